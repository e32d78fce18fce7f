// An emulated device that refuses what a test wants refused.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kernels/cuda/device.h"

namespace certkv::test {

// refuses(bytes, what): whether an allocation of the device's memory is refused.
class FaultyDevice final : public cuda::Device {
 public:
  using Refuses = std::function<bool(uint64_t bytes, const std::string& what)>;
  explicit FaultyDevice(Refuses refuses, const cuda::EmulatedDeviceOptions& options = {})
      : inner_(cuda::make_emulated_device(options)), refuses_(std::move(refuses)) {}

  bool emulated() const override { return true; }
  const cuda::DeviceShape& shape() const override { return inner_->shape(); }
  std::string name() const override { return inner_->name(); }
  uint64_t total_bytes() const override { return inner_->total_bytes(); }
  uint64_t free_bytes() const override { return inner_->free_bytes(); }
  std::byte* allocate(uint64_t bytes, const char* what) override {
    CERTKV_EXPECT(!refuses_(bytes, what), OutOfMemory, "{}: {} bytes refused by the test", what,
                  bytes);
    return inner_->allocate(bytes, what);
  }
  void release(std::byte* memory) noexcept override { inner_->release(memory); }
  std::byte* allocate_host(uint64_t bytes, const char* what) override {
    std::byte* p = inner_->allocate_host(bytes, what);
    host_[p] = {what, bytes};
    return p;
  }
  void release_host(std::byte* memory) noexcept override {
    host_.erase(memory);
    inner_->release_host(memory);
  }
  // Host memory that is held by that name.
  uint64_t host_bytes(const std::string& what) const {
    uint64_t sum = 0;
    for (const auto& [p, held] : host_) sum += held.first == what ? held.second : 0;
    return sum;
  }
  const std::byte* map_host(const std::byte* memory, uint64_t bytes) override {
    return inner_->map_host(memory, bytes);
  }
  void unmap_host(const std::byte* memory) noexcept override { inner_->unmap_host(memory); }
  void copy(void* to, const void* from, uint64_t bytes) override { inner_->copy(to, from, bytes); }
  void fill(void* to, uint8_t byte, uint64_t bytes) override { inner_->fill(to, byte, bytes); }
  void synchronize(Deadline deadline) override { inner_->synchronize(deadline); }
  void fetch(std::span<const Fetch> parts) override {
    for (const Fetch& f : parts) fetched_bytes_ += f.bytes;
    inner_->fetch(parts);
  }
  uint64_t fetched_bytes() const { return fetched_bytes_; }  // asked for so far
  void await_fetches(Deadline deadline) override {
    if (on_await) on_await();
    inner_->await_fetches(deadline);
  }
  std::function<void()> on_await;  // may throw what a fetch fails with
  void when(const uint32_t* word, const std::function<void()>& body) override {
    inner_->when(word, body);
  }
  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    return inner_->capture(work);
  }
  void launch(Graph& graph) override { inner_->launch(graph); }

 private:
  std::unique_ptr<cuda::Device> inner_;
  Refuses refuses_;
  std::map<std::byte*, std::pair<std::string, uint64_t>> host_;
  uint64_t fetched_bytes_ = 0;
};

}  // namespace certkv::test
