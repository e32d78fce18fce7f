// NCCL and GPUs of thread ranks in host memory: a stream per rank whose work waits its turn, and
// collectives in it that are done once every rank's stream has come to them. As honest as NCCL
// where it promises nothing: sums are made from the last rank to the first, 16-bit sums are
// refused, and a collective runs only when the stream is asked whether it is done. As strict where
// graphs are concerned: a collective that some ranks have captured and others not is an error, and
// neither finalizing nor aborting a communicator ends while a graph refers to it.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "parallel/nccl_api.h"
#include "parallel/nccl_device.h"

namespace certkv {

// THREADS: the rank's own.
class FakeStreamDevice final : public NcclDevice, private cuda::Device {
 public:
  FakeStreamDevice();

  // Work of the stream: called until it returns true, then the next. During a capture it goes into
  // the graph, with what it refers to.
  void enqueue(std::function<bool()> work, std::shared_ptr<void> reference = nullptr);
  bool capturing() const { return capturing_ != nullptr; }
  // The next capture fails as CUDA's do, with this.
  void refuse_capture(std::string why) { refusal_ = std::move(why); }

  cuda::Device& device() override { return *this; }
  NcclStream stream() override { return this; }
  bool done() override;
  bool is_device_memory(const void* data) override;
  void sum_ranks(DType dtype, const void* parts, int ranks, uint64_t count, void* out) override;

  uint64_t allocations() const { return allocations_; }
  void refuse_memory(bool refuse) { refuse_ = refuse; }
  std::byte* allocate(uint64_t bytes, const char* what) override;
  void release(std::byte* memory) noexcept override;

 private:
  bool emulated() const override { return true; }
  const cuda::DeviceShape& shape() const override { return memory_->shape(); }
  std::string name() const override { return "fake device"; }
  uint64_t total_bytes() const override { return memory_->total_bytes(); }
  uint64_t free_bytes() const override { return memory_->free_bytes(); }
  std::byte* allocate_host(uint64_t bytes, const char* what) override;
  void release_host(std::byte* memory) noexcept override { memory_->release_host(memory); }
  const std::byte* map_host(const std::byte* memory, uint64_t) override { return memory; }
  void unmap_host(const std::byte*) noexcept override {}
  void copy(void* to, const void* from, uint64_t bytes) override;
  void fill(void* to, uint8_t byte, uint64_t bytes) override;
  void synchronize(Deadline) override;
  void when(const uint32_t* word, const std::function<void()>& body) override;
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override;
  void launch(Graph& graph) override;

  std::unique_ptr<cuda::Device> memory_;
  struct Captured;
  std::deque<std::function<bool()>> queue_;
  Captured* capturing_ = nullptr;
  std::string refusal_;
  std::set<const std::byte*> held_;
  uint64_t allocations_ = 0;
  bool refuse_ = false;
};

// What the ranks share. THREADS: any.
class FakeNccl {
 public:
  explicit FakeNccl(int ranks);

  // A table for one rank; tests replace what shall go wrong. It outlives this object, as an abort
  // may the test.
  NcclApi api();

  // What was called, over all ranks.
  struct Calls {
    int unique_ids = 0, inits = 0, finalizes = 0, destroys = 0, aborts = 0;
  };
  Calls calls() const;

 private:
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace certkv
