#include "runtime/bench/attention_bench.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "runtime/bench/bench_layer.h"
#include "runtime/bench/layer_runner.h"
#include "runtime/bench/memory_bandwidth.h"

namespace certkv {
namespace {

constexpr DType kDtype = DType::F16;  // of the originals
constexpr uint64_t kAssumedCache = uint64_t(32) << 20;
constexpr uint64_t kBeyondCache = 4;  // what rotates, and what is copied, is so many caches large
constexpr int kWarmUpSteps = 8;
constexpr size_t kCorrectedBlocks = 16;
constexpr int kRung3Every = 20;  // head-steps: 5 %

double quantile(const std::vector<double>& sorted, double p) {
  const double at = p * double(sorted.size() - 1);
  const size_t i = std::min(size_t(at), sorted.size() - 1), j = std::min(i + 1, sorted.size() - 1);
  return sorted[i] + (at - double(i)) * (sorted[j] - sorted[i]);
}

uint64_t cache_bytes(const AttentionBenchOptions& o) {
  return o.cache_bytes > 0 ? o.cache_bytes : kAssumedCache;
}

size_t tokens_of(const PageFormat& format, int64_t context) {
  const size_t group = size_t(format.group_tokens);
  return size_t(context) / group * group + group / 2;
}

size_t sets_of(const AttentionBenchOptions& o, const PageFormat& format, size_t tokens) {
  const double read = double(o.batch) * o.kv_heads * double(tokens) *
                      std::min(format.bytes_per_token(), 4.0 * format.head_dim);
  return 1 + size_t(std::ceil(double(kBeyondCache * cache_bytes(o)) / read));
}

// One case under measurement.
class Bench {
 public:
  Bench(const AttentionBenchOptions& options, std::shared_ptr<const PageFormat> format,
        int64_t context, size_t sets);
  void warm_up();
  AttentionCase run();

 private:
  using Samples = std::vector<double>;
  BenchLayer& next() { return sets_[turn_++ % sets_.size()]; }
  StepRules rules(Policy policy) const;
  const float* queries(size_t task, size_t step) const;
  // Runs body(task, head) for every KV head of a layer on the pool; returns microseconds.
  std::vector<HeadTask> tasks(BenchLayer& layer, HeadState BenchHead::*state) const;
  double step(Policy policy, BenchLayer& layer, HeadState BenchHead::*state);
  void count(const BenchLayer& layer, AttentionCase* c) const;

  double dense(bool verify);
  double cold();
  LayerRunner::Correction correction();
  double ladder();

