#include "runtime/certified_engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <list>
#include <map>

#include "kernels/arith/rounding.h"
#include "kernels/base/log.h"
#include "kernels/base/thread_pool.h"
#include "kernels/sample.h"
#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/byte_size.h"
#include "runtime/generation.h"
#include "runtime/host_memory.h"
#include "runtime/rank_compute.h"
#include "runtime/request_wire.h"
#include "runtime/step_figures.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What the leader tells its group at the start of every step.
enum class Action : uint64_t { Done, Stop, Admit, Decode };
struct Plan {
  uint64_t action = 0;
  uint64_t bytes = 0;   // of the request that follows, for Admit
  uint64_t policy = 0;  // for Decode
  uint64_t step = 0;
};
static_assert(sizeof(Plan) == 4 * 8);

class CertifiedEngine : public Engine {
 public:
  CertifiedEngine(const JobOptions& options, EngineParts parts)
      : options_(options),
        parts_(std::move(parts)),
        pool_(parts_.threads),
        group_(*parts_.group),
        heads_(kv_heads_of_rank(parts_.config->kv_heads, group_.size(), group_.rank())),
        compute_(make_rank_compute(options, parts_, heads_, pool_)),
        cache_(*compute_.cache),
        forward_(*compute_.forward) {
    stop_ids_ = parts_.config->eos_ids;
    stop_ids_.insert(stop_ids_.end(), parts_.stop_ids.begin(), parts_.stop_ids.end());
    if (options.run.tier1_memory == "auto") {
      tier1_capacity_ = compute_.tier1_memory(parts_.local_ranks);
    } else {
      const std::optional<uint64_t> bytes = parse_byte_size(options.run.tier1_memory);
      CERTKV_EXPECT(bytes.has_value(), InvalidArgument,
                    "run.tier1_memory is '{}': write auto or a size such as 8GiB",
                    options.run.tier1_memory);
      tier1_capacity_ = *bytes;
    }
  }

  void submit(Request request) override;
  bool step(bool stop) override;
  Load load() const override;

 private:
  bool leader() const { return group_.rank() == 0; }
  Plan make_plan(bool stop, std::vector<std::byte>* payload);
  void share_plan(Plan* plan, std::vector<std::byte>* payload);
  void admit(const Request& request);
  EngineNeed need(const Request& request) const;
  // Segments of the prompt that can be shared by name, and how many of them all ranks have.
  struct Shared {
    std::vector<OwnerId> segments;
    size_t found = 0;
  };
  Shared find_shared(const Request& request);
  int64_t reserve(const Request& request, const Shared& shared, std::string* why);
  bool refused_anywhere(bool here);
  void prefill(const Request& request, int64_t prompt, Shared shared);
  std::optional<Error> run_prompt(const Request& request, int64_t* prompt, Shared* shared,
                                  std::vector<float>* logits);
  void decode(Policy policy);
  StepRecord::Phases phases_of(std::span<const int64_t> handles) const;
  void finish(std::list<Generation>::iterator g);
  void fail(Generation& g, ErrorKind kind, const std::string& text);
  StepRules rules_of(const Request& request, Policy policy) const;
  uint64_t claimed() const;

  const JobOptions options_;
  EngineParts parts_;
  ThreadPool pool_;
  Communicator& group_;
  ShardRange heads_;
  RankCompute compute_;
  SequenceCache& cache_;
  ForwardPass& forward_;

  std::deque<Request> waiting_;          // leader only
  std::list<Generation> running_;        // the same on every rank, in the same order
  std::map<uint64_t, uint64_t> claims_;  // request id -> bytes of memory counted for it
  std::map<uint64_t, int> open_forks_;   // request id -> generations not finished
  std::vector<int32_t> stop_ids_;
  uint64_t tier1_capacity_ = 0;
  uint64_t step_ = 0;
  uint64_t tokens_ = 0;
  size_t next_policy_ = 0;
  bool blocked_ = false;  // the first waiting request waits for room
};

std::vector<Policy> policies_of(const Request& r) {
  return r.compare.empty() ? std::vector<Policy>{r.policy} : r.compare;
}

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

Plan CertifiedEngine::make_plan(bool stop, std::vector<std::byte>* payload) {
  Plan plan;
  plan.step = step_;
  if (stop) {
    plan.action = uint64_t(Action::Stop);
    return plan;
  }
  if (!waiting_.empty() && !blocked_) {
    const Request& r = waiting_.front();
    const EngineNeed n = need(r);
    const bool room = open_forks_.size() < size_t(options_.run.max_batch) &&
                      claimed() + n.peak() <= tier1_capacity_;
    if (room || running_.empty()) {
      *payload = encode_request(r);
      plan.action = uint64_t(Action::Admit);
      plan.bytes = payload->size();
      return plan;
    }
    blocked_ = true;
  }
  if (running_.empty()) {
    plan.action = uint64_t(Action::Done);
    return plan;
  }
  // Policies take turns: a step decodes sequences of one policy, so that its figures are its own.
  for (size_t i = 0; i < 4; ++i) {
    const Policy policy = Policy((next_policy_ + i) % 4);
    if (std::any_of(running_.begin(), running_.end(),
                    [&](const Generation& g) { return g.policy == policy; })) {
      plan.action = uint64_t(Action::Decode);
      plan.policy = uint64_t(policy);
      next_policy_ = size_t(policy) + 1;
      return plan;
    }
  }
  return plan;
}

