// The scrub inside the certified cache: a store in this process, forks that share pages, and what
// the step's verdict says of damage.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>
#include <random>

#include "kernels/base/thread_pool.h"
#include "parallel/local_world.h"
#include "runtime/certified_cache.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

constexpr int64_t kLayers = 2, kKvHeads = 2, kHeads = 4, kDim = 64;
constexpr size_t kPrompt = 64 * 5 + 9;
constexpr double kTolerance = 0.2;  // heads are certified from codes alone: every page is read

ModelConfig small_config() {
  ModelConfig c;
  c.layers = kLayers;
  c.heads = kHeads;
  c.kv_heads = kKvHeads;
  c.head_dim = kDim;
  return c;
}

CertifiedCacheOptions options_with(int64_t scrub_steps, const std::string& layout) {
  CertifiedCacheOptions o;
  o.cache.layout = layout;
  o.cache.scrub_steps = scrub_steps;
  o.dtype = DType::F16;
  return o;
}

// A cache of one rank. What is appended and asked depends on (sequence, layer, length) alone, so
// two runs that do the same are twins.
class OneRank {
 public:
  explicit OneRank(int64_t scrub_steps, int threads = 2, const std::string& layout = "compact")
      : client_(store_.attach()),
        world_(LocalWorld::create(1)),
        group_(world_->communicator(0)),
        pool_(threads),
        cache(config_, {0, kKvHeads}, options_with(scrub_steps, layout), pool_, client_, *group_) {}

