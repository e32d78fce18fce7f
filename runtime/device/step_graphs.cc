#include "runtime/device/step_graphs.h"

#include <algorithm>

namespace certkv {

StepGraphs::Step* StepGraphs::find(const Key& key) {
  const auto it =
      std::find_if(steps_.begin(), steps_.end(), [&](const Step& s) { return s.key == key; });
  return it == steps_.end() ? nullptr : &*it;
}

StepGraphs::Step* StepGraphs::add(const Key& key) {
  if (steps_.size() < kMost) {
    steps_.emplace_back().key = key;
    return &steps_.back();
  }
  Step* oldest = &*std::min_element(steps_.begin(), steps_.end(),
                                    [](const Step& a, const Step& b) { return a.used < b.used; });
  forget(oldest);
  oldest->key = key;
  return oldest;
}

void StepGraphs::forget(Step* step) {
  if (step->capture != 0 && group_ != nullptr) group_->forget(step->capture);
  step->graph.reset();
  step->capture = 0;
}

bool StepGraphs::capture(Step* step, const std::function<void()>& work) {
  ++captures_;
  if (group_ == nullptr) {
    step->graph = device_.capture(work);
  } else if (!group_->capture(captures_, work)) {
    for (Step& s : steps_) forget(&s);  // whatever was captured went with the communicator
    return false;
  }
  step->capture = captures_;
  return true;
}

void StepGraphs::run(const Key& key, const std::function<void()>& work) {
  Step* step = find(key);
  // Where this rank stands: the step is new (0), has been seen (1), or was captured as the n-th.
  const uint64_t stand = step == nullptr ? 0 : 1 + step->capture;
  const bool agreed = group_ == nullptr || group_->all_same(stand);
  if (step == nullptr) step = add(key);
  step->used = ++clock_;
  if (!agreed) forget(step);
  if (!agreed || stand == 0) return work();
  if (step->capture == 0 && !capture(step, work)) return work();
  if (group_ != nullptr)
    group_->launch(step->capture);
  else
    device_.launch(*step->graph);
}

}  // namespace certkv
