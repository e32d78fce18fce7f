// The ranks of a tensor-parallel group as a device's forward pass sees them.
#pragma once

#include <cstddef>

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
};

}  // namespace certkv
