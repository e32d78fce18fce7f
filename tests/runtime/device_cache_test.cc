// The device's cache against float64: whatever it returns of a head at a step (certified after any
// rung, exact, over), the promise holds over the originals. In emulation, and on a GPU as a program
// of tests/gpu.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "runtime/device/device_backend.h"
#include "runtime/device/device_cache.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/attention_cases.h"
#include "tests/support/oracle.h"
#ifdef CERTKV_TEST_ON_GPU
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {
namespace {

constexpr int kSteps = 5;
// The element of a value that goes beyond, and what outputs of random originals err by elsewhere:
// scores by 24 u for each of 8 matrix instructions, of at most ||q|| ||k|| / sqrt(d) < 20; weights
// by twice that and by some hundred u; values of size 1. Together below 2^-11.
constexpr size_t kGiant = 3;
constexpr double kOfOriginals = 0x1p-11;
constexpr uint64_t kArena = uint64_t(8) << 20;

struct Counts {
  uint64_t head_steps = 0, certified = 0, exact = 0, over = 0, failed = 0;
  uint64_t rung[kRungs] = {}, promoted = 0, hits = 0;
  uint64_t prefetched = 0, prefetched_used = 0;
  double worst = 0, tightest = 1e300;  // error over bound; bound over the outputs' norm
  uint64_t kept = 0;                   // pages of originals at the end
  uint64_t kinds[3] = {}, mixed = 0, exact_class = 0;  // of classes: KV heads; sequences of two
};

ModelConfig config_of(int head_dim, int kv_heads, int per_group) {
  ModelConfig c;
  c.layers = 1;
  c.kv_heads = kv_heads;
  c.heads = kv_heads * per_group;
  c.head_dim = head_dim;
  return c;
}

class DeviceCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef CERTKV_TEST_ON_GPU
    if (cuda::cuda_device_count() == 0) GTEST_SKIP() << "no device answers";
    backend_ = make_device_backend("cuda", 0);
#else
    backend_ = make_device_backend("emulated", 0);
#endif
  }

  // What a run has beside what its case draws.
  struct Special {
    size_t tokens = 0;  // of the prompt, if not 0
    int steps = kSteps;
    double prefetch = 0;              // as ladder.prefetch
    std::vector<size_t> beyond = {};  // tokens of KV head 0 whose page cannot be quantised
    const char* layout = "compact";
  };

  // One KV head for each maker of rows; some steps of one sequence under one policy.
  void run(Shape shape, uint64_t seed, Policy policy, double tolerance, Counts* counts,
           bool library = false) {
    run(shape, seed, policy, tolerance, counts, library, Special{});
  }
  void run(Shape shape, uint64_t seed, Policy policy, double tolerance, Counts* counts,
           bool library, const Special& special) {
    AttentionCase c = draw_case(shape, seed);
    std::mt19937_64 random(seed * 131 + uint64_t(shape));
    c.head_dim = random() % 2 == 0 ? 64 : 128;
    c.tokens = std::min<size_t>(c.tokens, 700);
    if (special.tokens > 0) c.tokens = special.tokens;
    if (!special.beyond.empty()) c.dtype = DType::BF16;
    const auto beyond = [&](oracle::Originals* of, size_t token) {
      const uint16_t largest = float_to_bf16(-7e4f);  // beyond any offset
      of->v[token * size_t(c.head_dim) + kGiant] = largest;
    };
    const size_t d = size_t(c.head_dim), n = size_t(c.heads), kv = 2;
    const ModelConfig config = config_of(c.head_dim, int(kv), c.heads);
    CertifiedCacheOptions options;
    options.dtype = c.dtype;
    options.cache.layout = special.layout;
    // Few slots, so that some heads find no room.
    options.scratch.key_blocks = options.scratch.value_blocks =
        int64_t(kv) * int64_t(4 + random() % 40) * (special.prefetch > 0 ? 10 : 1);

    test::ThreadHolder holder(kArena);
    const auto store = holder.attach(0);
    const auto world = LocalWorld::create(1);
    const auto group = world->communicator(0);
    ThreadPool pool(1);
    DeviceCache cache(config, {0, int64_t(kv)}, options, *backend_.device, *backend_.cache, pool,
                      store, *group);

    if (library) cache.use_library(*backend_.dense, *backend_.model);

    std::vector<RowMaker> rows;
    std::vector<oracle::Originals> x(kv,
                                     {.dtype = c.dtype, .head_dim = c.head_dim, .k = {}, .v = {}});
    std::vector<uint16_t> k, v;
    AttentionCase cases[2] = {c, c};
    cases[1].seed = c.seed + 1;
    // Of classes, two heads that ask for different ones.
    if (special.layout == std::string_view(kClassesLayout)) cases[1].q_scale /= 16;
    for (size_t h = 0; h < kv; ++h) {
      rows.emplace_back(cases[h]);
      rows[h].append(c.tokens, &x[h]);
      for (const size_t token : special.beyond)
        if (h == 0 && token < c.tokens) beyond(&x[h], token);
      k.insert(k.end(), x[h].k.begin(), x[h].k.end());
      v.insert(v.end(), x[h].v.begin(), x[h].v.end());
    }
    const int64_t prompt = cache.create(int64_t(c.tokens), 1, special.steps + 1);
    const auto keys = put(k), values = put(v);
    const bool classes = options.cache.layout == kClassesLayout;
    std::vector<float> last_q;
    for (int i = 0; i < 4 && classes; ++i)
      for (size_t h = 0; h < kv; ++h) {
        const std::vector<float> q = rows[h].query();
        last_q.insert(last_q.end(), q.begin(), q.end());
      }
    cache.store_prefill(prompt, 0, c.tokens, keys.data(), values.data(), c.tokens * d, last_q);
    StepRules rules;
    rules.policy = policy;
    rules.tolerance.value = tolerance;
    rules.ladder.prefetch = special.prefetch;
    const int64_t sequence = cache.fork(prompt, special.steps + 1, rules);
    if (classes) {  // the CPU's choice, but for `exact`
      CertifiedCache cpu(config, {0, int64_t(kv)}, options, pool, store, *group);
      const int64_t same = cpu.create(int64_t(c.tokens), 1, special.steps + 1);
      cpu.store_prefill(same, 0, c.tokens, k.data(), v.data(), last_q);
      const int64_t decode = cpu.fork(same, special.steps + 1, rules);
      for (size_t h = 0; h < kv; ++h) {
        const int chosen = cpu.heads(decode)[h].precision.now;
        const int kind = int(cache.kind(sequence, 0, int(h)));
        EXPECT_EQ(kind, std::min(chosen, kExactClass - 1)) << "KV head " << h;
        counts->exact_class += chosen == kExactClass;
        ++counts->kinds[kind];
      }
      counts->mixed += cache.kind(sequence, 0, 0) != cache.kind(sequence, 0, 1);
    }
    cache.drop(prompt);

    const size_t width = (n + 2) * kv * d;
    const cuda::DeviceArray<float> qkv(*backend_.device, width, "rows"),
        out(*backend_.device, n * kv * d, "outputs");
    for (int step = 0; step < special.steps; ++step) {
      std::vector<float> row(width), got(n * kv * d);
      for (size_t h = 0; h < kv; ++h) {
        rows[h].append(1, &x[h]);
        for (const size_t token : special.beyond)
          if (h == 0 && token == c.tokens + size_t(step)) beyond(&x[h], token);
        const std::vector<float> q = rows[h].query();
        std::copy_n(q.data(), n * d, row.data() + h * n * d);
        for (size_t i = 0; i < d; ++i) {
          const size_t last = x[h].k.size() - d + i;
          row[kv * n * d + h * d + i] = float(oracle::decode(c.dtype, x[h].k[last]));
          row[kv * (n + 1) * d + h * d + i] = float(oracle::decode(c.dtype, x[h].v[last]));
        }
      }
      cache.begin_step(uint64_t(step) + 1, {&sequence, 1});
      cache.begin_rows({&sequence, 1}, out.data());
      backend_.device->copy(qkv.data(), row.data(), qkv.bytes());
      cache.decode(0, qkv.data(), {});
      backend_.device->copy(got.data(), out.data(), out.bytes());
      cache.end_step();
      const SequenceReport& report = cache.report(sequence);
      for (size_t h = 0; h < kv; ++h) {
        const GroupReport& g = report.layers[h];
        counts->hits += g.scratch_hits;
        EXPECT_EQ(g.canary, 0u) << c.describe() << " step " << step;
        counts->prefetched += g.prefetched;
        counts->prefetched_used += g.prefetched_used;
        for (size_t i = 0; i < n; ++i) {
          const HeadReport& r = g.heads[i];
          const oracle::Exact exact =
              oracle::attention(x[h], x[h].tokens(), row.data() + (h * n + i) * d);
          oracle::Claim claim;
          claim.kind = r.outcome == Outcome::Certified ? oracle::Claim::Kind::Certified
                       : r.outcome == Outcome::Exact   ? oracle::Claim::Kind::Exact
                       : r.outcome == Outcome::Over    ? oracle::Claim::Kind::Over
                                                       : oracle::Claim::Kind::Failed;
          claim.bound = r.returned.bound;
          claim.s = r.returned.s;
          claim.enforces = policy == Policy::Budget;
          claim.tolerance = tolerance;
          const std::span<const float> answer(got.data() + (h * n + i) * d, d);
          if (claim.kind != oracle::Claim::Kind::Failed) {
            const oracle::Verdict verdict = oracle::check(exact, answer, claim);
            EXPECT_TRUE(verdict.holds)
                << c.describe() << " step " << step << " KV head " << h << " head " << i << " rung "
                << r.rung << ": " << verdict.why;
            if (r.returned.bound > 0)
              counts->worst = std::max(counts->worst, verdict.error / r.returned.bound);
            if (r.returned.out_norm > 0)
              counts->tightest = std::min(counts->tightest, r.returned.bound / r.returned.out_norm);
          }
          // A giant value excuses much: the other elements are held to their own size.
          const bool exactly = claim.kind == oracle::Claim::Kind::Exact && special.steps > kSteps;
          for (size_t e = 0; e < d && exactly; ++e) {
            if (e == kGiant) continue;
            EXPECT_NEAR(double(answer[e]), exact.out[e], kOfOriginals) << "step " << step;
          }
          ++counts->head_steps;
          ++counts->rung[r.rung];
          counts->certified += r.outcome == Outcome::Certified;
          counts->exact += r.outcome == Outcome::Exact;
          counts->over += r.outcome == Outcome::Over;
          counts->failed += r.outcome == Outcome::Failed;
          counts->promoted += uint64_t(r.promoted_keys + r.promoted_values);
        }
      }
      if (report.error) {  // by name, and nothing else may follow
        EXPECT_EQ(*report.error, ErrorKind::Uncertifiable) << report.error_text;
        return;
      }
    }
    if (classes) {
      if (c.tokens >= 64)
        for (int h = 0; h < int(kv); ++h) expect_damage_is_repaired(cache, sequence, h);
      return;
    }
    const size_t pages = (c.tokens + size_t(special.steps)) / 64;
    const size_t open = (c.tokens + size_t(special.steps)) % 64;
    const uint64_t page =
        cuda::page_layout(int(d), cuda::page_kind_of(cache.format())).page_bytes();
    const uint64_t originals = 64 * 4 * d;
    const uint64_t all_quantised = kv * (pages * page + open * 4 * d);
    counts->kept += (cache.tier1_bytes(sequence) - all_quantised) / (originals - page);
  }

  // A bit of a page's value codes flips: found by the last look, and sealed again as it was.
  void expect_damage_is_repaired(DeviceCache& cache, int64_t sequence, int head) {
    const cuda::PageLayoutDevice p =
        cuda::page_layout(cache.format().head_dim, cache.kind(sequence, 0, head));
    std::byte* at = cache.page(sequence, 0, head, 0);
    const auto read = [&] {
      std::vector<std::byte> bytes(p.page_bytes());
      backend_.device->copy(bytes.data(), at, bytes.size());
      backend_.device->synchronize(test::patience());
      return bytes;
    };
    const std::vector<std::byte> was = read();
    const std::byte other = was[p.key_bytes + 77] ^ std::byte(4);
    backend_.device->copy(at + p.key_bytes + 77, &other, 1);
    EXPECT_EQ(cache.close(sequence), 1u);
    EXPECT_EQ(read(), was);
    EXPECT_EQ(cache.close(sequence), 0u);
  }

  cuda::DeviceArray<uint16_t> put(const std::vector<uint16_t>& x) {
    cuda::DeviceArray<uint16_t> array(*backend_.device, x.size(), "a test's rows");
    backend_.device->copy(array.data(), x.data(), array.bytes());
    return array;
  }

  DeviceBackend backend_;
};

