#include "runtime/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <map>

#include "kernels/base/error.h"
#include "runtime/host_memory.h"
#include "runtime/safetensors.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using test::TempFolder;
using testing::HasSubstr;

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return std::string(error_kind_name(e.kind())) + ": " + e.what();
  }
  return "no error";
}

// Sizes of which none divides another by accident: MLP 10 and vocabulary 11 over 4 groups.
ModelConfig small_config(Architecture architecture) {
  ModelConfig c;
  c.architecture = architecture;
  c.hidden = 6;
  c.intermediate = 10;
  c.layers = 2;
  c.heads = 8;
  c.kv_heads = 4;
  c.head_dim = 64;
  c.vocab = 11;
  c.dtype = DType::F32;
  c.max_position_embeddings = c.max_tokens = 128;
  if (architecture == Architecture::Llama) c.qkv_bias = c.o_bias = c.mlp_bias = true;
  if (architecture == Architecture::Qwen2) c.qkv_bias = true;
  if (architecture == Architecture::Qwen2) c.tie_word_embeddings = true;
  if (architecture == Architecture::Qwen3) c.qk_norm = true;
  return c;
}

struct FullTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;  // all different from one another, over all tensors; exact in 24 bits
  float at(int64_t r, int64_t c) const { return values[size_t(r * shape[1] + c)]; }
};
using Model = std::map<std::string, FullTensor>;

Model small_model(const ModelConfig& c) {
  Model m;
  int64_t next = 1;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    FullTensor t{shape, {}};
    int64_t count = 1;
    for (const int64_t d : shape) count *= d;
    for (int64_t i = 0; i < count; ++i) t.values.push_back(float(next++));
    m[name] = t;
  };
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  add("model.embed_tokens.weight", {c.vocab, c.hidden});
  add("model.norm.weight", {c.hidden});
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab, c.hidden});
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".", a = p + "self_attn.";
    add(p + "input_layernorm.weight", {c.hidden});
    add(p + "post_attention_layernorm.weight", {c.hidden});
    add(a + "q_proj.weight", {q, c.hidden});
    add(a + "k_proj.weight", {kv, c.hidden});
    add(a + "v_proj.weight", {kv, c.hidden});
    add(a + "o_proj.weight", {c.hidden, q});
    add(p + "mlp.gate_proj.weight", {c.intermediate, c.hidden});
    add(p + "mlp.up_proj.weight", {c.intermediate, c.hidden});
    add(p + "mlp.down_proj.weight", {c.hidden, c.intermediate});
    if (c.qkv_bias)
      add(a + "q_proj.bias", {q}), add(a + "k_proj.bias", {kv}), add(a + "v_proj.bias", {kv});
    if (c.o_bias) add(a + "o_proj.bias", {c.hidden});
    if (c.mlp_bias) {
      add(p + "mlp.gate_proj.bias", {c.intermediate});
      add(p + "mlp.up_proj.bias", {c.intermediate});
      add(p + "mlp.down_proj.bias", {c.hidden});
    }
    if (c.qk_norm) add(a + "q_norm.weight", {c.head_dim}), add(a + "k_norm.weight", {c.head_dim});
  }
  return m;
}

void save(const Model& m, const std::filesystem::path& folder) {
  std::vector<TensorToWrite> list;
  for (const auto& [name, t] : m) list.push_back({name, DType::F32, t.shape, t.values.data()});
  write_safetensors(folder / "model.safetensors", list);
}

uint64_t floats_in(const Weights& w) {
  uint64_t n = w.final_norm.size();
  const auto matrix = [](const Matrix& m) { return uint64_t(m.rows * m.cols) + m.scales.size(); };
  for (const LayerWeights& l : w.layers) {
    n += l.input_norm.size() + l.post_attention_norm.size() + l.q_norm.size() + l.k_norm.size() +
         l.o_bias.size() + l.down_bias.size();
    for (const GroupWeights& g : l.groups) {
      n += matrix(g.qkv) + g.qkv_bias.size() + matrix(g.o) + matrix(g.gate_up) +
           g.gate_up_bias.size() + matrix(g.down);
    }
  }
  for (const Matrix& m : w.lm_head) n += matrix(m);
  return n;
}

// y = W x over whole tensors, one output row; the products over the tiles must add up to it.
double row_times(const FullTensor& w, int64_t row, const std::vector<double>& x) {
  double y = 0;
  for (int64_t i = 0; i < w.shape[1]; ++i) y += double(w.at(row, i)) * x[size_t(i)];
  return y;
}

