// The threads of a block, for programs that are written once: each(count, f) calls f(t) for every t
// below count, side by side on a GPU, one after another elsewhere, and ends with a barrier. What is
// decided between such calls is the same for the whole block.
#pragma once

#include "kernels/base/dtype.h"

// A loop that is unrolled: registers have no index at run time. Not lanes.h's CERTKV_EACH, which
// comes with its lanes.
#if defined(__CUDA_ARCH__)
#define CERTKV_UNROLLED(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)
#else
#define CERTKV_UNROLLED(i, count) for (int i = 0; i < (count); ++i)
#endif

namespace certkv::cuda {

struct BlockThreads {
  template <typename F>
  CERTKV_HD void each(int count, F f) const {
#if defined(__CUDA_ARCH__)
    if (int(threadIdx.x) < count) f(int(threadIdx.x));
    __syncthreads();
#else
    for (int t = 0; t < count; ++t) f(t);
#endif
  }
};

}  // namespace certkv::cuda