TEST_F(DeviceCacheTest, WhateverRungAnsweredThePromiseHolds) {
  Counts budget, naive;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 0; seed < 2; ++seed) {
      const double tolerance = seed % 2 == 0 ? 0.05 : 0.15;
      run(Shape(shape), seed, Policy::Budget, tolerance, &budget);
      if (seed == 0) run(Shape(shape), seed, Policy::Naive, tolerance, &naive);
    }
  fmt::print(
      "budget: {} head-steps, {} certified, {} exact, {} failed; rungs {} {} {} {}; {} "
      "promoted, {} hits\n",
      budget.head_steps, budget.certified, budget.exact, budget.failed, budget.rung[0],
      budget.rung[1], budget.rung[2], budget.rung[3], budget.promoted, budget.hits);
  fmt::print("naive: {} head-steps, {} certified, {} over, {} failed\n", naive.head_steps,
             naive.certified, naive.over, naive.failed);
  // The test must have tried what it is about.
  EXPECT_EQ(budget.certified + budget.exact + budget.failed, budget.head_steps);
  EXPECT_GE(budget.head_steps, 500u);
  EXPECT_GE(budget.rung[1] + budget.rung[2], 20u);
  EXPECT_GE(budget.rung[3], 50u);
  EXPECT_GE(budget.hits, 20u);
  EXPECT_LE(budget.failed, budget.head_steps / 10);
  EXPECT_GE(naive.over, 20u);
}

