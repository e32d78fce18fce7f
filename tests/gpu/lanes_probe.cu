#include <cuda_runtime.h>

#include "tests/gpu/lanes_probe.h"

namespace certkv {
namespace {

__global__ void probe_kernel(const uint32_t* in, uint32_t* exact, float* sums) {
  const int warp = int(blockIdx.x);
  cuda::probe_lanes(in + warp * kProbeWords * 32, exact + warp * kProbeExact * 32,
                    sums + warp * kProbeSums * 32);
}

}  // namespace

bool probe_lanes_on_device(const uint32_t* in, int warps, uint32_t* exact, float* sums) {
  const size_t words = size_t(warps) * 32;
  uint32_t* at = nullptr;  // in, exact, sums
  if (cudaMalloc(&at, words * (kProbeWords + kProbeExact + kProbeSums) * 4) != cudaSuccess)
    return false;
  uint32_t* const exact_at = at + words * kProbeWords;
  float* const sums_at = reinterpret_cast<float*>(exact_at + words * kProbeExact);
  bool ran = cudaMemcpy(at, in, words * kProbeWords * 4, cudaMemcpyHostToDevice) == cudaSuccess;
  probe_kernel<<<warps, 32>>>(at, exact_at, sums_at);
  ran = ran && cudaGetLastError() == cudaSuccess &&
        cudaMemcpy(exact, exact_at, words * kProbeExact * 4, cudaMemcpyDeviceToHost) ==
            cudaSuccess &&
        cudaMemcpy(sums, sums_at, words * kProbeSums * 4, cudaMemcpyDeviceToHost) == cudaSuccess;
  return cudaFree(at) == cudaSuccess && ran;
}

}  // namespace certkv
