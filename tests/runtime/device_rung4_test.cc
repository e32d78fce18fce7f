// Rung 4 over several ranks of the device's backend: a canary that fails on one rank sends the
// layer to dense attention on all, for its row alone, as on the CPU backend; every token is
// appended, every page sealed and every block learned of once. Thread ranks on emulated devices.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/quantize.h"
#include "runtime/certified_cache.h"
#include "runtime/device/device_transformer.h"
#include "runtime/transformer.h"
#include "tests/runtime/device_scrub_rank.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"

namespace certkv {
namespace {

using scrub_test::CountingOps;

constexpr int kLayers = 3, kHitLayer = 1, kHitHead = 3;  // of 4 KV heads: the last rank's
constexpr size_t kPrompt = 64 * 3 + 60, kSteps = 6;      // the fourth step fills a page
constexpr int64_t kAnswer = 80;
constexpr size_t kHitRow = 1, kRows = 2;
constexpr double kTolerance = 0.08;  // of random weights: every head promotes, and that does
constexpr uint64_t kSeed = 11;

ModelConfig three_layers() {
  ModelConfig c = test::random_model_config();
  c.layers = kLayers;
  return c;
}

std::vector<int32_t> prompt(int64_t id) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < kPrompt; ++i) ids.push_back(int32_t((i * i * 31 + size_t(id) * 7) % 101));
  return ids;
}

CertifiedCacheOptions cache_options(int64_t scrub_steps) {
  CertifiedCacheOptions o;
  o.cache.layout = "compact";
  o.cache.scrub_steps = scrub_steps;
  o.scratch.key_blocks = o.scratch.value_blocks = 128;
  o.dtype = DType::BF16;
  return o;
}

StepRules budget(double prefetch = 0) {
  StepRules r;
  r.policy = Policy::Budget;
  r.tolerance.value = kTolerance;
  r.ladder.max_share = 1;
  r.ladder.prefetch = prefetch;
  return r;
}

// What all ranks make of the steps.
struct Head {
  int rung = -1;
  Outcome outcome = Outcome::Failed;
  double bound = 0, candidate = 0;
  int64_t promoted = 0;
  bool operator==(const Head&) const = default;
};
struct Group {
  uint64_t paged = 0, f_blocks = 0, x_blocks = 0, prefetched = 0, canary = 0;
  bool operator==(const Group&) const = default;
};
struct Step {
  std::vector<float> logits;
  std::vector<int> fallback_layers;
  std::map<std::array<int, 4>, Head> heads;  // row, layer, KV head, query head
  std::map<std::array<int, 3>, Group> groups;
  uint64_t canary[kRows] = {}, digest = 0, failed = 0;
  bool operator==(const Step&) const = default;
};
using Steps = std::vector<Step>;

class Recorder {
 public:
  explicit Recorder(size_t steps) : run(steps) {}
  void keep(size_t step, const SequenceCache& cache, std::span<const int64_t> rows,
            ShardRange heads, const DecodeOutput& out) {
    std::lock_guard lock(mutex_);
    Step& to = run[step];
    if (!to.logits.empty()) {
      EXPECT_EQ(to.logits, out.logits) << "ranks disagree";
      EXPECT_EQ(to.fallback_layers, out.fallback_layers) << "ranks disagree";
    }
    to.logits = out.logits;
    to.fallback_layers = out.fallback_layers;
    const int of_rank = int(heads.count());
    for (size_t row = 0; row < rows.size(); ++row) {
      const SequenceReport& report = cache.report(rows[row]);
      EXPECT_FALSE(report.error.has_value()) << report.error_text;
      EXPECT_EQ(report.damaged_pages, 0u);
      for (size_t cell = 0; cell < report.layers.size(); ++cell) {
        const GroupReport& g = report.layers[cell];
        to.canary[row] += g.canary;
        to.digest += g.digest;
        const int layer = int(cell) / of_rank, kv = int(heads.begin) + int(cell) % of_rank;
        to.groups[{int(row), layer, kv}] = {g.paged_bytes, g.f_blocks, g.x_blocks, g.prefetched,
                                            g.canary};
        for (size_t h = 0; h < g.heads.size(); ++h)
          to.heads[{int(row), layer, kv, int(h)}] = {
              g.heads[h].rung, g.heads[h].outcome, g.heads[h].returned.bound,
              g.heads[h].candidate.bound, g.heads[h].promoted_keys + g.heads[h].promoted_values};
      }
      to.failed += cache.verdict(rows[row]).sum.failed;
    }
  }
  void behind(const std::map<std::string, int>& calls) {
    std::lock_guard lock(mutex_);
    for (const auto& [what, count] : calls) behind_halt[what] += count;
  }
  Steps run;
  std::map<std::string, int> behind_halt;  // of all ranks

