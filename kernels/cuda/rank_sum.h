// Sums of several ranks' parts of 16-bit floats in rank order: one element, for the GPU and the
// host.
#pragma once

#include "kernels/base/dtype.h"

namespace certkv::cuda {

struct RankSumArgs {
  const uint16_t* parts = nullptr;  // [ranks, count]
  int ranks = 0;
  uint64_t count = 0;
  DType dtype = DType::F16;  // or BF16
  uint16_t* out = nullptr;   // [count], apart from parts
};

// From left to right in FP32, rounded once: the arithmetic of parallel/ordered_sum.
CERTKV_INLINE uint16_t rank_sum(const RankSumArgs& args, uint64_t i) {
  float sum = float_from_16(args.dtype, args.parts[i]);
  for (int r = 1; r < args.ranks; ++r)
    sum += float_from_16(args.dtype, args.parts[uint64_t(r) * args.count + i]);
  return float_to_16(args.dtype, sum);
}

// Launches it for every element; returns a cudaError_t. Not in builds without the toolkit.
int launch_rank_sum(const RankSumArgs& args, void* stream);

}  // namespace certkv::cuda
