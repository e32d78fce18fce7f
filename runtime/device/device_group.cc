#include "runtime/device/device_group.h"

#include <string>
#include <utility>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "parallel/nccl_communicator.h"
#include "parallel/nccl_device.h"
#ifdef CERTKV_WITH_CUDA
#include "parallel/nccl_binding.h"
#endif

namespace certkv {
namespace {

bool agree(Communicator& group, bool mine) {
  uint64_t against = mine ? 0 : 1;
  group.all_reduce_sum(view_u64(&against, 1), {});
  group.wait();
  return against == 0;
}

TensorView words(const void* data, size_t n, MemoryKind memory) {
  return {const_cast<void*>(data), n * 4, DType::U8, memory};
}

class HostGroup final : public DeviceGroup {
 public:
  HostGroup(Communicator& group, cuda::Device& device) : group_(group), device_(device) {}
  int rank() const override { return group_.rank(); }
  int size() const override { return group_.size(); }
  void sum(float* inout, size_t count) override {
    group_.all_reduce_sum(view_f32(inout, count), {});
    group_.wait();
  }
  void gather(const void* own, void* all, size_t count) override {
    group_.all_gather(words(own, count, MemoryKind::Host),
                      words(all, count * size_t(size()), MemoryKind::Host), {});
    group_.wait();
  }
  void wait() override {}
  bool all_agree(bool mine) override { return agree(group_, mine); }
  bool capture(const std::function<void()>& work) override {
    graph_ = device_.capture(work);
    return true;
  }
  void launch() override { device_.launch(*graph_); }

 private:
  Communicator& group_;
  cuda::Device& device_;
  std::unique_ptr<cuda::Device::Graph> graph_;
};

class NcclGroup final : public DeviceGroup {
 public:
  NcclGroup(NcclControls controls, Communicator& group, std::shared_ptr<const NcclApi> api,
            NcclDevice& device, std::unique_ptr<NcclDevice> owned = nullptr)
      : group_(group),
        api_(std::move(api)),
        owned_(std::move(owned)),
        device_(device),
        spare_(std::move(controls.second)),
        nccl_(make_nccl_communicator(std::move(controls.first), api_, device_)) {}
  int rank() const override { return nccl_->rank(); }
  int size() const override { return nccl_->size(); }
  void sum(float* inout, size_t count) override {
    nccl_->all_reduce_sum({inout, count, DType::F32, MemoryKind::Device}, {});
  }
  void gather(const void* own, void* all, size_t count) override {
    nccl_->all_gather(words(own, count, MemoryKind::Device),
                      words(all, count * size_t(size()), MemoryKind::Device), {});
  }
  void wait() override { nccl_->wait(); }
  bool all_agree(bool mine) override { return agree(group_, mine); }

  bool capture(const std::function<void()>& work) override {
    if (refused_) return false;
    const std::string why = nccl_->capture(work);
    if (all_agree(why.empty())) return true;
    refused_ = true;
    log_warning(
        "{}: steps over several ranks are not captured in a graph, but enqueued call by call: {}",
        group_.peer_name(rank()), why.empty() ? "another rank cannot; its log says why" : why);
    nccl_->discard();
    nccl_.reset();
    nccl_ = make_nccl_communicator(std::move(spare_), api_, device_);
    return false;
  }
  void launch() override { nccl_->launch(); }

 private:
  Communicator& group_;
  std::shared_ptr<const NcclApi> api_;
  std::unique_ptr<NcclDevice> owned_;
  NcclDevice& device_;
  std::unique_ptr<Communicator> spare_;
  std::unique_ptr<NcclCommunicator> nccl_;
  bool refused_ = false;
};

}  // namespace

std::unique_ptr<DeviceGroup> make_host_group(Communicator& group, cuda::Device& device) {
  return std::make_unique<HostGroup>(group, device);
}

std::unique_ptr<DeviceGroup> make_nccl_group(NcclControls controls, Communicator& group,
                                             std::shared_ptr<const NcclApi> api,
                                             NcclDevice& device) {
  return std::make_unique<NcclGroup>(std::move(controls), group, std::move(api), device);
}

std::unique_ptr<DeviceGroup> make_nccl_group(NcclControls controls, Communicator& group,
                                             cuda::Device& device) {
#ifdef CERTKV_WITH_CUDA
  auto own = make_nccl_device(cuda::CudaDevice::of(device));
  NcclDevice& rank = *own;
  return std::make_unique<NcclGroup>(std::move(controls), group, load_nccl(), rank, std::move(own));
#else
  (void)controls, (void)group, (void)device;
  CERTKV_THROW(InvalidArgument, "this build has no CUDA backend, and so no NCCL");
#endif
}

}  // namespace certkv
