#include "runtime/generation.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "runtime/record_json.h"

namespace certkv {

Generation::Generation(const Request& r, Policy p, std::shared_ptr<const Tokenizer> tokenizer,
                       const std::vector<int32_t>& eos_ids)
    : request_id(r.id),
      policy(p),
      sampling(r.sampling),
      prompt_tokens(r.prompt.size()),
      eos_ids_(eos_ids),
      decoder_(std::move(tokenizer), true) {}

void Generation::accept(int32_t token) {
  if (std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end()) {
    text += decoder_.finish();
    finished = true;
    finish_reason = "stop";
    return;
  }
  tokens.push_back(token);
  text += decoder_.push(token);
  const bool last = int64_t(tokens.size()) >= sampling.max_tokens;
  if (last) text += decoder_.finish();
  // The first stop string anywhere in the text ends it; a piece of a token may lie behind it.
  size_t cut = std::string::npos;
  for (const std::string& stop : sampling.stop)
    if (!stop.empty()) cut = std::min(cut, text.find(stop));
  if (cut != std::string::npos) {
    text.resize(cut);
    finished = true;
    finish_reason = "stop";
  } else if (last) {
    finished = true;
    finish_reason = "length";
  }
}

void Generation::count(const VerdictRecord& v) {
  counts.add(v);
  if (severity(outcome) < v.max.severity) outcome = outcome_of_severity(v.max.severity);
  const auto bound_of = [](uint64_t key) { return double(std::bit_cast<float>(uint32_t(key))); };
  const double bound = bound_of(v.max.bound), relative = bound_of(v.max.relative);
  // A NaN stays: it must not be replaced by a later, smaller figure.
  bound_max = bound <= bound_max ? bound_max : bound_max == bound_max ? bound : bound_max;
  relative_max = relative <= relative_max       ? relative_max
                 : relative_max == relative_max ? relative
                                                : relative_max;
  bound_sum += bound;
  relative_sum += relative;
  ++steps;
}

void Generation::resume(const AnswerState& state, bool sealed) {
  known_ = state.tokens;
  if (!sealed) return;
  const SealedAnswer& s = *state.sealed;
  const Completion c = decode_completion(s.figures);
  CERTKV_EXPECT(c.id == request_id && c.policy == policy && s.tokens <= known_.size() &&
                    s.steps + 1 == s.tokens,
                BadFile, "request {}: the figures of an open answer are of another one",
                request_id);
  while (tokens.size() < s.tokens && !finished) accept(known_[tokens.size()]);
  CERTKV_EXPECT(!finished, BadFile, "request {}: an open answer is complete", request_id);
  counts = c.counts;
  returned = c.returned;
  candidate = c.candidate;
  outcome = c.outcome;
  bound_max = c.bound_max;
  relative_max = c.relative_max;
  bound_sum = s.bound_sum;
  relative_sum = s.relative_sum;
  steps = s.steps;
  decode_seconds = c.decode_seconds;
}

SealedAnswer Generation::sealed() const {
  SealedAnswer s;
  s.tokens = tokens.size();
  s.bound_sum = bound_sum;
  s.relative_sum = relative_sum;
  s.steps = steps;
  Completion c = completion();
  c.tokens.clear();
  c.text.clear();
  s.figures = encode_completion(c);
  return s;
}

Completion Generation::completion() const {
  Completion c;
  c.id = request_id;
  c.policy = policy;
  c.failed = error.has_value();
  if (error) {
    c.error_kind = error_kind_name(*error);
    c.error = error_text;
  }
  c.tokens = tokens;
  c.text = text;
  c.finish_reason = finish_reason;
  c.outcome = error ? Outcome::Failed : outcome;
  c.counts = counts;
  c.returned = returned;
  c.candidate = candidate;
  c.bound_max = bound_max;
  c.relative_max = relative_max;
  c.bound_mean = steps == 0 ? 0 : bound_sum / double(steps);
  c.relative_mean = steps == 0 ? 0 : relative_sum / double(steps);
  c.prompt_tokens = prompt_tokens;
  c.reused_tokens = reused_tokens;
  c.prefill_seconds = prefill_seconds;
  c.decode_seconds = decode_seconds;
  return c;
}

}  // namespace certkv