void expect_group(const Model& m, const ModelConfig& c, int64_t l, int64_t g,
                  const GroupWeights& w) {
  const std::string p = "model.layers." + std::to_string(l) + ".", a = p + "self_attn.";
  const int64_t d = c.head_dim, n = c.heads / c.kv_heads, H = c.hidden;
  ASSERT_EQ(w.qkv.rows, (n + 2) * d);
  ASSERT_EQ(w.qkv.cols, H);
  for (int64_t r = 0; r < w.qkv.rows; ++r) {
    // Head by head, as the model's definition numbers them: query head h belongs to KV head h / n.
    const int64_t head = r / d, dim = r % d;
    const char* which = head < n ? "q_proj" : head == n ? "k_proj" : "v_proj";
    const int64_t global = head < n ? (g * n + head) * d + dim : g * d + dim;
    for (int64_t i = 0; i < H; ++i) {
      ASSERT_EQ(w.qkv.data()[r * H + i], m.at(a + which + ".weight").at(global, i))
          << r << " " << i;
    }
    if (c.qkv_bias) {
      ASSERT_EQ(w.qkv_bias[size_t(r)], m.at(a + which + ".bias").values[size_t(global)]);
    }
  }
  ASSERT_EQ(w.qkv_bias.size(), c.qkv_bias ? size_t(w.qkv.rows) : 0u);
  ASSERT_EQ(w.o.rows, H);
  ASSERT_EQ(w.o.cols, n * d);
  for (int64_t r = 0; r < H; ++r) {
    for (int64_t i = 0; i < n * d; ++i) {
      ASSERT_EQ(w.o.data()[r * n * d + i], m.at(a + "o_proj.weight").at(r, g * n * d + i));
    }
  }
  const int64_t first = g * c.intermediate / c.kv_heads,
                t = (g + 1) * c.intermediate / c.kv_heads - first;
  ASSERT_EQ(w.tile(), t);
  ASSERT_EQ(w.gate_up.rows, 2 * t);
  for (int64_t r = 0; r < 2 * t; ++r) {
    const std::string which = p + (r < t ? "mlp.gate_proj" : "mlp.up_proj");
    for (int64_t i = 0; i < H; ++i) {
      ASSERT_EQ(w.gate_up.data()[r * H + i], m.at(which + ".weight").at(first + r % t, i));
    }
    if (c.mlp_bias) {
      ASSERT_EQ(w.gate_up_bias[size_t(r)], m.at(which + ".bias").values[size_t(first + r % t)]);
    }
  }
  for (int64_t r = 0; r < H; ++r) {
    for (int64_t i = 0; i < t; ++i) {
      ASSERT_EQ(w.down.data()[r * t + i], m.at(p + "mlp.down_proj.weight").at(r, first + i));
    }
  }
}

class WeightsOfEveryKind : public testing::TestWithParam<Architecture> {};