  // Prefills a prompt and forks it `forks` times. before_fork: called once all of it is sealed.
  std::vector<int64_t> start(int64_t id, int forks,
                             const std::function<void(int64_t)>& before_fork = {}) {
    const int64_t prompt = cache.create(int64_t(kPrompt), id, 400);
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<uint16_t> k, v;
      for (int h = 0; h < kKvHeads; ++h) {
        oracle::Originals& x = originals_[{prompt, layer, h}];
        x = draw(id, layer, h, 0, kPrompt);
        k.insert(k.end(), x.k.begin(), x.k.end());
        v.insert(v.end(), x.v.begin(), x.v.end());
      }
      std::mt19937_64 random{uint64_t(layer)};
      std::normal_distribution<float> normal(0, 0.5f);
      std::vector<float> last_q(KvAttention::kLastQueries * size_t(kHeads * kDim));
      for (float& x : last_q) x = normal(random);
      cache.store_prefill(prompt, layer, kPrompt, k.data(), v.data(), last_q);
    }
    if (before_fork) before_fork(prompt);
    StepRules rules;
    rules.tolerance.value = tolerance;
    std::vector<int64_t> out;
    for (int f = 0; f < forks; ++f) {
      out.push_back(cache.fork(prompt, 400, rules));
      for (int layer = 0; layer < kLayers; ++layer)
        for (int h = 0; h < kKvHeads; ++h)
          originals_[{out.back(), layer, h}] = originals_[{prompt, layer, h}];
    }
    cache.drop(prompt);
    return out;
  }

  // One decode step; every claim is judged by the oracle unless `judged` is false. Returns the
  // verdicts; `outputs` holds everything returned.
  std::vector<VerdictRecord> step(const std::vector<int64_t>& sequences, bool judged = true) {
    cache.begin_step(++step_, sequences);
    outputs.clear();
    for (int layer = 0; layer < kLayers; ++layer) {
      const size_t n = sequences.size(), d = size_t(kDim);
      std::vector<std::vector<float>> q(n), out(n);
      std::vector<std::vector<uint16_t>> k(n), v(n);
      std::vector<DecodeRow> rows;
      for (size_t i = 0; i < n; ++i) {
        for (int h = 0; h < kKvHeads; ++h) {
          oracle::Originals& x = originals_[{sequences[i], layer, h}];
          const oracle::Originals one = draw(sequences[i], layer, h, x.tokens(), 1);
          x.k.insert(x.k.end(), one.k.begin(), one.k.end());
          x.v.insert(x.v.end(), one.v.begin(), one.v.end());
          k[i].insert(k[i].end(), one.k.begin(), one.k.end());
          v[i].insert(v[i].end(), one.v.begin(), one.v.end());
        }
        std::mt19937_64 random(step_ * 31 + uint64_t(layer) * 7 + uint64_t(sequences[i]));
        std::normal_distribution<float> normal(0, 0.5f);
        for (size_t j = 0; j < size_t(kHeads) * d; ++j) q[i].push_back(normal(random));
        out[i].resize(size_t(kHeads) * d);
        rows.push_back({sequences[i], q[i].data(), k[i].data(), v[i].data(), out[i].data()});
      }
      std::vector<float> flags(n);
      cache.decode(layer, rows, flags.data());
      for (size_t i = 0; i < n; ++i)
        if (flags[i] != 0) cache.decode_dense(layer, {&rows[i], 1});
      for (size_t i = 0; i < n; ++i) {
        outputs.insert(outputs.end(), out[i].begin(), out[i].end());
        if (judged) judge(sequences[i], layer, q[i], out[i]);
      }
    }
    std::vector<VerdictRecord> verdicts;
    for (int64_t s : sequences) verdicts.push_back(cache.verdict(s));
    return verdicts;
  }

  const DeviceTier& tier(int64_t sequence, int layer, int head) const {
    return cache.heads(sequence)[size_t(layer * kKvHeads + head)].tier;
  }
  std::byte* page(int64_t sequence, int layer, int head, size_t page) const {
    return const_cast<std::byte*>(tier(sequence, layer, head).blocks()[page * 4].page);
  }
  void flip(int64_t sequence, int layer, int head, size_t at, size_t bit) const {
    page(sequence, layer, head, at)[bit / 8] ^= std::byte(1u << bit % 8);
  }
  // Damages the originals of a block where they lie.
  void flip_original(int64_t sequence, int layer, int head, uint32_t block) {
    const BlockId id = cache.originals_id(sequence, layer, head, block);
    const Destination view{.part = BlockPart::Both, .view = true};
    ReadTicket ticket = client_->reader()->read({&id, 1}, {&view, 1}, test::patience());
    const BlockResult r = BlockReader::wait(ticket)[0];
    ASSERT_EQ(r.status, BlockStatus::Ok);
    auto* v = const_cast<uint16_t*>(r.v);
    v[3] = uint16_t(v[3] ^ 1);
  }

  double tolerance = kTolerance;

 private:
  static oracle::Originals draw(int64_t sequence, int layer, int head, size_t first,
                                size_t tokens) {
    oracle::Originals x{.dtype = DType::F16, .head_dim = int(kDim), .k = {}, .v = {}};
    std::mt19937_64 random(uint64_t(sequence) * 1000003 + uint64_t(layer * 16 + head) * 10007 +
                           first);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < tokens * size_t(kDim); ++i) {
      x.k.push_back(oracle::encode(DType::F16, normal(random)));
      x.v.push_back(oracle::encode(DType::F16, normal(random)));
    }
    return x;
  }

  void judge(int64_t sequence, int layer, const std::vector<float>& q,
             const std::vector<float>& out) {
    const SequenceReport& report = cache.report(sequence);
    for (int h = 0; h < kHeads; ++h) {
      const int kv = h / int(kHeads / kKvHeads);
      const HeadReport& r =
          report.layers[size_t(layer * kKvHeads + kv)].heads[size_t(h % int(kHeads / kKvHeads))];
      oracle::Claim claim;
      claim.kind = r.outcome == Outcome::Certified ? oracle::Claim::Kind::Certified
                   : r.outcome == Outcome::Exact   ? oracle::Claim::Kind::Exact
                                                   : oracle::Claim::Kind::Failed;
      EXPECT_NE(claim.kind, oracle::Claim::Kind::Failed);
      claim.bound = r.returned.bound;
      claim.s = r.returned.s;
      claim.tolerance = tolerance;
      const oracle::Originals& x = originals_[{sequence, layer, kv}];
      const oracle::Verdict v = oracle::check(oracle::attention(x, x.tokens(), q.data() + h * kDim),
                                              {out.data() + h * kDim, size_t(kDim)}, claim);
      EXPECT_TRUE(v.holds) << "sequence " << sequence << " layer " << layer << " head " << h << ": "
                           << v.why;
    }
  }

  test::ThreadHolder store_{uint64_t(64) << 20};
  std::shared_ptr<StoreClient> client_;
  std::shared_ptr<LocalWorld> world_;
  std::unique_ptr<Communicator> group_;
  ThreadPool pool_;
  ModelConfig config_ = small_config();
  std::map<std::tuple<int64_t, int, int>, oracle::Originals> originals_;
  uint64_t step_ = 0;

 public:
  CertifiedCache cache;
  std::vector<float> outputs;
};