// Two phases for every head, whatever its bound; what codes leave open goes to rung 3.
TEST_F(DeviceCacheTest, PaperKeepsWhatItsCertificatesSay) {
  Counts paper;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 0; seed < 2; ++seed)
      run(Shape(shape), seed, Policy::Paper, seed % 2 == 0 ? 0.05 : 0.15, &paper);
  fmt::print(
      "paper: {} head-steps, {} certified, {} exact, {} over, {} failed; rungs {} {} {} {}; {} "
      "promoted, {} hits\n",
      paper.head_steps, paper.certified, paper.exact, paper.over, paper.failed, paper.rung[0],
      paper.rung[1], paper.rung[2], paper.rung[3], paper.promoted, paper.hits);
  EXPECT_GE(paper.head_steps, 500u);
  EXPECT_GE(paper.certified, 20u);
  EXPECT_GE(paper.over, 20u);
  EXPECT_GE(paper.rung[3], 50u);
  EXPECT_GE(paper.hits, 20u);
  EXPECT_LE(paper.failed, paper.head_steps / 10);
}

// The same where steps read ahead, which changes what a pass reads, and nothing that it promises.
TEST_F(DeviceCacheTest, WhateverWasReadAheadThePromiseHolds) {
  Counts counts;
  Special special;
  special.prefetch = 0.3;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 2; seed < 4; ++seed)
      run(Shape(shape), seed, Policy::Budget, seed % 2 == 0 ? 0.05 : 0.15, &counts, false, special);
  fmt::print("{} head-steps, rungs {} {} {} {}; {} promoted, {} read ahead, {} of them used\n",
             counts.head_steps, counts.rung[0], counts.rung[1], counts.rung[2], counts.rung[3],
             counts.promoted, counts.prefetched, counts.prefetched_used);
  EXPECT_EQ(counts.certified + counts.exact + counts.failed, counts.head_steps);
  EXPECT_GE(counts.head_steps, 300u);
  EXPECT_LE(counts.failed, counts.head_steps / 10);
  EXPECT_GE(counts.rung[1] + counts.rung[2], 10u);
  EXPECT_GE(counts.prefetched, 20u);
  EXPECT_GT(counts.prefetched_used, 0u);
}

