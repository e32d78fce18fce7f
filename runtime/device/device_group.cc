#include "runtime/device/device_group.h"

#include "parallel/communicator.h"
#ifdef CERTKV_WITH_CUDA
#include "parallel/nccl_binding.h"
#include "parallel/nccl_communicator.h"
#endif

namespace certkv {
namespace {

class HostGroup final : public DeviceGroup {
 public:
  explicit HostGroup(Communicator& group) : group_(group) {}
  int rank() const override { return group_.rank(); }
  int size() const override { return group_.size(); }
  void sum(float* inout, size_t count) override {
    group_.all_reduce_sum(view_f32(inout, count), {});
    group_.wait();
  }
  void gather(const void* own, void* all, size_t count) override {
    const auto words = [](const void* data, size_t n) {
      return TensorView{const_cast<void*>(data), n * 4, DType::U8, MemoryKind::Host};
    };
    group_.all_gather(words(own, count), words(all, count * size_t(size())), {});
    group_.wait();
  }
  void wait() override {}

 private:
  Communicator& group_;
};

#ifdef CERTKV_WITH_CUDA
class NcclGroup final : public DeviceGroup {
 public:
  NcclGroup(std::unique_ptr<Communicator> control, cuda::CudaDevice& device)
      : device_(make_nccl_device(device)),
        nccl_(make_nccl_communicator(std::move(control), load_nccl(), *device_)) {}
  int rank() const override { return nccl_->rank(); }
  int size() const override { return nccl_->size(); }
  void sum(float* inout, size_t count) override {
    nccl_->all_reduce_sum({inout, count, DType::F32, MemoryKind::Device}, {});
  }
  void gather(const void* own, void* all, size_t count) override {
    const auto words = [](const void* data, size_t n) {
      return TensorView{const_cast<void*>(data), n * 4, DType::U8, MemoryKind::Device};
    };
    nccl_->all_gather(words(own, count), words(all, count * size_t(size())), {});
  }
  void wait() override { nccl_->wait(); }

 private:
  std::unique_ptr<NcclDevice> device_;
  std::unique_ptr<Communicator> nccl_;
};
#endif

}  // namespace

std::unique_ptr<DeviceGroup> make_host_group(Communicator& group) {
  return std::make_unique<HostGroup>(group);
}

std::unique_ptr<DeviceGroup> make_nccl_group(std::unique_ptr<Communicator> control,
                                             cuda::Device& device) {
#ifdef CERTKV_WITH_CUDA
  return std::make_unique<NcclGroup>(std::move(control), cuda::CudaDevice::of(device));
#else
  (void)control, (void)device;
  CERTKV_THROW(InvalidArgument, "this build has no CUDA backend, and so no NCCL");
#endif
}

}  // namespace certkv
