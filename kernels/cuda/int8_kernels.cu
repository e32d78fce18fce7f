#include "kernels/cuda/int8_body.h"
#include "kernels/cuda/int8_kernels.h"

namespace certkv::cuda {

// ---- kernels ------------------------------------------------------------------------------------

namespace {

template <DType X, int R>
__global__ void __launch_bounds__(kInt8Threads, 2)
    rows_kernel(const Int8Product a, size_t first_row) {
  __shared__ typename Int8Block<X, R>::Shared shared;
  const Int8Block<X, R> block{a, size_t(blockIdx.x) * kInt8Outputs, first_row, shared};
  block.run(BlockThreads{});
}

__global__ void unpack_kernel(const Int8Unpack a) {
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.count; i += step)
    unpack_element(a, i);
}

__global__ void scale_kernel(const Int8Scale a) {
  const size_t i = size_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (i < a.out) scale_element(a, blockIdx.x, i);
}

struct Launch {
  const Int8Product& product;
  cudaStream_t stream;

  template <DType X, int R>
  void operator()(size_t first_row) const {
    const size_t blocks = (product.out + kInt8Outputs - 1) / kInt8Outputs;
    rows_kernel<X, R><<<unsigned(blocks), kInt8Threads, 0, stream>>>(product, first_row);
  }
};

constexpr unsigned kThreads = 256;
constexpr uint64_t kMostBlocks = 1 << 16;

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

// Reads out * in bytes of codes for each kInt8Rows rows, and x from the caches once for each
// kInt8Outputs outputs.
cudaError_t launch_int8_rows(const Int8Product& p, cudaStream_t stream) {
  int8_readings(p, Launch{p, stream});
  return cudaGetLastError();
}

cudaError_t launch_int8_unpack(const Int8Unpack& a, cudaStream_t stream) {
  const uint64_t blocks = (a.count + kThreads - 1) / kThreads;
  unpack_kernel<<<unsigned(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_int8_scale(const Int8Scale& a, cudaStream_t stream) {
  const dim3 blocks(unsigned(a.rows), unsigned((a.out + kThreads - 1) / kThreads));
  scale_kernel<<<blocks, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
