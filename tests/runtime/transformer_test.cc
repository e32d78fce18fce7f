#include "runtime/transformer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "tests/support/plain_kv_attention.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"

namespace certkv::test {
namespace {

constexpr uint64_t kSeed = 7;
constexpr int kSteps = 3;

// Spans two chunks of 512, one chunk but several query tiles, and less than one tile.
const std::vector<size_t> kLengths{530, 300, 7};

std::vector<int32_t> prompt(size_t length, int32_t vocab) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < length; ++i)
    ids.push_back(int32_t((i * i * 31 + i * 7 + length) % size_t(vocab)));
  return ids;
}

struct Variant {
  int tensor = 1, threads = 1;
  bool deterministic = true, together = false;
  DType originals = DType::BF16;
};

// Logits of prefill and of kSteps decode steps, per sequence, as rank 0 sees them; all ranks must
// see the same bits.
using Logits = std::vector<std::vector<float>>;

struct Rank {
  ModelConfig config = random_model_config();
  Weights weights;
  ThreadPool pool;
  PlainKvAttention cache;
  Transformer model;
  Rank(Communicator& group, const Variant& run)
      : weights(random_weights(config, group.size(), group.rank(), kSeed)),
        pool(run.threads),
        cache(size_t(config.kv_heads / group.size()), size_t(config.heads_per_group()),
              size_t(config.head_dim), run.originals),
        model(config, weights, group, cache, pool, {run.deterministic, run.originals}) {}
};

Logits forward(const Variant& run) {
  std::vector<Logits> by_rank(size_t(run.tensor), Logits(kLengths.size()));
  run_thread_ranks(run.tensor, [&](Communicator& group) {
    Rank rank(group, run);
    Logits& logits = by_rank[size_t(group.rank())];
    for (size_t s = 0; s < kLengths.size(); ++s)
      logits[s] = rank.model.prefill(int64_t(s), prompt(kLengths[s], int32_t(rank.config.vocab)));
    for (int step = 0; step < kSteps; ++step) {
      std::vector<DecodeInput> rows;
      for (size_t s = 0; s < kLengths.size(); ++s)
        rows.push_back({int64_t(s), int32_t((s + size_t(step) * 5) % size_t(rank.config.vocab)),
                        int64_t(kLengths[s]) + step});
      const auto keep = [&](std::span<const DecodeInput> some) {
        const DecodeOutput out = rank.model.decode(some);
        for (size_t i = 0; i < some.size(); ++i) {
          std::vector<float>& to = logits[size_t(some[i].sequence)];
          const float* from = out.logits.data() + i * size_t(rank.config.vocab);
          to.insert(to.end(), from, from + rank.config.vocab);
          EXPECT_EQ(out.nonfinite_layer[i], -1);
        }
      };
      if (run.together) {
        keep(rows);
      } else {
        for (const DecodeInput& row : rows) keep({&row, 1});
      }
    }
  });
  for (const Logits& l : by_rank) EXPECT_EQ(l, by_rank[0]) << "ranks disagree";
  return by_rank[0];
}

float largest_difference(const Logits& a, const Logits& b) {
  float worst = 0;
  for (size_t s = 0; s < a.size(); ++s)
    for (size_t i = 0; i < a[s].size(); ++i) worst = std::max(worst, std::abs(a[s][i] - b[s][i]));
  return worst;
}

TEST(Transformer, DeterministicLogitsHaveTheSameBitsForAnyRanksThreadsAndBatch) {
  const Logits reference = forward({});
  float largest = 0;
  for (float x : reference[0]) largest = std::max(largest, std::abs(x));
  EXPECT_GT(largest, 0.1f);  // not a row of zeros
  for (int tensor : {1, 2, 4})
    for (int threads : {1, 2})
      for (bool together : {false, true})
        EXPECT_EQ(forward({tensor, threads, true, together}), reference)
            << tensor << " ranks, " << threads << " threads, together " << together;
}

// Without ordered reductions a partial sum is rounded in another order: about (groups + ranks)
// 2^-24 per sum. A key or value that then rounds the other way moves by 2^-8 of itself (bfloat16),
// and there are few of those; a hundredth of the largest logit would take thousands.
constexpr float kReorderingTolerance = 0.01f;

TEST(Transformer, LogitsAreCloseForEveryNumberOfRanksWithoutDeterminism) {
  const Logits reference = forward({});
  for (int tensor : {2, 4}) {
    const Logits other = forward({tensor, 2, false, true});
    EXPECT_LT(largest_difference(other, reference), kReorderingTolerance);
  }
}

TEST(Transformer, DecodingATokenEqualsPrefillingIt) {
  run_thread_ranks(1, [](Communicator& group) {
    Rank rank(group, {.originals = DType::F16});
    const std::vector<int32_t> ids = prompt(521, int32_t(rank.config.vocab));
    for (size_t split : {511u, 512u, 513u, 520u}) {
      const int64_t handle = int64_t(split);
      rank.model.prefill(handle, std::span(ids).first(split));
      DecodeOutput out;
      for (size_t i = split; i < ids.size(); ++i) {
        const DecodeInput row{handle, ids[i], int64_t(i)};
        out = rank.model.decode({&row, 1});
      }
      const std::vector<float> whole = rank.model.prefill(1000 + handle, ids);
      EXPECT_LT(largest_difference({out.logits}, {whole}), kReorderingTolerance) << split;
      EXPECT_EQ(rank.cache.tokens(handle, 1), ids.size());
    }
  });
}

