// One decode step of one KV head: the speculative pass, the judgement, and the ladder.
// SOURCE: method sections 5, 6 and 7; rung 4 is decided by all ranks, outside (runtime/engine).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/arith/verdict.h"
#include "kvstore/device_tier.h"
#include "kvstore/reader.h"
#include "kvstore/scratch_cache.h"
#include "runtime/certify/certificate.h"
#include "runtime/certify/head_class.h"
#include "runtime/certify/skipping.h"
#include "runtime/options.h"

namespace certkv {

struct AuditCapture;  // runtime/audit/capture.h

// Originals of the sealed blocks of one KV head of one sequence at one layer.
class HeadOriginals {
 public:
  virtual ~HeadOriginals() = default;
  // results[i] for blocks[i], into destinations[i], [block_tokens, head_dim] of 16 bits; nothing is
  // Ok before its digest was verified on this side.
  // THREADS: views (Destination::view) may be asked for by several threads at once.
  virtual void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
                    std::vector<BlockResult>* results) = 0;
};

// What a request asks for, fixed over its life.
struct StepRules {
  Policy policy = Policy::Budget;
  Tolerance tolerance;
  PaperOptions paper;
  LadderOptions ladder;
  SkipOptions skip;
  uint64_t exploration_seed = 0;
  bool prefetches() const { return policy == Policy::Budget && ladder.prefetch > 0; }
  int ranking() const { return ladder.ranking >= 0 ? ladder.ranking : policy == Policy::Paper; }
};

// Tier 1, scratch and memory of one KV head.
struct HeadState {
  HeadState(DeviceTier tier, size_t key_quota, size_t value_quota);
  HeadState fork() const;  // shares sealed pages, keeps the class; scratch and F start empty

  DeviceTier tier;
  ScratchCache keys, values;
  size_t key_quota, value_quota;  // UNITS: blocks
  std::vector<uint32_t> dropped;  // memory of learn()

  SkipGuess skip;                 // for the next step
  HeadClass precision;            // its formats must outlive it
};

struct HeadReport {
  Certificate candidate;  // of the speculative pass, before the ladder acted
  Certificate returned;
  Outcome outcome = Outcome::Failed;
  int rung = 0;
  int64_t promoted_keys = 0, promoted_values = 0;  // blocks, by this step's ladder
};

struct GroupReport {
  std::vector<HeadReport> heads;
  uint64_t scratch_hits = 0, scratch_misses = 0, paged_bytes = 0;
  // Blocks of one tensor that the step read for the next one, and of those that the step before had
  // read how many it kept: their codes would have cost enough. A device's alone; in paged_bytes.
  uint64_t prefetched = 0, prefetched_used = 0;
  uint64_t canary = 0, digest = 0;      // failures
  uint64_t f_blocks = 0, x_blocks = 0;  // resident originals the pass used (open block excluded)
  uint64_t skipped_blocks = 0;          // whose values the pass that counted did not read
  // What the step read of keys and values, codes by the layout's payload: by the pass, by the
  // corrections (both sides of each), by passes repeated and by rungs 3 and 4. Paging in is
  // paged_bytes. UNITS: bytes, tokens
  uint64_t read_bytes = 0;
  uint64_t attended_tokens = 0;
  int precision = -1;                // class at this step; -1 where the layout has none
  bool broken = false;               // a precondition broke: rung 4 must be entered
  double append_seconds = 0;         // of the new token, before the step (written by its caller)
  double pass_seconds = 0, judge_seconds = 0, ladder_seconds = 0;
  void clear(size_t query_heads);  // to a fresh report's values, keeping memory
};

// Identity of the step, for log lines and exploration; audit: nullptr, or where what the returned
// certificates were computed from is left.
struct StepWhere {
  int64_t sequence = 0;
  int layer = 0, kv_head = 0;
  uint64_t step = 0;
  AuditCapture* audit = nullptr;
};

// One step in three parts, so that the pass, nearly all of the work, can be spread over threads. An
// object is used for step after step: it allocates nothing while heads stay within rung 0 and the
// sequence within what it has seen.
class HeadStep {
 public:
  HeadStep();
  ~HeadStep();
  HeadStep(HeadStep&&) noexcept;
  HeadStep& operator=(HeadStep&&) noexcept;

  // q, out: [heads, head_dim]. block_log_mass: nullptr or [heads, blocks], of the candidate. All
  // arguments must live until finish() has returned. The current token has been appended to
  // state.tier already. REQUIRES at least one token. Throws InvalidArgument for more than
  // kMaxGroupHeads heads.
  void begin(const StepRules& rules, const StepWhere& where, int heads, const float* q,
             HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass,
             GroupReport* report);
  size_t splits() const;
  // Splits [first, last). THREADS: different splits at the same time. The result does not depend on
  // who runs which, nor on how many in one call.
  void attend(size_t first, size_t last);
  // Judges, climbs the ladder, learns. Returns true where heads go to rung 3, or where skipping cost a
  // head its certificate: then splits() are to be attended once more, and finish() called again.
  // ENSURES, once it returns false, every head's out is certified, exact, over (policies that do not enforce) or failed
  // (out is then zero), unless report->broken: then out is unspecified and dense_step must follow.
  bool finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// All of it on the calling thread.
void head_step(const StepRules& rules, const StepWhere& where, int heads, const float* q,
               HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass,
               GroupReport* report);

// Rungs 3 and 4 and policy `dense`: attention over originals for the heads in `mask`, in the same
// three parts. Heads whose originals cannot be had end as failed, with a zero out; nothing is
// thrown for it. block_log_mass: nullptr or [heads, blocks], written for the heads in `mask`.
class DenseStep {
 public:
  void begin(const StepWhere& where, int heads, uint32_t mask, const float* q, HeadState* state,
             HeadOriginals& originals);
  size_t splits() const;
  void attend(size_t first, size_t last);  // THREADS: different splits at the same time
  void finish(int rung, float* out, float* block_log_mass, GroupReport* report);

 private:
  StepWhere where_;
  AttendContext context_;
  HeadOriginals* originals_ = nullptr;
  std::vector<BlockRef> refs_;
  std::vector<int> chosen_;
  std::vector<float> chosen_q_;
  QueryGroup group_;
  PassState pass_;
  std::atomic<uint32_t> lost_{0};  // calls whose originals could not be had
};
void dense_step(const StepWhere& where, int heads, uint32_t mask, int rung, const float* q,
                HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass,
                GroupReport* report);

}  // namespace certkv
