#include "parallel/nccl_api.h"

#include <span>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr int kOldest = 21800;  // 2.18.0
constexpr int kNextMajor = 30000;

const char* advice(NcclResult result) {
  switch (result) {
    case NcclResult::UnhandledCudaError:
      return "a kernel or the driver failed before: compute-sanitizer finds the kernel, dmesg "
             "(Xid) "
             "a fault of the device";
    case NcclResult::SystemError:
      return "a socket, shared memory or a device file failed: run with NCCL_DEBUG=INFO, choose "
             "the "
             "network interface with NCCL_SOCKET_IFNAME, see that /dev/shm has room";
    case NcclResult::RemoteError:
      return "a peer's process or the network to it failed: look at the first error of the others";
    case NcclResult::InvalidUsage:
      return "every rank needs a GPU of its own (CUDA_VISIBLE_DEVICES; GPUs are picked by local "
             "rank): run with NCCL_DEBUG=WARN";
    default:
      return "run with NCCL_DEBUG=INFO";
  }
}

}  // namespace

const char* nccl_result_name(NcclResult result) {
  switch (result) {
    case NcclResult::Success:
      return "ncclSuccess";
    case NcclResult::UnhandledCudaError:
      return "ncclUnhandledCudaError";
    case NcclResult::SystemError:
      return "ncclSystemError";
    case NcclResult::InternalError:
      return "ncclInternalError";
    case NcclResult::InvalidArgument:
      return "ncclInvalidArgument";
    case NcclResult::InvalidUsage:
      return "ncclInvalidUsage";
    case NcclResult::RemoteError:
      return "ncclRemoteError";
    case NcclResult::InProgress:
      return "ncclInProgress";
  }
  return "an unknown result";
}

NcclSum nccl_sum(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return NcclSum::Float32;
    case DType::U64:
      return NcclSum::Uint64;
    case DType::F16:
    case DType::BF16:
      return NcclSum::InRankOrder;
    default:
      return NcclSum::None;
  }
}

std::string describe_nccl_failure(NcclResult result, const char* what, const std::string& who,
                                  const std::string& last_error, const std::string& library) {
  return fmt::format("{}: NCCL failed on {} with {}{}{} ({}): {}", what, who,
                     nccl_result_name(result), last_error.empty() ? "" : ", ", last_error, library,
                     advice(result));
}

cuda::SharedLibrary open_nccl(const std::string& soname) {
  return cuda::SharedLibrary("NCCL (libnccl2)", "several ranks on GPUs (parallel.tensor above 1)",
                             std::span(&soname, 1));
}

std::string nccl_version_text(int version) {
  // Two digits each for minor and patch since 2.9, one digit before.
  const int major = version >= 10000 ? version / 10000 : version / 1000;
  const int minor = version >= 10000 ? version / 100 % 100 : version / 100 % 10;
  return fmt::format("{}.{}.{}", major, minor, version % 100);
}

void check_nccl_version(int version, const std::string& library) {
  CERTKV_EXPECT(
      version >= kOldest && version < kNextMajor, DeviceError,
      "{} is NCCL {}: {} or newer of the same major version is needed; install it, or put "
      "its folder first in LD_LIBRARY_PATH",
      library, nccl_version_text(version), nccl_version_text(kOldest));
}

}  // namespace certkv
