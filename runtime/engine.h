// The engine: continuous batching of requests over one tensor-parallel group.
//
// Every rank of the group owns an Engine and calls the same functions in the same order; the leader
// (group rank 0) alone decides what is admitted, and broadcasts it. Only the leader's completions
// are read.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/arith/verdict.h"
#include "runtime/answer_state.h"
#include "runtime/certify/class_table.h"
#include "runtime/options.h"

namespace certkv {

struct Request {
  uint64_t id = 0;              // unique in the job: index of the input line
  std::vector<int32_t> prompt;  // token ids, special tokens included
  SamplingOptions sampling;
  Policy policy = Policy::Budget;
  Tolerance tolerance;
  std::vector<Policy> compare;       // decode under each of these from one prefill; empty: policy
  bool policy_is_job_wide = true;    // false where the request itself asked for a policy
  std::vector<AnswerState> resumed;  // answers that an earlier session has begun
  std::vector<OwnerId> names;        // of the answers' originals, by policy; the leader draws them
};

// Distribution of a non-negative figure over head-steps; quantiles from a logarithmic histogram
// whose bins are 2^(1/16) wide, reported as the bin's upper edge (so never below the true value),
// or as the maximum where that is smaller. NaN and negative figures count as NaN: they lie above
// infinity, and a quantile that reaches them is NaN.
struct BoundHistogram {
  static constexpr int kBins = 1024;
  std::vector<uint64_t> bins;  // empty until first used
  double max = 0;              // NaN if one was NaN
  double sum = 0;
  uint64_t count = 0;
  void add(double x);
  void merge(const BoundHistogram& other);
  double quantile(double p) const;  // 0 when count is 0
  double mean() const { return count == 0 ? 0 : sum / double(count); }
};

// Counted over query heads of all ranks of the group.
struct HeadStepCounts {
  uint64_t head_steps = 0, certified = 0, exact = 0, over = 0, failed = 0;
  std::array<uint64_t, kRungs> rungs{};
  uint64_t promoted_keys = 0, promoted_values = 0;
  uint64_t scratch_hits = 0, scratch_misses = 0, paged_bytes = 0;
  uint64_t canary = 0, digest = 0;
  uint64_t read_bytes = 0, attended_tokens = 0, dense_bytes = 0;  // see VerdictRecord::Sum
  uint64_t prefetched = 0, prefetched_used = 0;
  void add(const VerdictRecord& record);
  void add(const HeadStepCounts& other);
};

struct Completion {
  uint64_t id = 0;
  Policy policy = Policy::Budget;  // under which this completion was decoded
  bool failed = false;
  std::string error_kind, error;         // when failed
  std::vector<int32_t> tokens;           // generated, without the stop token
  std::string text;                      // up to the stop string, exclusive
  std::string finish_reason;             // stop, length
  Outcome outcome = Outcome::Certified;  // the worst of its head-steps
  HeadStepCounts counts;
  double bound_max = 0, relative_max = 0;    // returned
  double bound_mean = 0, relative_mean = 0;  // returned; mean over steps of the worst head
  struct Distribution {
    BoundHistogram bound, relative;  // absolute and relative, over this rank group's head-steps
  } returned, candidate;             // candidate: before the ladder acted
  uint64_t prompt_tokens = 0, tier1_bytes = 0, dense_bytes = 0;
  uint64_t reused_tokens = 0;  // of the prompt: not prefilled, their originals were in the store
  double prefill_seconds = 0, decode_seconds = 0;
};

// One line of steps.jsonl (method section 9).
struct StepRecord {
  uint64_t step = 0;
  Policy policy = Policy::Budget;
  uint64_t sequences = 0, tokens = 0;
  double seconds = 0;
  HeadStepCounts counts;
  struct Bounds {
    double max = 0, p50 = 0, p95 = 0, p99 = 0;
    double relative_max = 0, relative_p50 = 0, relative_p95 = 0, relative_p99 = 0;
  } candidate, returned;
  double e_key_max = 0, e_val_max = 0, e_fp_max = 0, e_key_paper_max = 0;
  uint64_t f_blocks = 0, x_blocks = 0;  // resident original blocks used by the pass
  uint64_t skipped_blocks = 0;          // blocks whose values were not read (skip.share)
  // cache.layout classes: KV heads by class (class_label()); all 0 under other layouts
  std::array<uint64_t, kClasses> classes{};
  // The leader's wall time. What its threads do for different heads at once counts as their mean.
  struct Phases {
    double projections = 0;  // norms, products, rotary embedding, logits
    double append = 0;       // the new token into tier 1; sealing, when a scale group is full
    double attention = 0;    // the pass; under `dense` the whole of attention
    double judge = 0;        // certificates of the pass
    double ladder = 0;       // rungs 1 to 4, learning F
    double balance = 0;      // of attention: threads that wait for the slowest head, or to be woken
    double communicate = 0;  // sums over the ranks, and their agreement on the step
    double sample = 0;       // sampling, text, stop conditions
    double scrub = 0;        // verifying tier 1
    double record = 0;       // figures of the step's head-steps, for this record and for results
    double other = 0;        // of `seconds`, what is left
  } phase_seconds;
};

// What a prompt's prefill took on the leader.
struct PrefillRecord {
  uint64_t id = 0, tokens = 0, reused_tokens = 0;
  double seconds = 0;
  double projections = 0, attention = 0;  // as above
  double store = 0;  // sealing into tier 1, and originals into the node's store
  double communicate = 0;
  double other = 0;
};

class Engine {
 public:
  virtual ~Engine() = default;

  // Leader: queues a request (validated: prompt not empty, within the model's limit). Throws
  // InvalidArgument for a request that can never be admitted.
  virtual void submit(Request request) = 0;

  // All ranks of the group: admits what fits, prefills at most one prompt or runs one decode step.
  // Returns false when the leader has no work left (followers learn it from the leader).
  // `stop` (leader's value counts): end without admitting or finishing anything more.
  virtual bool step(bool stop) = 0;

  std::function<void(Completion&&)> on_completion;  // leader only
  std::function<void(const StepRecord&)> on_step;   // leader only
  // Leader only; with every token drawn, before the step's completions.
  std::function<void(const AnswerProgress&)> on_progress;
  std::function<void(const PrefillRecord&)> on_prefill;  // leader only; before its first step
  // Leader only, again and again while a prompt is prefilled: the share of it that is done.
  std::function<void(double)> on_prefill_progress;

  struct Load {
    uint64_t waiting = 0, running = 0, tokens = 0;
    uint64_t tier1_bytes = 0, tier1_capacity = 0, arena_bytes = 0, arena_capacity = 0;
  };
  virtual Load load() const = 0;
};

}  // namespace certkv