// The same head-steps served by each kind of page: the promise, and that more bits certify more
// from codes alone. Then pages that an answer fills, one of them without codes.
TEST_F(DeviceCacheTest, EveryKindOfPageKeepsThePromise) {
  double before = 0;
  for (const char* layout : {"k8v4", "k8v8", "k12v8"}) {
    Counts c;
    for (int shape = 0; shape < kShapes; ++shape)
      run(Shape(shape), 2, Policy::Budget, 0.05, &c, false, {.layout = layout});
    const double from_codes = double(c.rung[0]) / double(c.head_steps);
    fmt::print("{}: {} head-steps, {} certified, {} exact, {} failed; rungs {} {} {} {}\n", layout,
               c.head_steps, c.certified, c.exact, c.failed, c.rung[0], c.rung[1], c.rung[2],
               c.rung[3]);
    EXPECT_EQ(c.certified + c.exact + c.failed, c.head_steps);
    EXPECT_GE(c.head_steps, 250u);
    EXPECT_LE(c.failed, c.head_steps / 10);
    EXPECT_GT(from_codes, before + 0.02);
    before = from_codes;
    Counts filled;
    run(Shape::Random, 1, Policy::Budget, 0.15, &filled, false,
        {.tokens = 250, .steps = 72, .beyond = {252}, .layout = layout});
    EXPECT_EQ(filled.certified + filled.exact, filled.head_steps);
    EXPECT_GT(filled.rung[0], 0u);
    EXPECT_EQ(filled.kept, 1u);
  }
}

