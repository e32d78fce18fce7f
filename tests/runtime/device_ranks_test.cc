// Several ranks of the device's forward pass, each on an emulated device, as threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <optional>
#include <set>
#include <span>

#include "kernels/base/error.h"
#include "kernels/sample.h"
#include "parallel/communicator.h"
#include "runtime/device/device_transformer.h"
#include "tests/support/plain_device_attention.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"

namespace certkv::test {
namespace {

constexpr uint64_t kSeed = 7;
constexpr size_t kPrompt = 40;

// Counts what was captured and launched.
struct CountingGroup final : DeviceGroup {
  explicit CountingGroup(std::unique_ptr<DeviceGroup> of) : group(std::move(of)) {}
  std::unique_ptr<DeviceGroup> group;
  bool refuses = false;
  int captures = 0, launches = 0, forgotten = 0;
  std::vector<size_t> elements;  // of sums

  int rank() const override { return group->rank(); }
  int size() const override { return group->size(); }
  void sum(float* inout, size_t count) override {
    elements.push_back(count);
    group->sum(inout, count);
  }
  void gather(const void* own, void* all, size_t count) override { group->gather(own, all, count); }
  void wait() override { group->wait(); }
  bool all_same(uint64_t mine) override { return group->all_same(mine); }
  bool capture(uint64_t number, const std::function<void()>& work) override {
    ++captures;
    return !refuses && group->capture(number, work);
  }
  void launch(uint64_t number) override {
    ++launches;
    group->launch(number);
  }
  void forget(uint64_t number) noexcept override {
    ++forgotten;
    group->forget(number);
  }
};

// Its shape is what the test says. An emulated graph runs this class's code again.
struct ShapedAttention final : PlainDeviceAttention {
  using PlainDeviceAttention::PlainDeviceAttention;
  std::optional<uint64_t> given;
  int layers = 0, ended = 0;  // of the step under way; steps that ended behind their layers
  void begin_rows(std::span<const int64_t> sequences, float* out) override {
    PlainDeviceAttention::begin_rows(sequences, out);
    layers = 0;
  }
  void decode(int layer, const float* qkv, const Following& following) override {
    PlainDeviceAttention::decode(layer, qkv, following);
    ++layers;
  }
  void end_rows() override { ended += layers > 0 ? 1 : 0; }
  uint64_t shape() const override { return given ? *given : PlainDeviceAttention::shape(); }
};

// An emulated device's memory is the host's, and its stream is always done.
struct Rank {
  ModelConfig config = random_model_config();
  std::unique_ptr<cuda::Device> device = cuda::make_emulated_device();
  std::unique_ptr<cuda::ModelOps> model = cuda::make_emulated_model_ops(*device);
  std::unique_ptr<cuda::LinearOps> linear = cuda::make_emulated_linear_ops(*device);
  std::unique_ptr<cuda::DenseOps> dense = cuda::make_emulated_dense_ops(*device);
  CountingGroup group;
  ShapedAttention cache;
  DeviceTransformer transformer;

  Rank(Communicator& ranks, const std::function<void(Weights&)>& change)
      : group(make_host_group(ranks, *device)),
        cache(*device, size_t(config.kv_heads / ranks.size()), size_t(config.heads_per_group()),
              size_t(config.head_dim), DType::F16),
        transformer(config, weights_of(ranks, change), *device, {*model, *linear, *dense}, cache,
                    &group,
                    {.originals = DType::F16,
                     .weights = DType::F32,
                     .max_batch = 2,
                     .max_tokens = 100,
                     .chunk_rows = 16}) {}

 private:
  Weights weights_of(Communicator& ranks, const std::function<void(Weights&)>& change) const {
    Weights w = random_weights(config, ranks.size(), ranks.rank(), kSeed);
    if (change) change(w);
    return w;
  }
};

std::vector<int32_t> prompt(int seed) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < kPrompt; ++i)
    ids.push_back(int32_t((i * i * 31 + size_t(seed) * 7) % 101));
  return ids;
}

// Logits of two prompts and of a step of both.
std::vector<float> forward(int tensor) {
  std::vector<std::vector<float>> by_rank(static_cast<size_t>(tensor));
  run_thread_ranks(tensor, [&](Communicator& ranks) {
    Rank rank(ranks, {});
    std::vector<float>& logits = by_rank[size_t(ranks.rank())];
    for (int s : {0, 1}) {
      const auto some = rank.transformer.prefill(s, prompt(s));
      logits.insert(logits.end(), some.begin(), some.end());
    }
    const DecodeOutput out = rank.transformer.decode(
        std::vector<DecodeInput>{{0, 5, int64_t(kPrompt)}, {1, 100, int64_t(kPrompt)}});
    EXPECT_EQ(out.nonfinite_layer, (std::vector{-1, -1}));
    logits.insert(logits.end(), out.logits.begin(), out.logits.end());
  });
  for (const auto& logits : by_rank) EXPECT_EQ(logits, by_rank[0]) << "ranks disagree";
  return by_rank[0];
}

