// The device's cache, seventh part: policies beside `budget`.
#include <algorithm>
#include <cmath>

#include "runtime/device/device_sequence.h"

namespace certkv {

int DeviceCache::ranking() const {
  const StepRules& rules = at(rows_[0]).rules;
  return rules.policy == Policy::Budget ? rules.ranking() : 0;
}

double DeviceCache::exploration() const {
  const StepRules& rules = at(rows_[0]).rules;
  return rules.policy == Policy::Budget && rules.ladder.exploration > 0 ? rules.ladder.exploration
                                                                        : 0;
}

cuda::PaperArgs DeviceCache::paper_args(const cuda::LadderArgs& ladder) const {
  const StepRules& rules = at(rows_[0]).rules;
  const PaperOptions& o = rules.paper;
  return {.tau_cov = o.tau_cov,
          .expand_tail = o.expand_tail,
          .v_tol = o.v_tol,
          .k_min = int32_t(o.k_min),
          .k_max = int32_t(o.k_max),
          .greedy_values = o.value_rule == "greedy",
          .ranking = int32_t(rules.ranking()),
          .scored = step_->scored.data(),
          .scored_of_item = step_->scored.count() / uint64_t(ladder.count)};
}

// Policy `paper`, in two phases as published; all of it is enqueued, and nothing but rung 3 depends
// on what comes of it. SOURCE: method section 5, "Policies".
void DeviceCache::paper(const cuda::PassArgs& first_pass, const cuda::PassShape& first_shape,
                        const cuda::LadderArgs& ladder) {
  StepBuffers& b = *step_;
  const cuda::PaperArgs paper = paper_args(ladder);
  cuda::PassArgs pass = first_pass;
  cuda::PassShape shape = first_shape;
  pass.repeated = true;
  shape.splits = b.most_splits[1];
  ops_.select_paper(ladder, paper);
  ops_.page_in(ladder);
  device_.fill(b.words.data() + kAnyFailing, 0, sizeof(uint32_t));
  attend(pass, shape);
  ops_.rank(ladder, paper);
  device_.when(b.words.data() + kAnyFailing, [&] { rung3(first_pass, shape, ladder); });
  ops_.forget(ladder);
}

// Some blocks at random, for the canary; all heads are judged again with what came of it.
void DeviceCache::explore(const cuda::PassArgs& first_pass, const cuda::PassShape& first_shape,
                          cuda::LadderArgs* ladder) {
  cuda::PassArgs pass = first_pass;
  cuda::PassShape shape = first_shape;
  pass.repeated = true;
  shape.splits = step_->most_splits[1];
  ladder->explored_below = uint64_t(std::ceil(std::min(exploration(), 1.0) * 0x1p53));
  ops_.explore(*ladder);
  ops_.page_in(*ladder);
  attend(pass, shape);
}

}  // namespace certkv
