// What the NCCL communicator asks of a rank's device, beside its memory. The GPU: nccl_binding.h;
// tests have one in host memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cuda/device.h"
#include "parallel/nccl_api.h"

namespace certkv {

class NcclDevice {
 public:
  virtual ~NcclDevice() = default;

  virtual cuda::Device& device() = 0;
  virtual NcclStream stream() = 0;  // the one of device(), where everything is enqueued
  // Whether all work of the stream is done; never waits. Throws DeviceError: that work failed.
  virtual bool done() = 0;
  // Whether a kernel of this device may use that memory as its own.
  virtual bool is_device_memory(const void* data) = 0;
  // Enqueues: out[i] := the sum of parts[r * count + i] over the ranks in FP32 and rank order,
  // rounded once. F16, BF16.
  virtual void sum_ranks(DType dtype, const void* parts, int ranks, uint64_t count, void* out) = 0;
};

}  // namespace certkv
