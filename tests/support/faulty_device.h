// An emulated device that refuses what a test wants refused.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "kernels/cuda/device.h"

namespace certkv::test {

// refuses(bytes, what): whether an allocation of the device's memory is refused.
class FaultyDevice final : public cuda::Device {
 public:
  using Refuses = std::function<bool(uint64_t bytes, const std::string& what)>;
  explicit FaultyDevice(Refuses refuses)
      : inner_(cuda::make_emulated_device()), refuses_(std::move(refuses)) {}

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
    return inner_->allocate_host(bytes, what);
  }
  void release_host(std::byte* memory) noexcept override { inner_->release_host(memory); }
  const std::byte* map_host(const std::byte* memory, uint64_t bytes) override {
    return inner_->map_host(memory, bytes);
  }
  void unmap_host(const std::byte* memory) noexcept override { inner_->unmap_host(memory); }
  void copy(void* to, const void* from, uint64_t bytes) override { inner_->copy(to, from, bytes); }
  void fill(void* to, uint8_t byte, uint64_t bytes) override { inner_->fill(to, byte, bytes); }
  void synchronize(Deadline deadline) override { inner_->synchronize(deadline); }
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
};

}  // namespace certkv::test
