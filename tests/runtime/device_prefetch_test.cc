// What a step reads for the next one: the ladder's own choice under a smaller tolerance, into what
// is free, verified, counted; and the same whenever the device does it. In emulation, whose work
// beside other work is done at once or as late as it is waited for.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "runtime/device/device_cache.h"
#include "tests/kvstore/store_support.h"

namespace certkv {
namespace {

constexpr int kLayers = 5;  // of records there are those of two
constexpr size_t kDim = 64, kKvHeads = 2, kPerGroup = 2, kPrompt = 64 * 9 + 30;
constexpr size_t kWidth = (kPerGroup + 2) * kKvHeads * kDim, kOuts = kPerGroup * kKvHeads * kDim;
constexpr int64_t kAnswer = 60;
constexpr double kStays = 0.93;  // of a query from step to step
constexpr unsigned kPast = 40;   // steps, for what is left of them is 0.05

// A cache and one sequence of it; what is appended and asked depends on layer and length alone.
class OneCache {
 public:
  struct Rules {
    double tolerance = 0.1, prefetch = 0;
    int rounds = 4;
    int64_t slots = 4096;  // of a layer, keys and values each
    bool late = false;
    double value_share = 0.5;
  };
  explicit OneCache(const Rules& r)
      : device_(cuda::make_emulated_device({.late = r.late})),
        ops_(cuda::make_emulated_cache_ops(*device_)) {
    config_.layers = kLayers;
    config_.kv_heads = kKvHeads;
    config_.heads = kKvHeads * kPerGroup;
    config_.head_dim = kDim;
    CertifiedCacheOptions o;
    o.dtype = DType::BF16;
    o.scratch.key_blocks = o.scratch.value_blocks = r.slots;
    cache.emplace(config_, ShardRange{0, int64_t(kKvHeads)}, o, *device_, *ops_, pool_, store_,
                  *group_);
    const int64_t prompt = cache->create(kPrompt, 1, kAnswer);
    for (int layer = 0; layer < kLayers; ++layer) {
      std::mt19937 random{unsigned(layer)};
      std::normal_distribution<float> normal;
      std::vector<uint16_t> k(kKvHeads * kPrompt * kDim), v(k.size());
      for (auto* rows : {&k, &v})
        for (uint16_t& x : *rows) x = float_to_16(DType::BF16, normal(random));
      cache->store_prefill(prompt, layer, kPrompt, k.data(), v.data(), kPrompt * kDim, {});
    }
    StepRules rules;
    rules.policy = Policy::Budget;
    rules.tolerance.value = r.tolerance;
    rules.ladder.prefetch = r.prefetch;
    rules.ladder.max_rounds = r.rounds;
    rules.ladder.max_share = 1;
    rules.ladder.value_share = r.value_share;
    sequence = cache->fork(prompt, kAnswer, rules);
    cache->drop(prompt);
  }
  const SequenceReport& step(std::vector<float>* outputs = nullptr) {
    const cuda::DeviceArray<float> qkv(*device_, kWidth, "rows"), out(*device_, kOuts, "outputs");
    cache->begin_step(++steps_, {&sequence, 1});
    cache->begin_rows({&sequence, 1}, out.data());
    // A graph, as of a device: what goes beside may be late in it.
    std::vector<float> got(kLayers * kOuts);
    const auto graph = device_->capture([&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        const std::vector<float> row = queries(layer);
        device_->copy(qkv.data(), row.data(), qkv.bytes());
        cache->decode(layer, qkv.data(), {});
        device_->copy(got.data() + size_t(layer) * kOuts, out.data(), out.bytes());
      }
    });
    device_->launch(*graph);
    if (outputs != nullptr) outputs->insert(outputs->end(), got.begin(), got.end());
    cache->end_step();
    return cache->report(sequence);
  }
  // Damages the originals of every sealed block where they lie.
  void damage_originals() {
    for (int layer = 0; layer < kLayers; ++layer)
      for (int head = 0; head < int(kKvHeads); ++head)
        for (uint32_t block = 0; block < kPrompt / 64 * 4; ++block) {
          const BlockId id = cache->originals_id(sequence, layer, head, block);
          const Destination view{.part = BlockPart::Both, .view = true};
          ReadTicket ticket = store_->reader()->read({&id, 1}, {&view, 1}, test::patience());
          const BlockResult r = BlockReader::wait(ticket)[0];
          ASSERT_EQ(r.status, BlockStatus::Ok);
          for (const uint16_t* rows : {r.k, r.v}) const_cast<uint16_t*>(rows)[5] ^= 1;
        }
  }