TEST_P(WeightsOfEveryKind, TheRanksTogetherHoldEveryWeightOnceAndInItsPlace) {
  const ModelConfig c = small_config(GetParam());
  const Model m = small_model(c);
  const TempFolder folder;
  save(m, folder.path());
  for (const int64_t T : {1, 2, 4}) {
    uint64_t most = 0;
    std::vector<double> logits;
    const std::vector<double> x = {1, -2, 3, -4, 5, -6};
    for (int64_t r = 0; r < T; ++r) {
      const Weights w = load_weights(folder.path(), c, T, r);
      EXPECT_EQ(w.groups.begin, r * 4 / T);
      EXPECT_EQ(w.groups.end, (r + 1) * 4 / T);
      ASSERT_EQ(w.layers.size(), 2u);
      for (int64_t l = 0; l < 2; ++l) {
        const LayerWeights& layer = w.layers[size_t(l)];
        const std::string p = "model.layers." + std::to_string(l) + ".";
        EXPECT_EQ(layer.input_norm, m.at(p + "input_layernorm.weight").values);
        EXPECT_EQ(layer.post_attention_norm, m.at(p + "post_attention_layernorm.weight").values);
        const auto optional = [&](const std::string& name) {
          return m.contains(p + name) ? m.at(p + name).values : std::vector<float>{};
        };
        EXPECT_EQ(layer.o_bias, optional("self_attn.o_proj.bias"));
        EXPECT_EQ(layer.down_bias, optional("mlp.down_proj.bias"));
        EXPECT_EQ(layer.q_norm, optional("self_attn.q_norm.weight"));
        EXPECT_EQ(layer.k_norm, optional("self_attn.k_norm.weight"));
        ASSERT_EQ(int64_t(layer.groups.size()), w.groups.count());
        for (int64_t g = w.groups.begin; g < w.groups.end; ++g) {
          expect_group(m, c, l, g, layer.groups[size_t(g - w.groups.begin)]);
        }
      }
      EXPECT_EQ(w.final_norm, m.at("model.norm.weight").values);
      std::vector<float> row(6);
      for (int32_t id = 0; id < c.vocab; ++id) {
        w.embed.row(id, row.data());
        for (int64_t i = 0; i < 6; ++i)
          EXPECT_EQ(row[size_t(i)], m.at("model.embed_tokens.weight").at(id, i));
      }
      for (size_t g = 0; g < w.lm_head.size(); ++g) {
        EXPECT_EQ(w.lm_head_rows[g].begin, int64_t(logits.size()));
        for (int64_t v = 0; v < w.lm_head[g].rows; ++v) {
          double y = 0;
          for (int64_t i = 0; i < 6; ++i)
            y += double(w.lm_head[g].data()[v * 6 + i]) * x[size_t(i)];
          logits.push_back(y);
        }
      }
      const uint64_t bytes = floats_in(w) * 4 + uint64_t(c.vocab * c.hidden) * 4;
      EXPECT_LE(bytes, weights_bytes(c, T));
      most = std::max(most, bytes);
    }
    EXPECT_EQ(most, weights_bytes(c, T)) << T;
    const auto& head = m.at(c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
    ASSERT_EQ(int64_t(logits.size()), c.vocab);
    for (int64_t v = 0; v < c.vocab; ++v) EXPECT_EQ(logits[size_t(v)], row_times(head, v, x));
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, WeightsOfEveryKind,
                         testing::Values(Architecture::Llama, Architecture::Mistral,
                                         Architecture::Qwen2, Architecture::Qwen3),
                         [](const auto& a) { return std::string(architecture_name(a.param)); });

TEST(Weights, SixteenBitFilesBecomeFloatsAndTheEmbeddingStaysAsItIs) {
  const ModelConfig c = small_config(Architecture::Mistral);
  const Model m = small_model(c);
  const TempFolder folder;
  for (const DType type : {DType::F16, DType::BF16}) {
    std::map<std::string, std::vector<uint16_t>> bits;
    std::vector<TensorToWrite> list;
    for (const auto& [name, t] : m) {
      auto& b = bits[name];
      for (const float x : t.values) b.push_back(float_to_16(type, x / 4));
      list.push_back({name, type, t.shape, b.data()});
    }
    write_safetensors(folder / "model.safetensors", list);
    const Weights w = load_weights(folder.path(), c, 4, 1);
    EXPECT_EQ(w.embed.dtype, type);
    const auto& q = bits.at("model.layers.1.self_attn.q_proj.weight");
    EXPECT_EQ(w.layers[1].groups[0].qkv.data()[5], float_from_16(type, q[2 * 64 * 6 + 5]));
    float row[6];
    w.embed.row(7, row);
    EXPECT_EQ(row[3], float_from_16(type, bits.at("model.embed_tokens.weight")[7 * 6 + 3]));
  }
}

TEST(Weights, AFolderThatIsNotTheConfiguredModelIsRefusedByTensor) {
  const ModelConfig c = small_config(Architecture::Mistral);
  const TempFolder folder;
  const auto load = [&](const Model& m) {
    save(m, folder.path());
    return error_of([&] { load_weights(folder.path(), c, 1, 0); });
  };
  Model m = small_model(c);
  EXPECT_EQ(load(m), "no error");

  Model missing = m;
  missing.erase("model.layers.1.mlp.up_proj.weight");
  EXPECT_THAT(load(missing), HasSubstr("there is no tensor 'model.layers.1.mlp.up_proj.weight'"));

  Model wrong = m;
  wrong["model.layers.0.self_attn.k_proj.weight"].shape = {6, 256};
  EXPECT_THAT(load(wrong),
              HasSubstr("k_proj.weight' has shape [6, 256], but config.json implies [256, 6]"));

  for (const char* extra :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight"}) {
    Model more = m;
    more[extra] = {{1}, {1}};
    EXPECT_THAT(load(more), HasSubstr(std::string("tensor '") + extra + "' belongs to no part"));
  }
  Model old = m;
  old["model.layers.0.self_attn.rotary_emb.inv_freq"] = {{1}, {1}};
  EXPECT_EQ(load(old), "no error");

  for (const char* name : {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
                           "model.norm.weight", "lm_head.weight"}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      Model broken = m;
      broken[name].values.back() = bad;
      const std::string e = load(broken);
      EXPECT_THAT(e, HasSubstr("NaN or infinite"));
      EXPECT_THAT(e, HasSubstr(name));
    }
  }
  save(m, folder.path());
  EXPECT_THAT(error_of([&] { load_weights(folder.path(), c, 3, 0); }),
              HasSubstr("use one of 1, 2, 4"));
}

TEST(Weights, EveryModelFolderOfTheRepositoryLoadsOnAnyNumberOfRanks) {
  size_t folders = 0;
  std::vector<std::filesystem::path> models = {std::filesystem::path(CERTKV_SOURCE_DIR) /
                                               "launcher/demo/reader"};
  for (const auto& entry : std::filesystem::directory_iterator(
           std::filesystem::path(CERTKV_SOURCE_DIR) / "tests/golden/models")) {
    models.push_back(entry.path());
  }
  for (const auto& model : models) {
    const ModelConfig c = load_model_config(model);
    for (int64_t T = 1; T <= c.kv_heads; ++T) {
      if (c.kv_heads % T != 0) continue;
      const Weights w = load_weights(model, c, T, T - 1);
      EXPECT_EQ(int64_t(w.layers.size()), c.layers) << model;
      EXPECT_EQ(w.lm_head_rows.back().end, c.vocab) << model;
      EXPECT_LE(floats_in(w) * 4, weights_bytes(c, T)) << model;
    }
    ++folders;
  }
  EXPECT_GE(folders, 9u);
}

// Written from the definition, over the whole tensor: what quantisation makes of row r.
std::vector<float> quantised_row(const FullTensor& w, int64_t row, float* scale) {
  double largest = 0;
  for (int64_t i = 0; i < w.shape[1]; ++i)
    largest = std::max(largest, std::abs(double(w.at(row, i))));
  int exponent = 0;
  const double fraction = std::frexp(largest / 127, &exponent);
  double s = std::ldexp(std::ceil(std::ldexp(fraction, 17)), exponent - 17);
  s = std::max(s, std::ldexp(1.0, -126));
  *scale = float(s);
  EXPECT_EQ(double(*scale), s) << "a scale that is no float";
  std::vector<float> out;
  for (int64_t i = 0; i < w.shape[1]; ++i) {
    const double x = std::nearbyint(double(w.at(row, i)) / s) * s;
    out.push_back(float(x));
    EXPECT_EQ(double(out.back()), x) << "code times scale is no float";
    EXPECT_LE(std::abs(x - double(w.at(row, i))), s / 2 * (1 + 0x1p-52));
  }
  return out;
}

TEST(Weights, InEightBitsEveryNumberOfRanksHasTheNumbersOfTheWholeRows) {
  const ModelConfig c = small_config(Architecture::Qwen2);
  Model m = small_model(c);
  // Draws with rounding to do: the largest of a row lies in another group's columns.
  uint64_t state = 1;
  for (auto& [name, tensor] : m)
    for (float& x : tensor.values) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = float(int64_t(state) >> 20) * 0x1p-40f * (state % 7 == 0 ? 100.0f : 1.0f);
    }
  auto& o = m.at("model.layers.0.self_attn.o_proj.weight");
  std::fill_n(o.values.begin() + o.shape[1], o.shape[1], 0.0f);            // a row of zeros
  for (int64_t i = 0; i < o.shape[1]; ++i) o.values[size_t(i)] *= 1e-40f;  // and one of subnormals
  const TempFolder folder;
  save(m, folder.path());
  for (const int64_t T : {1, 2, 4})
    for (int64_t rank = 0; rank < T; ++rank) {
      const Weights w = load_weights(folder.path(), c, T, rank, WeightFormat::Int8);
      EXPECT_EQ(w.format, WeightFormat::Int8);
      EXPECT_LE(floats_in(w) * 4 + uint64_t(c.vocab * c.hidden) * 4,
                weights_bytes(c, T, WeightFormat::Int8));
      const Weights plain = load_weights(folder.path(), c, T, rank);
      for (size_t g = 0; g < w.lm_head.size(); ++g) {  // the head is as stored
        EXPECT_TRUE(w.lm_head[g].scales.empty());
        EXPECT_TRUE(std::equal(w.lm_head[g].data(),
                               w.lm_head[g].data() + w.lm_head[g].rows * w.lm_head[g].cols,
                               plain.lm_head[g].data()));
      }
      for (int64_t l = 0; l < 2; ++l)
        for (int64_t g = w.groups.begin; g < w.groups.end; ++g) {
          const GroupWeights& got = w.layers[size_t(l)].groups[size_t(g - w.groups.begin)];
          const std::string p = "model.layers." + std::to_string(l) + ".";
          const int64_t d = c.head_dim, n = c.heads_per_group(), t = got.tile();
          const int64_t first = g * c.intermediate / c.kv_heads;
          const auto expect_row = [&](const Matrix& tile, int64_t r, const char* name, int64_t row,
                                      int64_t first_column) {
            float scale = 0;
            const std::vector<float> want = quantised_row(m.at(p + name), row, &scale);
            EXPECT_EQ(tile.scales[size_t(r)], scale) << name << " row " << row;
            for (int64_t i = 0; i < tile.cols; ++i)
              ASSERT_EQ(tile.data()[r * tile.cols + i], want[size_t(first_column + i)])
                  << name << " row " << row << " of rank " << rank << " of " << T;
          };
          for (int64_t r = 0; r < n * d; ++r)
            expect_row(got.qkv, r, "self_attn.q_proj.weight", g * n * d + r, 0);
          for (int64_t r = 0; r < d; ++r) {
            expect_row(got.qkv, n * d + r, "self_attn.k_proj.weight", g * d + r, 0);
            expect_row(got.qkv, (n + 1) * d + r, "self_attn.v_proj.weight", g * d + r, 0);
          }
          for (int64_t r = 0; r < t; ++r) {
            expect_row(got.gate_up, r, "mlp.gate_proj.weight", first + r, 0);
            expect_row(got.gate_up, t + r, "mlp.up_proj.weight", first + r, 0);
          }
          for (int64_t r = 0; r < c.hidden; ++r) {
            expect_row(got.o, r, "self_attn.o_proj.weight", r, g * n * d);
            expect_row(got.down, r, "mlp.down_proj.weight", r, first);
          }
        }
    }
}