// A class per KV head and sequence, chosen as the CPU chooses: the promise, and pages of several
// kinds in one step.
TEST_F(DeviceCacheTest, ClassesKeepThePromise) {
  Counts c;
  for (int shape = 0; shape < kShapes; ++shape)
    for (const double tolerance : {0.3, 0.05, 0.02})
      run(Shape(shape), 3, Policy::Budget, tolerance, &c, false, {.layout = "classes"});
  // Pages that an answer fills.
  for (const double tolerance : {0.1, 0.05})
    run(Shape::Random, 1, Policy::Budget, tolerance, &c, false,
        {.tokens = 250, .steps = 72, .layout = "classes"});
  fmt::print(
      "{} head-steps, {} certified, {} exact, {} failed; rungs {} {} {} {}; KV heads k8v4 {}, k8v8 "
      "{}, k12v8 {} ({} would be exact); {} sequences of two kinds\n",
      c.head_steps, c.certified, c.exact, c.failed, c.rung[0], c.rung[1], c.rung[2], c.rung[3],
      c.kinds[0], c.kinds[1], c.kinds[2], c.exact_class, c.mixed);
  EXPECT_EQ(c.certified + c.exact + c.failed, c.head_steps);
  EXPECT_GE(c.head_steps, 500u);
  EXPECT_LE(c.failed, c.head_steps / 10);
  for (const uint64_t kind : c.kinds) EXPECT_GE(kind, 5u);
  EXPECT_GE(c.mixed, 3u);
}