// Sums over ranks are taken in another order, 2^-24 for each of a few hundred terms. A key, value,
// query or output of attention that then rounds the other way moves by 2^-11 of itself, one of 512
// inputs of a product; a thousandth of the largest logit would take some fifty.
constexpr float kReordering = 1e-3f;

TEST(DeviceRanks, LogitsAreTheSameOnAllRanksAndCloseForEveryNumber) {
  const std::vector<float> one = forward(1);
  float largest = 0;
  for (float x : one) largest = std::max(largest, std::abs(x));
  EXPECT_GT(largest, 0.5f);
  for (int tensor : {2, 4}) {
    const std::vector<float> several = forward(tensor);
    ASSERT_EQ(several.size(), one.size());
    for (size_t i = 0; i < one.size(); ++i)
      EXPECT_NEAR(several[i], one[i], kReordering * largest) << tensor << " ranks, logit " << i;
  }
}

// How the two rows of a step are asked for: their logits, or the likeliest token, or one drawn.
enum class Ask { Logits, Best, Draw };

TokenChoice choice_of(Ask ask, size_t step, size_t row) {
  if (ask == Ask::Best) return {};
  const SampleOptions options[] = {{1, 0, 1}, {0.7, 40, 1}, {2, 0, 0.9}, {1, 60, 0.95}};
  return {options[(step + row) % 4], uniform_at(1, row, step)};
}

std::vector<DecodeOutput> decode_as(Communicator& ranks,
                                    const std::vector<std::array<Ask, 2>>& steps) {
  Rank rank(ranks, {});
  rank.cache.given = 1;
  for (int s : {0, 1}) rank.transformer.prefill(s, prompt(s));
  std::vector<DecodeOutput> out;
  for (size_t i = 0; i < steps.size(); ++i) {
    std::vector<DecodeInput> rows{{0, int32_t(5 + i), int64_t(kPrompt + i), {}},
                                  {1, int32_t(90 - i), int64_t(kPrompt + i), {}}};
    for (size_t r = 0; r < 2; ++r)
      if (steps[i][r] != Ask::Logits) rows[r].choice = choice_of(steps[i][r], i, r);
    out.push_back(rank.transformer.decode(rows));
  }
  return out;
}

// What a row is asked for is a shape of its own, but changes no result: new, captured, and launched
// again.
TEST(DeviceRanks, TheTokenIsThatOfTheLogitsOnAnyNumberOfRanks) {
  std::vector<std::array<Ask, 2>> steps;
  const Ask all_ways[] = {Ask::Best, Ask::Logits, Ask::Draw};
  for (Ask first : all_ways)
    for (Ask second : all_ways) steps.insert(steps.end(), 3, {first, second});
  for (int tensor : {1, 2, 4}) {
    run_thread_ranks(tensor, [&](Communicator& ranks) {
      const std::vector<DecodeOutput> all =
          decode_as(ranks, {steps.size(), std::array{Ask::Logits, Ask::Logits}});
      const std::vector<DecodeOutput> some = decode_as(ranks, steps);
      std::set<int32_t> likeliest, drawn;
      for (size_t i = 0; i < steps.size(); ++i) {
        const size_t vocab = all[i].logits.size() / 2;
        EXPECT_EQ(some[i].logits.empty(), steps[i][0] != Ask::Logits && steps[i][1] != Ask::Logits)
            << "step " << i;
        for (size_t r = 0; r < 2; ++r) {
          const std::span logits = std::span(all[i].logits).subspan(r * vocab, vocab);
          const DecodeOutput::Chosen& chosen = some[i].chosen[r];
          EXPECT_EQ(all[i].chosen[r].token, -1);
          if (steps[i][r] == Ask::Logits) {
            EXPECT_EQ(chosen.token, -1);
            EXPECT_TRUE(std::equal(logits.begin(), logits.end(),
                                   some[i].logits.begin() + ptrdiff_t(r * vocab)));
            continue;
          }
          const TokenChoice choice = choice_of(steps[i][r], i, r);
          (steps[i][r] == Ask::Best ? likeliest : drawn).insert(chosen.token);
          EXPECT_EQ(chosen.token, sample_token(logits, choice.options, choice.uniform))
              << "step " << i << " row " << r << " of " << tensor << " ranks";
          EXPECT_EQ(chosen.largest, *std::max_element(logits.begin(), logits.end()));
        }
      }
      EXPECT_GT(likeliest.size(), 4u) << "no choice to speak of";
      EXPECT_GT(drawn.size(), 12u) << "no choice to speak of";
    });
  }
}

