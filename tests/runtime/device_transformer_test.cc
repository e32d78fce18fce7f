// The forward pass of a device against the CPU's. In emulation here, on a GPU in tests/gpu.
#include "runtime/device/device_transformer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "runtime/transformer.h"
#include "tests/support/device_ops.h"
#include "tests/support/plain_device_attention.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"

namespace certkv::test {
namespace {

constexpr uint64_t kSeed = 7;
constexpr int kSteps = 3;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<int32_t> prompt(size_t length, int64_t vocab) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < length; ++i)
    ids.push_back(int32_t((i * i * 31 + i * 7 + length) % size_t(vocab)));
  return ids;
}

// What a cache was handed of the last queries.
class RecordingAttention : public PlainKvAttention {
 public:
  using PlainKvAttention::PlainKvAttention;
  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, std::span<const float> queries) override {
    PlainKvAttention::store_prefill(sequence, layer, tokens, k, v, queries);
    last_q[{sequence, layer}].assign(queries.begin(), queries.end());
  }
  std::map<std::pair<int64_t, int>, std::vector<float>> last_q;
};

struct Case {
  ModelConfig config = random_model_config();
  DType weights = DType::F32;
  DType originals = DType::F16;
  std::vector<size_t> lengths{70, 33, 1};
  size_t chunk_rows = 32;
  std::function<void(Weights&)> change = [](Weights&) {};
};

// Logits of prefill and of kSteps decode steps, per sequence.
using Logits = std::vector<std::vector<float>>;

// Prefills all sequences, then decodes them together.
template <typename Model>
Logits forward(Model& model, const Case& c) {
  Logits logits;
  for (size_t s = 0; s < c.lengths.size(); ++s)
    logits.push_back(model.prefill(int64_t(s), prompt(c.lengths[s], c.config.vocab)));
  for (int step = 0; step < kSteps; ++step) {
    std::vector<DecodeInput> rows;
    for (size_t s = 0; s < c.lengths.size(); ++s)
      rows.push_back({int64_t(s), int32_t((s * 17 + size_t(step) * 5) % size_t(c.config.vocab)),
                      int64_t(c.lengths[s]) + step});
    const DecodeOutput out = model.decode(rows);
    EXPECT_EQ(out.nonfinite_layer, std::vector<int>(rows.size(), -1));
    EXPECT_EQ(out.fallback_layers, std::vector<int>(rows.size(), 0));
    for (size_t s = 0; s < rows.size(); ++s)
      logits[s].insert(logits[s].end(), out.logits.begin() + ptrdiff_t(s) * c.config.vocab,
                       out.logits.begin() + ptrdiff_t(s + 1) * c.config.vocab);
  }
  return logits;
}

Logits on_cpu(const Case& c, std::vector<float>* last_q = nullptr) {
  Logits logits;
  run_thread_ranks(1, [&](Communicator& group) {
    Weights weights = random_weights(c.config, 1, 0, kSeed);
    c.change(weights);
    ThreadPool pool(1);
    RecordingAttention cache(size_t(c.config.kv_heads), size_t(c.config.heads_per_group()),
                             size_t(c.config.head_dim), c.originals);
    Transformer model(c.config, weights, group, cache, pool, {true, c.originals});
    logits = forward(model, c);
    if (last_q != nullptr) *last_q = cache.last_q.at({0, 0});
  });
  return logits;
}

double largest(const Logits& a) {
  double most = 0;
  for (const auto& row : a)
    for (float x : row) most = std::max(most, std::abs(double(x)));
  return most;
}
double largest_difference(const Logits& a, const Logits& b) {
  double worst = 0;
  EXPECT_EQ(a.size(), b.size());
  for (size_t s = 0; s < a.size(); ++s) {
    EXPECT_EQ(a[s].size(), b[s].size());
    for (size_t i = 0; i < a[s].size(); ++i) {
      const double d = std::abs(double(a[s][i]) - double(b[s][i]));
      worst = d <= worst ? worst : d;  // a NaN stays
    }
  }
  return worst;
}