// So little that a tool which watches every access of the device ends soon (tests/gpu/sanitize.sh),
// and yet an append, a pass, a climb, rung 3 and a page that a step fills.
TEST_F(DeviceCacheTest, AFewTokensKeepThePromise) {
  Special few;
  few.tokens = 190;  // two sealed pages; the second step fills the third
  few.steps = 3;
  Counts counts;
  for (const double tolerance : {0.02, 0.15})
    run(Shape::Random, 1, Policy::Budget, tolerance, &counts, false, few);
  fmt::print("{} head-steps, rungs {} {} {} {}\n", counts.head_steps, counts.rung[0],
             counts.rung[1], counts.rung[2], counts.rung[3]);
  EXPECT_GT(counts.rung[0], 0u);
  EXPECT_GT(counts.rung[1] + counts.rung[2], 0u);
  EXPECT_GT(counts.rung[3], 0u);
  EXPECT_EQ(counts.failed, 0u);
}

// Policy dense: exact, whoever attends, with a bound that holds. A library takes and gives 16 bits,
// so its bound is never below what that costs (2^-8 or 2^-11, twice for weights and once for the
// outputs); ours is.
TEST_F(DeviceCacheTest, DenseIsExactByALibraryAndByOurOwnPass) {
  Counts own, library;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 0; seed < 2; ++seed) {
      run(Shape(shape), seed, Policy::Dense, 0.05, &own);
      run(Shape(shape), seed, Policy::Dense, 0.05, &library, true);
    }
  for (const Counts* c : {&own, &library}) {
    fmt::print(
        "{}: {} head-steps, {} exact; error / bound at most {:.3g}, bound / |O| from {:.3g}\n",
        c == &own ? "own" : "library", c->head_steps, c->exact, c->worst, c->tightest);
    EXPECT_GE(c->head_steps, 500u);
    EXPECT_EQ(c->rung[3], c->head_steps);
    EXPECT_GE(c->exact, c->head_steps - c->head_steps / 10);
    EXPECT_EQ(c->exact + c->failed, c->head_steps);
  }
  EXPECT_LT(own.tightest, 0x1p-12);
  EXPECT_GE(library.tightest, 3 * 0x1p-11);
  EXPECT_GE(library.worst, 0.005);  // a bound that says something
}

// A library is handed addresses, so a step captured for some sequences is not another's. Our own
// pass reads tables: there a step is.
TEST_F(DeviceCacheTest, AStepOfALibraryNamesItsSequences) {
  const ModelConfig config = config_of(64, 1, 1);
  constexpr size_t kTokens = 80;
  for (const bool library : {false, true}) {
    test::ThreadHolder holder(kArena);
    const auto store = holder.attach(0);
    const auto world = LocalWorld::create(1);
    const auto group = world->communicator(0);
    ThreadPool pool(1);
    DeviceCache cache(config, {0, 1}, {}, *backend_.device, *backend_.cache, pool, store, *group);
    if (library) cache.use_library(*backend_.dense, *backend_.model);
    const int64_t prompt = cache.create(kTokens, 1, 10);
    const std::vector<uint16_t> rows(kTokens * 64, 0x3f80);
    const auto on_device = put(rows);
    cache.store_prefill(prompt, 0, kTokens, on_device.data(), on_device.data(), kTokens * 64, {});
    StepRules rules;
    rules.policy = Policy::Dense;
    const int64_t a = cache.fork(prompt, 10, rules), b = cache.fork(prompt, 10, rules);
    const cuda::DeviceArray<float> out(*backend_.device, 64, "outputs");
    const auto shape_of = [&](int64_t sequence) {
      cache.begin_rows({&sequence, 1}, out.data());
      return cache.shape();
    };
    const uint64_t first = shape_of(a);
    EXPECT_EQ(shape_of(a), first);
    EXPECT_EQ(shape_of(b) == first, !library);
  }
}

