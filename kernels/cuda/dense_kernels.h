// The small kernels beside the libraries, for linear_device.cc and dense_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace certkv::cuda {

// to[i] = from[i] as BF16 (or F16). REQUIRES count > 0.
cudaError_t launch_narrow(bool bf16, const float* from, uint16_t* to, size_t count,
                          cudaStream_t stream);
// to[0] = first, to[1] = second.
cudaError_t launch_set_pair(int32_t* to, int32_t first, int32_t second, cudaStream_t stream);

}  // namespace certkv::cuda