class DeviceTransformerTest : public OnTestDevice {
 protected:
  struct Model {
    std::unique_ptr<cuda::ModelOps> model;
    std::unique_ptr<cuda::LinearOps> linear;
    std::unique_ptr<cuda::DenseOps> dense;
    std::unique_ptr<ModelConfig> config;
    std::unique_ptr<PlainDeviceAttention> cache;
    std::unique_ptr<DeviceTransformer> transformer;
    DeviceTransformerOptions options;
    DeviceTransformer* operator->() const { return transformer.get(); }
    DeviceTransformer& operator*() const { return *transformer; }
  };
  Model make(const Case& c, cuda::Device* other = nullptr) {
    cuda::Device& device = other == nullptr ? *device_ : *other;
    Model m{make_test_model_ops(device),
            make_test_linear_ops(device),
            make_test_dense_ops(device),
            std::make_unique<ModelConfig>(c.config),
            nullptr,
            nullptr,
            {}};
    Weights weights = random_weights(c.config, 1, 0, kSeed);
    c.change(weights);
    m.cache = std::make_unique<PlainDeviceAttention>(device, size_t(c.config.kv_heads),
                                                     size_t(c.config.heads_per_group()),
                                                     size_t(c.config.head_dim), c.originals);
    m.options = {.originals = c.originals,
                 .weights = c.weights,
                 .int8 = weights.format == WeightFormat::Int8,
                 .max_batch = 3,
                 .max_tokens = 200,
                 .chunk_rows = c.chunk_rows};
    m.transformer = std::make_unique<DeviceTransformer>(*m.config, weights, device,
                                                        DeviceOps{*m.model, *m.linear, *m.dense},
                                                        *m.cache, nullptr, m.options);
    return m;
  }
  Logits on_device(const Case& c) {
    Model m = make(c);
    return forward(*m, c);
  }
};

// Prompts of one token: attention answers with a value that is rounded already, so that products'
// orders of summation are all that differs from the CPU: 72 terms (the hidden size) cost at most 72
// 2^-24, 20 products and norms in a row 9e-5 of the result. A key or value that then rounds the
// other way moves by 2^-11 of itself, one of the 512 inputs of a product: 2e-5 each, and there are
// few.
constexpr double kReordering = 2e-4;

// Rounding to bfloat16 moves a number by 2^-9 of itself. Two layers and the head have 9 products,
// each with two sides that are rounded.
constexpr double kBrainRounding = 9 * 2 * 0x1p-9;

TEST_F(DeviceTransformerTest, DecodeOfSeveralRowsIsTheCpusBesideTheOrderOfSums) {
  const Case c{.lengths = {1, 1, 1}};
  const Logits cpu = on_cpu(c);
  EXPECT_GT(largest(cpu), 0.5);
  EXPECT_LT(largest_difference(on_device(c), cpu), kReordering * largest(cpu));
}

// Prefill rounds queries and attention's outputs to halves (2^-12), which the CPU does not. What
// that may change is measured: rounding keys and values to bfloat16 (2^-9) instead of halves is a
// perturbation 8 times as large of as many numbers, at the same places. Half of what it changes is
// 4 times what is expected.
TEST_F(DeviceTransformerTest, PromptsInChunksAndDecodeAreTheCpusBesideRounding) {
  Case c, coarse;
  coarse.originals = DType::BF16;
  std::vector<float> last_q;
  const Logits cpu = on_cpu(c, &last_q);
  const double measured = largest_difference(on_cpu(coarse), cpu);
  EXPECT_LT(measured, 0.05 * largest(cpu));  // or half of it would say nothing
  EXPECT_GT(measured, 0);

  Model m = make(c);
  EXPECT_LT(largest_difference(forward(*m, c), cpu), measured / 2);
  EXPECT_EQ(m.cache->cache().tokens(0, 1), c.lengths[0] + kSteps);
  // The first layer's queries have seen no attention. The CPU's chunk is longer: it has 4 rows.
  const std::vector<float>& queries = m.cache->last_q.at({0, 0});
  EXPECT_LT(largest_difference({queries}, {last_q}), kReordering * largest({last_q}));

  c.chunk_rows = 128;  // one chunk
  EXPECT_LT(largest_difference(on_device(c), cpu), measured / 2);
}

TEST_F(DeviceTransformerTest, ATiedHeadAndAModelWithoutBiasOrHeadNormsAreTheCpus) {
  Case c{.lengths = {1, 1}};
  c.config.tie_word_embeddings = true;
  c.config.qkv_bias = c.config.o_bias = c.config.mlp_bias = c.config.qk_norm = false;
  c.change = [](Weights& w) {
    for (size_t g = 0; g < w.lm_head.size(); ++g)
      for (int64_t r = 0; r < w.lm_head[g].rows; ++r)
        w.embed.row(int32_t(w.lm_head_rows[g].begin + r),
                    w.lm_head[g].values.get() + r * w.lm_head[g].cols);
  };
  const Logits cpu = on_cpu(c);
  EXPECT_LT(largest_difference(on_device(c), cpu), kReordering * largest(cpu));
  c.weights = DType::BF16;  // the embedding stays F32: the head is a matrix of its own
  EXPECT_LT(largest_difference(on_device(c), cpu), kBrainRounding * largest(cpu));
}

