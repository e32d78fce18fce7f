// The certified pass on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/pass.h"

namespace certkv::cuda {

// Of the current device. Throws DeviceError.
DeviceShape device_shape();

// Asks for the shared memory that the kernels of this shape need: once per device, before any
// launch or capture. Throws DeviceError.
void prepare_attend(const PassShape& shape);

// Launches the pass and its merge; nothing is allocated and nothing waited for. args.items and all
// it points to: device memory. Throws InvalidArgument, DeviceError.
void attend(const PassArgs& args, const PassShape& shape, cudaStream_t stream);

}  // namespace certkv::cuda
