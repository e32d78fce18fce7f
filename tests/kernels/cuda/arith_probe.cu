#include <cuda_runtime.h>

#include "tests/kernels/cuda/arith_probe.h"

namespace certkv {
namespace {

__global__ void probe_arith_kernel(uint64_t* results) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  probe_arith(i, results + size_t(i) * kProbeResults);
}

}  // namespace

void probe_arith_by_nvcc(uint64_t* results) {
  for (uint32_t i = 0; i < kProbeInputs; ++i) probe_arith(i, results + size_t(i) * kProbeResults);
}

bool probe_arith_on_device(uint64_t* results) {
  const size_t bytes = sizeof(uint64_t) * kProbeInputs * kProbeResults;
  uint64_t* on_device = nullptr;
  if (cudaMalloc(&on_device, bytes) != cudaSuccess) return false;
  constexpr int kThreads = 256;
  probe_arith_kernel<<<kProbeInputs / kThreads, kThreads>>>(on_device);
  const bool ran = cudaGetLastError() == cudaSuccess &&
                   cudaMemcpy(results, on_device, bytes, cudaMemcpyDeviceToHost) == cudaSuccess;
  return cudaFree(on_device) == cudaSuccess && ran;
}

}  // namespace certkv