 private:
  std::mutex mutex_;
};

// Prompts, forks and steps, whatever the backend. Tokens are given, so that runs stay comparable.
template <typename Cache, typename Forward>
void decode(Cache& cache, Forward& forward, ShardRange heads, Recorder* recorder,
            const StepRules& rules, const std::function<void(int64_t prompt_id)>& before_prefill,
            const std::function<void(int64_t fork)>& after_fork) {
  std::vector<int64_t> rows;
  for (int64_t id : {0, 1}) {
    if (before_prefill) before_prefill(id);
    const int64_t handle = cache.create(int64_t(kPrompt), id, kAnswer);
    forward.prefill(handle, prompt(id));
    rows.push_back(cache.fork(handle, kAnswer, rules));
    if (after_fork && id == int64_t(kHitRow)) after_fork(rows.back());
    cache.drop(handle);
  }
  for (size_t step = 0; step < recorder->run.size(); ++step) {
    cache.begin_step(step, rows);
    std::vector<DecodeInput> in;
    for (size_t r = 0; r < kRows; ++r)
      in.push_back({rows[r], int32_t((step * 13 + r * 50) % 101), int64_t(kPrompt + step), {}});
    const DecodeOutput out = forward.decode(in);
    EXPECT_EQ(out.nonfinite_layer, (std::vector{-1, -1}));
    cache.end_step();
    recorder->keep(step, cache, rows, heads, out);
  }
  for (const int64_t row : rows) {
    EXPECT_EQ(cache.close(row), 0u);
    cache.drop(row);
  }
}

// The promise of a quarter of the values' norms: whatever the head promotes breaks it.
Steps on_cpu(int tensor) {
  const ModelConfig config = three_layers();
  test::ThreadHolder store(uint64_t(64) << 20);
  Recorder recorder(kSteps);
  run_thread_ranks(tensor, [&](Communicator& group) {
    const ShardRange heads = kv_heads_of_rank(config.kv_heads, tensor, group.rank());
    const Weights weights = test::random_weights(config, tensor, group.rank(), kSeed);
    ThreadPool pool(1);
    CertifiedCache cache(config, heads, cache_options(0), pool, store.attach(group.rank()), group);
    Transformer forward(config, weights, group, cache, pool, {false, DType::BF16});
    decode(cache, forward, heads, &recorder, budget(), {}, [&](int64_t fork) {
      if (kHitHead < heads.begin || kHitHead >= heads.end) return;
      const size_t cell = size_t(kHitLayer * heads.count() + kHitHead - heads.begin);
      const auto blocks = cache.heads(fork)[cell].tier.blocks();
      for (size_t b = 0; b < blocks.size(); b += 4) {
        if (blocks[b].page == nullptr) continue;
        auto* page = const_cast<std::byte*>(blocks[b].page);
        auto* notes = reinterpret_cast<BlockAnnotations*>(page + cache.format().annotations);
        for (int n = 0; n < cache.format().blocks(); ++n) notes[n].nu *= 0.25f;
      }
    });
  });
  return recorder.run;
}

// What is enqueued behind a halt leaves the sequences as they are: compares all that it might
// write.
class GuardedOps final : public CountingOps {
 public:
  using CountingOps::CountingOps;
  std::map<std::string, int> behind;  // calls

