#include "runtime/certified_engine.h"

#include <algorithm>
#include <cstring>

#include "kernels/arith/rounding.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kernels/sample.h"
#include "runtime/engine_inside.h"
#include "runtime/originals_scope.h"
#include "runtime/request_wire.h"
#include "runtime/step_figures.h"

namespace certkv {

void CertifiedEngine::submit(Request r) {
  const int64_t limit = engine_token_limit(options_, *parts_.config);
  const int64_t prompt = int64_t(r.prompt.size());
  CERTKV_EXPECT(prompt >= 1, InvalidArgument, "the prompt is empty");
  CERTKV_EXPECT(r.sampling.max_tokens >= 1, InvalidArgument,
                "max_tokens is {}: at least 1 is needed", r.sampling.max_tokens);
  CERTKV_EXPECT(r.sampling.max_tokens <= limit && prompt + r.sampling.max_tokens <= limit,
                InvalidArgument,
                "prompt of {} tokens and max_tokens {} are longer than the limit of {} tokens: "
                "shorten the prompt or max_tokens, or raise model.max_len (the model allows {})",
                prompt, r.sampling.max_tokens, limit, parts_.config->max_tokens);
  for (int32_t t : r.prompt)
    CERTKV_EXPECT(t >= 0 && t < parts_.config->vocab, InvalidArgument,
                  "token {} of the prompt is outside the model's vocabulary of {}: the tokenizer "
                  "does not belong to this model",
                  t, parts_.config->vocab);
  const EngineNeed n = need(r);
  if (n.on_device) {
    CERTKV_EXPECT(
        n.least() <= tier1_capacity_, OutOfMemory,
        "a prompt of {} tokens does not fit the device: {} are allowed on each rank (auto is "
        "what is free but for a tenth; raise run.tier1_memory, or use more ranks: "
        "parallel.tensor), and it needs {} for its prefill, {} of tier 1 (lower "
        "sampling.max_tokens), {} of scratch (lower scratch.key_blocks, scratch.value_blocks) "
        "and {} to {} of rung 3's staging",
        prompt, byte_size_text(tier1_capacity_), byte_size_text(n.prefill), byte_size_text(n.tier1),
        byte_size_text(n.scratch), byte_size_text(n.least_staging), byte_size_text(n.staging));
  } else {
    CERTKV_EXPECT(
        n.least() <= tier1_capacity_, OutOfMemory,
        "a prompt of {} tokens needs {} of tier 1 and scratch on each rank, {} are allowed: "
        "raise run.tier1_memory, or use more ranks (parallel.tensor)",
        prompt, byte_size_text(n.least()), byte_size_text(tier1_capacity_));
  }
  waiting_.push_back(std::move(r));
}

Engine::Load CertifiedEngine::load() const {
  Load l;
  l.waiting = waiting_.size();
  l.running = running_.size();
  l.tokens = tokens_;
  l.tier1_bytes = cache_.tier1_bytes();
  l.tier1_capacity = tier1_capacity_;
  if (parts_.store != nullptr) {
    const StoreCapacity c = parts_.store->capacity();
    l.arena_capacity = c.total_bytes;
    l.arena_bytes = c.total_bytes - c.free_bytes;
  }
  return l;
}

uint64_t CertifiedEngine::claimed() const {
  uint64_t sum = 0;
  for (const auto& [id, bytes] : claims_) sum += bytes;
  return sum;
}

StepRules CertifiedEngine::rules_of(const Request& r, Policy policy) const {
  return {.policy = policy,
          .tolerance = r.tolerance,
          .paper = options_.paper,
          .ladder = options_.ladder,
          .skip = options_.skip,
          .exploration_seed = r.sampling.seed};
}

EnginePlan CertifiedEngine::make_plan(bool stop, std::vector<std::byte>* payload) {
  EnginePlan plan;
  plan.step = step_;
  if (stop) {
    plan.action = uint64_t(EngineAction::Stop);
    return plan;
  }
  if (!waiting_.empty() && !blocked_) {
    const Request& r = waiting_.front();
    const EngineNeed n = need(r);
    if (parts_.scope && waiting_.front().names.empty())
      for (size_t i = 0; i < policies_of(r).size(); ++i)
        waiting_.front().names.push_back(lasting_owner());
    const bool room = open_forks_.size() < size_t(options_.run.max_batch) &&
                      claimed() + n.peak() <= tier1_capacity_;
    if (room || running_.empty()) {
      *payload = encode_request(r);
      plan.action = uint64_t(EngineAction::Admit);
      plan.bytes = payload->size();
      return plan;
    }
    blocked_ = true;
  }
  if (running_.empty()) {
    plan.action = uint64_t(EngineAction::Done);
    return plan;
  }
  // Policies take turns: a step decodes sequences of one policy, so that its figures are its own.
  for (size_t i = 0; i < 4; ++i) {
    const Policy policy = Policy((next_policy_ + i) % 4);
    if (std::any_of(running_.begin(), running_.end(),
                    [&](const Generation& g) { return g.policy == policy; })) {
      plan.action = uint64_t(EngineAction::Decode);
      plan.policy = uint64_t(policy);
      next_policy_ = size_t(policy) + 1;
      return plan;
    }
  }
  return plan;
}

void CertifiedEngine::share_plan(EnginePlan* plan, std::vector<std::byte>* payload) {
  group_.broadcast(view_u64(reinterpret_cast<uint64_t*>(plan), sizeof(EnginePlan) / 8), 0, {});
  group_.wait();
  CERTKV_FAILPOINT(engine_plan);
  if (plan->bytes == 0) return;
  payload->resize(size_t(plan->bytes));
  group_.broadcast({payload->data(), payload->size(), DType::U8, MemoryKind::Host}, 0, {});
  group_.wait();
}

bool CertifiedEngine::step(bool stop) {
  CERTKV_FAILPOINT(engine_step);
  if (parts_.store != nullptr) parts_.store->throw_if_lost();
  EnginePlan plan;
  std::vector<std::byte> payload;
  if (leader()) plan = make_plan(stop, &payload);
  share_plan(&plan, &payload);
  switch (EngineAction(plan.action)) {
    case EngineAction::Done:
    case EngineAction::Stop:
      if (compute_.audit != nullptr) compute_.audit->end();
      return false;
    case EngineAction::Admit:
      admit(decode_request(payload));
      return true;
    case EngineAction::Decode:
      decode(Policy(plan.policy));
      return true;
  }
  CERTKV_THROW(CommError, "the leader asks for step kind {}, which is not known", plan.action);
}

EngineNeed CertifiedEngine::need(const Request& r) const {
  return compute_.need(options_, *parts_.config, heads_, group_.size(), int64_t(r.prompt.size()),
                       r.sampling.max_tokens, policies_of(r));
}

// What an earlier session has drawn comes again; what is drawn now is told.
void CertifiedEngine::take(Generation& g, int32_t drawn) {
  const std::optional<int32_t> known = g.known();
  AnswerProgress news{.first = g.tokens.size(), .tokens = {}, .sealed = std::nullopt};
  g.accept(known.value_or(drawn));
  if (!known) {
    ++tokens_;
    news.tokens.push_back(drawn);
  }
  tell(std::move(news), g);
}

void CertifiedEngine::tell(AnswerProgress news, const Generation& g) {
  if (!leader() || !on_progress) return;
  news.id = g.request_id;
  news.policy = g.policy;
  if (parts_.scope && !g.finished) {
    std::vector<AnswerSpan> spans = cache_.sealed_answer(g.handle);
    // Behind the prompt alone there is nothing to go on from.
    if (!spans.empty() && g.steps > 0) {
      news.sealed = g.sealed();
      news.sealed->scope = scope_word(*parts_.scope);
      news.sealed->spans = std::move(spans);
    }
  }
  if (!news.tokens.empty() || news.sealed) on_progress(news);
}

void CertifiedEngine::decode(Policy policy) {
  const auto start = EngineClock::now();
  ++step_;
  forward_.clear_phases();
  std::vector<std::list<Generation>::iterator> rows;
  for (auto g = running_.begin(); g != running_.end(); ++g)
    if (g->policy == policy && rows.size() < size_t(options_.run.max_batch)) rows.push_back(g);
  std::vector<DecodeInput> inputs;
  std::vector<int64_t> handles;
  for (auto g : rows) {
    inputs.push_back({.sequence = g->handle,
                      .token = g->tokens.back(),
                      .position = g->position(),
                      .choice = TokenChoice{g->sample_options(), g->uniform()}});
    handles.push_back(g->handle);
  }
  const auto scrubbing = EngineClock::now();
  cache_.begin_step(step_, handles);
  const double scrub_seconds = seconds_since(scrubbing);
  const DecodeOutput out = forward_.decode(inputs);
  CERTKV_FAILPOINT(engine_decode);
  cache_.end_step();

  // The step's verdict: agreed upon before anything of it is used.
  const auto agreeing = EngineClock::now();
  std::vector<VerdictRecord> verdicts;
  for (int64_t handle : handles) verdicts.push_back(cache_.verdict(handle));
  CERTKV_FAILPOINT(engine_agree);
  group_.reduce_verdict(verdicts, {});
  group_.wait();
  const double agree_seconds = seconds_since(agreeing);
  const auto recording = EngineClock::now();
  StepFigures figures(*parts_.config, heads_, group_.size());
  figures.gather(cache_, handles, group_);
  double record_seconds = seconds_since(recording);

  CERTKV_FAILPOINT(engine_sample);
  const auto sampling = EngineClock::now();
  StepRecord record;
  record.step = step_;
  record.policy = policy;
  for (size_t i = 0; i < rows.size(); ++i) {
    Generation& g = *rows[i];
    const VerdictRecord& v = verdicts[i];
    CERTKV_EXPECT(verdict_agreed(v, uint64_t(group_.size()), step_), CommError,
                  "step {}: the ranks do not agree on the step ({} of {} votes)", step_,
                  v.sum.votes, group_.size());
    g.count(v);
    record.counts.add(v);
    figures.add_to(i, &g.returned, &g.candidate);
    const Outcome outcome = outcome_of_severity(v.max.severity);
    if (out.nonfinite_layer[i] >= 0) {
      fail(g, ErrorKind::NonFinite,
           fmt::format("layer {}: {} of token {} is not finite", out.nonfinite_layer[i],
                       layer_part_text(out.nonfinite_part[i]), inputs[i].position));
    } else if (outcome == Outcome::Failed) {
      const SequenceReport& mine = cache_.report(g.handle);
      const ErrorKind kind =
          v.max.error > 0 ? ErrorKind(v.max.error - 1) : ErrorKind::Uncertifiable;
      fail(g, kind,
           mine.error ? mine.error_text : "on another rank of the group; its log says more");
    } else {
      const size_t vocab = size_t(parts_.config->vocab);
      const DecodeOutput::Chosen& chosen = out.chosen[i];
      try {  // every rank draws from the same logits
        if (!g.known()) ++record.tokens;
        take(g, chosen.token >= 0 ? sampled_elsewhere(chosen.token, chosen.largest)
                                  : sample_token(std::span(out.logits).subspan(i * vocab, vocab),
                                                 g.sample_options(), g.uniform()));
      } catch (const Error& e) {
        if (e.kind() != ErrorKind::NonFinite) throw;
        fail(g, e.kind(), fmt::format("after token {}: {}", inputs[i].position, e.what()));
      }
    }
  }
  const double sample_seconds = seconds_since(sampling);
  if (leader() && on_step) {
    const auto filling = EngineClock::now();
    record.sequences = rows.size();
    figures.fill(&record);
    record_seconds += seconds_since(filling);
    record.phase_seconds = phases_of(handles);
    record.phase_seconds.communicate += agree_seconds;
    record.phase_seconds.sample = sample_seconds;
    record.phase_seconds.record = record_seconds;
  }
  record.seconds = seconds_since(start);
  for (auto g : rows) g->decode_seconds += record.seconds / double(rows.size());
  if (leader() && on_step) {
    StepRecord::Phases& p = record.phase_seconds;
    p.scrub = scrub_seconds;
    p.other = std::max(
        0.0, record.seconds - (p.projections + p.append + p.attention + p.judge + p.ladder +
                               p.balance + p.communicate + p.sample + p.scrub + p.record));
    on_step(record);
  }
  for (auto g : rows)
    if (g->finished) finish(g);
}

// Where the forward pass spent its time. Heads are spread over the pool's threads: of the wall time
// of attention each of their phases took its sum over the heads, divided by the threads.
StepRecord::Phases CertifiedEngine::phases_of(std::span<const int64_t> handles) const {
  const ForwardPhases forward = forward_.phases();
  StepRecord::Phases p;
  p.projections = forward.projections;
  p.communicate = forward.communicate;
  for (int64_t handle : handles)
    for (const GroupReport& g : cache_.report(handle).layers) {
      p.append += g.append_seconds;
      p.attention += g.pass_seconds;
      p.judge += g.judge_seconds;
      p.ladder += g.ladder_seconds;
    }
  for (double* x : {&p.append, &p.attention, &p.judge, &p.ladder}) *x /= pool_.threads();
  p.balance = std::max(0.0, forward.attention - p.append - p.attention - p.judge - p.ladder);
  return p;
}

void CertifiedEngine::fail(Generation& g, ErrorKind kind, const std::string& text) {
  g.finished = true;
  g.error = kind;
  g.error_text = text;
}

void CertifiedEngine::finish(std::list<Generation>::iterator g) {
  CERTKV_FAILPOINT(engine_finish);
  Completion c = g->completion();
  uint64_t damaged = g->handle != 0 ? cache_.close(g->handle) : 0;
  group_.all_reduce_sum(view_u64(&damaged, 1), {});
  group_.wait();
  c.counts.digest += damaged;
  if (g->handle != 0) {
    // KV heads are shared out evenly: what one rank holds is what every rank holds.
    c.tier1_bytes = cache_.tier1_bytes(g->handle) * uint64_t(group_.size());
    c.dense_bytes = cache_.dense_bytes(g->handle) * uint64_t(group_.size());
    cache_.drop(g->handle, g->error.has_value());
  }
  if (--open_forks_[g->request_id] == 0) {
    open_forks_.erase(g->request_id);
    claims_.erase(g->request_id);
  }
  running_.erase(g);
  blocked_ = false;
  if (leader() && on_completion) on_completion(std::move(c));
}

std::unique_ptr<Engine> make_engine(const JobOptions& options, EngineParts parts) {
  return std::make_unique<CertifiedEngine>(options, std::move(parts));
}

}  // namespace certkv
