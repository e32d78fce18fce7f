// Prompts: admitting them, prefilling them, and the decodes that go on from them.
#include <algorithm>

#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kernels/sample.h"
#include "runtime/engine_inside.h"
#include "runtime/host_memory.h"
#include "runtime/originals_scope.h"

namespace certkv {

CertifiedEngine::Shared CertifiedEngine::find_shared(const Request& r) {
  Shared s;
  if (!parts_.scope) return s;
  s.segments = content_owners(r.prompt, *parts_.scope);
  // The last token is always run: its logits are wanted.
  const size_t most = (r.prompt.size() - 1) / kSegmentTokens;
  uint64_t mine = cache_.find_shared(std::span(s.segments).first(most));
  std::vector<uint64_t> all(static_cast<size_t>(group_.size()));
  group_.all_gather(view_u64(&mine, 1), view_u64(all.data(), all.size()), {});
  group_.wait();
  s.found = size_t(*std::min_element(all.begin(), all.end()));
  return s;
}

// All ranks or none.
bool CertifiedEngine::refused_anywhere(bool here) {
  uint64_t refused = here ? 1 : 0;
  group_.all_reduce_sum(view_u64(&refused, 1), {});
  group_.wait();
  return refused != 0;
}

// The handle of the new prompt, or 0 with a reason where this rank has no room.
int64_t CertifiedEngine::reserve(const Request& r, const Shared& shared, std::string* why) {
  const EngineNeed n = need(r);
  const uint64_t free = available_memory_bytes();
  if (free != 0 && !(n.host < free)) {
    *why = fmt::format("a prompt of {} tokens needs {} for prefill and tier 1, {} are free on {}",
                       r.prompt.size(), byte_size_text(n.host), byte_size_text(free),
                       group_.peer_name(group_.rank()));
    return 0;
  }
  // What others on the device have taken meanwhile.
  if (n.on_device && n.prompt + n.prefill > compute_.device.device->free_bytes()) {
    *why = fmt::format(
        "a prompt of {} tokens needs {} for its prefill and {} of tier 1; {} of {} are free on {}",
        r.prompt.size(), byte_size_text(n.prefill), byte_size_text(n.prompt),
        byte_size_text(compute_.device.device->free_bytes()),
        byte_size_text(compute_.device.device->total_bytes()), compute_.device.device->name());
    return 0;
  }
  try {
    return cache_.create_shared(int64_t(r.prompt.size()), int64_t(r.id), r.sampling.max_tokens,
                                shared.segments, shared.found);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::OutOfMemory) throw;
    *why = e.what();
    return 0;
  }
}

void CertifiedEngine::admit(const Request& r) {
  CERTKV_FAILPOINT(engine_admit);
  const std::vector<Policy> policies = policies_of(r);
  std::string why = "another rank has no room; its log says more";
  Shared shared = find_shared(r);
  const int64_t prompt = reserve(r, shared, &why);
  const bool here = prompt != 0;
  if (refused_anywhere(!here)) {
    if (here) cache_.drop(prompt);
    if (!here) log_warning("request {}: {}", r.id, why);
    if (!leader()) return;
    if (running_.empty()) {  // nothing will ever free more
      Completion c;
      c.id = r.id;
      c.failed = true;
      c.error_kind = error_kind_name(ErrorKind::OutOfMemory);
      c.error = why;
      c.outcome = Outcome::Failed;
      c.prompt_tokens = r.prompt.size();
      waiting_.pop_front();
      for (Policy p : policies) {
        c.policy = p;
        if (on_completion) on_completion(Completion(c));
      }
    } else {
      blocked_ = true;
    }
    return;
  }
  if (leader()) waiting_.pop_front();
  const EngineNeed n = need(r);
  claims_[r.id] = n.held();
  prefill(r, prompt, std::move(shared));
}