std::string logged(const std::function<void()>& body) {
  testing::internal::CaptureStderr();
  body();
  return testing::internal::GetCapturedStderr();
}

size_t times(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

TEST(CacheScrub, WithAPeriodOfOneFlipsNeverReachAStep) {
  OneRank hit(1), clean(0);
  const auto a = hit.start(1, 1), b = clean.start(1, 1);
  std::mt19937_64 random(3);
  const size_t bits = hit.cache.format().page_bytes * 8;
  for (int step = 0; step < 12; ++step) {
    const size_t flips = random() % 3;  // of different pages
    for (size_t i = 0; i < flips; ++i)
      hit.flip(a[0], int(random() % 2), int(i), random() % 5, random() % bits);
    const VerdictRecord v = hit.step(a)[0];
    EXPECT_EQ(v.sum.digest, flips);
    EXPECT_EQ(v.sum.canary, 0u);
    EXPECT_EQ(v.sum.rungs[0], uint64_t(kLayers * kHeads));
    clean.step(b);
    EXPECT_EQ(hit.outputs, clean.outputs);
  }
}

TEST(CacheScrub, ADamagedPageIsFoundWithinThePeriodAndRepairedForEveryFork) {
  constexpr int64_t kPeriod = 8;
  OneRank hit(kPeriod), clean(0);
  const auto a = hit.start(1, 3), b = clean.start(1, 3);
  hit.step(a);
  clean.step(b);
  const std::byte* before = hit.page(a[0], 1, 0, 2);
  ASSERT_EQ(hit.page(a[1], 1, 0, 2), before);
  hit.flip(a[0], 1, 0, 2, 12345);
  uint64_t found = 0;
  int64_t steps = 0;
  const std::string log = logged([&] {
    while (found == 0 && steps < kPeriod) {  // the second fork steps, the others wait
      found = hit.step({a[1]}, false)[0].sum.digest;
      ++steps;
    }
  });
  EXPECT_EQ(found, 1u);
  EXPECT_EQ(times(log, "sequence 1 layer 1 KV head 0 page 2 (blocks 8 to 11)"), 1u) << log;
  EXPECT_EQ(times(log, "rebuilt from originals"), 1u) << log;
  EXPECT_EQ(times(log, "sequence 1 shares it: the steps at 330 to 330 tokens are in doubt"), 2u)
      << log;
  EXPECT_EQ(times(log, "in doubt"), 3u) << log;
  for (int64_t s : a) {
    EXPECT_EQ(hit.page(s, 1, 0, 2), hit.page(a[0], 1, 0, 2));
    EXPECT_EQ(
        std::memcmp(hit.page(s, 1, 0, 2), clean.page(b[0], 1, 0, 2), hit.cache.format().page_bytes),
        0);
  }
  // Every fork goes on, judged by the oracle; those that shared the page count it too, once.
  const auto next = hit.step(a);
  EXPECT_EQ(next[0].sum.digest, 1u);
  EXPECT_EQ(next[1].sum.digest, 0u);
  EXPECT_EQ(next[2].sum.digest, 1u);
  for (int step = 0; step < int(kPeriod) + 2; ++step)
    for (const VerdictRecord& v : hit.step(a)) EXPECT_EQ(v.sum.digest, 0u);
}

TEST(CacheScrub, ForksThatFindTheSameDamageCountItEachAndRepairItOnce) {
  OneRank hit(1), clean(0);
  const auto a = hit.start(1, 3), b = clean.start(1, 3);
  hit.step(a);
  clean.step(b);
  hit.flip(a[2], 0, 1, 4, 99);
  const std::string log = logged([&] {
    for (const VerdictRecord& v : hit.step(a)) EXPECT_EQ(v.sum.digest, 1u);
  });
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
  EXPECT_EQ(times(log, "tier 1: "), 1u) << log;
  EXPECT_EQ(hit.page(a[0], 0, 1, 4), hit.page(a[2], 0, 1, 4));
}

TEST(CacheScrub, TheLogNamesTheStepsThatAreInDoubt) {
  // Period 4, page 0 of layer 0, head 0 (phase 0): due at lengths that are multiples of 4.
  OneRank hit(4);
  const auto a = hit.start(1, 1);
  static_assert(kPrompt == 329);
  for (int step = 0; step < 4; ++step) hit.step(a);  // now 333 tokens; the page was due at 332
  hit.flip(a[0], 0, 0, 0, 9);
  std::string log = logged([&] {
    for (int step = 0; step < 3; ++step) EXPECT_EQ(hit.step(a, false)[0].sum.digest, 0u);
    EXPECT_EQ(hit.step(a)[0].sum.digest, 1u);  // at 336
  });
  EXPECT_NE(log.find("the steps at 333 to 336 tokens are in doubt"), std::string::npos) << log;
}

TEST(CacheScrub, TheStepThatSealedAPageIsInDoubtWhereTheNextFindsItDamaged) {
  OneRank hit(1000);
  const auto a = hit.start(1, 1);
  while (hit.tier(a[0], 0, 0).pages() == 5) hit.step(a);  // until 384 tokens
  hit.flip(a[0], 1, 0, 5, 40);
  const std::string log = logged([&] { EXPECT_EQ(hit.step(a)[0].sum.digest, 1u); });
  EXPECT_NE(log.find("page 5"), std::string::npos) << log;
  EXPECT_NE(log.find("the steps at 384 to 384 tokens are in doubt"), std::string::npos) << log;
}

TEST(CacheScrub, WithoutOriginalsEveryForkOfThePageFailsByName_AndNobodyElse) {
  OneRank hit(1);
  const auto a = hit.start(1, 2), other = hit.start(2, 1);
  hit.step({a[0], a[1], other[0]});
  hit.flip_original(a[0], 0, 1, 7);
  hit.flip(a[0], 0, 1, 1, 1000);  // blocks 4 to 7
  const auto verdicts = hit.step({a[0], other[0]}, false);
  EXPECT_EQ(outcome_of_severity(verdicts[0].max.severity), Outcome::Failed);
  EXPECT_EQ(verdicts[0].max.error, 1 + uint64_t(ErrorKind::OriginalsLost));
  EXPECT_EQ(verdicts[0].sum.digest, 1u);
  const SequenceReport& report = hit.cache.report(a[0]);
  ASSERT_TRUE(report.error.has_value());
  EXPECT_NE(report.error_text.find("layer 0 KV head 1 page 1 (blocks 4 to 7)"), std::string::npos)
      << report.error_text;
  EXPECT_NE(report.error_text.find("block 7 are corrupt"), std::string::npos) << report.error_text;
  EXPECT_EQ(verdicts[1].max.error, 0u);
  const auto later = hit.step({a[1], other[0]}, false);
  EXPECT_EQ(later[0].sum.digest, 1u);
  EXPECT_EQ(later[0].max.error, 1 + uint64_t(ErrorKind::OriginalsLost));
  EXPECT_EQ(outcome_of_severity(later[0].max.severity), Outcome::Failed);
  EXPECT_EQ(later[1].max.error, 0u);
}

TEST(CacheScrub, ThePromptIsVerifiedBeforeItsFirstStep) {
  OneRank hit(1000), clean(0);
  const auto b = clean.start(1, 2);
  std::vector<int64_t> a;
  const std::string log =
      logged([&] { a = hit.start(1, 2, [&](int64_t prompt) { hit.flip(prompt, 1, 1, 4, 777); }); });
  EXPECT_EQ(times(log, "no step has read it"), 1u) << log;
  const auto verdicts = hit.step(a);
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
  for (const VerdictRecord& v : verdicts)
    EXPECT_EQ(v.sum.digest, 1u);  // counted with the first step
  EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
}

TEST(CacheScrub, WhatIsDamagedAfterItsLastLookIsFoundAtTheEnd) {
  for (const int64_t period : {0, 1000}) {
    OneRank hit(period);
    const auto a = hit.start(1, 2);
    hit.step(a);
    hit.flip(a[0], 0, 0, 3, 4321);
    const std::string log =
        logged([&] { EXPECT_EQ(hit.cache.close(a[0]), period == 0 ? 0u : 1u); });
    EXPECT_EQ(times(log, "page 3"), period == 0 ? 0u : 1u) << log;
    if (period != 0) {
      hit.cache.drop(a[0]);
      EXPECT_EQ(hit.cache.close(a[1]), 1u) << "it held the page too";
      EXPECT_EQ(hit.cache.close(a[1]), 0u) << "repaired for it as well";
    }
  }
}

TEST(CacheScrub, FindsTheSameForAnyNumberOfThreadsAndNeighbours) {
  std::vector<uint64_t> first;
  for (const int threads : {1, 2}) {
    for (const bool crowd : {false, true}) {
      OneRank hit(6, threads);
      auto batch = hit.start(1, 1);
      if (crowd) batch.push_back(hit.start(2, 1)[0]);
      std::vector<uint64_t> counts;
      for (int step = 0; step < 14; ++step) {
        if (step == 2)
          for (size_t page = 0; page < 5; ++page)
            for (int cell = 0; cell < 4; ++cell) hit.flip(batch[0], cell / 2, cell % 2, page, 50);
        counts.push_back(hit.step(batch, false)[0].sum.digest);
      }
      if (first.empty()) first = counts;
      EXPECT_EQ(counts, first);
    }
  }
  uint64_t sum = 0;
  for (uint64_t n : first) sum += n;
  EXPECT_EQ(sum, 20u);
}

// With a tolerance that asks for more bits than k8v4's.
TEST(CacheClasses, ForksHaveClassesAndPagesOfTheirOwnWhichTheScrubRepairs) {
  OneRank rank(1, 2, kClassesLayout);
  rank.tolerance = 0.02;
  const std::vector<int64_t> forks = rank.start(1, 2);
  size_t dearer = 0;
  for (size_t cell = 0; cell < size_t(kLayers * kKvHeads); ++cell) {
    const HeadState &a = rank.cache.heads(forks[0])[cell], &b = rank.cache.heads(forks[1])[cell];
    EXPECT_EQ(a.precision.now, b.precision.now);
    EXPECT_EQ(a.tier.shares_page(0, b.tier),
              a.precision.now == 0 || a.precision.now == kExactClass);
    dearer += a.precision.now > 0 ? 1 : 0;
  }
  EXPECT_GT(dearer, 0u);
  for (int i = 0; i < 3; ++i)
    for (const VerdictRecord& v : rank.step(forks)) {
      EXPECT_EQ(v.sum.certified + v.sum.exact, uint64_t(kLayers * kHeads));
      EXPECT_EQ(v.sum.digest, 0u);
      EXPECT_GT(v.sum.read_bytes, 0u);
      EXPECT_LT(v.sum.read_bytes, v.sum.dense_bytes);
    }
  for (int layer = 0; layer < kLayers; ++layer)
    for (int head = 0; head < kKvHeads; ++head) {
      const bool shared =
          rank.tier(forks[0], layer, head).shares_page(2, rank.tier(forks[1], layer, head));
      rank.flip(forks[0], layer, head, 2, 77);
      const auto verdicts = rank.step(forks);
      EXPECT_EQ(verdicts[0].sum.digest, 1u);
      EXPECT_EQ(verdicts[1].sum.digest, shared ? 1u : 0u);
    }
}

TEST(CacheClasses, AHeadWhoseOriginalsAreDamagedKeepsItsClassAndIsCounted) {
  OneRank rank(0, 2, kClassesLayout);
  rank.tolerance = 0.02;
  const std::vector<int64_t> sound = rank.start(1, 1);
  ASSERT_GT(rank.cache.heads(sound[0])[0].precision.now, 0);
  const std::vector<int64_t> hit =
      rank.start(1, 1, [&](int64_t prompt) { rank.flip_original(prompt, 0, 0, 4); });
  for (size_t cell = 0; cell < size_t(kLayers * kKvHeads); ++cell)
    EXPECT_EQ(rank.cache.heads(hit[0])[cell].precision.now,
              cell == 0 ? 0 : rank.cache.heads(sound[0])[cell].precision.now);
  EXPECT_GE(rank.step(hit, false)[0].sum.digest, 1u);
}

}  // namespace
}  // namespace certkv
