// What nvcc compiles of sealing, for cache_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/seal_args.h"

namespace certkv::cuda {

// REQUIRES arguments that check_seal accepts.
cudaError_t launch_seal(const SealArgs& args, cudaStream_t stream);

}  // namespace certkv::cuda
