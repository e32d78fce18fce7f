#include "runtime/certify/head_step.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <utility>

#include "kernels/base/log.h"
#include "runtime/audit/capture.h"
#include "runtime/certify/canary.h"
#include "runtime/certify/learn.h"
#include "runtime/certify/read_bytes.h"
#include "runtime/certify/selector.h"

namespace certkv {

HeadState::HeadState(DeviceTier t, size_t kq, size_t vq)
    : tier(std::move(t)),
      keys(kq, size_t(tier.format().block_tokens) * size_t(tier.format().head_dim)),
      values(vq, size_t(tier.format().block_tokens) * size_t(tier.format().head_dim)),
      key_quota(kq),
      value_quota(vq) {}

HeadState HeadState::fork() const {
  HeadState copy(tier.fork(), key_quota, value_quota);
  copy.precision.formats = precision.formats;
  copy.precision.now = copy.precision.next = precision.now;
  copy.precision.ratios = precision.ratios;
  copy.precision.measured = precision.measured;
  return copy;
}

void GroupReport::clear(size_t query_heads) {
  std::vector<HeadReport> kept = std::move(heads);
  *this = {};
  kept.assign(query_heads, {});
  heads = std::move(kept);
}

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

// Everything one step works on. References would not let it be used again.
struct HeadStep::Impl {
  const StepRules* rules_ = nullptr;
  StepWhere where;
  HeadState* state_ = nullptr;
  HeadOriginals* originals_ = nullptr;
  GroupReport* report_ = nullptr;
  const float* queries = nullptr;
  float* out = nullptr;  // [heads, head_dim]
  float* log_mass_out = nullptr;
  std::chrono::steady_clock::time_point start;
  std::atomic<int64_t> pass_ns{0};  // of all threads that attend
  bool all_dense = false;           // policy dense, or a head of class `exact`
  bool dense_now() const { return on_rung3 || all_dense; }
  void add_to_pass(std::chrono::steady_clock::time_point since) {
    pass_ns.fetch_add((std::chrono::steady_clock::now() - since).count(),
                      std::memory_order_relaxed);
  }
  AttendContext context;
  QueryGroup q;
  PassState pass, fresh;
  std::vector<CorrectionLog> logs;
  DenseStep dense_pass;  // policy dense, and heads on rung 3
  bool on_rung3 = false;

  const StepRules& rules() const { return *rules_; }
  HeadState& state() const { return *state_; }
  GroupReport& report() const { return *report_; }
  float* out_of(int h) { return out + size_t(h) * size_t(q.head_dim); }
  std::span<const BlockRef> blocks() const { return state().tier.blocks(); }

