// What nvcc compiles of drawing tokens, for model_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/sample_args.h"

namespace certkv::cuda {

cudaError_t launch_sample(const SampleRows& rows, cudaStream_t stream);

}  // namespace certkv::cuda