 private:
  // Of variance 1.7^2, most of it what the step before had.
  std::vector<float> queries(int layer) const {
    std::vector<float> row(kWidth);
    double weight = 1.7 * std::sqrt(1 - kStays * kStays);
    for (unsigned at = steps_ + kPast; at > steps_; --at, weight *= kStays) {
      std::mt19937 random(at * 1000 + unsigned(layer));
      std::normal_distribution<double> normal;
      for (float& x : row) x += float(weight * normal(random));
    }
    return row;
  }

  ModelConfig config_;
  std::unique_ptr<cuda::Device> device_;
  std::unique_ptr<cuda::CacheOps> ops_;
  test::ThreadHolder holder_{uint64_t(32) << 20};
  std::shared_ptr<StoreClient> store_ = holder_.attach(0);
  std::shared_ptr<LocalWorld> world_ = LocalWorld::create(1);
  std::unique_ptr<Communicator> group_ = world_->communicator(0);
  ThreadPool pool_{1};
  unsigned steps_ = 0;

 public:
  std::optional<DeviceCache> cache;
  int64_t sequence = 0;
};

struct Sums {
  uint64_t climbed = 0, promoted = 0, prefetched = 0, used = 0, paged = 0, read = 0, digest = 0;
  uint64_t certified = 0, exact = 0, head_steps = 0;
  void add(const SequenceReport& report) {
    for (const GroupReport& g : report.layers) {
      prefetched += g.prefetched;
      used += g.prefetched_used;
      paged += g.paged_bytes;
      read += g.read_bytes;
      digest += g.digest;
      for (const HeadReport& h : g.heads) {
        climbed += h.rung > 0;
        promoted += uint64_t(h.promoted_keys + h.promoted_values);
        certified += h.outcome == Outcome::Certified;
        exact += h.outcome == Outcome::Exact;
        ++head_steps;
      }
    }
  }
};

// Largest bound over tolerance of a KV head's query heads.
double worst(const GroupReport& g, double tolerance) {
  double most = 0;
  for (const HeadReport& h : g.heads)
    most = std::max(most, h.returned.bound / (tolerance * h.returned.s_lo));
  return most;
}

// A tolerance that no head exceeds in two steps without originals, and so small a share of it that
// most do.
double loose() {
  static const double tolerance = [] {
    OneCache c({.tolerance = 100});
    double most = 0;
    for (int n = 0; n < 2; ++n)
      for (const GroupReport& g : c.step().layers) most = std::max(most, worst(g, 1));
    return most * 1.01;
  }();
  return tolerance;
}
constexpr double kShare = 0.7;

// The oracle is the ladder itself: another cache whose tolerance is the smaller one.
TEST(DevicePrefetch, ReadsWhatTheLadderWouldPromoteIfTheToleranceWereTheShare) {
  OneCache ahead({.tolerance = loose(), .prefetch = kShare});
  OneCache climbs({.tolerance = loose() * kShare, .rounds = 1});
  const SequenceReport first = ahead.step(), other = climbs.step();
  int heads = 0;
  uint64_t keys_and_values = 0;
  std::vector<uint64_t> expected;
  for (size_t cell = 0; cell < first.layers.size(); ++cell) {
    const GroupReport &a = first.layers[cell], &b = other.layers[cell];
    for (const HeadReport& h : a.heads) EXPECT_EQ(h.rung, 0);  // nothing was promoted
    EXPECT_EQ(a.scratch_misses, 0u);
    uint64_t promoted = 0;
    for (const HeadReport& h : b.heads) promoted += uint64_t(h.promoted_keys + h.promoted_values);
    EXPECT_EQ(a.prefetched, promoted) << "cell " << cell;
    EXPECT_EQ(a.prefetched > 0, worst(a, loose()) > kShare) << "cell " << cell;
    EXPECT_EQ(a.paged_bytes, a.prefetched * 16 * kDim * 2);
    heads += promoted > 0;
    keys_and_values += promoted;
    expected.push_back(promoted);
  }
  EXPECT_GE(heads, 3);
  EXPECT_GE(keys_and_values, 20u);
  // The next step's pass reads them, and says how many it kept.
  const SequenceReport& second = ahead.step();
  for (size_t cell = 0; cell < second.layers.size(); ++cell) {
    const GroupReport& g = second.layers[cell];
    EXPECT_EQ(g.f_blocks + g.x_blocks, expected[cell]) << "cell " << cell;
    EXPECT_LE(g.prefetched_used, expected[cell]);
  }
}

TEST(DevicePrefetch, SparesLaterStepsTheirClimbs) {
  const double tight = loose() * 0.6;
  Sums with, without;
  OneCache ahead({.tolerance = tight, .prefetch = 0.8}), plain({.tolerance = tight});
  for (int n = 0; n < 20; ++n) {
    const SequenceReport &a = ahead.step(), &b = plain.step();
    if (n == 0) continue;  // nothing could be read before
    with.add(a);
    without.add(b);
  }
  for (const Sums* s : {&with, &without}) {
    fmt::print(
        "{} of {} head-steps climbed, {} blocks promoted, {} prefetched, {} used, {} KiB read\n",
        s->climbed, s->head_steps, s->promoted, s->prefetched, s->used, s->read >> 10);
    EXPECT_EQ(s->certified + s->exact, s->head_steps);
    EXPECT_EQ(s->digest, 0u);
  }
  EXPECT_EQ(without.prefetched, 0u);
  EXPECT_EQ(without.used, 0u);
  EXPECT_GE(without.climbed, 10u);
  EXPECT_LT(2 * with.climbed, without.climbed);
  EXPECT_GT(with.prefetched, 0u);
  EXPECT_GT(with.used, with.prefetched / 2);
}

// What a branch reads must not be what the main stream writes meanwhile: with the work of branches
// done at once or as late as their joins, all bits are the same.
TEST(DevicePrefetch, BitsDoNotDependOnWhenTheDeviceDoesIt) {
  OneCache::Rules rules{.tolerance = loose() * 0.6, .prefetch = 0.8};
  OneCache at_once(rules);
  rules.late = true;
  OneCache late(rules);
  Sums sums;
  for (int n = 0; n < 40; ++n) {  // a page is sealed on the way
    std::vector<float> a, b;
    const SequenceReport &x = at_once.step(&a), &y = late.step(&b);
    ASSERT_EQ(0, std::memcmp(a.data(), b.data(), a.size() * sizeof(float))) << "step " << n;
    for (size_t cell = 0; cell < x.layers.size(); ++cell) {
      const GroupReport &g = x.layers[cell], &h = y.layers[cell];
      ASSERT_EQ(g.prefetched, h.prefetched) << "step " << n << " cell " << cell;
      ASSERT_EQ(g.prefetched_used, h.prefetched_used) << "step " << n << " cell " << cell;
      ASSERT_EQ(g.f_blocks, h.f_blocks);
      ASSERT_EQ(g.x_blocks, h.x_blocks);
    }
    sums.add(x);
  }
  EXPECT_GT(sums.prefetched, 100u);
  EXPECT_GT(sums.climbed, 20u);
}

TEST(DevicePrefetch, LeavesHalfOfWhatIsFree) {
  for (const int64_t slots : {2, 8, 14, 30}) {
    OneCache c({.tolerance = loose(), .prefetch = kShare, .slots = slots * int64_t(kKvHeads)});
    uint64_t seen = 0;
    const SequenceReport first = c.step();
    for (const GroupReport& g : first.layers) {
      EXPECT_LE(g.prefetched, 2 * uint64_t(slots + 1) / 2);
      seen += g.prefetched;
    }
    for (int n = 0; n < 5; ++n)
      for (const GroupReport& g : c.step().layers) {
        EXPECT_LE(g.f_blocks, uint64_t(slots));
        EXPECT_LE(g.x_blocks, uint64_t(slots));
        for (const HeadReport& h : g.heads) EXPECT_NE(h.outcome, Outcome::Failed);
      }
    if (slots == 30) {
      EXPECT_GT(seen, 0u);
    }
  }
}

// Codes go on standing in for what is not what was asked for: bits are those of a cache that read
// nothing.
TEST(DevicePrefetch, OriginalsThatAreDamagedAreNotUsed) {
  OneCache ahead({.tolerance = loose(), .prefetch = kShare}), plain({.tolerance = loose()});
  ahead.damage_originals();
  Sums sums;
  for (int n = 0; n < 2; ++n) {
    std::vector<float> a, b;
    const SequenceReport &x = ahead.step(&a), &y = plain.step(&b);
    for (const GroupReport& g : y.layers)
      for (const HeadReport& h : g.heads) ASSERT_EQ(h.rung, 0);
    EXPECT_EQ(0, std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
    EXPECT_FALSE(x.error.has_value());
    for (const GroupReport& g : x.layers) {
      EXPECT_EQ(g.f_blocks + g.x_blocks, 0u);
      EXPECT_EQ(g.prefetched_used, 0u);
    }
    sums.add(x);
  }
  EXPECT_GT(sums.prefetched, 0u);
  EXPECT_EQ(sums.digest, sums.prefetched);
}

}  // namespace
}  // namespace certkv
