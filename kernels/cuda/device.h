// A GPU as the backend sees it: memory, and one stream of work that is done in order, beside which
// memory may come to the host.
//
// Two implementations, the same behind one interface: the GPU (cuda_device.h, where the toolkit was
// found), and an emulation in host memory, so that what is written on top runs, and is tested,
// where there is no GPU. It does everything at once, but fetches as late as they may be.
// Operations on the data are beside it, each family behind an interface of its own (cache_ops.h,
// model_ops.h, linear_ops.h, dense_ops.h).
//
// THREADS: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "kernels/cuda/plan.h"

namespace certkv::cuda {

class Device {
 public:
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual bool emulated() const = 0;
  virtual const DeviceShape& shape() const = 0;
  virtual std::string name() const = 0;  // for people: "NVIDIA H100 80GB HBM3"
  // UNITS: bytes. Of the device's memory; what others on the device take counts.
  virtual uint64_t total_bytes() const = 0;
  virtual uint64_t free_bytes() const = 0;

  // 256-byte aligned, contents undefined (in emulation: poison). `what` names it in the error.
  // Throws OutOfMemory: what was asked for and what is there.
  virtual std::byte* allocate(uint64_t bytes, const char* what) = 0;
  virtual void release(std::byte* memory) noexcept = 0;
  // Host memory that copies run from and to without waiting.
  virtual std::byte* allocate_host(uint64_t bytes, const char* what) = 0;
  virtual void release_host(std::byte* memory) noexcept = 0;

  // Makes host memory of another owner (the store's arena) readable by the device's kernels;
  // returns where they find it. Must be undone before the memory goes. Throws DeviceError: what was
  // refused, and how many bytes.
  virtual const std::byte* map_host(const std::byte* memory, uint64_t bytes) = 0;
  virtual void unmap_host(const std::byte* memory) noexcept = 0;

  // In order with all other work; between host and device in any direction. From host memory that
  // did not come of allocate_host(), the bytes are taken before the call returns.
  virtual void copy(void* to, const void* from, uint64_t bytes) = 0;
  virtual void fill(void* to, uint8_t byte, uint64_t bytes) = 0;
  // Until all work so far is done. Throws DeviceError with the first error of that work, and
  // DeadlineExceeded.
  virtual void synchronize(Deadline deadline) = 0;

  // Brings memory to the host beside what is enqueued afterwards, on a stream of its own: begins
  // once all work so far is done, part after part, and after what was fetched before. Until
  // await_fetches() has returned, nobody may write `from`, read or write `to` (of allocate_host()),
  // or free either. Not while a graph is captured. Throws DeviceError.
  struct Fetch {
    void* to = nullptr;
    const void* from = nullptr;
    uint64_t bytes = 0;
  };
  virtual void fetch(std::span<const Fetch> parts) {  // where all is done in order, so is this
    for (const Fetch& f : parts) copy(f.to, f.from, f.bytes);
  }
  // Until all fetches so far are done. Throws as synchronize(), with the first error of a fetch.
  virtual void await_fetches(Deadline deadline) { synchronize(deadline); }
  // Until nothing of what was enqueued runs any more, before memory that it may use goes, after an
  // error too: what goes wrong is logged, and the deadline ends the wait.
  void settle(Deadline deadline) noexcept;

  // Does `body` if the word, in the device's memory, is not 0 once all work so far is done. Within
  // a captured graph the device decides; else the host waits for the word. The body may contain
  // other such parts. Throws as synchronize().
  virtual void when(const uint32_t* word, const std::function<void()>& body) = 0;

  // The same of a word that a kernel yet to be enqueued writes: within a captured graph the kernel
  // itself sets the condition (Setter, for set_condition() of lanes.h), which spares one that reads
  // the word. Make it before that kernel, use it once.
  struct Setter {
    bool armed = false;  // within a captured graph
    uint64_t handle = 0;
  };
  struct Condition {
    const uint32_t* word = nullptr;
    Setter setter;
  };
  virtual Condition condition(const uint32_t* word) { return {word, {}}; }
  virtual void when_met(const Condition& condition, const std::function<void()>& body) {
    when(condition.word, body);
  }

  // Does `body` beside what is enqueued after it, until join(branch): after all work so far, and
  // after what went beside before. Several branches, so that some may be under way when others
  // begin. The body may have parts under when(); not within when(); a graph must have joined all
  // before its capture ends. What the body refers to must live until it is joined.
  static constexpr int kBranches = 3;
  // Where all is done in order, so is this.
  virtual void beside(int /*branch*/, const std::function<void()>& body) { body(); }
  virtual void join(int /*branch*/) {}

  // Work that is enqueued again and again as one piece: what `work` enqueues, with the same memory.
  // It must not wait, nor allocate; parts under when() are decided anew at every launch. Nothing is
  // done yet. Throws DeviceError.
  class Graph {
   public:
    virtual ~Graph() = default;
  };
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& work) = 0;
  virtual void launch(Graph& graph) = 0;

 protected:
  Device() = default;
};

enum class ArrayMemory : uint8_t { Device, Host };

// An array of plain data in a device's memory, or in host memory that copies run from and to
// without waiting; freed with its owner.
template <typename T, ArrayMemory kMemory>
class MemoryArray {
 public:
  MemoryArray() = default;
  MemoryArray(Device& device, uint64_t count, const char* what) : device_(&device), count_(count) {
    if (count == 0) return;
    const uint64_t bytes = count * sizeof(T);
    data_ =
        reinterpret_cast<T*>(kMemory == ArrayMemory::Device ? device.allocate(bytes, what)
                                                            : device.allocate_host(bytes, what));
  }
  ~MemoryArray() { reset(); }
  MemoryArray(MemoryArray&& from) noexcept { *this = std::move(from); }
  MemoryArray& operator=(MemoryArray&& from) noexcept {
    std::swap(device_, from.device_);
    std::swap(count_, from.count_);
    std::swap(data_, from.data_);
    return *this;
  }
  void reset() noexcept {
    auto* memory = reinterpret_cast<std::byte*>(data_);
    if (memory != nullptr && kMemory == ArrayMemory::Device) device_->release(memory);
    if (memory != nullptr && kMemory == ArrayMemory::Host) device_->release_host(memory);
    data_ = nullptr;
    count_ = 0;
  }
  T* data() const { return data_; }
  T& operator[](uint64_t i) const requires(kMemory == ArrayMemory::Host) { return data_[i]; }
  uint64_t count() const { return count_; }
  uint64_t bytes() const { return count_ * sizeof(T); }

 private:
  Device* device_ = nullptr;
  uint64_t count_ = 0;
  T* data_ = nullptr;
};
template <typename T>
using DeviceArray = MemoryArray<T, ArrayMemory::Device>;
template <typename T>
using HostArray = MemoryArray<T, ArrayMemory::Host>;

struct EmulatedDeviceOptions {
  uint64_t total_bytes = uint64_t(4) << 30;  // more than that is OutOfMemory, as on a device
  // Small, so that short sequences too are cut into several splits.
  DeviceShape shape = {.multiprocessors = 8,
                       .shared_per_block = 227 * 1024,
                       .shared_per_multiprocessor = 228 * 1024};
  // Of a captured graph: what goes beside other work is done as late as it may be, when it is
  // joined, so that what does not wait for it is seen.
  bool late = false;
  // fetch() is done as late as its waits allow, or at once, as a device may do either: who has not
  // waited then reads what was never written, and who writes too early is read.
  bool late_fetches = true;
};
std::unique_ptr<Device> make_emulated_device(const EmulatedDeviceOptions& options = {});

}  // namespace certkv::cuda
