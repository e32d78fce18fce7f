// What nvcc compiles of the pass, for attend_device.cc (fmt 9, and with it kernels/base/error.h, is
// beyond nvcc).
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/pass_args.h"
#include "kernels/cuda/plan.h"

namespace certkv::cuda {

struct KernelShape {
  int head_dim, heads, groups, items, splits, warps;
  PageKind kind;
  bool certificate;
  bool early;  // the device can begin a kernel before its predecessor has ended
};
// REQUIRES a shape that check_shape accepts.
cudaError_t allow_shared_memory(const KernelShape& shape, uint32_t bytes);
cudaError_t launch_attend(const PassArgs& args, const KernelShape& shape, uint32_t shared_bytes,
                          cudaStream_t stream);
cudaError_t launch_merge(const PassArgs& args, const KernelShape& shape, cudaStream_t stream);

}  // namespace certkv::cuda
