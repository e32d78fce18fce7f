#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernels/cuda/rank_sum.h"

namespace certkv::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr uint64_t kMostBlocks = 4096;  // then a thread takes several elements

// ---- kernels ------------------------------------------------------------------------------------

__global__ void rank_sum_kernel(RankSumArgs args) {
  const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count; i += stride)
    args.out[i] = rank_sum(args, i);
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

int launch_rank_sum(const RankSumArgs& args, void* stream) {
  if (args.count == 0) return cudaSuccess;
  const auto blocks = unsigned(std::min((args.count + kThreads - 1) / kThreads, kMostBlocks));
  rank_sum_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