// Weights and what meets them rounded to 11 or to 8 bits: if nothing but rounding makes the
// difference, that is 8 times as large. 3 leaves room for which way single numbers fall.
TEST_F(DeviceTransformerTest, WeightsOf16BitsDifferByTheirRoundingAlone) {
  Case c;
  const Logits cpu = on_cpu(c);
  c.weights = DType::F16;
  const double fine = largest_difference(on_device(c), cpu);
  c.weights = DType::BF16;
  const double coarse = largest_difference(on_device(c), cpu);
  EXPECT_LT(3 * fine, coarse);
  EXPECT_GT(fine, 0);
  EXPECT_LT(coarse, kBrainRounding * largest(cpu));
}

// Codes and scales are the same numbers on both sides. What was rounded to 8 bits changes the
// logits by far more than what is allowed here.
TEST_F(DeviceTransformerTest, WeightsOf8BitsAreTheCpusBesideTheOrderOfSums) {
  Case c{.lengths = {1, 1, 1}};
  const Logits plain = on_cpu(c);
  c.change = quantise_weights;
  const Logits cpu = on_cpu(c);
  EXPECT_GT(largest_difference(plain, cpu), 10 * kReordering * largest(cpu));
  EXPECT_LT(largest_difference(on_device(c), cpu), kReordering * largest(cpu));
  // Inputs of 16 bits are rounded, the layers' weights are not: less than what is allowed for both.
  c.weights = DType::BF16;
  EXPECT_LT(largest_difference(on_device(c), cpu), kBrainRounding * largest(cpu));
}

// Chunks of 32 rows go through the library, the 6 rows after them and decode through the kernel.
TEST_F(DeviceTransformerTest, PromptsWithWeightsOf8BitsAreTheCpusBesideRounding) {
  Case c, coarse;
  c.change = coarse.change = quantise_weights;
  coarse.originals = DType::BF16;
  const Logits cpu = on_cpu(c);
  const double measured = largest_difference(on_cpu(coarse), cpu);  // as without INT8, above
  EXPECT_LT(measured, 0.05 * largest(cpu));
  EXPECT_GT(measured, 0);
  EXPECT_LT(largest_difference(on_device(c), cpu), measured / 2);
}

TEST_F(DeviceTransformerTest, WeightsOfAnotherFormatThanWasToldAreRefused) {
  Case c;
  const Model m = make(c);
  DeviceTransformerOptions options = m.options;
  options.int8 = true;
  const std::string why = thrown_by([&] {
    DeviceTransformer(*m.config, random_weights(c.config, 1, 0, kSeed), *device_,
                      DeviceOps{*m.model, *m.linear, *m.dense}, *m.cache, nullptr, options);
  });
  EXPECT_NE(why.find("weights that are not INT8"), std::string::npos) << why;
}

// A part of a row that was rounded by another scale would be another model.
TEST_F(DeviceTransformerTest, PartsOfAnOutputWithTwoScalesAreRefused) {
  Case c;
  c.change = [](Weights& w) {
    quantise_weights(w);
    w.layers[0].groups[1].o.scales[3] *= 2;
  };
  const std::string why = thrown_by([&] { make(c); });
  EXPECT_NE(why.find("o weights (raise parallel.tensor): parts of output 3"), std::string::npos)
      << why;
}

TEST_F(DeviceTransformerTest, ProgressIsToldOfEveryChunkAndMayEndThePrefill) {
  const Case c;
  Model m = make(c);
  using Told = std::vector<std::pair<int, size_t>>;
  Told told;
  const auto ids = prompt(70, c.config.vocab);
  const auto note = [&](int layer, size_t tokens) { told.push_back({layer, tokens}); };
  const auto start = std::chrono::steady_clock::now();
  const auto logits = m->prefill(0, ids, note);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  const ForwardPhases phases = m->phases();
  for (double phase : {phases.projections, phases.attention, phases.store}) EXPECT_GT(phase, 0);
  EXPECT_LE(phases.projections + phases.attention + phases.store, took.count());
  m->clear_phases();
  EXPECT_EQ(m->phases().attention, 0);
  EXPECT_EQ(told, (Told{{0, 32}, {0, 64}, {0, 70}, {1, 32}, {1, 64}, {1, 70}}));
  const auto end = [](int layer, size_t tokens) {
    if (layer == 1 && tokens == 64) throw std::runtime_error("enough");
  };
  EXPECT_THROW(m->prefill(1, ids, end), std::runtime_error);
  EXPECT_EQ(m->prefill(2, ids), logits);
}