// Runs the prompt; an error is one that all ranks have. Where what was to be shared turns out to be
// damaged, once more from the first token: then *prompt is another sequence, or 0.
std::optional<Error> CertifiedEngine::run_prompt(const Request& r, int64_t* prompt, Shared* shared,
                                                 std::vector<float>* logits) {
  const auto progress = [&](int layer, size_t tokens) {
    group_.alive();
    if (!leader() || !on_prefill_progress) return;
    const double of_layer = double(tokens) / double(r.prompt.size());
    on_prefill_progress((layer + of_layer) / double(parts_.config->layers));
  };
  try {
    *logits = forward_.prefill(*prompt, r.prompt, progress);
    return std::nullopt;
  } catch (const SharedPrefixLost& e) {
    log_warning("request {}: {}; its prompt is prefilled from the first token", r.id, e.what());
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::NonFinite) throw;  // thrown by all ranks at the same point
    return e;
  }
  cache_.drop(*prompt);
  shared->found = 0;
  std::string why = "another rank has no room; its log says more";
  *prompt = reserve(r, *shared, &why);
  if (refused_anywhere(*prompt == 0)) {
    if (*prompt != 0) cache_.drop(std::exchange(*prompt, 0));
    return Error(ErrorKind::OutOfMemory, why, __FILE__, __LINE__);
  }
  try {
    *logits = forward_.prefill(*prompt, r.prompt, progress);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::NonFinite) throw;
    return e;
  }
  return std::nullopt;
}

void CertifiedEngine::prefill(const Request& r, int64_t prompt, Shared shared) {
  CERTKV_FAILPOINT(engine_prefill);
  const auto start = EngineClock::now();
  const std::vector<Policy> policies = policies_of(r);
  std::vector<float> logits;
  forward_.clear_phases();
  const std::optional<Error> error = run_prompt(r, &prompt, &shared, &logits);
  const uint64_t reused = shared.found * kSegmentTokens;
  const double seconds = seconds_since(start);
  if (leader() && on_prefill && !error) {
    const ForwardPhases p = forward_.phases();
    const double named = p.projections + p.attention + p.store + p.communicate;
    on_prefill({.id = r.id,
                .tokens = r.prompt.size(),
                .reused_tokens = reused,
                .seconds = seconds,
                .projections = p.projections,
                .attention = p.attention,
                .store = p.store,
                .communicate = p.communicate,
                .other = std::max(0.0, seconds - named)});
  }
  open_forks_[r.id] = int(policies.size());
  for (size_t which = 0; which < policies.size(); ++which) {
    Generation g(r, policies[which], parts_.tokenizer, stop_ids_);
    g.prefill_seconds = seconds;
    g.reused_tokens = reused;
    bool sealed = false;
    std::string why = "another rank has no room in its arena; its log says more";
    if (!error) g.handle = fork(r, which, prompt, &sealed, &why);
    const bool failed = refused_anywhere(!error && g.handle == 0);
    running_.push_back(std::move(g));
    const auto last = std::prev(running_.end());
    if (error) {
      fail(*last, error->kind(), error->what());
    } else if (failed) {
      fail(*last, ErrorKind::OutOfMemory, why);
    } else {
      if (const AnswerState* known = resumed_answer(r, last->policy)) {
        last->resume(*known, sealed);
        if (leader())
          log_info("request {} (policy {}): goes on behind {} known tokens, {} of them sealed",
                   r.id, policy_name(last->policy), known->tokens.size(), last->tokens.size());
      }
      if (!sealed) take(*last, sample_token(logits, last->sample_options(), last->uniform()));
    }
    if (last->finished) finish(last);
  }
  if (prompt != 0) cache_.drop(prompt);
}

// A decode of the prompt, 0 where this rank has no room: behind what an earlier job has sealed of
// the answer, where all ranks find that (*sealed), else from the prompt's end.
int64_t CertifiedEngine::fork(const Request& r, size_t which, int64_t prompt, bool* sealed,
                              std::string* why) {
  const Policy policy = policies_of(r)[which];
  const StepRules rules = rules_of(r, policy);
  const OwnerId name = r.names.empty() ? OwnerId{} : r.names[which];
  const AnswerState* known = resumed_answer(r, policy);
  if (parts_.scope && known != nullptr && known->sealed &&
      known->sealed->scope == scope_word(*parts_.scope)) {
    int64_t handle = 0;
    try {
      handle = cache_.fork_named(prompt, r.sampling.max_tokens, rules, name, known->sealed->spans,
                                 r.prompt.size() + known->sealed->tokens - 1);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::OutOfMemory) throw;
    }
    *sealed = !refused_anywhere(handle == 0);
    if (*sealed) return handle;
    if (handle != 0) cache_.drop(handle);
    if (leader())
      log_warning(
          "request {} (policy {}): its answer's originals are not in the store, or not "
          "sound; they are made again",
          r.id, policy_name(policy));
  }
  try {
    if (name.is_nobody()) return cache_.fork(prompt, r.sampling.max_tokens, rules);
    return cache_.fork_named(prompt, r.sampling.max_tokens, rules, name, {}, 0);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::OutOfMemory) throw;
    *why = e.what();
    return 0;
  }
}

}  // namespace certkv
