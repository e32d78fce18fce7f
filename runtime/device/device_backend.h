// What a rank computes with on a device: the device, and the operations on it.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/dense_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/model_ops.h"

namespace certkv {

struct DeviceBackend {
  std::unique_ptr<cuda::Device> device;  // outlives the operations
  std::unique_ptr<cuda::CacheOps> cache;
  std::unique_ptr<cuda::ModelOps> model;
  std::unique_ptr<cuda::LinearOps> linear;
  std::unique_ptr<cuda::DenseOps> dense;
};

// backend: cuda, or emulated (the same kernels on the CPU, lane by lane: for tests). ordinal: among
// the visible devices, the rank's place on its node; where there are fewer, ranks share them.
// Throws InvalidArgument where this build has no such backend, DeviceError where no device answers.
DeviceBackend make_device_backend(const std::string& backend, int ordinal);
// The emulated operations on this device of host memory.
DeviceBackend make_emulated_backend(std::unique_ptr<cuda::Device> device);

}  // namespace certkv
