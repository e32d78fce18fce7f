#include <algorithm>

#include "kernels/cuda/model_body.h"
#include "kernels/cuda/model_kernels.h"

namespace certkv::cuda {

// ---- kernels ------------------------------------------------------------------------------------

namespace {

// Rows are along x, which has room for 2^31 - 1 of them; columns along y.
__global__ void embed_kernel(const EmbedRows a) {
  const size_t i = size_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (i < a.n) embed_element(a, blockIdx.x, i);
}

__global__ void gate_kernel(const GatedRows a) {
  const size_t i = size_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (i < a.n) gate_element(a, blockIdx.x, i);
}

__global__ void convert_kernel(const Conversion a) {
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.count; i += step)
    convert_element(a, i);
}

__global__ void __launch_bounds__(kRowThreads) residual_norm_kernel(const ResidualNorm a) {
  __shared__ float shared[kRowThreads + kSumParts];
  const ResidualNormRow row{a, blockIdx.x, {shared, kRowThreads}};
  const int thread = int(threadIdx.x);
  row.add(thread);
  if (a.weight == nullptr) return;
  __syncthreads();
  if (thread < kSumParts) row.sum.join(thread);
  __syncthreads();
  row.scale(thread);
}

__global__ void __launch_bounds__(kHeadThreads) rotate_kernel(const RotateQkv a) {
  __shared__ float shared[kHeadThreads + kSumParts];
  const RotateHead head{a, blockIdx.x, blockIdx.y, {shared, kHeadThreads}};
  const int thread = int(threadIdx.x);
  if (head.norm() != nullptr) {  // the same for the whole block
    head.square(thread);
    __syncthreads();
    if (thread < kSumParts) head.sum.join(thread);
    __syncthreads();
  }
  head.turn(thread);
}

__global__ void __launch_bounds__(kRowThreads) argmax_kernel(const ArgmaxRows a) {
  __shared__ uint64_t shared[kRowThreads + kSumParts];
  const ArgmaxPart row{a, blockIdx.y, blockIdx.x, shared, kRowThreads};
  const int thread = int(threadIdx.x);
  row.best(thread);
  __syncthreads();
  if (thread < kSumParts) row.join(thread);
  __syncthreads();
  if (thread == 0) row.finish();
}

// ---- launchers ----------------------------------------------------------------------------------

constexpr unsigned kThreads = 256;
constexpr uint64_t kMostBlocks = 1 << 16;  // of a loop over elements

dim3 columns(size_t rows, size_t n) {
  return dim3(unsigned(rows), unsigned((n + kThreads - 1) / kThreads));
}

}  // namespace

cudaError_t launch_embed(const EmbedRows& a, cudaStream_t stream) {
  embed_kernel<<<columns(a.rows, a.n), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_residual_norm(const ResidualNorm& a, cudaStream_t stream) {
  residual_norm_kernel<<<unsigned(a.rows), kRowThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_rotate_qkv(const RotateQkv& a, cudaStream_t stream) {
  rotate_kernel<<<dim3(unsigned(a.rows), unsigned(a.heads + 2 * a.kv_heads)), kHeadThreads, 0,
                  stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_gate(const GatedRows& a, cudaStream_t stream) {
  gate_kernel<<<columns(a.rows, a.n), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_convert(const Conversion& a, cudaStream_t stream) {
  const uint64_t blocks = (a.count + kThreads - 1) / kThreads;
  convert_kernel<<<unsigned(std::min(blocks, kMostBlocks)), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_argmax(const ArgmaxRows& a, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(a.best, 0, a.rows * sizeof(uint64_t), stream);
  if (error != cudaSuccess) return error;
  const unsigned parts = unsigned((a.n + kArgmaxPart - 1) / kArgmaxPart);
  argmax_kernel<<<dim3(parts, unsigned(a.rows)), kRowThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
