// One answer being generated: tokens, text, stop conditions and what its head-steps added up to.
// The same on every rank of a group, because logits and verdicts are.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/sample.h"
#include "runtime/engine.h"
#include "runtime/tokenizer.h"

namespace certkv {

struct Generation {
  Generation(const Request& request, Policy policy, std::shared_ptr<const Tokenizer> tokenizer,
             const std::vector<int32_t>& eos_ids);

  // Takes the next token: appends it, or finishes (EOS, stop string, length).
  void accept(int32_t token);
  void count(const VerdictRecord& verdict);
  // Takes up an answer that an earlier session has begun: its tokens come again in their order
  // instead of what is drawn. With `sealed`, those of state.sealed are there already, and so are
  // the figures of their head-steps. Throws BadFile where the state is none of this answer.
  void resume(const AnswerState& state, bool sealed);
  // The next token, where it is known; draws are for what follows.
  std::optional<int32_t> known() const {
    if (tokens.size() < known_.size()) return known_[tokens.size()];
    return std::nullopt;
  }
  SealedAnswer sealed() const;  // without scope and spans
  Completion completion() const;

  SampleOptions sample_options() const {
    return {sampling.temperature, sampling.top_k, sampling.top_p};
  }
  // The draw for the next token: depends on seed, request and position alone.
  double uniform() const { return uniform_at(sampling.seed, request_id, tokens.size()); }
  // Position of the newest token.
  int64_t position() const { return int64_t(prompt_tokens + tokens.size()) - 1; }

  uint64_t request_id;
  Policy policy;
  SamplingOptions sampling;
  uint64_t prompt_tokens;
  int64_t handle = 0;  // in the cache
  std::vector<int32_t> tokens;
  std::string text;  // decoded so far; cut at the stop string
  bool finished = false;
  std::string finish_reason;
  std::optional<ErrorKind> error;
  std::string error_text;
  Outcome outcome = Outcome::Certified;
  HeadStepCounts counts;
  Completion::Distribution returned, candidate;
  double bound_max = 0, relative_max = 0, bound_sum = 0, relative_sum = 0;
  uint64_t steps = 0;
  uint64_t reused_tokens = 0;  // of the prompt
  double prefill_seconds = 0, decode_seconds = 0;

 private:
  std::vector<int32_t> known_;
  std::vector<int32_t> eos_ids_;
  StreamingDecoder decoder_;
};

}  // namespace certkv
