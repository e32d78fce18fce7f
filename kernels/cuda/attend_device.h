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

// Whether the current device can begin a kernel before its predecessor has ended. Throws
// DeviceError.
bool begins_early();

// Launches the pass and its merge; nothing is allocated and nothing waited for. args.items and all
// it points to: device memory. early: begins_early(). Throws InvalidArgument, DeviceError.
void attend(const PassArgs& args, const PassShape& shape, cudaStream_t stream, bool early);

}  // namespace certkv::cuda