TEST_F(DeviceTransformerTest, WhatCannotBeRunIsNamed) {
  const Case c;
  Model m = make(c);
  const auto has = [](const std::string& text, const char* part) {
    return text.starts_with("InvalidArgument") && text.find(part) != std::string::npos;
  };
  const auto prefill = [&](std::vector<int32_t> ids) {
    return thrown_by([&] { m->prefill(9, ids); });
  };
  EXPECT_PRED2(has, prefill({}), "the prompt is empty");
  EXPECT_PRED2(has, prefill({5, 101}), "token 1 of the prompt is id 101");
  EXPECT_PRED2(has, prefill({-1}), "id -1");
  EXPECT_PRED2(has, prefill(std::vector<int32_t>(201, 1)), "201 tokens: the limit is 200");
  m->prefill(0, prompt(5, c.config.vocab));
  const auto decode = [&](std::vector<DecodeInput> rows) {
    return thrown_by([&] { m->decode(rows); });
  };
  EXPECT_PRED2(has, decode({{0, 101, 5}}), "id 101");
  EXPECT_PRED2(has, decode({{0, 1, 200}}), "position 200 of sequence 0");
  EXPECT_PRED2(has, decode({{0, 1, -1}}), "position -1");
  EXPECT_PRED2(has, decode(std::vector<DecodeInput>(4, {0, 1, 5})), "at most 3");
  EXPECT_TRUE(m->decode({}).logits.empty());
  EXPECT_EQ(m->decode(std::vector<DecodeInput>{{0, 1, 5}}).logits.size(), size_t(c.config.vocab));
}

TEST_F(DeviceTransformerTest, ANanInAWeightIsNonFiniteWithItsLayerAndPart) {
  struct Poison {
    const char* says;
    std::function<void(LayerWeights&)> change;
  };
  const Poison poisons[] = {
      {"layer 1: a key or value of token 0 ",
       [](LayerWeights& l) { l.groups[2].qkv_bias[2 * 64 + 3] = kNan; }},
      {"layer 1: a key or value of token 0 ",
       [](LayerWeights& l) { l.groups[0].qkv_bias[3 * 64 + 3] = 1e9f; }},
      {"layer 1: the attention output of token ",
       [](LayerWeights& l) { l.groups[1].o.values[5] = kNan; }},
      {"layer 1: the MLP output of token ",
       [](LayerWeights& l) { l.groups[3].down.values[7] = kNan; }},
      {"layer 1: the attention output of token ", [](LayerWeights& l) { l.o_bias[1] = kNan; }}};
  for (const Poison& poison : poisons) {
    Case c;
    Model good = make(c);
    c.change = [&](Weights& w) { poison.change(w.layers[1]); };
    Model bad = make(c);
    const auto ids = prompt(40, c.config.vocab);
    const std::string error = thrown_by([&] { bad->prefill(0, ids); });
    EXPECT_TRUE(error.starts_with(std::string("NonFinite: ") + poison.says)) << error;
    for (int layer : {0, 1}) {  // a step over what the good model stored
      const auto& from = good.cache->cache();
      if (layer == 0) good->prefill(1, ids);
      std::vector<uint16_t> k, v;
      for (size_t h = 0; h < 4; ++h) {
        k.insert(k.end(), from.keys(1, layer, h).begin(), from.keys(1, layer, h).end());
        v.insert(v.end(), from.values(1, layer, h).begin(), from.values(1, layer, h).end());
      }
      bad.cache->store_prefill(1, layer, ids.size(), k.data(), v.data(), k.size() / 4, {});
    }
    const DecodeOutput out = bad->decode(std::vector<DecodeInput>{{1, 3, 40}});
    EXPECT_EQ(out.nonfinite_layer, std::vector{1}) << poison.says;
    EXPECT_NE(std::string(poison.says).find(layer_part_text(out.nonfinite_part[0])),
              std::string::npos)
        << poison.says << layer_part_text(out.nonfinite_part[0]);
  }
}