// Logits of steps of one sequence, whose shapes are given; on rank 1 perhaps others.
struct Steps {
  std::vector<float> logits;
  int captures = 0, launches = 0, forgotten = 0;
};
Steps decode_shapes(const std::vector<uint64_t>& shapes, const std::vector<uint64_t>& of_rank_1,
                    bool refuses = false) {
  std::vector<Steps> by_rank(2);
  run_thread_ranks(2, [&](Communicator& ranks) {
    Rank rank(ranks, {});
    rank.group.refuses = refuses;
    Steps& out = by_rank[size_t(ranks.rank())];
    rank.transformer.prefill(0, prompt(0));
    for (size_t i = 0; i < shapes.size(); ++i) {
      rank.cache.given = ranks.rank() == 1 ? of_rank_1[i] : shapes[i];
      const DecodeOutput step = rank.transformer.decode(
          std::vector<DecodeInput>{{0, int32_t(5 + i), int64_t(kPrompt + i)}});
      out.logits.insert(out.logits.end(), step.logits.begin(), step.logits.end());
    }
    EXPECT_EQ(rank.cache.layers, rank.config.layers);
    EXPECT_EQ(rank.cache.ended, int(shapes.size()));
    out.captures = rank.group.captures;
    out.launches = rank.group.launches;
    out.forgotten = rank.group.forgotten;
  });
  EXPECT_EQ(by_rank[0].logits, by_rank[1].logits);
  EXPECT_EQ(by_rank[0].captures, by_rank[1].captures) << "one rank captured, the other did not";
  EXPECT_EQ(by_rank[0].launches, by_rank[1].launches);
  return by_rank[0];
}

TEST(DeviceRanks, AStepIsCapturedWhereItsShapeComesAgainOnAllRanks) {
  const std::vector<uint64_t> always_new = {1, 2, 3, 4, 5, 6};
  const Steps plain = decode_shapes(always_new, always_new);
  EXPECT_EQ(plain.captures, 0);
  EXPECT_EQ(plain.launches, 0);
  const auto check = [&](const Steps& steps, int captures, int launches) {
    EXPECT_EQ(steps.logits, plain.logits);
    EXPECT_EQ(steps.captures, captures);
    EXPECT_EQ(steps.launches, launches);
  };
  const std::vector<uint64_t> same = {1, 1, 1, 1, 1, 1}, changes = {1, 1, 1, 2, 2, 2};
  check(decode_shapes(same, same), 1, 5);
  check(decode_shapes(changes, changes), 2, 4);
  check(decode_shapes(same, changes), 2, 4);  // devices of two kinds: other splits
  check(decode_shapes(changes, same), 2, 4);
  check(decode_shapes(same, always_new), 0, 0);
  check(decode_shapes(same, same, true), 5, 0);
  // Policies take turns.
  const std::vector<uint64_t> turns = {1, 2, 1, 2, 1, 2};
  check(decode_shapes(turns, turns), 2, 4);
  // What rank 0 takes for its first capture is the second one of rank 1.
  check(decode_shapes(turns, {1, 2, 2, 1, 1, 2}), 2, 2);
}

TEST(DeviceRanks, TheStepThatWasNotLaunchedForLongestIsForgotten) {
  std::vector<uint64_t> shapes = {1, 1};
  for (uint64_t other = 2; other <= StepGraphs::kMost; ++other) shapes.push_back(other);
  shapes.push_back(1);  // still there
  for (uint64_t other = 2; other <= StepGraphs::kMost; ++other) shapes.push_back(other + 100);
  shapes.push_back(1);  // still: those that were never captured went before
  const Steps kept = decode_shapes(shapes, shapes);
  EXPECT_EQ(kept.captures, 1);
  EXPECT_EQ(kept.launches, 3);
  EXPECT_EQ(kept.forgotten, 0);
  for (uint64_t other = 0; other < StepGraphs::kMost; ++other) shapes.push_back(other + 200);
  shapes.push_back(1);
  const Steps gone = decode_shapes(shapes, shapes);
  EXPECT_EQ(gone.captures, 1);
  EXPECT_EQ(gone.launches, 3);
  EXPECT_EQ(gone.forgotten, 1);
}