TEST(Weights, InEightBitsAreTheSameWhereTheyWereLoadedAsStored) {
  const ModelConfig c = small_config(Architecture::Llama);
  const TempFolder folder;
  save(small_model(c), folder.path());
  const Weights loaded = load_weights(folder.path(), c, 1, 0, WeightFormat::Int8);
  Weights later = load_weights(folder.path(), c, 1, 0);
  quantise_weights(later);
  EXPECT_EQ(later.format, WeightFormat::Int8);
  const auto same = [](const Matrix& a, const Matrix& b) {
    return !a.scales.empty() && a.scales == b.scales &&
           std::equal(a.data(), a.data() + a.rows * a.cols, b.data());
  };
  for (size_t l = 0; l < 2; ++l)
    for (size_t g = 0; g < 4; ++g) {
      const GroupWeights &a = loaded.layers[l].groups[g], &b = later.layers[l].groups[g];
      EXPECT_TRUE(same(a.qkv, b.qkv) && same(a.o, b.o) && same(a.gate_up, b.gate_up) &&
                  same(a.down, b.down));
    }
}

TEST(Weights, TheirFormatIsOneOfTheWordsOfTheOption) {
  EXPECT_EQ(weight_format("none"), WeightFormat::AsStored);
  EXPECT_EQ(weight_format("int8"), WeightFormat::Int8);
  EXPECT_THAT(error_of([&] { weight_format("int4"); }), HasSubstr("model.quantization is 'int4'"));
}