  Certificate judge(int h) {
    finish_output(pass, h, out_of(h));
    return certify(pass, h, logs[size_t(h)], out_of(h));
  }
  bool fits(const Certificate& c) const {
    return within_tolerance(c, rules().tolerance.is_relative, rules().tolerance.value);
  }
  // The largest numerator of E4 that would be certified.
  double allowed(const Certificate& c) const {
    return allowed_error(c, rules().tolerance.is_relative, rules().tolerance.value);
  }
  bool page_in(std::span<const uint32_t> blocks, BlockPart part);
  bool check_canary(uint32_t block, const BlockTerms& before, const BlockTerms& after,
                    const BlockRef& was, const BlockRef& now);
  bool promote(std::span<const uint32_t> keys, std::span<const uint32_t> values, uint32_t mask);
  uint32_t climb();
  bool skipping() const { return rules().policy == Policy::Budget && rules().skip.share > 0; }
  bool settle_skipping();
  void remember_for_skipping();
  double skipping_seconds = 0;  // of a pass that was thrown away
  std::vector<uint32_t> explore() const;
  uint32_t paper_phase_two();
  void forecast();
};

// Brings the blocks' originals into the scratch and lets the next pass use them.
// Returns false if they do not fit the quota, or could not be had (then report().broken).
bool HeadStep::Impl::page_in(std::span<const uint32_t> blocks, BlockPart part) {
  ScratchCache& cache = part == BlockPart::K ? state().keys : state().values;
  std::vector<uint32_t> missing;
  for (uint32_t b : blocks) {
    if (cache.find(b) != nullptr) {
      cache.pin(b);
      ++report().scratch_hits;
    } else {
      missing.push_back(b);
    }
  }
  const auto use = [&](uint32_t b, const uint16_t* p) {
    part == BlockPart::K ? state().tier.use_key(b, p) : state().tier.use_value(b, p);
  };
  if (blocks.size() > cache.capacity()) return false;
  std::vector<Destination> destinations(missing.size());
  for (size_t i = 0; i < missing.size(); ++i) {
    uint32_t evicted;
    uint16_t* slot = cache.insert(missing[i], &evicted);
    if (evicted != ScratchCache::kNone) use(evicted, nullptr);
    if (slot == nullptr) {  // every slot is needed by this very step
      for (size_t j = 0; j < i; ++j) cache.erase(missing[j]);
      return false;
    }
    destinations[i] = {.part = part,
                       .k = part == BlockPart::K ? slot : nullptr,
                       .v = part == BlockPart::V ? slot : nullptr};
  }
  std::vector<BlockResult> results;
  originals_->read(missing, destinations, &results);
  results.resize(missing.size());  // an answer that is missing is not Ok
  bool all = true;
  for (size_t i = 0; i < missing.size(); ++i) {
    if (results[i].status != BlockStatus::Ok) {
      cache.erase(missing[i]);
      ++report().digest;
      report().broken = true;
      all = false;
      log_warning(
          "sequence {} layer {} KV head {} block {}: originals are {}; the layer goes dense",
          where.sequence, where.layer, where.kv_head, missing[i],
          block_status_name(results[i].status));
    } else {
      cache.seal(missing[i]);
      ++report().scratch_misses;
      report().paged_bytes += uint64_t(state().tier.format().block_tokens) * size_t(q.head_dim) * 2;
    }
  }
  return all;
}

bool HeadStep::Impl::check_canary(uint32_t block, const BlockTerms& before, const BlockTerms& after,
                                  const BlockRef& was, const BlockRef& now) {
  const CanaryResult result = canary(context, q.heads, before, after, was, now);
  if (result.ok) return true;
  ++report().canary;
  report().broken = true;
  log_error("canary: sequence {} layer {} KV head {} block {}: {}; the layer goes dense",
            where.sequence, where.layer, where.kv_head, block, result.what);
  return false;
}

// Rungs 1 and 2 for the heads in `mask`: subtract-and-replace. Returns false where the ladder must
// go on to rung 3 (quota) or the layer to rung 4 (report().broken).
bool HeadStep::Impl::promote(std::span<const uint32_t> keys, std::span<const uint32_t> values,
                             uint32_t mask) {
  if (!page_in(keys, BlockPart::K) || !page_in(values, BlockPart::V)) return false;
  thread_local BlockTerms before, after;
  std::vector<uint32_t> all;
  std::set_union(keys.begin(), keys.end(), values.begin(), values.end(), std::back_inserter(all));
  bool corrected = true;
  for (uint32_t b : all) {
    const BlockRef was = blocks()[b];
    BlockRef now = was;
    const bool want_key = std::binary_search(keys.begin(), keys.end(), b);
    const bool want_value = std::binary_search(values.begin(), values.end(), b);
    if (want_key) now.k = state().keys.find(b);
    if (want_value) now.v = state().values.find(b);
    // Heads may differ in what their sums were built from: group them by it, before a correction
    // moves any of them to another group.
    uint32_t heads_using[4] = {};
    for (int h = 0; h < q.heads; ++h)
      if ((mask >> h & 1) != 0) heads_using[pass.used[pass.at(h, b)] & 3] |= 1u << h;
    for (uint8_t used = 0; used < 4; ++used) {
      const uint32_t same = heads_using[used];
      if (same == 0) continue;
      BlockRef source = was, target = now;
      source.k = (used & kUsedKey) != 0 ? was.k : nullptr;
      source.v = (used & kUsedValue) != 0 ? was.v : nullptr;
      if (!want_key) target.k = source.k;  // not asked for: leave it as the head has it
      if (!want_value) target.v = source.v;
      if (target.k == source.k && target.v == source.v) continue;
      // Also after a refusal: the pass that is run again uses these originals, so the canary looks.
      report().read_bytes += uint64_t(block_read_bytes(state().tier.format(), source) +
                                      block_read_bytes(state().tier.format(), target));
      corrected &= correct_block(context, q, b, source, target, same, &pass, logs, &before, &after);
      if (!check_canary(b, before, after, source, target)) return false;
    }
    state().tier.use_key(b, now.k);
    state().tier.use_value(b, now.v);
  }
  bool rerun = !corrected;
  for (int h = 0; h < q.heads; ++h)
    rerun = rerun || ((mask >> h & 1) != 0 && must_rerun(pass, h, logs[size_t(h)]));
  if (rerun) {  // cancellation ate the state: one more pass, with everything promoted so far
    attend_pass(context, q, blocks(), &fresh);
    report().read_bytes +=
        uint64_t(pass_read_bytes(state().tier, state().keys.resident(), state().values.resident()));
    for (int h = 0; h < q.heads; ++h) {
      if ((mask >> h & 1) == 0) continue;
      take_over(fresh, h, &pass);
      logs[size_t(h)] = {};
    }
  }
  return true;
}

namespace {

std::vector<uint32_t> merge(std::span<const uint32_t> a, std::span<const uint32_t> b) {
  std::vector<uint32_t> out;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(out));
  return out;
}

// Counts promotions of one head: blocks whose codes its sums stood on until now.
void count_promotions(const PassState& pass, int h, std::span<const uint32_t> keys,
                      std::span<const uint32_t> values, HeadReport* r) {
  for (uint32_t b : keys)
    if ((pass.used[pass.at(h, b)] & kUsedKey) == 0) {
      ++r->promoted_keys;
      r->rung = std::max(r->rung, 1);
    }
  for (uint32_t b : values)
    if ((pass.used[pass.at(h, b)] & kUsedValue) == 0) {
      ++r->promoted_values;
      r->rung = std::max(r->rung, 2);
    }
}

}  // namespace