// Rung 4: one rank doubts rows at some layers. All ranks repeat these for these rows, none other,
// and every token is appended once: the outputs are those of a run without faults, bit for bit,
// whether the step is enqueued piece by piece, captured, or launched again.
TEST(DeviceRanks, ARowOneRankDoubtsIsRepeatedDenselyOnAllRanksAndNoOther) {
  struct Fault {
    int rank, layer;
    int64_t sequence;
    size_t step;
  };
  constexpr size_t kSteps = 5;
  const int last = int(random_model_config().layers) - 1;
  ASSERT_GE(last, 1);
  const auto decode = [&](const std::vector<Fault>& faults, float flag) {
    std::vector<std::vector<float>> by_rank(2);
    run_thread_ranks(2, [&](Communicator& ranks) {
      Rank rank(ranks, {});
      rank.cache.given = 1;
      rank.cache.flag = flag;
      size_t step = 0;
      for (int s : {0, 1}) rank.transformer.prefill(s, prompt(s));
      rank.cache.cache().broken = [&](int layer, int64_t s) {
        return std::ranges::any_of(faults, [&](const Fault& f) {
          return f.rank == ranks.rank() && f.layer == layer && f.sequence == s && f.step == step;
        });
      };
      using Calls = std::vector<std::pair<int, int64_t>>;
      for (; step < kSteps; ++step) {
        Calls& calls = rank.cache.cache().dense_calls;
        calls.clear();
        rank.group.elements.clear();
        const DecodeOutput out = rank.transformer.decode(
            std::vector<DecodeInput>{{0, int32_t(5 + step), int64_t(kPrompt + step), {}},
                                     {1, int32_t(90 - step), int64_t(kPrompt + step), {}}});
        EXPECT_EQ(out.nonfinite_layer, (std::vector{-1, -1}));
        std::set<std::pair<int, int64_t>> expected;
        std::vector<int> layers(2);
        for (const Fault& f : faults)
          if (f.step == step && expected.insert({f.layer, f.sequence}).second)
            ++layers[size_t(f.sequence)];
        EXPECT_EQ(calls, Calls(expected.begin(), expected.end())) << "step " << step;
        EXPECT_EQ(out.fallback_layers, layers) << "step " << step;
        if (expected.empty()) {  // an element a row on every layer's first sum
          const size_t hidden = size_t(rank.config.hidden);
          std::vector<size_t> sums;
          for (int layer = 0; layer <= last; ++layer)
            sums.insert(sums.end(), {2 * hidden + 2, 2 * hidden});
          EXPECT_EQ(rank.group.elements, sums);
        }
        for (int layer = 0; layer <= last; ++layer)
          for (int64_t s : {0, 1})
            EXPECT_EQ(rank.cache.cache().tokens(s, layer), kPrompt + step + 1);
        by_rank[size_t(ranks.rank())].insert(by_rank[size_t(ranks.rank())].end(),
                                             out.logits.begin(), out.logits.end());
      }
      EXPECT_EQ(rank.group.launches, int(kSteps) - 1);
    });
    EXPECT_EQ(by_rank[0], by_rank[1]);
    return by_rank[0];
  };
  const std::vector<float> sound = decode({}, 1);
  // By step: piece by piece; captured; launched again, twice in one step, by both ranks; the last
  // layer, all rows.
  const std::vector<Fault> faults = {{1, 0, 1, 0},    {0, last, 0, 1}, {1, 0, 0, 2},
                                     {0, last, 1, 2}, {1, last, 1, 2}, {0, last, 0, 3},
                                     {1, last, 1, 3}};
  for (const float flag : {1.0f, 0x1p-149f, std::nanf("")})
    EXPECT_EQ(decode(faults, flag), sound) << flag;
}

TEST(DeviceRanks, AValueThatOneRankCannotRoundIsNamedByAll) {
  std::mutex mutex;
  std::vector<std::string> errors;
  std::vector<int> layers;
  run_thread_ranks(2, [&](Communicator& ranks) {
    Rank rank(ranks, [&](Weights& w) {  // a value; the other rank sees it in the layer's sum alone
      if (ranks.rank() == 1) w.layers[1].groups[1].qkv_bias[3 * 64 + 5] = -1e9f;
    });
    std::string error;
    try {
      rank.transformer.prefill(0, prompt(0));
    } catch (const Error& e) {
      error = std::string(error_kind_name(e.kind())) + ": " + e.what();
    }
    const DecodeOutput out =
        rank.transformer.decode(std::vector<DecodeInput>{{7, 5, 0}});  // of an empty sequence
    std::lock_guard lock(mutex);
    errors.push_back(error);
    layers.push_back(out.nonfinite_layer[0]);
  });
  ASSERT_EQ(errors.size(), 2u);
  EXPECT_EQ(errors[0], errors[1]);
  EXPECT_TRUE(errors[0].starts_with("NonFinite: layer 1: a key or value of token 0 ")) << errors[0];
  EXPECT_EQ(layers, (std::vector{1, 1}));
}

TEST(DeviceRanks, WeightsOfAnotherRankAreRefused) {
  run_thread_ranks(2, [&](Communicator& ranks) {
    std::string error;
    try {
      Rank rank(ranks, [&](Weights& w) {
        w = random_weights(random_model_config(), 2, 1 - ranks.rank(), kSeed);
      });
    } catch (const Error& e) {
      error = e.what();
    }
    EXPECT_NE(error.find("weights of KV groups"), std::string::npos) << error;
  });
}

}  // namespace
}  // namespace certkv::test
