#include <cuda_runtime.h>

#include "tests/gpu/lanes_probe.h"

namespace certkv {
namespace {

__global__ void probe_kernel(const uint32_t* in, uint32_t* exact, float* sums) {
  const int warp = int(blockIdx.x);
  cuda::probe_lanes(in + warp * kProbeWords * 32, exact + warp * kProbeExact * 32,
                    sums + warp * kProbeSums * 32);
}

// bits of the floats -0 to -inf; worst: as the bits of a positive double.
__global__ void exponential_kernel(unsigned long long* worst, unsigned* below) {
  double most = 0;
  float small = 0;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i <= 0x7f800000u;
       i += uint64_t(gridDim.x) * blockDim.x) {
    const float x = __uint_as_float(uint32_t(i) | 0x80000000u);
    const float y = cuda::exponential(x);
    if (x < kExpFlush) {
      small = fmaxf(small, y);
      if (!(y >= 0)) small = INFINITY;
      continue;
    }
    const double exact = exp(double(x)), off = fabs(double(y) - exact) / exact;
    most = off <= most ? most : (off > most ? off : INFINITY);  // a NaN counts
  }
  atomicMax(worst, static_cast<unsigned long long>(__double_as_longlong(most)));
  atomicMax(below, __float_as_uint(small));
}

}  // namespace

bool probe_exponential_on_device(double* worst, float* below) {
  unsigned long long* at = nullptr;
  if (cudaMalloc(&at, 16) != cudaSuccess) return false;
  bool ran = cudaMemset(at, 0, 16) == cudaSuccess;
  exponential_kernel<<<1024, 256>>>(at, reinterpret_cast<unsigned*>(at + 1));
  ran = ran && cudaGetLastError() == cudaSuccess &&
        cudaMemcpy(worst, at, 8, cudaMemcpyDeviceToHost) == cudaSuccess &&
        cudaMemcpy(below, at + 1, 4, cudaMemcpyDeviceToHost) == cudaSuccess;
  return cudaFree(at) == cudaSuccess && ran;
}

bool probe_lanes_on_device(const uint32_t* in, int warps, uint32_t* exact, float* sums) {
  const size_t words = size_t(warps) * 32;
  uint32_t* at = nullptr;  // in, exact, sums
  if (cudaMalloc(&at, words * (kProbeWords + kProbeExact + kProbeSums) * 4) != cudaSuccess)
    return false;
  uint32_t* const exact_at = at + words * kProbeWords;
  float* const sums_at = reinterpret_cast<float*>(exact_at + words * kProbeExact);
  bool ran = cudaMemcpy(at, in, words * kProbeWords * 4, cudaMemcpyHostToDevice) == cudaSuccess;
  probe_kernel<<<warps, 32>>>(at, exact_at, sums_at);
  ran =
      ran && cudaGetLastError() == cudaSuccess &&
      cudaMemcpy(exact, exact_at, words * kProbeExact * 4, cudaMemcpyDeviceToHost) == cudaSuccess &&
      cudaMemcpy(sums, sums_at, words * kProbeSums * 4, cudaMemcpyDeviceToHost) == cudaSuccess;
  return cudaFree(at) == cudaSuccess && ran;
}

}  // namespace certkv
