#include <cuda_runtime.h>

#include "tests/gpu/read_only.h"

namespace certkv {
namespace {

constexpr int kThreads = 512, kAhead = 8;

__global__ void __launch_bounds__(kThreads)
    read_only_kernel(const uint4* from, size_t count, unsigned* out) {
  const size_t stride = size_t(gridDim.x) * kThreads;
  unsigned sum = 0;
  size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kAhead - 1) * stride < count; i += kAhead * stride) {
    uint4 x[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) x[n] = __ldcs(from + i + n * stride);
#pragma unroll
    for (int n = 0; n < kAhead; ++n) sum += x[n].x ^ x[n].y ^ x[n].z ^ x[n].w;
  }
  for (; i < count; i += stride) sum += from[i].x;
  if (sum == 0x12345678u) out[threadIdx.x] = sum;
}

}  // namespace

cudaError_t launch_read_only(const std::byte* from, size_t bytes, unsigned* out, int blocks,
                             cudaStream_t stream) {
  read_only_kernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const uint4*>(from),
                                                    bytes / 16, out);
  return cudaGetLastError();
}

}  // namespace certkv
