// Memory through which host views travel: pinned on the host's side, and on the device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/device.h"

namespace certkv {

// Hands out pieces that all end together, at reset(). It grows when it must and never shrinks:
// cudaFree waits for the device, and would wait for ever behind a collective that hangs.
template <typename Array>
class NcclArena {
 public:
  NcclArena(cuda::Device& device, const char* what) : device_(device), what_(what) {}

  // 256-byte aligned; valid until reset() as far as the host is concerned, and for work of the
  // stream enqueued before the next piece at its place is written.
  std::byte* take(uint64_t bytes) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    while (chunk_ < chunks_.size() && chunks_[chunk_].bytes() - used_ < bytes) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) {
      chunks_.emplace_back(device_, std::max(bytes, kFirst << chunks_.size()), what_);
      used_ = 0;
    }
    std::byte* piece = chunks_[chunk_].data() + used_;
    used_ += bytes;
    return piece;
  }
  void reset() { chunk_ = used_ = 0; }
  uint64_t chunks() const { return chunks_.size(); }

  // Gives the memory up for lost: work that cannot be stopped may still write to it.
  void abandon() {
    static auto* const lost = new std::vector<Array>;
    for (Array& chunk : chunks_) lost->push_back(std::move(chunk));
    chunks_.clear();
  }

 private:
  static constexpr uint64_t kAlign = 256;
  static constexpr uint64_t kFirst = uint64_t(1) << 16;  // bytes of the first chunk; then doubling
  cuda::Device& device_;
  const char* what_;
  std::vector<Array> chunks_;
  uint64_t chunk_ = 0, used_ = 0;
};

}  // namespace certkv
