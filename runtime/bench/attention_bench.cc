#include "runtime/bench/attention_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "runtime/bench/bench_layer.h"
#include "runtime/bench/memory_bandwidth.h"
#include "runtime/certify/canary.h"

namespace certkv {
namespace {

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
  template <typename Body>
  double timed(BenchLayer& layer, const Body& body);
  void step(Policy policy, size_t task, BenchHead& head, HeadState* state);
  void count(const BenchLayer& layer, AttentionCase* c) const;

  double dense(bool verify);
  double certified(AttentionCase* c);
  double pass(bool certificate);
  double cold();
  double correction();
  double other(Policy policy);
  double ladder();

  const AttentionBenchOptions& o_;
  std::shared_ptr<const PageFormat> format_;
  ThreadPool pool_;
  int per_group_;
  size_t tasks_, turn_ = 0, step_ = 0;
  std::vector<SyntheticHead> data_;  // [batch, kv_heads]; k and v are given up once copied
  std::vector<BenchLayer> sets_;
  MemoryBandwidth memory_;
  AttendContext context_;
  int64_t asked_;
  // Of a correction, which runs in one thread.
  std::vector<uint16_t> corrected_k_, corrected_v_;
  BlockTerms before_, after_;
};

Bench::Bench(const AttentionBenchOptions& options, std::shared_ptr<const PageFormat> format,
             int64_t context, size_t sets)
    : o_(options),
      format_(std::move(format)),
      pool_(options.threads),
      per_group_(options.query_heads / options.kv_heads),
      tasks_(size_t(options.batch) * size_t(options.kv_heads)),
      memory_(kBeyondCache * cache_bytes(options), pool_),
      context_{format_.get(), DType::F16},
      asked_(context) {
  data_.resize(tasks_);
  const SyntheticShape shape{.kind = o_.heads,
                             .dtype = context_.dtype,
                             .query_heads = per_group_,
                             .head_dim = o_.head_dim,
                             .tokens = tokens_of(*format_, context)};
  pool_.parallel_for(
      tasks_, [&](size_t i) { data_[i] = make_synthetic_head(shape, o_.seed * 1000003 + i); });
  sets_.resize(sets);
  pool_.parallel_for(sets, [&](size_t i) {
    sets_[i] = make_bench_layer(format_, context_.dtype, data_,
                                size_t(o_.scratch.key_blocks / o_.kv_heads),
                                size_t(o_.scratch.value_blocks / o_.kv_heads));
  });
  for (SyntheticHead& h : data_) h.k = h.v = {};
  for (BenchLayer& layer : sets_)
    for (auto& head : layer.heads) head->out.resize(size_t(per_group_ * o_.head_dim));
  const size_t elements = kCorrectedBlocks * size_t(format_->block_tokens * o_.head_dim);
  corrected_k_.resize(elements);
  corrected_v_.resize(elements);
}

StepRules Bench::rules(Policy policy) const {
  return {.policy = policy, .tolerance = o_.tolerance, .paper = o_.paper, .ladder = o_.ladder};
}

const float* Bench::queries(size_t task, size_t step) const {
  const size_t row = size_t(per_group_ * o_.head_dim), steps = data_[task].q.size() / row;
  return data_[task].q.data() + step % steps * row;
}

template <typename Body>
double Bench::timed(BenchLayer& layer, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  pool_.parallel_for(tasks_, [&](size_t task) { body(task, *layer.heads[task]); });
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

void Bench::step(Policy policy, size_t task, BenchHead& head, HeadState* state) {
  const StepWhere where{0, 0, int(task), step_};
  head_step(rules(policy), where, per_group_, queries(task, step_), state, head.originals,
            head.out.data(), nullptr, &head.report);
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
    c->certified_bytes +=
        certified_read_bytes(head->budget, double(g.f_blocks), double(g.x_blocks));
  }
}

void Bench::warm_up() {
  for (BenchLayer& layer : sets_)
    for (int i = 0; i < kWarmUpSteps; ++i) {
      ++step_;
      timed(layer, [&](size_t task, BenchHead& head) {
        step(Policy::Paper, task, head, &head.paper);
        step(Policy::Naive, task, head, &head.naive);
        step(Policy::Budget, task, head, &head.budget);
      });
      count(layer, nullptr);
    }
}

double Bench::dense(bool verify) {
  BenchLayer& layer = next();
  for (auto& head : layer.heads) head->originals.set_verify(verify);
  const double us = timed(
      layer, [&](size_t task, BenchHead& head) { step(Policy::Dense, task, head, &head.sealed); });
  for (auto& head : layer.heads) head->originals.set_verify(true);
  count(layer, nullptr);
  return us;
}

double Bench::certified(AttentionCase* c) {
  BenchLayer& layer = next();
  const double us = timed(
      layer, [&](size_t task, BenchHead& head) { step(Policy::Budget, task, head, &head.budget); });
  count(layer, c);
  return us;
}

// The pass as the certified step runs it, over the same snapshot.
double Bench::pass(bool certificate) {
  if (!certificate) return std::nan("");  // the kernels cannot leave the certificate's sums out
  return timed(next(), [&](size_t task, BenchHead& head) {
    const QueryGroup q = make_query_group(per_group_, o_.head_dim, queries(task, step_));
    attend_pass(context_, q, head.budget.tier.blocks(), head.budget.centre.data(), &head.pass);
  });
}

double Bench::cold() {
  BenchLayer& layer = next();
  std::vector<HeadState> fresh;
  for (auto& head : layer.heads) {
    fresh.push_back(head->sealed.fork());
    std::fill(fresh.back().centre.begin(), fresh.back().centre.end(), 0.0f);
  }
  const double us = timed(
      layer, [&](size_t task, BenchHead& head) { step(Policy::Budget, task, head, &fresh[task]); });
  count(layer, nullptr);
  return us;
}

double Bench::correction() {
  BenchLayer& layer = next();
  // A correction follows its pass, on all KV heads; only the correction is timed.
  std::vector<QueryGroup> q;
  for (size_t task = 0; task < tasks_; ++task)
    q.push_back(make_query_group(per_group_, o_.head_dim, queries(task, step_)));
  timed(layer, [&](size_t task, BenchHead& head) {
    attend_pass(context_, q[task], head.budget.tier.blocks(), head.budget.centre.data(),
                &head.pass);
  });
  BenchHead& head = *layer.heads[0];
  const std::span<const BlockRef> blocks = head.budget.tier.blocks();
  std::vector<uint32_t> chosen;  // none of F and X among them
  for (size_t b = 0; b < blocks.size(); ++b)
    if (blocks[b].page != nullptr && blocks[b].k == nullptr && blocks[b].v == nullptr)
      chosen.push_back(uint32_t(b));
  CERTKV_EXPECT(chosen.size() >= kCorrectedBlocks, InvalidArgument,
                "a context of {} tokens has no {} blocks to correct outside F and X", asked_,
                kCorrectedBlocks);
  for (size_t i = 0; i < kCorrectedBlocks; ++i)  // spread over the context
    chosen[i] = chosen[i * chosen.size() / kCorrectedBlocks];
  chosen.resize(kCorrectedBlocks);
  std::vector<CorrectionLog> logs(static_cast<size_t>(per_group_));
  std::vector<Destination> to(chosen.size());
  std::vector<BlockResult> results;
  const size_t rows = size_t(format_->block_tokens * o_.head_dim);
  bool sound = true;

  const auto start = std::chrono::steady_clock::now();
  for (size_t i = 0; i < chosen.size(); ++i)
    to[i] = {.k = corrected_k_.data() + i * rows, .v = corrected_v_.data() + i * rows};
  head.originals.read(chosen, to, &results);
  for (size_t i = 0; i < chosen.size(); ++i) {
    const BlockRef& was = blocks[chosen[i]];
    BlockRef now = was;
    now.k = results[i].k;
    now.v = results[i].v;
    sound = correct_block(context_, q[0], chosen[i], was, now, 1, &head.pass, logs, &before_,
                          &after_) &&
            canary(context_, per_group_, before_, after_, was, now).ok && sound;
  }
  finish_output(head.pass, 0, head.out.data());
  const Certificate judged = certify(context_, head.pass, 0, blocks, logs[0], head.out.data());
  const double us =
      std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  CERTKV_EXPECT(sound && std::isfinite(judged.bound), Uncertifiable,
                "a measured correction was refused or its bound is {}", judged.bound);
  return us;
}

double Bench::other(Policy policy) {
  BenchLayer& layer = next();
  const double us = timed(layer, [&](size_t task, BenchHead& head) {
    step(policy, task, head, policy == Policy::Paper ? &head.paper : &head.naive);
  });
  count(layer, nullptr);
  return us;
}

// So many layer steps in a row that 5 % of their head-steps are a whole number.
double Bench::ladder() {
  const int heads = o_.batch * o_.query_heads, steps = kRung3Every / std::gcd(kRung3Every, heads);
  double us = 0;
  for (int i = 0; i < steps; ++i) {
    std::vector<uint32_t> exact(tasks_, 0);  // heads of each KV head that go to rung 3
    for (int h = 0; h < heads; ++h)
      if ((i * heads + h) % kRung3Every == kRung3Every / 2)
        exact[size_t(h / per_group_)] |= 1u << (h % per_group_);
    BenchLayer& layer = next();
    us += timed(layer, [&](size_t task, BenchHead& head) {
      step(Policy::Budget, task, head, &head.budget);
      if (exact[task] != 0)
        dense_step({0, 0, int(task), step_}, per_group_, exact[task], 3, queries(task, step_),
                   &head.budget, head.originals, head.out.data(), nullptr, &head.report);
    });
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
  Samples dense_us, verified_us, certified_us, pass_us, bare_us, cold_us, correction_us, paper_us,
      naive_us, ladder_us, copy, streaming, read;
  for (int i = 0; i < o_.repeats; ++i) {
    ++step_;
    ++turn_;  // no measurement meets the same set at every repeat
    dense_us.push_back(dense(false));
    certified_us.push_back(certified(&c));
    pass_us.push_back(pass(true));
    bare_us.push_back(pass(false));
    cold_us.push_back(cold());
    correction_us.push_back(correction());
    paper_us.push_back(other(Policy::Paper));
    naive_us.push_back(other(Policy::Naive));
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
  if (std::all_of(bare_us.begin(), bare_us.end(), [](double x) { return std::isfinite(x); }))
    c.uncertified_pass = timing_of(bare_us);
  c.cold = timing_of(cold_us);
  c.correction = timing_of(correction_us);
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