// Policy budget: rungs 1 and 2 until every head fits, or has to go dense. Returns the heads that
// do.
uint32_t HeadStep::Impl::climb() {
  const int heads = q.heads, ranking = rules().ranking();
  const size_t cap = size_t(std::ceil(rules().ladder.max_share * double(pass.blocks)));
  uint32_t dense = 0;
  for (int round = 0;; ++round) {
    std::vector<uint32_t> keys, values;
    uint32_t mask = 0;
    for (int h = 0; h < heads; ++h) {
      if ((dense >> h & 1) != 0) continue;
      HeadReport& r = report().heads[size_t(h)];
      if (!std::isfinite(r.returned.out_norm)) {  // NaN or Inf in the pass: a broken precondition
        report().broken = true;
        return dense;
      }
      const bool holds = fits(r.returned);
      const auto undecided = ranking_unresolved(context, q, pass, h, blocks(), ranking);
      if (holds && undecided.empty()) continue;
      Promotions p;
      if (!holds)
        p = select_for_budget(pass, h, blocks(), r.returned, allowed(r.returned),
                              rules().ladder.value_share);
      p.keys = merge(p.keys, undecided);
      const size_t promoted =
          size_t(r.promoted_keys + r.promoted_values) + p.keys.size() + p.values.size();
      if (round >= rules().ladder.max_rounds || !p.enough || promoted > cap ||
          (p.keys.empty() && p.values.empty()) || p.keys.size() > state().key_quota ||
          p.values.size() > state().value_quota) {
        dense |= 1u << h;
        continue;
      }
      mask |= 1u << h;
      keys = merge(keys, p.keys);
      values = merge(values, p.values);
    }
    if (mask == 0) return dense;
    for (int h = 0; h < heads; ++h)
      if ((mask >> h & 1) != 0) count_promotions(pass, h, keys, values, &report().heads[size_t(h)]);
    if (!promote(keys, values, mask)) return report().broken ? dense : dense | mask;
    for (int h = 0; h < heads; ++h)
      if ((mask >> h & 1) != 0) report().heads[size_t(h)].returned = judge(h);
  }
}