TEST(Weights, AModelTooBigForTheNodeIsRefusedBeforeAnythingIsAllocated) {
  const ModelConfig c = small_config(Architecture::Llama);
  const uint64_t each = weights_bytes(c, 2);
  EXPECT_EQ(error_of([&] { check_weights_fit(c, 2, 2, 2 * each); }), "no error");
  const std::string e = error_of([&] { check_weights_fit(c, 2, 2, 2 * each - 1); });
  EXPECT_THAT(e, HasSubstr("OutOfMemory"));
  EXPECT_THAT(e, HasSubstr("2 of 2 tensor-parallel ranks"));
  EXPECT_THAT(e, HasSubstr("more ranks on more nodes"));
  EXPECT_THAT(error_of([&] { check_weights_fit(c, 3, 1, each); }), HasSubstr("use one of 1, 2, 4"));

  // Two TiB on disk that take no room there: the check must come before the first allocation.
  ModelConfig big = small_config(Architecture::Mistral);
  big.vocab = int64_t(1) << 22;
  big.hidden = int64_t(1) << 17;
  big.layers = 1;
  big.dtype = DType::BF16;
  if (available_memory_bytes() > uint64_t(3) << 40) GTEST_SKIP() << "this machine could load it";
  std::string header = "{";
  uint64_t at = 0;
  for (const auto& [name, t] : std::map<std::string, std::vector<int64_t>>{
           {"model.embed_tokens.weight", {big.vocab, big.hidden}},
           {"lm_head.weight", {big.vocab, big.hidden}},
           {"model.norm.weight", {big.hidden}},
           {"model.layers.0.input_layernorm.weight", {big.hidden}},
           {"model.layers.0.post_attention_layernorm.weight", {big.hidden}},
           {"model.layers.0.self_attn.q_proj.weight", {512, big.hidden}},
           {"model.layers.0.self_attn.k_proj.weight", {256, big.hidden}},
           {"model.layers.0.self_attn.v_proj.weight", {256, big.hidden}},
           {"model.layers.0.self_attn.o_proj.weight", {big.hidden, 512}},
           {"model.layers.0.mlp.gate_proj.weight", {10, big.hidden}},
           {"model.layers.0.mlp.up_proj.weight", {10, big.hidden}},
           {"model.layers.0.mlp.down_proj.weight", {big.hidden, 10}}}) {
    uint64_t bytes = 2;
    for (const int64_t d : t) bytes *= uint64_t(d);
    header += (at == 0 ? "\"" : ",\"") + name + R"(":{"dtype":"BF16","shape":)" + shape_text(t) +
              ",\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + bytes) + "]}";
    at += bytes;
  }
  header += "}";
  std::string start(8, '\0');
  for (size_t i = 0; i < 8; ++i) start[i] = char(header.size() >> (8 * i));
  const TempFolder folder;
  const auto path = folder.write("model.safetensors", start + header);
  std::error_code ec;
  std::filesystem::resize_file(path, start.size() + header.size() + at, ec);
  if (ec) GTEST_SKIP() << "this file system has no sparse files of 2 TiB";
  EXPECT_THAT(error_of([&] { load_weights(folder.path(), big, 1, 0); }),
              HasSubstr("OutOfMemory: the weights of rank 0 of 1 need"));
}

