// NCCL and a GPU behind the table and the interface that the communicator uses.
#pragma once

#include <memory>

#include "kernels/cuda/cuda_device.h"
#include "parallel/nccl_api.h"
#include "parallel/nccl_device.h"

namespace certkv {

bool nccl_is_built();  // nccl.h was found when this build was configured
// Of the installed library. Throws DeviceError: this build has no NCCL, the library is missing,
// lacks a function, or is too old.
std::shared_ptr<const NcclApi> load_nccl();

// `device` outlives it.
std::unique_ptr<NcclDevice> make_nccl_device(cuda::CudaDevice& device);

}  // namespace certkv
