#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <utility>
#include <vector>

#include "kernels/cuda/device.h"

namespace certkv::cuda {
namespace {

constexpr size_t kAlign = 256;

// Memory comes from malloc, so that a sanitizer sees who reads what was never written or is gone.
class EmulatedDevice final : public Device {
 public:
  explicit EmulatedDevice(const EmulatedDeviceOptions& options)
      : total_(options.total_bytes),
        shape_(options.shape),
        late_(options.late),
        late_fetches_(options.late_fetches) {}

  bool emulated() const override { return true; }
  const DeviceShape& shape() const override { return shape_; }
  std::string name() const override { return "emulated device"; }
  uint64_t total_bytes() const override { return total_; }
  uint64_t free_bytes() const override { return total_ - used_; }

  std::byte* allocate(uint64_t bytes, const char* what) override {
    CERTKV_EXPECT(bytes <= total_ - used_, OutOfMemory,
                  "{}: {} bytes of device memory asked for, {} of {} are free", what, bytes,
                  total_ - used_, total_);
    std::byte* p = take(bytes, what);
    held_[p] = bytes;
    used_ += bytes;
    return p;
  }
  void release(std::byte* memory) noexcept override {
    const auto it = held_.find(memory);
    if (it == held_.end()) return;
    used_ -= it->second;
    drop(&held_, it);
  }
  std::byte* allocate_host(uint64_t bytes, const char* what) override {
    std::byte* p = take(bytes, what);
    host_[p] = bytes;
    return p;
  }
  void release_host(std::byte* memory) noexcept override {
    const auto it = host_.find(memory);
    if (it != host_.end()) drop(&host_, it);
  }

  const std::byte* map_host(const std::byte* memory, uint64_t) override { return memory; }
  void unmap_host(const std::byte*) noexcept override {}

  void copy(void* to, const void* from, uint64_t bytes) override {
    if (bytes != 0) std::memcpy(to, from, bytes);
  }
  void fill(void* to, uint8_t byte, uint64_t bytes) override {
    if (bytes != 0) std::memset(to, byte, bytes);
  }
  void synchronize(Deadline) override { expect_used_well(); }
  void fetch(std::span<const Fetch> parts) override {
    fetches_.insert(fetches_.end(), parts.begin(), parts.end());
    if (!late_fetches_) end_fetches();
  }
  void await_fetches(Deadline) override {
    expect_used_well();
    end_fetches();
  }
  void when(const uint32_t* word, const std::function<void()>& body) override {
    if (*word != 0) body();
  }
  // What `work` captures by reference must outlive the graph, as the device's memory must.
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    auto graph = std::make_unique<Again>();
    graph->work = work;
    return graph;
  }
  void launch(Graph& graph) override {
    launched_ = true;
    std::exception_ptr failed;
    try {
      dynamic_cast<Again&>(graph).work();
    } catch (...) {
      failed = std::current_exception();
    }
    launched_ = false;
    const size_t left = beside_.size();
    beside_.clear();
    if (failed) std::rethrow_exception(failed);
    CERTKV_EXPECT(left == 0, DeviceError, "a graph ended with work beside it that is not joined");
  }

  Condition condition(const uint32_t* word) override { return {word, {late_ && launched_, 0}}; }
  void beside(int branch, const std::function<void()>& body) override {
    if (late_ && launched_)
      beside_.emplace_back(branch, body);
    else
      body();
  }
  // All that went beside is in order.
  void join(int branch) override {
    const auto last = std::find_if(beside_.rbegin(), beside_.rend(),
                                   [&](const auto& b) { return b.first == branch; });
    const std::vector<std::pair<int, std::function<void()>>> now(beside_.begin(), last.base());
    beside_.erase(beside_.begin(), last.base());
    for (const auto& [of, body] : now) body();
  }

 private:
  struct Again : Graph {
    std::function<void()> work;
  };
  static std::byte* take(uint64_t bytes, const char* what) {
    void* p = std::aligned_alloc(kAlign, (size_t(bytes) + kAlign - 1) / kAlign * kAlign);
    CERTKV_EXPECT(p != nullptr, OutOfMemory, "{}: {} bytes of host memory cannot be had", what,
                  bytes);
    std::memset(p, 0xff, bytes);  // NaN as a float or a half: what is read must have been written
    return static_cast<std::byte*>(p);
  }

  using Memory = std::map<std::byte*, uint64_t>;
  void end_fetches() {
    for (const Fetch& f : fetches_) copy(f.to, f.from, f.bytes);
    fetches_.clear();
  }
  void drop(Memory* from, Memory::iterator it) noexcept {
    const std::byte *begin = it->first, *end = begin + it->second;
    const auto within = [&](const void* at) { return begin <= at && at < end; };
    if (std::erase_if(fetches_, [&](const Fetch& f) { return within(f.to) || within(f.from); }) > 0)
      freed_too_early_ = true;
    std::free(it->first);
    from->erase(it);
  }
  // A device would have gone on in memory that is another's by now, so this is never forgotten.
  void expect_used_well() {
    CERTKV_EXPECT(
        !freed_too_early_, DeviceError,
        "memory was freed while a fetch used it: await_fetches() or settle() comes first");
  }

  uint64_t total_, used_ = 0;
  const DeviceShape shape_;
  const bool late_;
  const bool late_fetches_;
  bool launched_ = false;                                      // a graph, which is under way
  std::vector<std::pair<int, std::function<void()>>> beside_;  // not done yet
  Memory held_, host_;
  std::vector<Fetch> fetches_;  // not done yet
  bool freed_too_early_ = false;
};

}  // namespace

std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options) {
  return std::make_unique<EmulatedDevice>(options);
}

}  // namespace certkv::cuda