TEST_F(DeviceTransformerTest, ARowWithNanFailsAloneAndTheOthersKeepTheirLogits) {
  Case c;
  const auto decode = [&](bool poison) {
    c.change = [&](Weights& w) {
      if (poison)
        reinterpret_cast<float*>(w.embed.values.get())[77 * size_t(c.config.hidden) + 3] = kNan;
    };
    Model m = make(c);
    for (int64_t s : {0, 1, 2}) m->prefill(s, prompt(9, 50));
    return m->decode(std::vector<DecodeInput>{{0, 5, 9}, {1, 77, 9}, {2, 6, 9}});
  };
  const DecodeOutput bad = decode(true), good = decode(false);
  EXPECT_EQ(bad.nonfinite_layer, (std::vector{-1, 0, -1}));
  EXPECT_EQ(good.nonfinite_layer, (std::vector{-1, -1, -1}));
  const size_t vocab = size_t(c.config.vocab);
  for (size_t r : {0u, 2u})
    EXPECT_TRUE(std::equal(bad.logits.begin() + ptrdiff_t(r * vocab),
                           bad.logits.begin() + ptrdiff_t((r + 1) * vocab),
                           good.logits.begin() + ptrdiff_t(r * vocab)));
}

// Nothing of a layer is at fault: what is drawn from such logits must not be served.
TEST_F(DeviceTransformerTest, ALogitThatIsNanIsNamedWhereATokenIsDrawn) {
  Case c;
  c.config.tie_word_embeddings = false;
  const auto decode = [&](bool poison, double temperature) {
    c.change = [&](Weights& w) {
      for (size_t t = 0; t < w.lm_head.size() && poison; ++t)
        if (w.lm_head_rows[t].begin <= 77 && 77 < w.lm_head_rows[t].end)
          reinterpret_cast<float*>(
              w.lm_head[t].values.get())[(77 - w.lm_head_rows[t].begin) * c.config.hidden] = kNan;
    };
    Model m = make(c);
    const std::optional<TokenChoice> choice = TokenChoice{{temperature, 20, 0.9}, 0.4};
    const DecodeOutput out = m->decode(std::vector<DecodeInput>{{0, 5, 0, choice}});
    EXPECT_EQ(out.nonfinite_layer, std::vector{-1});
    EXPECT_TRUE(out.logits.empty());
    return out.chosen[0];
  };
  for (double temperature : {0.0, 1.0}) {
    const auto good = decode(false, temperature), bad = decode(true, temperature);
    EXPECT_EQ(sampled_elsewhere(good.token, good.largest), good.token);
    const std::string why = thrown_by([&] { sampled_elsewhere(bad.token, bad.largest); });
    EXPECT_NE(why.find("NonFinite: logit of token 77 is nan"), std::string::npos) << why;
  }
}

TEST_F(DeviceTransformerTest, MemoryIsWhatWasForetoldAndAPromptThatDoesNotFitIsNamed) {
  for (bool tied : {false, true})
    for (DType type : {DType::F32, DType::BF16}) {
      Case c{.weights = type};
      c.config.tie_word_embeddings = tied;
      Weights weights = random_weights(c.config, 1, 0, kSeed);
      for (bool int8 : {false, true}) {
        if (int8) quantise_weights(weights);
        const auto device = cuda::make_emulated_device();
        const uint64_t before = device->free_bytes();
        const DeviceWeights uploaded(c.config, weights, *device, type);
        EXPECT_EQ(before - device->free_bytes(), DeviceWeights::bytes(c.config, weights, type));
      }
    }
  if (!device_->emulated()) return;  // what follows counts an emulated device's bytes
  Case c;
  const auto ids = prompt(70, c.config.vocab);
  uint64_t used = 0;
  for (bool int8 : {true, false}) {
    c.change = [int8](Weights& w) {
      if (int8) quantise_weights(w);
    };
    Model m = make(c);
    const uint64_t before = device_->free_bytes();
    used = device_->total_bytes() - before;
    Weights weights = random_weights(c.config, 1, 0, kSeed);
    c.change(weights);
    EXPECT_EQ(used, DeviceWeights::bytes(c.config, weights, m.options.weights) +
                        DeviceTransformer::step_bytes(c.config, 1, m.options));
    uint64_t least = before;
    m->prefill(0, ids, [&](int, size_t) { least = std::min(least, device_->free_bytes()); });
    EXPECT_EQ(before - least, DeviceTransformer::prefill_bytes(c.config, 1, 70, m.options));
    EXPECT_EQ(device_->free_bytes(), before);
  }
  const auto small = cuda::make_emulated_device({.total_bytes = used + 10000});
  Model m = make(c, small.get());
  const std::string error = thrown_by([&] { m->prefill(0, ids); });
  EXPECT_TRUE(error.starts_with("OutOfMemory: a prompt's activations")) << error;
  const auto tiny = cuda::make_emulated_device({.total_bytes = used / 2});
  EXPECT_TRUE(thrown_by([&] { make(c, tiny.get()); }).starts_with("OutOfMemory: "));
}

}  // namespace
}  // namespace certkv::test
