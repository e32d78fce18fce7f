// The ranks of a tensor-parallel group as a device's forward pass sees them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "kernels/cuda/device.h"

namespace certkv {

// Both sum() and gather() are enqueued on the device's stream and read and write the device's
// memory. All ranks call everything in the same order with the same counts.
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

  // Between the hosts: whether every rank says the same.
  virtual bool all_same(uint64_t mine) = 0;
  // Captures what `work` enqueues, sums and gathers included, as one piece under a number that is
  // the same on all ranks; the same must have been done once outside of a capture. False where a
  // rank's NCCL or device refused: the log says why, nothing is captured any more, nor ever will
  // be, and the group goes on.
  // REQUIRES that the group's work has been waited for.
  virtual bool capture(uint64_t number, const std::function<void()>& work) = 0;
  // Enqueues what was captured once more.
  virtual void launch(uint64_t number) = 0;
  virtual void forget(uint64_t number) noexcept = 0;  // on this rank
};

class Communicator;
class NcclDevice;
struct NcclApi;

// Over the group's communicator itself, for an emulated device, whose memory is the host's: every
// call waits. Both must outlive it.
std::unique_ptr<DeviceGroup> make_host_group(Communicator& group, cuda::Device& device);

// What NCCL is laid over: two more communicators of the group's ranks, for its signs of life; the
// second one for a second start, where NCCL refuses to be captured.
struct NcclControls {
  std::unique_ptr<Communicator> first, second;
};
// NCCL between the GPUs of the group's ranks. Collective over `group`, which the hosts agree
// through and which must outlive it. Throws InvalidArgument where this build has no CUDA,
// DeviceError where there is no usable NCCL, and what the group's communicator does.
std::unique_ptr<DeviceGroup> make_nccl_group(NcclControls controls, Communicator& group,
                                             cuda::Device& device);
// The same over a given table of NCCL's calls. `device` must outlive it.
std::unique_ptr<DeviceGroup> make_nccl_group(NcclControls controls, Communicator& group,
                                             std::shared_ptr<const NcclApi> api,
                                             NcclDevice& device);

}  // namespace certkv
