#include "parallel/nccl_binding.h"

#if defined(CERTKV_BUILD_NCCL)
#include <nccl.h>
#endif

#include <cstring>

#include "kernels/cuda/rank_sum.h"

namespace certkv {

bool nccl_is_built() {
#if defined(CERTKV_BUILD_NCCL)
  return true;
#else
  return false;
#endif
}

#if defined(CERTKV_BUILD_NCCL)
namespace {

// The numbers of nccl_api.h are NCCL's.
static_assert(int(NcclResult::Success) == ncclSuccess);
static_assert(int(NcclResult::UnhandledCudaError) == ncclUnhandledCudaError);
static_assert(int(NcclResult::SystemError) == ncclSystemError);
static_assert(int(NcclResult::InternalError) == ncclInternalError);
static_assert(int(NcclResult::InvalidArgument) == ncclInvalidArgument);
static_assert(int(NcclResult::InvalidUsage) == ncclInvalidUsage);
static_assert(int(NcclResult::RemoteError) == ncclRemoteError);
static_assert(int(NcclResult::InProgress) == ncclInProgress);
static_assert(int(NcclType::Uint8) == ncclUint8 && int(NcclType::Uint64) == ncclUint64);
static_assert(int(NcclType::Float32) == ncclFloat32);
static_assert(int(NcclOp::Sum) == ncclSum && int(NcclOp::Max) == ncclMax);
static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId));

ncclComm_t comm_of(NcclComm comm) {
  return static_cast<ncclComm_t>(comm);
}
cudaStream_t stream_of(NcclStream stream) {
  return static_cast<cudaStream_t>(stream);
}
ncclDataType_t type_of(NcclType type) {
  return ncclDataType_t(int(type));
}

}  // namespace

std::shared_ptr<const NcclApi> load_nccl() {
  const cuda::SharedLibrary library = open_nccl();
  auto api = std::make_shared<NcclApi>();
// A variable with the name and the type that the function has in nccl.h, without its prefix.
#define CERTKV_NCCL(variable, function)     \
  decltype(&::function) variable = nullptr; \
  library.find(&variable, #function)
  CERTKV_NCCL(get_version, ncclGetVersion);
  (void)get_version(&api->version);  // 0, if it cannot say: refused as too old
  check_nccl_version(api->version, library.soname());
  api->name = fmt::format("{} {}", library.soname(), nccl_version_text(api->version));

  CERTKV_NCCL(get_unique_id, ncclGetUniqueId);
  api->get_unique_id = [=](NcclUniqueId* id) {
    ncclUniqueId own{};
    const ncclResult_t result = get_unique_id(&own);
    std::memcpy(id->data(), &own, sizeof own);
    return NcclResult(result);
  };
  CERTKV_NCCL(init, ncclCommInitRankConfig);
  api->init_rank = [=](NcclComm* comm, int ranks, const NcclUniqueId& id, int rank) {
    ncclUniqueId own{};
    std::memcpy(&own, id.data(), sizeof own);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t made = nullptr;
    const ncclResult_t result = init(&made, ranks, own, rank, &config);
    *comm = made;
    return NcclResult(result);
  };
  CERTKV_NCCL(get_async_error, ncclCommGetAsyncError);
  api->get_async_error = [=](NcclComm comm, NcclResult* state) {
    ncclResult_t own = ncclInternalError;
    const ncclResult_t result = get_async_error(comm_of(comm), &own);
    *state = NcclResult(own);
    return NcclResult(result);
  };
  CERTKV_NCCL(all_reduce, ncclAllReduce);
  api->all_reduce = [=](const void* send, void* receive, size_t count, NcclType type, NcclOp op,
                        NcclComm comm, NcclStream stream) {
    return NcclResult(all_reduce(send, receive, count, type_of(type), ncclRedOp_t(int(op)),
                                 comm_of(comm), stream_of(stream)));
  };
  CERTKV_NCCL(all_gather, ncclAllGather);
  api->all_gather = [=](const void* send, void* receive, size_t send_count, NcclType type,
                        NcclComm comm, NcclStream stream) {
    return NcclResult(
        all_gather(send, receive, send_count, type_of(type), comm_of(comm), stream_of(stream)));
  };
  CERTKV_NCCL(broadcast, ncclBroadcast);
  api->broadcast = [=](const void* send, void* receive, size_t count, NcclType type, int root,
                       NcclComm comm, NcclStream stream) {
    return NcclResult(
        broadcast(send, receive, count, type_of(type), root, comm_of(comm), stream_of(stream)));
  };
  CERTKV_NCCL(finalize, ncclCommFinalize);
  api->finalize = [=](NcclComm comm) { return NcclResult(finalize(comm_of(comm))); };
  CERTKV_NCCL(destroy, ncclCommDestroy);
  api->destroy = [=](NcclComm comm) { return NcclResult(destroy(comm_of(comm))); };
  CERTKV_NCCL(abort, ncclCommAbort);
  api->abort = [=](NcclComm comm) { return NcclResult(abort(comm_of(comm))); };
  CERTKV_NCCL(last_error, ncclGetLastError);
  api->last_error = [=](NcclComm comm) {
    const char* text = last_error(comm_of(comm));
    return std::string(text != nullptr ? text : "");
  };
#undef CERTKV_NCCL
  return api;
}
#else
std::shared_ptr<const NcclApi> load_nccl() {
  CERTKV_THROW(DeviceError,
               "several ranks on GPUs need NCCL, which this build lacks: configure it again where "
               "nccl.h (libnccl-dev) is found");
}
#endif

namespace {

class GpuOfRank final : public NcclDevice {
 public:
  explicit GpuOfRank(cuda::CudaDevice& device) : device_(device) {}

  cuda::Device& device() override { return device_; }
  NcclStream stream() override { return device_.stream(); }
  bool done() override {
    const cudaError_t state = cudaStreamQuery(device_.stream());
    if (state == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    cuda::check_cuda(state, "work on the device failed");
    return true;
  }
  bool is_device_memory(const void* data) override {
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return false;
    }
    return (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged) &&
           attributes.device == device_.ordinal();
  }
  void sum_ranks(DType dtype, const void* parts, int ranks, uint64_t count, void* out) override {
    const cuda::RankSumArgs args{.parts = static_cast<const uint16_t*>(parts),
                                 .ranks = ranks,
                                 .count = count,
                                 .dtype = dtype,
                                 .out = static_cast<uint16_t*>(out)};
    cuda::check_cuda(cudaError_t(cuda::launch_rank_sum(args, device_.stream())),
                     "the sum over the ranks cannot be launched");
  }

 private:
  cuda::CudaDevice& device_;
};

}  // namespace

std::unique_ptr<NcclDevice> make_nccl_device(cuda::CudaDevice& device) {
  return std::make_unique<GpuOfRank>(device);
}

}  // namespace certkv