  void append(const cuda::AppendArgs& a) override {
    guard(
        "append", a.halt, [&] { return tables(a); }, [&] { CountingOps::append(a); });
  }
  void climb(const cuda::LadderArgs& a) override {
    ladder("climb", a, [&] { CountingOps::climb(a); });
  }
  void page_in(const cuda::LadderArgs& a) override {
    ladder("page_in", a, [&] { CountingOps::page_in(a); });
  }
  void list_dense(const cuda::LadderArgs& a) override {
    ladder("list_dense", a, [&] { CountingOps::list_dense(a); });
  }
  void learn(const cuda::LadderArgs& a) override {
    ladder("learn", a, [&] { CountingOps::learn(a); });
  }
  void explore(const cuda::LadderArgs& a) override {
    ladder("explore", a, [&] { CountingOps::explore(a); });
  }
  void forget(const cuda::LadderArgs& a) override {
    ladder("forget", a, [&] { CountingOps::forget(a); });
  }
  void rank(const cuda::LadderArgs& a, const cuda::PaperArgs& p) override {
    ladder("rank", a, [&] { CountingOps::rank(a, p); });
  }
  void select_paper(const cuda::LadderArgs& a, const cuda::PaperArgs& p) override {
    ladder("select_paper", a, [&] { CountingOps::select_paper(a, p); });
  }
  void prefetch(const cuda::LadderArgs& a, double share) override {
    ladder("prefetch", a, [&] { CountingOps::prefetch(a, share); });
  }

 private:
  using Bytes = std::vector<std::byte>;
  template <typename T>
  static void take(Bytes* to, const T* from, size_t count) {
    const auto* bytes = reinterpret_cast<const std::byte*>(from);
    to->insert(to->end(), bytes, bytes + count * sizeof(T));
  }
  static Bytes tables(const cuda::AppendArgs& a) {
    Bytes all;
    for (int i = 0; i < a.rows * a.kv_heads; ++i) {
      const cuda::AppendItem& item = a.items[i];
      take(&all, item.keys, size_t(64 * a.head_dim) * 2);
      take(&all, item.values, size_t(64 * a.head_dim) * 2);
      take(&all, item.entries, 4);
      take(&all, item.k_norm, 16);
      take(&all, item.open_nu, 16);
      take(&all, item.scaled, size_t(a.heads * a.head_dim));
    }
    return all;
  }
  static Bytes tables(const cuda::LadderArgs& a) {
    Bytes all;
    for (int i = 0; i < a.count; ++i) {
      const cuda::LadderItem& item = a.items[i];
      const size_t pages = size_t(item.coded_pages) + 4;
      take(&all, item.pages, pages);
      take(&all, item.free_count, 2);
      take(&all, item.counts, 1);
      for (int part = 0; part < 2; ++part) {
        take(&all, item.slot_of[part], pages * 4);
        take(&all, item.block_of[part], size_t(item.quota[part]));
        take(&all, item.free_slots[part], size_t(item.quota[part]));
        take(&all, item.score[part], size_t(item.quota[part]));
      }
    }
    return all;
  }
  template <typename Body>
  void ladder(const char* what, const cuda::LadderArgs& a, Body body) {
    guard(
        what, a.halt, [&] { return tables(a); }, body);
  }
  template <typename Tables, typename Body>
  void guard(const char* what, const cuda::Halt& halt, Tables tables_now, Body body) {
    if (!halt.passed()) return body();
    ++behind[what];
    const Bytes before = tables_now();
    body();
    EXPECT_TRUE(tables_now() == before) << what << " acts behind a halt";
  }
};

// Thread ranks over an emulated device; a group that refuses captures enqueues every step anew.
struct Ranks final : DeviceGroup {
  Ranks(std::unique_ptr<DeviceGroup> of, bool captures) : group(std::move(of)), may(captures) {}
  std::unique_ptr<DeviceGroup> group;
  bool may;
  int launches = 0;
  int rank() const override { return group->rank(); }
  int size() const override { return group->size(); }
  void sum(float* inout, size_t count) override { group->sum(inout, count); }
  void gather(const void* own, void* all, size_t count) override { group->gather(own, all, count); }
  void wait() override { group->wait(); }
  bool all_same(uint64_t mine) override { return group->all_same(mine); }
  bool capture(uint64_t number, const std::function<void()>& work) override {
    return may && group->capture(number, work);
  }
  void launch(uint64_t number) override {
    ++launches;
    group->launch(number);
  }
  void forget(uint64_t number) noexcept override { group->forget(number); }
};

