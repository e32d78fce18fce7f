// What nvcc compiles of the operations on rows, for model_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/model_args.h"

namespace certkv::cuda {

cudaError_t launch_embed(const EmbedRows& rows, cudaStream_t stream);
cudaError_t launch_residual_norm(const ResidualNorm& rows, cudaStream_t stream);
cudaError_t launch_rotate_qkv(const RotateQkv& rows, cudaStream_t stream);
cudaError_t launch_gate(const GatedRows& rows, cudaStream_t stream);
cudaError_t launch_convert(const Conversion& elements, cudaStream_t stream);
cudaError_t launch_argmax(const ArgmaxRows& rows, cudaStream_t stream);

}  // namespace certkv::cuda
