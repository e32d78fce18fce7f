#include "runtime/device/device_group.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "parallel/nccl_communicator.h"
#include "parallel/nccl_device.h"
#ifdef CERTKV_WITH_CUDA
#include "parallel/nccl_binding.h"
#endif

namespace certkv {
namespace {

bool same_on_all(Communicator& group, uint64_t mine) {
  std::vector<uint64_t> all(static_cast<size_t>(group.size()));
  group.all_gather(view_u64(&mine, 1), view_u64(all.data(), all.size()), {});
  group.wait();
  return std::all_of(all.begin(), all.end(), [&](uint64_t one) { return one == all[0]; });
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
  bool all_same(uint64_t mine) override { return same_on_all(group_, mine); }
  bool capture(uint64_t number, const std::function<void()>& work) override {
    graphs_[number] = device_.capture(work);
    return true;
  }
  void launch(uint64_t number) override { device_.launch(*graphs_.at(number)); }
  void forget(uint64_t number) noexcept override { graphs_.erase(number); }

 private:
  Communicator& group_;
  cuda::Device& device_;
  std::map<uint64_t, std::unique_ptr<cuda::Device::Graph>> graphs_;
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
  bool all_same(uint64_t mine) override { return same_on_all(group_, mine); }

  bool capture(uint64_t number, const std::function<void()>& work) override {
    if (refused_) return false;
    const std::string why = nccl_->capture(number, work);
    uint64_t refusals = why.empty() ? 0 : 1;
    group_.all_reduce_sum(view_u64(&refusals, 1), {});
    group_.wait();
    if (refusals == 0) return true;
    refused_ = true;
    log_warning(
        "{}: steps over several ranks are not captured in a graph, but enqueued call by call: {}",
        group_.peer_name(rank()), why.empty() ? "another rank cannot; its log says why" : why);
    nccl_->discard();
    nccl_.reset();
    nccl_ = make_nccl_communicator(std::move(spare_), api_, device_);
    return false;
  }
  void launch(uint64_t number) override { nccl_->launch(number); }
  void forget(uint64_t number) noexcept override { nccl_->forget(number); }

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