struct Variant {
  int tensor = 2;
  bool graphs = true, late = false;
  StepRules rules = budget();
  size_t steps = kSteps;
  std::map<std::string, int>* behind_halt = nullptr;
  std::vector<int> pages = {0, 1, 2};  // that are hit
};
Steps on_device(const Variant& v) {
  const ModelConfig config = three_layers();
  test::ThreadHolder store(uint64_t(64) << 20);
  Recorder recorder(v.steps);
  run_thread_ranks(v.tensor, [&](Communicator& ranks) {
    const ShardRange heads = kv_heads_of_rank(config.kv_heads, v.tensor, ranks.rank());
    const Weights weights = test::random_weights(config, v.tensor, ranks.rank(), kSeed);
    DeviceBackend backend = make_emulated_backend(cuda::make_emulated_device({.late = v.late}));
    GuardedOps ops(*backend.cache);
    ThreadPool pool(1);
    DeviceCache cache(config, heads, cache_options(1), *backend.device, ops, pool,
                      store.attach(ranks.rank()), ranks);
    Ranks group(make_host_group(ranks, *backend.device), v.graphs);
    DeviceTransformer forward(config, weights, *backend.device,
                              {*backend.model, *backend.linear, *backend.dense}, cache,
                              v.tensor > 1 ? &group : nullptr,
                              {.originals = DType::BF16,
                               .weights = DType::F32,
                               .max_batch = kRows + 1,
                               .max_tokens = int64_t(kPrompt) + kAnswer});
    decode(
        cache, forward, heads, &recorder, v.rules,
        [&](int64_t id) {
          ops.before_sealed_digests = [&, id, layer = 0](const cuda::DigestArgs& a) mutable {
            const bool here = layer++ == kHitLayer && id == int64_t(kHitRow);
            if (!here || kHitHead < heads.begin || kHitHead >= heads.end) return;
            for (const int page : v.pages) {
              auto* at = const_cast<std::byte*>(a.first) +
                         uint64_t(kHitHead - heads.begin) * a.row_stride + uint64_t(page) * a.bytes;
              auto* notes = reinterpret_cast<cuda::PageNotesDevice*>(
                  at + cuda::notes_offset(int(config.head_dim)));
              for (auto& block : notes->block) block.nu *= 0.25f;
            }
          };
        },
        [&](int64_t) { ops.before_sealed_digests = {}; });
    EXPECT_EQ(group.launches > 0, v.graphs && v.tensor > 1);
    recorder.behind(ops.behind);
  });
  if (v.behind_halt != nullptr) *v.behind_halt = recorder.behind_halt;
  return recorder.run;
}

float largest_of(const std::vector<float>& x) {
  float most = 0;
  for (const float one : x) most = std::max(most, std::abs(one));
  return most;
}

// Rung 4 is all heads of the layer of that row and nothing else, each exact.
void expect_rung4(const Steps& run, const char* what) {
  size_t steps = 0;
  for (size_t i = 0; i < run.size(); ++i) {
    const Step& step = run[i];
    SCOPED_TRACE(testing::Message() << what << ", step " << i);
    EXPECT_EQ(step.digest, 0u);
    EXPECT_EQ(step.failed, 0u);
    EXPECT_EQ(step.canary[0], 0u);
    const bool fell = step.canary[kHitRow] > 0;
    steps += fell ? 1 : 0;
    for (const auto& [at, head] : step.heads) {
      const bool here = at[0] == int(kHitRow) && at[1] == kHitLayer && fell;
      EXPECT_EQ(head.rung == 4, here) << at[0] << " " << at[1] << " " << at[2] << " " << at[3];
      EXPECT_TRUE(head.outcome == Outcome::Exact || (head.outcome == Outcome::Certified && !here));
      EXPECT_TRUE(std::isfinite(head.bound));
      if (here) {
        EXPECT_GT(head.candidate, head.bound);
      }
    }
  }
  EXPECT_GT(steps, 2u) << what;
}

float apart(const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
  return a.size() == b.size() ? most : INFINITY;
}

// Every head of either run is within kTolerance of S of exact attention, so logits are about within
// that share of the largest of the exact model's, and within two of each other. A row that lost its
// layer, or met its token twice, is farther off: as far as the two rows are from each other.
constexpr float kApart = 2 * kTolerance;

