// The KV cache of one rank as the engine sees it: sequences that come, decode and go, and what each
// step did for them. Attention itself goes between the forward pass and the cache
// (runtime/kv_attention.h, runtime/device/device_attention.h).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/arith/verdict.h"
#include "kernels/base/error.h"
#include "kvstore/content_owner.h"
#include "runtime/answer_state.h"
#include "runtime/certify/head_step.h"

namespace certkv {

// Figures of one query head at one layer of one step, as they travel to the leader: rounded up.
struct HeadFigures {
  float candidate, candidate_relative, returned, returned_relative;
  float e_key, e_val, e_fp, e_key_paper;
};
static_assert(sizeof(HeadFigures) == 8 * sizeof(float));
HeadFigures figures_of(const HeadReport& report);

// What one sequence's step did on this rank.
struct SequenceReport {
  std::vector<GroupReport> layers;   // [layers, local_kv_heads]
  std::vector<HeadFigures> figures;  // [layers, local_query_heads]
  std::optional<ErrorKind> error;    // first one; the request must fail
  std::string error_text;
  uint64_t damaged_pages = 0;  // of tier 1, found by this or a sharing sequence's scrub
  uint64_t lost_reads = 0;     // KV heads whose re-encoding ended for want of originals
};

// A rank's vote on a sequence's step, counted over local query heads.
VerdictRecord verdict_of(const SequenceReport& report, bool failed, uint64_t step, int head_dim);

class SequenceCache {
 public:
  virtual ~SequenceCache() = default;

  // A sequence that will be prefilled with `prompt_tokens`: reserves its originals. max_tokens:
  // that a decode of it will have at most. Throws OutOfMemory where there is no room.
  virtual int64_t create(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens) = 0;
  // How many of a prompt's segments, from the first on, the store has the originals of, for this
  // rank's KV heads in all layers. They are held until the next create_shared() or find_shared(). A
  // cache that cannot share finds none.
  virtual size_t find_shared(std::span<const OwnerId> /*segments*/) { return 0; }
  // As create(): the first `shared` segments, of those that find_shared() found just now, are taken
  // from the store, so that prefill may go on behind them; the others are reserved under their
  // names. REQUIRES that they end before the prompt's last token.
  virtual int64_t create_shared(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens,
                                std::span<const OwnerId> /*segments*/, size_t shared) {
    CERTKV_EXPECT(shared == 0, InvalidArgument, "this cache shares no originals");
    return create(prompt_tokens, sequence_id, max_tokens);
  }
  // A decode of a prefilled sequence: shares what is sealed, reserves for max_tokens more.
  virtual int64_t fork(int64_t sequence, int64_t max_tokens, const StepRules& rules) = 0;
  // As fork(); the answer's originals are reserved under `name`, for a later job to find. With
  // `sealed`, the first `held` tokens of the sequence are there as an earlier job has sealed them:
  // 0, and nothing is made, where the store does not have all of them, sound. A cache that keeps no
  // names makes a plain fork, and finds nothing.
  virtual int64_t fork_named(int64_t sequence, int64_t max_tokens, const StepRules& rules,
                             const OwnerId& /*name*/, std::span<const AnswerSpan> sealed,
                             uint64_t /*held*/) {
    return sealed.empty() ? fork(sequence, max_tokens, rules) : 0;
  }
  // Where a decode's originals behind the prompt's sealed ones lie, at a moment when every token it
  // holds is sealed and can be found by name; empty at any other.
  virtual std::vector<AnswerSpan> sealed_answer(int64_t /*sequence*/) const { return {}; }
  // After a sequence's last step: verifies all of its pages, where the cache can. Returns how many
  // damaged ones it held that no step has reported; they are repaired for those that share them.
  virtual uint64_t close(int64_t sequence) = 0;
  virtual void drop(int64_t sequence,
                    bool failed = false) = 0;  // failed: of a decode, for its audit

  // Starts a step: clears the reports of the sequences named.
  virtual void begin_step(uint64_t step, std::span<const int64_t> sequences) = 0;
  virtual void end_step() = 0;  // after the last layer
  virtual const SequenceReport& report(int64_t sequence) const = 0;
  virtual VerdictRecord verdict(int64_t sequence) const = 0;

  // UNITS: bytes
  virtual uint64_t tier1_bytes() const = 0;  // all sequences, shared pages once
  virtual uint64_t tier1_bytes(int64_t sequence) const = 0;
  virtual uint64_t dense_bytes(int64_t sequence) const = 0;
};

}  // namespace certkv