TEST(Transformer, ARowOneRankDoubtsIsRepeatedDenselyOnAllRanksAndNoOther) {
  Variant run{2, 1, true, true};
  const int64_t vocab = random_model_config().vocab;
  const auto decode = [&](bool fault) {
    std::vector<float> logits;
    run_thread_ranks(2, [&](Communicator& group) {
      Rank rank(group, run);
      for (int64_t s : {0, 1, 2}) rank.model.prefill(s, prompt(20 + size_t(s), int32_t(vocab)));
      if (fault && group.rank() == 1)
        rank.cache.broken = [](int layer, int64_t s) { return layer == 1 && s == 1; };
      const std::vector<DecodeInput> rows{{0, 5, 20}, {1, 6, 21}, {2, 7, 22}};
      const DecodeOutput out = rank.model.decode(rows);
      using Calls = std::vector<std::pair<int, int64_t>>;
      EXPECT_EQ(rank.cache.dense_calls, fault ? Calls({{1, 1}}) : Calls{}) << group.rank();
      EXPECT_EQ(out.fallback_layers, fault ? std::vector({0, 1, 0}) : std::vector({0, 0, 0}));
      if (group.rank() == 0) logits = out.logits;
    });
    return logits;
  };
  EXPECT_EQ(decode(true), decode(false));
}

TEST(Transformer, AKeyBeyondHalfPrecisionOnOneRankIsANamedErrorOnAll) {
  std::mutex mutex;
  std::vector<std::string> messages;
  run_thread_ranks(2, [&](Communicator& group) {
    Variant run{2, 1, false, false, DType::F16};
    Rank rank(group, run);
    if (group.rank() == 1)  // one key channel of layer 1, KV head 3
      rank.weights.layers[1].groups[1].qkv_bias[size_t(3 * rank.config.head_dim) + 2] = 1e9f;
    try {
      rank.model.prefill(0, prompt(600, int32_t(rank.config.vocab)));
      ADD_FAILURE() << "an infinite value was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::NonFinite);
      std::lock_guard lock(mutex);
      messages.push_back(e.what());
    }
  });
  ASSERT_EQ(messages.size(), 2u);
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_NE(messages[0].find("layer 1"), std::string::npos) << messages[0];
}

TEST(Transformer, ARowWithNanFailsAloneAndNamesTheLayer) {
  const auto decode = [](bool poison) {
    DecodeOutput out;
    run_thread_ranks(2, [&](Communicator& group) {
      Rank rank(group, {2, 1, true, true});
      const size_t hidden = size_t(rank.config.hidden);
      for (int64_t s : {0, 1}) rank.model.prefill(s, prompt(30, 50));
      float* row = reinterpret_cast<float*>(rank.weights.embed.values.get()) + 77 * hidden;
      if (poison) row[3] = std::numeric_limits<float>::quiet_NaN();
      const std::vector<DecodeInput> rows{{0, 5, 30}, {1, 77, 30}};
      const DecodeOutput mine = rank.model.decode(rows);
      if (group.rank() == 1) out = mine;
    });
    return out;
  };
  const DecodeOutput bad = decode(true), good = decode(false);
  EXPECT_EQ(bad.nonfinite_layer, (std::vector{-1, 0}));
  EXPECT_EQ(good.nonfinite_layer, (std::vector{-1, -1}));
  const size_t vocab = bad.logits.size() / 2;
  EXPECT_EQ(std::memcmp(bad.logits.data(), good.logits.data(), vocab * sizeof(float)), 0);
  EXPECT_TRUE(std::isnan(bad.logits[vocab]));
}

TEST(Transformer, RefusesPromptsItCannotRun) {
  run_thread_ranks(1, [](Communicator& group) {
    Rank rank(group, {});
    rank.config.max_tokens = 10;
    const auto kind = [&](std::vector<int32_t> ids) {
      try {
        rank.model.prefill(0, ids);
      } catch (const Error& e) {
        return e.kind();
      }
      return ErrorKind::Stopped;
    };
    EXPECT_EQ(kind({}), ErrorKind::InvalidArgument);
    EXPECT_EQ(kind({1, 101}), ErrorKind::InvalidArgument);
    EXPECT_EQ(kind({-1}), ErrorKind::InvalidArgument);
    EXPECT_EQ(kind(std::vector<int32_t>(11, 1)), ErrorKind::InvalidArgument);
    const DecodeInput late{0, 1, 10};
    EXPECT_THROW(rank.model.decode({&late, 1}), Error);
  });
}

TEST(Transformer, ReportsProgressPerChunkAndLayerAndEndsWhenToldTo) {
  run_thread_ranks(1, [](Communicator& group) {
    Rank rank(group, {});
    std::vector<std::pair<int, size_t>> seen;
    rank.model.prefill(0, prompt(1030, 101), [&](int layer, size_t n) {
      seen.push_back({layer, n});
    });
    EXPECT_EQ(seen, (std::vector<std::pair<int, size_t>>{
                        {0, 512}, {0, 1024}, {0, 1030}, {1, 512}, {1, 1024}, {1, 1030}}));
    EXPECT_GT(rank.model.phases().projections, 0);
    EXPECT_GT(rank.model.phases().attention, 0);
    EXPECT_THROW(rank.model.prefill(1, prompt(600, 101),
                                    [](int, size_t) { CERTKV_THROW(Stopped, "asked to end"); }),
                 Error);
  });
}

}  // namespace
}  // namespace certkv::test
