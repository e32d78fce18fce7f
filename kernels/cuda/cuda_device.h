// The GPU behind device.h.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <string>

#include "kernels/cuda/device.h"

namespace certkv::cuda {

// What the runtime says of an error, beside what was being done. Throws DeviceError, or OutOfMemory
// where memory was refused.
void check_cuda(cudaError_t error, const std::string& what);

class CudaDevice : public Device {
 public:
  virtual int ordinal() const = 0;
  virtual cudaStream_t stream() const = 0;
  // The device that `device` is; REQUIRES that it is no emulation.
  static CudaDevice& of(Device& device) { return dynamic_cast<CudaDevice&>(device); }
};

// ordinal: among the devices that CUDA_VISIBLE_DEVICES leaves. Throws DeviceError: no driver, one
// too old for this build (both versions named), no such device, or a device too old.
std::unique_ptr<CudaDevice> make_cuda_device(int ordinal);
int cuda_device_count();  // 0 where there is no driver

}  // namespace certkv::cuda