void CertifiedEngine::share_plan(Plan* plan, std::vector<std::byte>* payload) {
  group_.broadcast(view_u64(reinterpret_cast<uint64_t*>(plan), sizeof(Plan) / 8), 0, {});
  group_.wait();
  if (plan->bytes == 0) return;
  payload->resize(size_t(plan->bytes));
  group_.broadcast({payload->data(), payload->size(), DType::U8, MemoryKind::Host}, 0, {});
  group_.wait();
}

bool CertifiedEngine::step(bool stop) {
  if (parts_.store != nullptr) parts_.store->throw_if_lost();
  Plan plan;
  std::vector<std::byte> payload;
  if (leader()) plan = make_plan(stop, &payload);
  share_plan(&plan, &payload);
  switch (Action(plan.action)) {
    case Action::Done:
    case Action::Stop:
      if (compute_.audit != nullptr) compute_.audit->end();
      return false;
    case Action::Admit:
      admit(decode_request(payload));
      return true;
    case Action::Decode:
      decode(Policy(plan.policy));
      return true;
  }
  CERTKV_THROW(CommError, "the leader asks for step kind {}, which is not known", plan.action);
}

EngineNeed CertifiedEngine::need(const Request& r) const {
  return compute_.need(options_, *parts_.config, heads_, group_.size(), int64_t(r.prompt.size()),
                       r.sampling.max_tokens, policies_of(r));
}

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
  const auto start = Clock::now();
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
  for (Policy policy : policies) {
    Generation g(r, policy, parts_.tokenizer, stop_ids_);
    g.prefill_seconds = seconds;
    g.reused_tokens = reused;
    uint64_t failed = 0;
    std::string why = "another rank has no room in its arena; its log says more";
    if (!error) {
      try {
        g.handle = cache_.fork(prompt, r.sampling.max_tokens, rules_of(r, policy));
      } catch (const Error& e) {
        if (e.kind() != ErrorKind::OutOfMemory) throw;
        failed = 1;
        why = e.what();
      }
    }
    group_.all_reduce_sum(view_u64(&failed, 1), {});
    group_.wait();
    running_.push_back(std::move(g));
    const auto last = std::prev(running_.end());
    if (error) {
      fail(*last, error->kind(), error->what());
    } else if (failed != 0) {
      fail(*last, ErrorKind::OutOfMemory, why);
    } else {
      last->accept(sample_token(logits, last->sample_options(), last->uniform()));
      ++tokens_;
    }
    if (last->finished) finish(last);
  }
  if (prompt != 0) cache_.drop(prompt);
}

void CertifiedEngine::decode(Policy policy) {
  const auto start = Clock::now();
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
  const auto scrubbing = Clock::now();
  cache_.begin_step(step_, handles);
  const double scrub_seconds = seconds_since(scrubbing);
  const DecodeOutput out = forward_.decode(inputs);
  cache_.end_step();

  // The step's verdict: agreed upon before anything of it is used.
  const auto agreeing = Clock::now();
  std::vector<VerdictRecord> verdicts;
  for (int64_t handle : handles) verdicts.push_back(cache_.verdict(handle));
  group_.reduce_verdict(verdicts, {});
  group_.wait();
  const double agree_seconds = seconds_since(agreeing);
  const auto recording = Clock::now();
  StepFigures figures(*parts_.config, heads_, group_.size());
  figures.gather(cache_, handles, group_);
  double record_seconds = seconds_since(recording);

  const auto sampling = Clock::now();
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
        g.accept(chosen.token >= 0 ? sampled_elsewhere(chosen.token, chosen.largest)
                                   : sample_token(std::span(out.logits).subspan(i * vocab, vocab),
                                                  g.sample_options(), g.uniform()));
        ++tokens_;
        ++record.tokens;
      } catch (const Error& e) {
        if (e.kind() != ErrorKind::NonFinite) throw;
        fail(g, e.kind(), fmt::format("after token {}: {}", inputs[i].position, e.what()));
      }
    }
  }
  const double sample_seconds = seconds_since(sampling);
  if (leader() && on_step) {
    const auto filling = Clock::now();
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

}  // namespace

std::unique_ptr<Engine> make_engine(const JobOptions& options, EngineParts parts) {
  return std::make_unique<CertifiedEngine>(options, std::move(parts));
}

}  // namespace certkv
