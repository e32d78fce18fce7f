#include "kernels/cuda/dense_kernels.h"

#include "kernels/base/dtype.h"

namespace certkv::cuda {
namespace {

constexpr unsigned kThreads = 256, kMaxBlocks = 4096;

__global__ void narrow_kernel(DType dtype, const float* from, uint16_t* to, size_t count) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    to[i] = float_to_16(dtype, from[i]);
}

__global__ void set_pair_kernel(int32_t* to, int32_t first, int32_t second) {
  to[0] = first;
  to[1] = second;
}

}  // namespace

cudaError_t launch_narrow(bool bf16, const float* from, uint16_t* to, size_t count,
                          cudaStream_t stream) {
  const size_t wanted = (count + kThreads - 1) / kThreads;
  const unsigned blocks = wanted < kMaxBlocks ? unsigned(wanted) : kMaxBlocks;
  narrow_kernel<<<blocks, kThreads, 0, stream>>>(bf16 ? DType::BF16 : DType::F16, from, to, count);
  return cudaGetLastError();
}

cudaError_t launch_set_pair(int32_t* to, int32_t first, int32_t second, cudaStream_t stream) {
  set_pair_kernel<<<1, 1, 0, stream>>>(to, first, second);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