  const AttentionBenchOptions& o_;
  std::shared_ptr<const PageFormat> format_;
  ThreadPool pool_;
  int per_group_;
  size_t tasks_, turn_ = 0, step_ = 0;
  std::vector<SyntheticHead> data_;  // [batch, kv_heads]; k and v are given up once copied
  std::vector<BenchLayer> sets_;
  MemoryBandwidth memory_;
  LayerRunner runner_;
  int64_t asked_;
};

Bench::Bench(const AttentionBenchOptions& options, std::shared_ptr<const PageFormat> format,
             int64_t context, size_t sets)
    : o_(options),
      format_(std::move(format)),
      pool_(options.threads),
      per_group_(options.query_heads / options.kv_heads),
      tasks_(size_t(options.batch) * size_t(options.kv_heads)),
      memory_(kBeyondCache * cache_bytes(options), pool_),
      runner_(format_, kDtype, per_group_, pool_),
      asked_(context) {
  data_.resize(tasks_);
  const SyntheticShape shape{.kind = o_.heads,
                             .dtype = kDtype,
                             .query_heads = per_group_,
                             .head_dim = o_.head_dim,
                             .tokens = tokens_of(*format_, context)};
  pool_.parallel_for(
      tasks_, [&](size_t i) { data_[i] = make_synthetic_head(shape, o_.seed * 1000003 + i); });
  sets_.resize(sets);
  pool_.parallel_for(sets, [&](size_t i) {
    sets_[i] = make_bench_layer(format_, kDtype, data_, size_t(o_.scratch.key_blocks / o_.kv_heads),
                                size_t(o_.scratch.value_blocks / o_.kv_heads));
  });
  for (SyntheticHead& h : data_) h.k = h.v = {};
  for (BenchLayer& layer : sets_)
    for (auto& head : layer.heads) head->out.resize(size_t(per_group_ * o_.head_dim));
}

StepRules Bench::rules(Policy policy) const {
  return {.policy = policy,
          .tolerance = o_.tolerance,
          .paper = o_.paper,
          .ladder = o_.ladder,
          .skip = o_.skip};
}

const float* Bench::queries(size_t task, size_t step) const {
  const size_t row = size_t(per_group_ * o_.head_dim), steps = data_[task].q.size() / row;
  return data_[task].q.data() + step % steps * row;
}

std::vector<HeadTask> Bench::tasks(BenchLayer& layer, HeadState BenchHead::*state) const {
  std::vector<HeadTask> out;
  for (size_t i = 0; i < tasks_; ++i) {
    BenchHead& head = *layer.heads[i];
    out.push_back({.head = &head, .state = &(head.*state), .q = queries(i, step_)});
  }
  return out;
}

double Bench::step(Policy policy, BenchLayer& layer, HeadState BenchHead::*state) {
  const double us = runner_.step(rules(policy), step_, tasks(layer, state));
  count(layer, nullptr);
  return us;
}

void Bench::count(const BenchLayer& layer, AttentionCase* c) const {
  for (const auto& head : layer.heads) {
    const GroupReport& g = head->report;
    CERTKV_EXPECT(!g.broken, Uncertifiable, "a measured step broke: its time would mean nothing");
    for (const HeadReport& r : g.heads) {
      CERTKV_EXPECT(r.outcome != Outcome::Failed, Uncertifiable, "a measured head-step failed");
      if (c == nullptr) continue;
      ++c->rungs[size_t(r.rung)];
      c->over_tolerance += r.outcome == Outcome::Over;
    }
    if (c == nullptr) continue;
    c->f_blocks += double(g.f_blocks);
    c->x_blocks += double(g.x_blocks);
    c->skipped_blocks += double(g.skipped_blocks);
    c->certified_bytes +=
        certified_read_bytes(head->budget, double(g.f_blocks), double(g.x_blocks)) -
        value_plane_bytes(*format_, double(g.skipped_blocks));
  }
}

void Bench::warm_up() {
  for (BenchLayer& layer : sets_)
    for (int i = 0; i < kWarmUpSteps; ++i) {
      ++step_;
      step(Policy::Paper, layer, &BenchHead::paper);
      step(Policy::Naive, layer, &BenchHead::naive);
      step(Policy::Budget, layer, &BenchHead::budget);
    }
}

double Bench::dense(bool verify) {
  BenchLayer& layer = next();
  for (auto& head : layer.heads) head->originals.set_verify(verify);
  const double us = step(Policy::Dense, layer, &BenchHead::sealed);
  for (auto& head : layer.heads) head->originals.set_verify(true);
  return us;
}

double Bench::cold() {
  BenchLayer& layer = next();
  std::vector<HeadState> fresh;
  for (auto& head : layer.heads) fresh.push_back(head->sealed.fork());
  std::vector<HeadTask> work = tasks(layer, &BenchHead::sealed);
  for (size_t i = 0; i < tasks_; ++i) work[i].state = &fresh[i];
  const double us = runner_.step(rules(Policy::Budget), step_, work);
  count(layer, nullptr);
  return us;
}

// A correction follows its pass, on all KV heads; only the correction is timed.
LayerRunner::Correction Bench::correction() {
  const std::vector<HeadTask> work = tasks(next(), &BenchHead::budget);
  runner_.pass(work, true);
  return runner_.correct(work[0], kCorrectedBlocks);
}

// So many layer steps in a row that 5 % of their head-steps are a whole number.
double Bench::ladder() {
  const int heads = o_.batch * o_.query_heads, steps = kRung3Every / std::gcd(kRung3Every, heads);
  double us = 0;
  for (int i = 0; i < steps; ++i) {
    BenchLayer& layer = next();
    std::vector<HeadTask> work = tasks(layer, &BenchHead::budget);
    for (int h = 0; h < heads; ++h)
      if ((i * heads + h) % kRung3Every == kRung3Every / 2)
        work[size_t(h / per_group_)].rung3 |= 1u << (h % per_group_);
    us += runner_.step(rules(Policy::Budget), step_, work);
    count(layer, nullptr);
    ++step_;
  }
  return us / steps;
}

AttentionCase Bench::run() {
  AttentionCase c;
  c.layout = format_->layout.name;
  c.context = asked_;
  c.tokens = tokens_of(*format_, asked_);
  c.sets = sets_.size();
  c.bytes_per_token = format_->bytes_per_token();
  Samples dense_us, verified_us, certified_us, pass_us, bare_us, cold_us, correction_us,
      read_back_us, canary_us, paper_us, naive_us, ladder_us, copy, streaming, read;
  for (int i = 0; i < o_.repeats; ++i) {
    ++step_;
    ++turn_;  // no measurement meets the same set at every repeat
    dense_us.push_back(dense(false));
    BenchLayer& layer = next();
    certified_us.push_back(step(Policy::Budget, layer, &BenchHead::budget));
    count(layer, &c);
    pass_us.push_back(*runner_.pass(tasks(next(), &BenchHead::budget), true));
    if (const auto us = runner_.pass(tasks(next(), &BenchHead::budget), false))
      bare_us.push_back(*us);
    cold_us.push_back(cold());
    const LayerRunner::Correction corrected = correction();
    correction_us.push_back(corrected.all);
    read_back_us.push_back(corrected.read);
    canary_us.push_back(corrected.canary);
    paper_us.push_back(step(Policy::Paper, next(), &BenchHead::paper));
    naive_us.push_back(step(Policy::Naive, next(), &BenchHead::naive));
    ladder_us.push_back(ladder());
    verified_us.push_back(dense(true));
    copy.push_back(memory_.copy_gbps());
    streaming.push_back(memory_.copy_streaming_gbps());
    read.push_back(memory_.read_gbps());
  }
  c.steps = size_t(o_.repeats);
  c.dense = timing_of(dense_us);
  c.dense_verified = timing_of(verified_us);
  c.certified = timing_of(certified_us);
  c.pass = timing_of(pass_us);
  if (!bare_us.empty()) c.uncertified_pass = timing_of(bare_us);
  c.cold = timing_of(cold_us);
  c.correction = timing_of(correction_us);
  c.correction_read = timing_of(read_back_us);
  c.correction_canary = timing_of(canary_us);
  c.paper = timing_of(paper_us);
  c.naive = timing_of(naive_us);
  c.ladder = timing_of(ladder_us);
  c.copy_gbps = timing_of(copy).us;
  c.copy_streaming_gbps = timing_of(streaming).us;
  c.read_gbps = timing_of(read).us;
  c.dense_bytes = double(tasks_) * dense_read_bytes(*format_, c.tokens);
  c.certified_bytes /= double(c.steps);
  c.f_blocks /= double(c.steps * tasks_);
  c.x_blocks /= double(c.steps * tasks_);
  c.skipped_blocks /= double(c.steps * tasks_);
  return c;
}

void check(const AttentionBenchOptions& o, int64_t context) {
  CERTKV_EXPECT(
      o.kv_heads >= 1 && o.query_heads >= 1 && o.query_heads % o.kv_heads == 0 &&
          o.query_heads / o.kv_heads <= kMaxGroupHeads,
      InvalidArgument,
      "{} query heads over {} KV heads: the latter must divide the former, at most {} to one",
      o.query_heads, o.kv_heads, kMaxGroupHeads);
  CERTKV_EXPECT(o.batch >= 1 && o.repeats >= 1 && o.threads >= 1, InvalidArgument,
                "batch {}, repeats {}, threads {}: at least 1 of each is needed", o.batch,
                o.repeats, o.threads);
  CERTKV_EXPECT(context >= 1024, InvalidArgument,
                "a context of {} tokens: at least 1024 are needed", context);
}

}  // namespace

Timing timing_of(std::vector<double> samples) {
  CERTKV_EXPECT(!samples.empty(), InvalidArgument, "no samples were taken");
  std::sort(samples.begin(), samples.end());
  const double median = quantile(samples, 0.5);
  return {median, (quantile(samples, 0.9) - quantile(samples, 0.1)) / median};
}

std::optional<double> AttentionCase::certificate_share() const {
  if (!uncertified_pass) return std::nullopt;
  return (pass.us - uncertified_pass->us) / pass.us;
}

uint64_t attention_bench_bytes(const AttentionBenchOptions& o, const std::string& layout,
                               int64_t context) {
  check(o, context);
  const PageFormat format = make_page_format(layout_by_name(layout), o.head_dim, o.block_tokens);
  const size_t tokens = tokens_of(format, context);
  const double originals = 4.0 * double(tokens) * o.head_dim;
  const double scratch =
      3 * std::min(originals, double(o.scratch.key_blocks + o.scratch.value_blocks) / o.kv_heads *
                                  o.block_tokens * o.head_dim * 2);
  const double each =
      double(o.batch) * o.kv_heads *
      (originals + double(format.page_bytes) * double(tokens) / format.group_tokens + scratch);
  return uint64_t(double(1 + sets_of(o, format, tokens)) * each) +
         2 * kBeyondCache * cache_bytes(o);
}

AttentionCase bench_attention(const AttentionBenchOptions& options, const std::string& layout,
                              int64_t context,
                              const std::function<void(const std::string&)>& progress) {
  check(options, context);
  const auto format = std::make_shared<const PageFormat>(
      make_page_format(layout_by_name(layout), options.head_dim, options.block_tokens));
  const size_t sets = sets_of(options, *format, tokens_of(*format, context));
  const auto say = [&](const std::string& what) {
    if (progress) progress(fmt::format("{} tokens, layout {}: {}", context, layout, what));
  };
  say(fmt::format("making {} sets of synthetic heads", sets));
  Bench bench(options, format, context, sets);
  say("warming up");
  bench.warm_up();
  say(fmt::format("measuring, {} repeats", options.repeats));
  return bench.run();
}

}  // namespace certkv
