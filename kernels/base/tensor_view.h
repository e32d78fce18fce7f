// A view of memory that somebody else owns: pointer, type, kind of memory, element count.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv {

enum class MemoryKind : uint8_t { Host, Device };

struct TensorView {
  void* data = nullptr;
  size_t count = 0;  // elements, contiguous
  DType dtype = DType::F32;
  MemoryKind memory = MemoryKind::Host;

  size_t bytes() const { return count * dtype_bytes(dtype); }
};

inline TensorView view_f32(float* data, size_t count) {
  return {data, count, DType::F32, MemoryKind::Host};
}
inline TensorView view_u64(uint64_t* data, size_t count) {
  return {data, count, DType::U64, MemoryKind::Host};
}

// Where work is enqueued. On the CPU a stream runs at once, so it carries nothing; the CUDA backend
// stores its cudaStream_t here.
struct Stream {
  void* handle = nullptr;
};

}  // namespace certkv
