// What nvcc compiles of products with 8-bit weights, for linear_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/int8_args.h"

namespace certkv::cuda {

cudaError_t launch_int8_rows(const Int8Product& product, cudaStream_t stream);
cudaError_t launch_int8_unpack(const Int8Unpack& codes, cudaStream_t stream);
cudaError_t launch_int8_scale(const Int8Scale& rows, cudaStream_t stream);

}  // namespace certkv::cuda