// Steps whose enqueued work is the same have one shape, also when another came between.
TEST_F(DeviceCacheTest, AShapeThatComesAgainIsTheSame) {
  const ModelConfig config = config_of(64, 2, 1);
  const size_t tokens = 640;
  test::ThreadHolder holder(kArena);
  const auto store = holder.attach(0);
  const auto world = LocalWorld::create(1);
  const auto group = world->communicator(0);
  ThreadPool pool(1);
  DeviceCache cache(config, {0, 2}, CertifiedCacheOptions{}, *backend_.device, *backend_.cache,
                    pool, store, *group);
  const int64_t prompt = cache.create(int64_t(tokens), 1, 10);
  const std::vector<uint16_t> rows(2 * tokens * 64, 0x3f80);
  const auto on_device = put(rows);
  cache.store_prefill(prompt, 0, tokens, on_device.data(), on_device.data(), tokens * 64, {});
  StepRules naive;
  naive.policy = Policy::Naive;
  const int64_t a = cache.fork(prompt, 10, StepRules{}), b = cache.fork(prompt, 10, naive);
  const int64_t c = cache.fork(prompt, 10, naive);
  const cuda::DeviceArray<float> out(*backend_.device, 2 * 2 * 64, "outputs");
  const auto shape_of = [&](const std::vector<int64_t>& sequences) {
    cache.begin_step(1, sequences);
    cache.begin_rows(sequences, out.data());
    return cache.shape();
  };
  shape_of({b, c});  // buffers grow to the largest step
  const uint64_t one = shape_of({a}), other = shape_of({b}), both = shape_of({b, c});
  EXPECT_EQ((std::set{one, other, both}.size()), 3u);
  EXPECT_EQ(shape_of({a}), one);
  EXPECT_EQ(shape_of({c}), other);
  EXPECT_EQ(shape_of({c, b}), both);
  // Memory that has moved makes every shape a new one.
  const int64_t longer = cache.create(int64_t(4 * tokens), 2, 10);
  const std::vector<uint16_t> more(2 * 4 * tokens * 64, 0x3f80);
  const auto longer_rows = put(more);
  cache.store_prefill(longer, 0, 4 * tokens, longer_rows.data(), longer_rows.data(),
                      4 * tokens * 64, {});
  shape_of({cache.fork(longer, 10, naive)});
  EXPECT_EQ((std::set{one, other, both}.count(shape_of({a}))), 0u);
}

// A tolerance that no codes meet: rung 3 then reads every sealed block from the arena, in which an
// answer's pages are by the step after.
constexpr double kOriginalsAlone = 1e-12;

// A prompt's pages and an answer's, sealed while it decodes; some of them cannot be quantised.
TEST_F(DeviceCacheTest, PagesThatCannotBeQuantisedAreServedFromOriginals) {
  // 250 tokens are 3 pages; the answer fills pages of the tokens 192 to 255 and 256 to 319.
  const auto decode = [&](Policy policy, double tolerance, const std::vector<size_t>& beyond) {
    Counts counts;
    run(Shape::Random, 1, policy, tolerance, &counts, false,
        {.tokens = 250, .steps = 72, .beyond = beyond});
    EXPECT_GE(counts.head_steps, 144u);
    EXPECT_EQ(counts.failed, 0u);
    EXPECT_EQ(counts.kept, policy == Policy::Dense ? 0u : beyond.size());
    return counts;
  };
  for (const std::vector<size_t>& beyond : {std::vector<size_t>{}, {70, 252}}) {
    const Counts certified = decode(Policy::Budget, 0.15, beyond);
    EXPECT_GE(certified.certified, certified.head_steps / 2);
    const Counts exact = decode(Policy::Budget, kOriginalsAlone, beyond);
    EXPECT_EQ(exact.exact, exact.head_steps);
  }
  decode(Policy::Naive, 0.15, {70, 252});
  decode(Policy::Dense, 0.15, {70, 252});
}