// After a pass that skipped: false where a head is not certified, and the pass is to be run again
// without.
bool HeadStep::Impl::settle_skipping() {
  bool fit = true;
  for (int h = 0; h < q.heads; ++h)
    fit = fit && fits(report().heads[size_t(h)].returned) &&
          ranking_unresolved(context, q, pass, h, blocks(), rules().ranking()).empty();
  learn_pause(!fit, &state().skip);
  if (!fit) return false;
  for (size_t b = 0; b < pass.blocks; ++b)
    report().skipped_blocks += (pass.used[pass.at(0, b)] & kSkippedValue) != 0;
  return true;
}

// What the next step may skip: of each head its share of the tolerance, and no more than a part of
// what its bound leaves of it: bounds differ from step to step, and a wrong guess costs a pass.
// Heads that climbed are not to be made to climb higher: the next step reads everything.
void HeadStep::Impl::remember_for_skipping() {
  constexpr double kAim = 0.75;  // the next step's masses are a little different
  constexpr double kOfWhatIsLeft = 0.25;
  SkipGuess& guess = state().skip;
  guess.limits.clear();
  if (!skipping()) return;
  if (guess.pause > 0) {
    --guess.pause;
    return;
  }
  for (const HeadReport& r : report().heads)
    if (r.rung != 0 || r.outcome != Outcome::Certified) return;
  double spend[kMaxGroupHeads];
  for (int h = 0; h < q.heads; ++h) {
    const Certificate& c = report().heads[size_t(h)].returned;
    // What skipping has cost stands in the bound over den.
    const double left = (allowed(c) - c.bound) * c.den + skipped_cost(pass, h);
    const double share = rules().skip.share * allowed(c);
    spend[h] = std::max(0.0, std::min(kAim * share, kOfWhatIsLeft * left));
  }
  guess_skips(pass, blocks(), {spend, size_t(q.heads)}, &guess);
}

// Seeded random share of tail blocks, so that the canary sees the whole cache over time (method 7).
std::vector<uint32_t> HeadStep::Impl::explore() const {
  std::vector<uint32_t> chosen;
  if (!(rules().ladder.exploration > 0)) return chosen;
  for (uint32_t b = 0; b < pass.blocks; ++b) {
    const BlockRef& ref = blocks()[b];
    if (ref.page == nullptr || ref.k != nullptr || ref.v != nullptr) continue;
    if (counter_uniform(rules().exploration_seed, where, b) < rules().ladder.exploration)
      chosen.push_back(b);
  }
  return chosen;
}

// What the classes would have read at this step.
void HeadStep::Impl::forecast() {
  HeadClass& precision = state().precision;
  for (const HeadReport& r : report().heads)
    if (!std::isfinite(r.candidate.bound)) return;
  std::vector<Certificate> certificates;
  for (const HeadReport& r : report().heads) certificates.push_back(r.candidate);
  ClassForecast f(state());
  f.add(rules(), precision.ratios, precision.page_class(state().tier.format()), blocks(), pass,
        certificates);
  const std::array<double, kClasses> bytes = f.bytes();
  for (int i = 0; i < kClasses; ++i) {
    precision.forecast[size_t(i)] += bytes[size_t(i)];
    precision.base[size_t(i)] += f.base(i);
  }
  ++precision.forecasts;
}

