#include "runtime/device/device_weights.h"

#include <cmath>
#include <cstring>

#include "kernels/arith/int8_weight.h"
#include "kernels/base/error.h"
#include "runtime/model_config.h"
#include "runtime/weights.h"

namespace certkv {
namespace {

// Part of a host matrix, and where it goes in the joined one.
struct Tile {
  const Matrix* from;
  int64_t first_row, rows;  // of `from`; all its columns
  size_t to_row, to_column;
};

class Uploader {
 public:
  Uploader(cuda::Device& device, DType dtype) : device_(device), dtype_(dtype) {}

  DeviceMatrix join(size_t out, size_t in, const std::vector<Tile>& tiles, const char* what) {
    if (!tiles[0].from->scales.empty()) return join_int8(out, in, tiles, what);
    const size_t element = dtype_bytes(dtype_);
    host_.resize(out * in * element);
    for (const Tile& tile : tiles)
      for (int64_t r = 0; r < tile.rows; ++r) {
        const float* from = tile.from->data() + (tile.first_row + r) * tile.from->cols;
        round(from, size_t(tile.from->cols),
              host_.data() + ((tile.to_row + size_t(r)) * in + tile.to_column) * element, what);
      }
    DeviceMatrix m{{device_, host_.size(), what}, out, in};
    device_.copy(m.values.data(), host_.data(), host_.size());
    return m;
  }

  // Values are codes times scales, exactly; a row that has several tiles has one scale.
  DeviceMatrix join_int8(size_t out, size_t in, const std::vector<Tile>& tiles, const char* what) {
    host_.resize(out * in);
    std::vector<float> scales(out, 0.0f);
    for (const Tile& tile : tiles)
      for (int64_t r = 0; r < tile.rows; ++r) {
        const float* from = tile.from->data() + (tile.first_row + r) * tile.from->cols;
        const float scale = tile.from->scales[size_t(tile.first_row + r)];
        float& joined = scales[tile.to_row + size_t(r)];
        CERTKV_EXPECT(joined == 0 || joined == scale, InvalidArgument,
                      "{}: parts of output {} have the scales {} and {}", what,
                      tile.to_row + size_t(r), joined, scale);
        joined = scale;
        std::byte* to = host_.data() + (tile.to_row + size_t(r)) * in + tile.to_column;
        for (int64_t i = 0; i < tile.from->cols; ++i) to[i] = std::byte(int8_code(from[i], scale));
      }
    DeviceMatrix m{{device_, host_.size(), what}, out, in, vector(scales, what)};
    device_.copy(m.values.data(), host_.data(), host_.size());
    return m;
  }

  cuda::DeviceArray<float> vector(const std::vector<float>& from, const char* what) {
    cuda::DeviceArray<float> to(device_, from.size(), what);
    device_.copy(to.data(), from.data(), to.bytes());
    return to;
  }

 private:
  void round(const float* from, size_t count, std::byte* to, const char* what) const {
    if (dtype_ == DType::F32) {
      std::memcpy(to, from, count * sizeof(float));
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      const uint16_t bits = float_to_16(dtype_, from[i]);
      CERTKV_EXPECT(std::isfinite(float_from_16(dtype_, bits)) || !std::isfinite(from[i]),
                    InvalidArgument,
                    "{}: a weight of {} is beyond the range of {}; choose BF16 or F32", what,
                    from[i], dtype_name(dtype_));
      std::memcpy(to + 2 * i, &bits, 2);
    }
  }