TEST(HostMemory, TheTightestLimitAboveTheProcessCounts) {
  const TempFolder root;
  const uint64_t MiB = 1 << 20;
  const auto available = [&] { return available_memory_bytes(root / "proc", root / "cgroup"); };
  EXPECT_EQ(available(), 0u);
  root.write("proc/meminfo", "MemTotal: 9000000 kB\nMemFree: 5 kB\nMemAvailable:  819200 kB\n");
  EXPECT_EQ(available(), 800 * MiB);
  root.write("proc/self/cgroup", "0::/user/job\n");
  EXPECT_EQ(available(), 800 * MiB);
  root.write("cgroup/user/job/memory.max", "max\n");
  root.write("cgroup/user/job/memory.current", std::to_string(50 * MiB));
  EXPECT_EQ(available(), 800 * MiB);
  root.write("cgroup/user/memory.max", std::to_string(400 * MiB));
  root.write("cgroup/user/memory.current", std::to_string(100 * MiB));
  EXPECT_EQ(available(), 300 * MiB);
  root.write("cgroup/user/memory.stat", "anon 1\ninactive_file " + std::to_string(30 * MiB) + "\n");
  EXPECT_EQ(available(), 330 * MiB);
  root.write("cgroup/user/memory.current", std::to_string(500 * MiB));
  EXPECT_EQ(available(), 0u);

  root.write("proc/self/cgroup", "4:cpu,memory:/old\n3:cpuset:/x\n");
  root.write("cgroup/memory/old/memory.limit_in_bytes", std::to_string(200 * MiB));
  root.write("cgroup/memory/old/memory.usage_in_bytes", std::to_string(50 * MiB));
  EXPECT_EQ(available(), 150 * MiB);
  EXPECT_GT(available_memory_bytes(), MiB);
}

}  // namespace
}  // namespace certkv
