#include "tests/support/random_model.h"

#include <cmath>
#include <cstring>
#include <random>

namespace certkv::test {

namespace {

// A stream named by (seed, layer, group, what).
class Draw {
 public:
  Draw(uint64_t seed, int64_t layer, int64_t group, int what)
      : engine_(seed * 1000003u + uint64_t(layer) * 10007u + uint64_t(group) * 101u +
                uint64_t(what)) {}
  Matrix matrix(int64_t rows, int64_t cols) {
    Matrix m{rows, cols, std::make_unique<float[]>(size_t(rows * cols))};
    for (int64_t i = 0; i < rows * cols; ++i)
      m.values[size_t(i)] = normal_(engine_) / std::sqrt(float(cols) + 1);
    return m;
  }
  std::vector<float> vector(int64_t n, float mean, float spread) {
    std::vector<float> v(size_t(n), 0.0f);
    for (float& x : v) x = mean + spread * normal_(engine_);
    return v;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

}  // namespace

ModelConfig random_model_config() {
  ModelConfig c;
  c.hidden = 72;
  c.intermediate = 90;  // tiles of 22 and 23
  c.layers = 2;
  c.heads = 8;
  c.kv_heads = 4;
  c.head_dim = 64;
  c.vocab = 101;  // tiles of 25 and 26
  c.rope.theta = 1e6;
  c.rms_norm_eps = 1e-5;
  c.max_position_embeddings = c.max_tokens = 4096;
  c.qkv_bias = c.o_bias = c.mlp_bias = c.qk_norm = true;
  c.dtype = DType::BF16;
  return c;
}

Weights random_weights(const ModelConfig& c, int64_t tensor, int64_t rank, uint64_t seed) {
  Weights w;
  w.groups = kv_heads_of_rank(c.kv_heads, tensor, rank);
  w.embed.dtype = DType::F32;
  w.embed.rows = c.vocab;
  w.embed.cols = c.hidden;
  const std::vector<float> table = Draw(seed, -1, 0, 1).vector(c.vocab * c.hidden, 0, 1);
  w.embed.values = std::make_unique<std::byte[]>(table.size() * 4);
  std::memcpy(w.embed.values.get(), table.data(), table.size() * 4);
  const int64_t n = c.heads_per_group(), d = c.head_dim;
  for (int64_t l = 0; l < c.layers; ++l) {
    LayerWeights& layer = w.layers.emplace_back();
    layer.input_norm = Draw(seed, l, 0, 2).vector(c.hidden, 1, 0.2f);
    layer.post_attention_norm = Draw(seed, l, 0, 3).vector(c.hidden, 1, 0.2f);
    if (c.qk_norm) {
      layer.q_norm = Draw(seed, l, 0, 4).vector(d, 1, 0.2f);
      layer.k_norm = Draw(seed, l, 0, 5).vector(d, 1, 0.2f);
    }
    if (c.o_bias) layer.o_bias = Draw(seed, l, 0, 6).vector(c.hidden, 0, 0.1f);
    if (c.mlp_bias) layer.down_bias = Draw(seed, l, 0, 7).vector(c.hidden, 0, 0.1f);
    for (int64_t g = w.groups.begin; g < w.groups.end; ++g) {
      GroupWeights& group = layer.groups.emplace_back();
      const int64_t tile = shard_range(c.intermediate, c.kv_heads, g).count();
      group.qkv = Draw(seed, l, g, 11).matrix((n + 2) * d, c.hidden);
      group.o = Draw(seed, l, g, 12).matrix(c.hidden, n * d);
      group.gate_up = Draw(seed, l, g, 13).matrix(2 * tile, c.hidden);
      group.down = Draw(seed, l, g, 14).matrix(c.hidden, tile);
      if (c.qkv_bias) group.qkv_bias = Draw(seed, l, g, 15).vector((n + 2) * d, 0, 0.3f);
      if (c.mlp_bias) group.gate_up_bias = Draw(seed, l, g, 16).vector(2 * tile, 0, 0.3f);
    }
  }
  w.final_norm = Draw(seed, -1, 0, 8).vector(c.hidden, 1, 0.2f);
  for (int64_t g = w.groups.begin; g < w.groups.end; ++g) {
    w.lm_head_rows.push_back(shard_range(c.vocab, c.kv_heads, g));
    w.lm_head.push_back(Draw(seed, -1, g, 9).matrix(w.lm_head_rows.back().count(), c.hidden));
  }
  return w;
}

}  // namespace certkv::test