  cuda::Device& device_;
  DType dtype_;
  std::vector<std::byte> host_;  // one joined matrix
};

size_t tile_sum(const LayerWeights& layer) {
  size_t sum = 0;
  for (const GroupWeights& g : layer.groups) sum += size_t(g.tile());
  return sum;
}

// Biases of the groups' products, in the order of the joined rows.
std::vector<float> join_qkv_bias(const LayerWeights& layer, size_t n, size_t d) {
  std::vector<float> all;
  const auto append = [&](size_t first, size_t count) {
    for (const GroupWeights& g : layer.groups)
      if (!g.qkv_bias.empty())
        all.insert(all.end(), g.qkv_bias.begin() + ptrdiff_t(first),
                   g.qkv_bias.begin() + ptrdiff_t(first + count));
  };
  append(0, n * d);
  append(n * d, d);
  append((n + 1) * d, d);
  return all;
}

std::vector<float> join_gate_up_bias(const LayerWeights& layer) {
  std::vector<float> all;
  for (size_t half = 0; half < 2; ++half)
    for (const GroupWeights& g : layer.groups)
      if (!g.gate_up_bias.empty()) {
        const auto begin = g.gate_up_bias.begin() + ptrdiff_t(half * size_t(g.tile()));
        all.insert(all.end(), begin, begin + g.tile());
      }
  return all;
}

DeviceLayer upload_layer(Uploader& to, const ModelConfig& c, const LayerWeights& layer) {
  const size_t H = size_t(c.hidden), d = size_t(c.head_dim), n = size_t(c.heads_per_group());
  const size_t groups = layer.groups.size(), mlp = tile_sum(layer);
  std::vector<Tile> qkv, o, gate_up, down;
  size_t tile_at = 0;
  for (size_t g = 0; g < groups; ++g) {
    const GroupWeights& w = layer.groups[g];
    const int64_t nd = int64_t(n * d), t = w.tile();
    qkv.push_back({&w.qkv, 0, nd, g * n * d, 0});
    qkv.push_back({&w.qkv, nd, int64_t(d), (groups * n + g) * d, 0});
    qkv.push_back({&w.qkv, nd + int64_t(d), int64_t(d), (groups * (n + 1) + g) * d, 0});
    o.push_back({&w.o, 0, w.o.rows, 0, g * n * d});
    gate_up.push_back({&w.gate_up, 0, t, tile_at, 0});
    gate_up.push_back({&w.gate_up, t, t, mlp + tile_at, 0});
    down.push_back({&w.down, 0, w.down.rows, 0, tile_at});
    tile_at += size_t(t);
  }
  DeviceLayer out;
  out.qkv = to.join(groups * (n + 2) * d, H, qkv, "qkv weights (raise parallel.tensor)");
  out.o = to.join(H, groups * n * d, o, "o weights (raise parallel.tensor)");
  out.gate_up = to.join(2 * mlp, H, gate_up, "gate and up weights (raise parallel.tensor)");
  out.down = to.join(H, mlp, down, "down weights (raise parallel.tensor)");
  out.input_norm = to.vector(layer.input_norm, "norm weights");
  out.post_attention_norm = to.vector(layer.post_attention_norm, "norm weights");
  out.q_norm = to.vector(layer.q_norm, "norm weights");
  out.k_norm = to.vector(layer.k_norm, "norm weights");
  out.qkv_bias = to.vector(join_qkv_bias(layer, n, d), "qkv bias");
  out.o_bias = to.vector(layer.o_bias, "o bias");
  out.gate_up_bias = to.vector(join_gate_up_bias(layer), "gate and up bias");
  out.down_bias = to.vector(layer.down_bias, "down bias");
  return out;
}

// One table serves twice where the head is the embedding, whole and of the products' type.
bool shares_embedding(const ModelConfig& c, const Weights& w, DType dtype) {
  return c.tie_word_embeddings && w.groups.count() == c.kv_heads && w.embed.dtype == dtype;
}

size_t vocab_rows_of(const Weights& w) {
  size_t rows = 0;
  for (const ShardRange& part : w.lm_head_rows) rows += size_t(part.count());
  return rows;
}

}  // namespace

DeviceWeights::DeviceWeights(const ModelConfig& config, const Weights& weights,
                             cuda::Device& device, DType type)
    : dtype(type),
      int8(weights.format == WeightFormat::Int8),
      embed_dtype(weights.embed.dtype),
      vocab_rows(vocab_rows_of(weights)) {
  CERTKV_EXPECT(type == DType::F32 || type == DType::F16 || type == DType::BF16, InvalidArgument,
                "weights of type {} on a device: F32, F16 or BF16 is needed", dtype_name(type));
  Uploader to(device, type);
  embed = {device,
           uint64_t(weights.embed.rows * weights.embed.cols) * dtype_bytes(weights.embed.dtype),
           "the embedding"};
  device.copy(embed.data(), weights.embed.values.get(), embed.bytes());
  for (const LayerWeights& layer : weights.layers)
    layers.push_back(upload_layer(to, config, layer));
  final_norm = to.vector(weights.final_norm, "norm weights");
  const size_t H = size_t(config.hidden);
  if (shares_embedding(config, weights, type)) {
    lm_head.out = vocab_rows;
    lm_head.in = H;
    return;
  }
  std::vector<Tile> tiles;
  size_t at = 0;
  for (const Matrix& m : weights.lm_head) {
    tiles.push_back({&m, 0, m.rows, at, 0});
    at += size_t(m.rows);
  }
  lm_head = to.join(vocab_rows, H, tiles, "the language model's head (raise parallel.tensor)");
}

void DeviceWeights::repeat_last_layer(cuda::Device& device, size_t count) {
  const auto copy = [&](const auto& from) {
    std::remove_cvref_t<decltype(from)> to(device, from.count(), "weights of a repeated layer");
    device.copy(to.data(), from.data(), from.bytes());
    return to;
  };
  const auto matrix = [&](const DeviceMatrix& m) {
    return DeviceMatrix{copy(m.values), m.out, m.in, copy(m.scales)};
  };
  layers.reserve(count);
  while (!layers.empty() && layers.size() < count) {
    const DeviceLayer& from = layers.back();
    layers.push_back({matrix(from.qkv), matrix(from.o), matrix(from.gate_up), matrix(from.down),
                      copy(from.input_norm), copy(from.post_attention_norm), copy(from.q_norm),
                      copy(from.k_norm), copy(from.qkv_bias), copy(from.o_bias),
                      copy(from.gate_up_bias), copy(from.down_bias)});
  }
}

const void* DeviceWeights::lm_head_values() const {
  return lm_head.values.data() != nullptr ? lm_head.values.data() : embed.data();
}

uint64_t DeviceWeights::bytes(const ModelConfig& c, const Weights& w, DType dtype) {
  const uint64_t H = uint64_t(c.hidden), d = uint64_t(c.head_dim);
  const uint64_t n = uint64_t(c.heads_per_group()), element = dtype_bytes(dtype);
  const bool int8 = w.format == WeightFormat::Int8;
  uint64_t sum =
      uint64_t(w.embed.rows * w.embed.cols) * dtype_bytes(w.embed.dtype) + 4 * w.final_norm.size();
  if (!shares_embedding(c, w, dtype)) sum += vocab_rows_of(w) * H * element;
  for (const LayerWeights& l : w.layers) {
    const uint64_t groups = l.groups.size(), mlp = tile_sum(l);
    sum += (int8 ? 1 : element) * H * (groups * (2 * n + 2) * d + 3 * mlp);
    if (int8) sum += 4 * (groups * (n + 2) * d + 2 * H + 2 * mlp);
    sum += 4 * (l.input_norm.size() + l.post_attention_norm.size() + l.q_norm.size() +
                l.k_norm.size() + l.o_bias.size() + l.down_bias.size());
    for (const GroupWeights& g : l.groups) sum += 4 * (g.qkv_bias.size() + g.gate_up_bias.size());
  }
  return sum;
}

}  // namespace certkv