// Policy paper: two phases; the candidate's pass was the scoring phase. Returns heads for rung 3.
uint32_t HeadStep::Impl::paper_phase_two() {
  const int heads = q.heads;
  const PaperOptions& o = rules().paper;
  const PaperRule rule{o.tau_cov, o.expand_tail, o.v_tol,
                       o.k_min,   o.k_max,       o.value_rule == "greedy"};
  std::vector<uint32_t> keys, values;
  std::vector<std::vector<double>> scored(static_cast<size_t>(heads));
  for (int h = 0; h < heads; ++h) {
    keys = merge(keys, select_paper_keys(pass, h, blocks(), rule));
    values = merge(values, select_paper_values(context, pass, h, blocks(), rule));
    for (size_t b = 0; b < pass.blocks; ++b)
      scored[size_t(h)].push_back(block_log_mass(pass, h, b));
  }
  const uint32_t everyone = (1u << heads) - 1;
  for (int h = 0; h < heads; ++h)
    count_promotions(pass, h, keys, values, &report().heads[size_t(h)]);
  if (!promote(keys, values, everyone)) return report().broken ? 0 : everyone;
  uint32_t dense = 0;
  for (int h = 0; h < heads; ++h) {
    report().heads[size_t(h)].returned = judge(h);
    const int r = rules().ranking();
    if (!ranking_unresolved(context, q, pass, h, blocks(), r).empty() ||
        !same_order_under_codes(pass, h, scored[size_t(h)], r))
      dense |= 1u << h;
  }
  return dense;
}

HeadStep::HeadStep() : impl_(std::make_unique<Impl>()) {}
HeadStep::~HeadStep() = default;
HeadStep::HeadStep(HeadStep&&) noexcept = default;
HeadStep& HeadStep::operator=(HeadStep&&) noexcept = default;

void HeadStep::begin(const StepRules& rules, const StepWhere& where, int heads, const float* q,
                     HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass,
                     GroupReport* report) {
  Impl& s = *impl_;
  s.start = std::chrono::steady_clock::now();
  s.pass_ns = 0;
  s.rules_ = &rules;
  s.where = where;
  s.state_ = state;
  s.originals_ = &originals;
  s.report_ = report;
  s.on_rung3 = false;
  s.skipping_seconds = 0;
  s.queries = q;
  s.out = out;
  s.log_mass_out = block_log_mass;
  report->clear(size_t(heads));
  report->attended_tokens = state->tier.tokens();
  s.all_dense = rules.policy == Policy::Dense;
  if (state->precision.formats != nullptr) report->precision = state->precision.now;
  if (state->precision.exact_now())
    s.all_dense = s.all_dense || !state->precision.forecasts_at(where);
  if (s.all_dense) {
    s.q.heads = heads;
    s.dense_pass.begin(where, heads, (1u << heads) - 1, q, state, originals);
    s.add_to_pass(s.start);
    return;
  }
  s.context = {&state->tier.format(), state->tier.dtype()};
  make_query_group(heads, state->tier.format().head_dim, q, &s.q);
  s.logs.assign(size_t(heads), {});
  if (rules.policy == Policy::Budget) {  // under the others the pass starts from codes alone
    report->f_blocks = state->keys.resident();
    report->x_blocks = state->values.resident();
    report->scratch_hits += report->f_blocks + report->x_blocks;
  }
  report->read_bytes += uint64_t(pass_read_bytes(state->tier, report->f_blocks, report->x_blocks));
  const std::vector<double>& limits = state->skip.limits;
  const bool skips = s.skipping() && limits.size() == size_t(heads);
  attend_begin(s.context, s.q, s.blocks(), {.skip = skips ? limits.data() : nullptr}, &s.pass);
  s.add_to_pass(s.start);
}

size_t HeadStep::splits() const {
  return impl_->dense_now() ? impl_->dense_pass.splits()
                            : attend_splits(impl_->context, impl_->blocks().size());
}

void HeadStep::attend(size_t first, size_t last) {
  Impl& s = *impl_;
  const auto start = std::chrono::steady_clock::now();
  if (s.dense_now())
    s.dense_pass.attend(first, last);
  else
    attend_some(s.context, s.q, s.blocks(), first, last, &s.pass);
  s.add_to_pass(start);
}

