// Policy `dense` by a library: what its own kernels read and write beside it. Items as in
// cache_args.h, index by index. Plain data, the same for both compilers.
#pragma once

#include "kernels/cuda/cache_args.h"

namespace certkv::cuda {

struct LibraryArgs {
  PassItem* passes = nullptr;  // out, judged and failing are written
  const AppendItem* appends = nullptr;
  int32_t count = 0;  // items
  int32_t head_dim = 0, heads = 0;
  DType dtype = DType::BF16;
  float* largest = nullptr;       // [count, 2] norm of a sealed key, of a sealed value
  const uint16_t* q16 = nullptr;  // [count, heads, head_dim] as the library read them
  const uint16_t* out16 = nullptr;
};

}  // namespace certkv::cuda
