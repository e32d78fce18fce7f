// The ranks of a tensor-parallel group as a device's forward pass sees them.
#pragma once

#include <cstddef>
#include <memory>

#include "kernels/cuda/device.h"

namespace certkv {

// Both are enqueued on the device's stream and read and write the device's memory. All ranks call
// them in the same order with the same counts.
class DeviceGroup {
 public:
  virtual ~DeviceGroup() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // inout[i] becomes the sum over the ranks, the same bits on all of them. A NaN stays one.
  virtual void sum(float* inout, size_t count) = 0;
  // all[r * count + i] becomes rank r's own[i], as 32-bit words: bits are kept.
  virtual void gather(const void* own, void* all, size_t count) = 0;
  // Until all of it is done, while the other ranks show signs of life. Throws what the group's
  // communicator does.
  virtual void wait() = 0;
};

class Communicator;

// Over the group's communicator itself, for an emulated device, whose memory is the host's: every
// call waits. `group` must outlive it.
std::unique_ptr<DeviceGroup> make_host_group(Communicator& group);
// NCCL between the GPUs of the group's ranks. Collective over `control`, another communicator of
// the same ranks, which it keeps. Throws InvalidArgument where this build has no CUDA, DeviceError
// where there is no usable NCCL, and what the group's communicator does.
std::unique_ptr<DeviceGroup> make_nccl_group(std::unique_ptr<Communicator> control,
                                             cuda::Device& device);

}  // namespace certkv