bool HeadStep::finish() {
  Impl& s = *impl_;
  GroupReport* report = s.report_;
  const int heads = s.q.heads;
  const Policy policy = s.rules().policy;
  const auto finishing = std::chrono::steady_clock::now();
  if (s.all_dense) {
    s.dense_pass.finish(3, s.out, s.log_mass_out, report);
    for (HeadReport& r : report->heads) r.candidate = r.returned;
    s.add_to_pass(finishing);
    report->pass_seconds = 1e-9 * double(s.pass_ns);
    return false;
  }
  if (s.on_rung3) {
    s.dense_pass.finish(3, s.out, nullptr, report);
    report->ladder_seconds += 1e-9 * double(s.pass_ns) + seconds_since(finishing);
    return false;
  }
  const uint32_t everyone = (1u << heads) - 1;
  attend_merge(&s.pass);
  const double merged = seconds_since(finishing);
  report->pass_seconds = 1e-9 * double(s.pass_ns) + merged;
  for (int h = 0; h < heads; ++h) {
    HeadReport& r = report->heads[size_t(h)];
    r.candidate = r.returned = s.judge(h);
    if (s.log_mass_out != nullptr)
      for (size_t b = 0; b < s.pass.blocks; ++b)
        s.log_mass_out[size_t(h) * s.pass.blocks + b] = float(block_log_mass(s.pass, h, b));
  }
  report->judge_seconds = seconds_since(finishing) - merged;
  if (s.pass.skips && !s.settle_skipping()) {  // once more, with every value
    s.pass_ns = 0;
    report->read_bytes +=
        uint64_t(pass_read_bytes(s.state().tier, report->f_blocks, report->x_blocks));
    attend_begin(s.context, s.q, s.blocks(), {}, &s.pass);
    s.skipping_seconds = report->pass_seconds + report->judge_seconds;
    return true;
  }
  report->pass_seconds += std::exchange(s.skipping_seconds, 0.0);
  const PageFormat& format = s.state().tier.format();
  report->read_bytes -=
      uint64_t(double(report->skipped_blocks) * format.block_tokens * format.value_bytes());
  if (policy == Policy::Budget && s.state().precision.forecasts_at(s.where)) s.forecast();

  uint32_t dense = 0;
  if (policy == Policy::Budget) {
    const std::vector<uint32_t> tail = s.explore();
    if (!tail.empty() && s.promote(tail, tail, everyone) && !report->broken)
      for (int h = 0; h < heads; ++h) report->heads[size_t(h)].returned = s.judge(h);
    if (!report->broken) dense = s.climb();
  } else if (policy == Policy::Paper) {
    dense = s.paper_phase_two();
  }
  if (policy == Policy::Naive)
    for (const HeadReport& r : report->heads)
      if (!std::isfinite(r.returned.out_norm)) report->broken = true;
  if (report->broken) {  // dense_step follows, on all ranks
    s.state().keys.unpin_all();
    s.state().values.unpin_all();
    return false;
  }

  const bool enforces = policy == Policy::Budget;
  for (int h = 0; h < heads; ++h) {
    HeadReport& r = report->heads[size_t(h)];
    r.outcome = s.fits(r.returned) ? Outcome::Certified : Outcome::Over;
    if (enforces && r.outcome == Outcome::Over) dense |= 1u << h;  // no fourth outcome
    if (s.where.audit != nullptr && (dense >> h & 1) == 0)
      capture_head(s.pass, h, s.logs[size_t(h)], h, s.where.audit);
  }
  if (policy != Policy::Naive) {
    std::array<double, kMaxGroupHeads> allowed;
    for (int h = 0; h < heads; ++h)
      allowed[size_t(h)] = s.allowed(report->heads[size_t(h)].returned);
    learn(s.context, s.pass, s.blocks(), {allowed.data(), size_t(heads)}, policy == Policy::Paper,
          s.state_);
  }
  s.remember_for_skipping();
  s.on_rung3 = dense != 0;
  if (s.on_rung3) {
    s.pass_ns = 0;
    s.dense_pass.begin(s.where, heads, dense, s.queries, s.state_, *s.originals_);
  }
  report->ladder_seconds = seconds_since(finishing) - merged - report->judge_seconds;
  return s.on_rung3;
}

void head_step(const StepRules& rules, const StepWhere& where, int heads, const float* q,
               HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass,
               GroupReport* report) {
  thread_local HeadStep step;
  step.begin(rules, where, heads, q, state, originals, out, block_log_mass, report);
  do step.attend(0, step.splits());
  while (step.finish());
}

}  // namespace certkv
