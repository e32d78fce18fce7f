// The graphs of a device's decode steps: one for every shape of a step that comes again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/cuda/device.h"
#include "runtime/device/device_group.h"

namespace certkv {

// What is captured on one rank of a group must be on all, and the same graph launched. Shapes
// change on all ranks alike, unless their devices differ, and with them how sequences are split: so
// the ranks agree before every step.
class StepGraphs {
 public:
  static constexpr size_t kMost = 8;  // kept; the one that was not launched for longest goes

  // Both must outlive it. group: nullptr for one rank.
  StepGraphs(cuda::Device& device, DeviceGroup* group) : device_(device), group_(group) {}

  // Steps with the same key enqueue the same work.
  struct Key {
    size_t rows = 0;
    uint64_t shape = 0;
    bool logits = false, best = false, draw = false;
    bool operator==(const Key&) const = default;
  };
  // Enqueues `work`: piece by piece the first time, so that libraries make their plans; captured
  // from the second time on. `work` is kept by an emulated device.
  void run(const Key& key, const std::function<void()>& work);

 private:
  struct Step {
    Key key;
    uint64_t capture = 0;                        // its number, from 1 on; 0: not captured yet
    std::unique_ptr<cuda::Device::Graph> graph;  // of one rank; a group keeps its own
    uint64_t used = 0;
  };
  Step* find(const Key& key);
  Step* add(const Key& key);
  void forget(Step* step);
  bool capture(Step* step, const std::function<void()>& work);

  cuda::Device& device_;
  DeviceGroup* group_;
  std::vector<Step> steps_;
  uint64_t captures_ = 0;  // so far, the same on all ranks
  uint64_t clock_ = 0;
};

}  // namespace certkv
