// NCCL and GPUs of thread ranks in host memory: a stream per rank whose work waits its turn, and
// collectives in it that are done once every rank's stream has come to them. As honest as NCCL
// where it promises nothing: sums are made from the last rank to the first, 16-bit sums are
// refused, and a collective runs only when the stream is asked whether it is done.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <set>

#include "parallel/nccl_api.h"
#include "parallel/nccl_device.h"

namespace certkv {

// THREADS: the rank's own.
class FakeStreamDevice final : public NcclDevice, private cuda::Device {
 public:
  FakeStreamDevice();

  // Work of the stream: called until it returns true, then the next.
  void enqueue(std::function<bool()> work) { queue_.push_back(std::move(work)); }

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
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    return memory_->capture(work);
  }
  void launch(Graph& graph) override { memory_->launch(graph); }

  std::unique_ptr<cuda::Device> memory_;
  std::deque<std::function<bool()>> queue_;
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