void expect_near(const std::vector<float>& a, const std::vector<float>& b) {
  const size_t vocab = a.size() / kRows;
  const float most = kApart * largest_of(a);
  EXPECT_LT(apart(a, b), most);
  EXPECT_GT(
      apart({a.begin(), a.begin() + ptrdiff_t(vocab)}, {a.begin() + ptrdiff_t(vocab), a.end()}),
      most);
}

TEST(DeviceRung4, AllRanksRepeatTheLayerAsTheCpuBackendDoes) {
  const Steps cpu = on_cpu(2);
  expect_rung4(cpu, "CPU");
  const Steps device = on_device({});
  expect_rung4(device, "device");
  for (size_t i = 0; i < kSteps; ++i) {
    SCOPED_TRACE(testing::Message() << "step " << i);
    EXPECT_EQ(device[i].fallback_layers, cpu[i].fallback_layers);
    ASSERT_EQ(device[i].heads.size(), cpu[i].heads.size());
    for (const auto& [at, head] : cpu[i].heads) {
      const Head& same = device[i].heads.at(at);
      EXPECT_EQ(same.outcome, head.outcome);
      EXPECT_EQ(same.rung == 4, head.rung == 4);
    }
    expect_near(cpu[i].logits, device[i].logits);
  }
}

// Enqueued piece by piece, captured, and with what goes beside as late as it may come: the same
// bits and counts. With one page hit, steps fall back and others do not.
TEST(DeviceRung4, GraphsAndLateWorkChangeNothing) {
  for (const Variant& v : {Variant{}, Variant{.rules = budget(0.5), .pages = {1}}}) {
    Variant plain = v, late = v;
    plain.graphs = false;
    late.late = true;
    const Steps expected = on_device(plain);
    const auto fell =
        std::ranges::count_if(expected, [](const Step& step) { return step.canary[kHitRow] > 0; });
    EXPECT_GT(fell, 0);
    if (v.pages.size() == 1) {
      EXPECT_LT(fell, ptrdiff_t(kSteps));
    }
    EXPECT_TRUE(on_device(v) == expected);
    EXPECT_TRUE(on_device(late) == expected);
  }
}

// One rank goes dense within its layer. Sums over ranks have another order, so bounds differ in
// last places; but a step that was appended, explored or learned from twice would show in the
// counts. The layer that falls back learns from its last pass, which on one rank is that of rung 4.
TEST(DeviceRung4, TwoRanksCountWhatOneDoes) {
  const Steps one = on_device({.tensor = 1}), two = on_device({});
  expect_rung4(one, "one rank");
  for (size_t i = 0; i < kSteps; ++i) {
    SCOPED_TRACE(testing::Message() << "step " << i);
    EXPECT_EQ(one[i].canary[kHitRow] > 0, two[i].canary[kHitRow] > 0);
    expect_near(one[i].logits, two[i].logits);
    for (const auto& [at, g] : one[i].groups)
      if (i == 0 || at[0] != int(kHitRow) || at[1] != kHitLayer) {
        EXPECT_TRUE(g == two[i].groups.at(at)) << at[0] << " " << at[1] << " " << at[2];
      }
  }
}

// Of every policy that may come to rung 4; GuardedOps sees whether anything acts.
TEST(DeviceRung4, NothingBehindAHaltReachesTheSequences) {
  StepRules ahead = budget(0.5), ranks = budget(), explores = budget(), paper = budget();
  ranks.ladder.ranking = 1;
  explores.ladder.exploration = 0.5;
  paper.policy = Policy::Paper;
  paper.paper.v_tol = 0;  // values of every block
  const std::vector<std::pair<StepRules, std::vector<std::string>>> cases = {
      {ahead, {"append", "learn", "prefetch"}},
      {ranks, {"append", "learn", "rank"}},
      {explores, {"append", "learn", "explore", "page_in"}},
      {paper, {"append", "select_paper", "page_in", "rank", "forget"}}};
  for (const auto& [rules, ops] : cases) {
    std::map<std::string, int> behind;
    const Steps run = on_device({.rules = rules, .steps = 3, .behind_halt = &behind});
    EXPECT_GT(run[0].canary[kHitRow], 0u);
    EXPECT_EQ(run[0].fallback_layers, (std::vector{0, 1}));
    EXPECT_EQ(run[0].failed, 0u);
    for (const std::string& op : ops) EXPECT_GT(behind[op], 0) << op;
  }
}

}  // namespace
}  // namespace certkv