#ifndef CERTKV_TEST_ON_GPU
TEST_F(DeviceCacheTest, ABackendThatIsNotThereIsNamed) {
  const auto error = [](const char* backend) -> std::string {
    try {
      make_device_backend(backend, 0);
    } catch (const Error& e) {
      return std::string(error_kind_name(e.kind())) + ": " + e.what();
    }
    return "";
  };
  EXPECT_NE(error("metal").find("InvalidArgument: run.backend is 'metal'"), std::string::npos);
  const std::string cuda = error("cuda");
  if (cuda.empty()) GTEST_SKIP() << "a GPU answers";
  EXPECT_TRUE(cuda.starts_with("InvalidArgument: this build has no CUDA backend") ||
              cuda.starts_with("DeviceError: no NVIDIA driver answers"))
      << cuda;
}

// Blocks of fewer warps, where a device's shared memory has no room for more; the emulation refuses
// what does not fit, as a device does.
TEST_F(DeviceCacheTest, ADeviceWithLessSharedMemoryKeepsThePromise) {
  backend_ = {};
  backend_.device = cuda::make_emulated_device({.shape = {8, 99 * 1024, 100 * 1024}});
  backend_.cache = cuda::make_emulated_cache_ops(*backend_.device);
  EXPECT_EQ(cuda::pass_warps(backend_.device->shape(), 128, 1, cuda::PageKind::K8V4), 5);
  Counts budget;
  for (int shape = 0; shape < kShapes; ++shape) run(Shape(shape), 2, Policy::Budget, 0.05, &budget);
  fmt::print("{} head-steps, {} certified, {} exact, {} failed; rungs {} {} {} {}\n",
             budget.head_steps, budget.certified, budget.exact, budget.failed, budget.rung[0],
             budget.rung[1], budget.rung[2], budget.rung[3]);
  EXPECT_EQ(budget.certified + budget.exact + budget.failed, budget.head_steps);
  EXPECT_GE(budget.head_steps, 250u);
  EXPECT_GE(budget.rung[1] + budget.rung[2], 10u);
  EXPECT_GE(budget.rung[3], 25u);
  EXPECT_LE(budget.failed, budget.head_steps / 10);
}

// A device too small for the prompt, and one too small for its decode: refused by name, with what
// was asked for and what there is, and nothing is kept.
TEST_F(DeviceCacheTest, MemoryThatIsNotThereIsNamed) {
  const ModelConfig config = config_of(64, 2, 1);
  const size_t tokens = 640, page = cuda::page_layout(64, cuda::PageKind::K8V4).page_bytes();
  for (const bool prompt_fits : {false, true}) {
    const uint64_t total = (prompt_fits ? 21 : 19) * page;
    const auto device = cuda::make_emulated_device({.total_bytes = total});
    const auto ops = cuda::make_emulated_cache_ops(*device);
    test::ThreadHolder holder(kArena);
    const auto store = holder.attach(0);
    const auto world = LocalWorld::create(1);
    const auto group = world->communicator(0);
    ThreadPool pool(1);
    CertifiedCacheOptions options;
    DeviceCache cache(config, {0, 2}, options, *device, *ops, pool, store, *group);
    try {
      const int64_t prompt = cache.create(int64_t(tokens), 1, 10);
      EXPECT_TRUE(prompt_fits);
      const std::vector<uint16_t> rows(2 * tokens * 64, 0x3f80);
      cache.store_prefill(prompt, 0, tokens, rows.data(), rows.data(), tokens * 64, {});
      cache.fork(prompt, 10, StepRules{});
      ADD_FAILURE() << "the device has no room for it";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::OutOfMemory) << e.what();
      const std::string what = e.what();
      EXPECT_NE(
          what.find(prompt_fits ? "scratch (lower scratch.key_blocks" : "tier 1: a prompt's pages"),
          std::string::npos)
          << what;
      EXPECT_NE(what.find(fmt::format("of {} are free", total)), std::string::npos) << what;
    }
    EXPECT_EQ(device->free_bytes(), total - (prompt_fits ? 20 * page : 0));
  }
}
#endif

}  // namespace
}  // namespace certkv
