#include "runtime/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <set>
#include <string>

#include "kernels/arith/int8_weight.h"
#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "runtime/byte_size.h"
#include "runtime/host_memory.h"
#include "runtime/safetensors.h"

namespace certkv {
namespace {

std::string layer_name(int64_t layer, const char* rest) {
  return "model.layers." + std::to_string(layer) + "." + rest;
}

// One tensor the configuration implies.
struct Expected {
  std::string name;
  std::vector<int64_t> shape;
};

std::vector<Expected> expected_tensors(const ModelConfig& c) {
  const int64_t H = c.hidden, q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  std::vector<Expected> all = {{"model.embed_tokens.weight", {c.vocab, H}},
                               {"model.norm.weight", {H}}};
  if (!c.tie_word_embeddings) all.push_back({"lm_head.weight", {c.vocab, H}});
  for (int64_t l = 0; l < c.layers; ++l) {
    const auto add = [&](const char* rest, std::vector<int64_t> shape) {
      all.push_back({layer_name(l, rest), std::move(shape)});
    };
    add("input_layernorm.weight", {H});
    add("post_attention_layernorm.weight", {H});
    add("self_attn.q_proj.weight", {q, H});
    add("self_attn.k_proj.weight", {kv, H});
    add("self_attn.v_proj.weight", {kv, H});
    add("self_attn.o_proj.weight", {H, q});
    add("mlp.gate_proj.weight", {c.intermediate, H});
    add("mlp.up_proj.weight", {c.intermediate, H});
    add("mlp.down_proj.weight", {H, c.intermediate});
    if (c.qkv_bias) {
      add("self_attn.q_proj.bias", {q});
      add("self_attn.k_proj.bias", {kv});
      add("self_attn.v_proj.bias", {kv});
    }
    if (c.o_bias) add("self_attn.o_proj.bias", {H});
    if (c.mlp_bias) {
      add("mlp.gate_proj.bias", {c.intermediate});
      add("mlp.up_proj.bias", {c.intermediate});
      add("mlp.down_proj.bias", {H});
    }
    if (c.qk_norm) {
      add("self_attn.q_norm.weight", {c.head_dim});
      add("self_attn.k_norm.weight", {c.head_dim});
    }
  }
  return all;
}

// Tensors that carry nothing: tables of frequencies saved by old versions, and a copy of the tied
// head.
bool may_be_ignored(const std::string& name, const ModelConfig& c) {
  return name.ends_with(".rotary_emb.inv_freq") ||
         (c.tie_word_embeddings && name == "lm_head.weight");
}

void check_tensors(const SafetensorsFolder& files, const ModelConfig& c) {
  std::set<std::string> used;
  for (const Expected& e : expected_tensors(c)) {
    const auto place = files.tensor(e.name);
    const TensorEntry& t = *place.entry;
    CERTKV_EXPECT(t.dtype == DType::F32 || t.dtype == DType::F16 || t.dtype == DType::BF16, BadFile,
                  "{}: tensor '{}' is {}: weights of F32, F16 or BF16 are supported",
                  place.file->path(), e.name, dtype_name(t.dtype));
    CERTKV_EXPECT(t.shape == e.shape, BadFile,
                  "{}: tensor '{}' has shape {}, but config.json implies {}", place.file->path(),
                  e.name, shape_text(t.shape), shape_text(e.shape));
    used.insert(e.name);
  }
  for (const auto& [name, place] : files.tensors()) {
    CERTKV_EXPECT(used.contains(name) || may_be_ignored(name, c), BadFile,
                  "{}: tensor '{:.80}' belongs to no part of the {} that config.json describes; "
                  "ignoring it would change the model",
                  place.file->path(), name, architecture_name(c.architecture));
  }
}

uint64_t rank_bytes(const ModelConfig& c, int64_t tensor, int64_t rank, WeightFormat format) {
  const ShardRange groups = kv_heads_of_rank(c.kv_heads, tensor, rank);
  const int64_t H = c.hidden, d = c.head_dim, n = c.heads_per_group();
  // Tiles follow one another, so those of the owned groups add up to one range.
  const auto owned = [&](int64_t items) {
    return shard_range(items, c.kv_heads, groups.end - 1).end -
           shard_range(items, c.kv_heads, groups.begin).begin;
  };
  const int64_t mlp = owned(c.intermediate), vocabulary = owned(c.vocab);
  int64_t layer = 2 * H + groups.count() * ((n + 2) * d * H + H * n * d) + 3 * mlp * H;
  if (c.qkv_bias) layer += groups.count() * (n + 2) * d;
  if (c.o_bias) layer += H;
  if (c.mlp_bias) layer += 2 * mlp + H;
  if (c.qk_norm) layer += 2 * d;
  if (format == WeightFormat::Int8) layer += groups.count() * ((n + 2) * d + 2 * H) + 2 * mlp;
  const int64_t floats = c.layers * layer + vocabulary * H + H;
  return uint64_t(floats) * 4 + uint64_t(c.vocab * H) * dtype_bytes(c.dtype);
}

// Reads parts of tensors as float and refuses values that are not finite.
class Loader {
 public:
  explicit Loader(const SafetensorsFolder& files) : files_(files) {}

  std::vector<float> vector(const std::string& name, ShardRange part) const {
    std::vector<float> out(size_t(part.count()));
    append_vector(name, part, out.data());
    return out;
  }
  void append_vector(const std::string& name, ShardRange part, float* out) const {
    const auto place = files_.tensor(name);
    place.file->read_float(*place.entry, uint64_t(part.begin), uint64_t(part.count()), out);
    expect_finite(name, place, out, part.count());
  }
  // Rows x columns of a matrix, written to out [rows, columns].
  void block(const std::string& name, ShardRange rows, ShardRange columns, float* out) const {
    const auto place = files_.tensor(name);
    place.file->read_block(*place.entry, rows.begin, rows.count(), columns.begin, columns.count(),
                           out);
    expect_finite(name, place, out, rows.count() * columns.count());
  }

 private:
  static void expect_finite(const std::string& name, const SafetensorsFolder::Place& place,
                            const float* values, int64_t count) {
    float sum = 0;  // 0 as long as all are finite, NaN afterwards
    for (int64_t i = 0; i < count; ++i) sum += values[i] * 0.0f;
    CERTKV_EXPECT(sum == 0, BadFile, "{}: tensor '{}' holds a value that is NaN or infinite",
                  place.file->path(), name);
  }
  const SafetensorsFolder& files_;
};

Matrix new_matrix(int64_t rows, int64_t cols) {
  return {rows, cols, std::make_unique_for_overwrite<float[]>(size_t(rows) * size_t(cols))};
}

// Of every row its largest magnitude, and no less than there is already.
void find_largest(const float* values, int64_t rows, int64_t cols, float* largest) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < cols; ++i)
      largest[r] = std::max(largest[r], std::abs(values[r * cols + i]));
}

void quantise(Matrix& m, const std::vector<float>& largest) {
  m.scales.resize(size_t(m.rows));
  for (int64_t r = 0; r < m.rows; ++r) {
    const float scale = m.scales[size_t(r)] = int8_scale(largest[size_t(r)]);
    float* row = m.values.get() + r * m.cols;
    for (int64_t i = 0; i < m.cols; ++i) row[i] = float(int8_code(row[i], scale)) * scale;
  }
}
void quantise(Matrix& m) {
  std::vector<float> largest(size_t(m.rows), 0.0f);
  find_largest(m.data(), m.rows, m.cols, largest.data());
  quantise(m, largest);
}
// o, down: the largest of those matrices' whole rows, which lie in all groups.
void quantise_layer(LayerWeights& w, const std::vector<float>& o, const std::vector<float>& down) {
  for (GroupWeights& g : w.groups) {
    quantise(g.qkv);
    quantise(g.o, o);
    quantise(g.gate_up);
    quantise(g.down, down);
  }
}
void quantise_whole_layer(LayerWeights& w) {
  const size_t hidden = size_t(w.groups.at(0).o.rows);
  std::vector<float> o(hidden, 0.0f), down(hidden, 0.0f);
  for (const GroupWeights& g : w.groups) {
    find_largest(g.o.data(), g.o.rows, g.o.cols, o.data());
    find_largest(g.down.data(), g.down.rows, g.down.cols, down.data());
  }
  quantise_layer(w, o, down);
}

// Where a rank has some columns alone, the file has the others.
std::vector<float> read_largest(const Loader& from, const std::string& name, int64_t rows,
                                int64_t cols) {
  constexpr int64_t kRows = 64;  // at a time
  std::vector<float> largest(size_t(rows), 0.0f), block(size_t(std::min(kRows, rows) * cols));
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min(kRows, rows - first);
    from.block(name, {first, first + count}, {0, cols}, block.data());
    find_largest(block.data(), count, cols, largest.data() + first);
  }
  return largest;
}

GroupWeights load_group(const Loader& from, const ModelConfig& c, int64_t l, int64_t g) {
  const int64_t H = c.hidden, d = c.head_dim, n = c.heads_per_group();
  const ShardRange all{0, H}, query{g * n * d, (g + 1) * n * d}, kv{g * d, (g + 1) * d};
  const ShardRange tile = shard_range(c.intermediate, c.kv_heads, g);
  GroupWeights w;
  w.qkv = new_matrix((n + 2) * d, H);
  from.block(layer_name(l, "self_attn.q_proj.weight"), query, all, w.qkv.values.get());
  from.block(layer_name(l, "self_attn.k_proj.weight"), kv, all, w.qkv.values.get() + n * d * H);
  from.block(layer_name(l, "self_attn.v_proj.weight"), kv, all,
             w.qkv.values.get() + (n + 1) * d * H);
  if (c.qkv_bias) {
    w.qkv_bias.resize(size_t((n + 2) * d));
    from.append_vector(layer_name(l, "self_attn.q_proj.bias"), query, w.qkv_bias.data());
    from.append_vector(layer_name(l, "self_attn.k_proj.bias"), kv, w.qkv_bias.data() + n * d);
    from.append_vector(layer_name(l, "self_attn.v_proj.bias"), kv, w.qkv_bias.data() + (n + 1) * d);
  }
  w.o = new_matrix(H, n * d);
  from.block(layer_name(l, "self_attn.o_proj.weight"), all, query, w.o.values.get());
  w.gate_up = new_matrix(2 * tile.count(), H);
  from.block(layer_name(l, "mlp.gate_proj.weight"), tile, all, w.gate_up.values.get());
  from.block(layer_name(l, "mlp.up_proj.weight"), tile, all,
             w.gate_up.values.get() + tile.count() * H);
  if (c.mlp_bias) {
    w.gate_up_bias.resize(size_t(2 * tile.count()));
    from.append_vector(layer_name(l, "mlp.gate_proj.bias"), tile, w.gate_up_bias.data());
    from.append_vector(layer_name(l, "mlp.up_proj.bias"), tile,
                       w.gate_up_bias.data() + tile.count());
  }
  w.down = new_matrix(H, tile.count());
  from.block(layer_name(l, "mlp.down_proj.weight"), all, tile, w.down.values.get());
  return w;
}

LayerWeights load_layer(const Loader& from, const ModelConfig& c, int64_t l, ShardRange groups,
                        WeightFormat format) {
  const ShardRange hidden{0, c.hidden}, head{0, c.head_dim};
  LayerWeights w;
  w.input_norm = from.vector(layer_name(l, "input_layernorm.weight"), hidden);
  w.post_attention_norm = from.vector(layer_name(l, "post_attention_layernorm.weight"), hidden);
  if (c.qk_norm) {
    w.q_norm = from.vector(layer_name(l, "self_attn.q_norm.weight"), head);
    w.k_norm = from.vector(layer_name(l, "self_attn.k_norm.weight"), head);
  }
  if (c.o_bias) w.o_bias = from.vector(layer_name(l, "self_attn.o_proj.bias"), hidden);
  if (c.mlp_bias) w.down_bias = from.vector(layer_name(l, "mlp.down_proj.bias"), hidden);
  w.groups.reserve(size_t(groups.count()));
  for (int64_t g = groups.begin; g < groups.end; ++g) w.groups.push_back(load_group(from, c, l, g));
  if (format == WeightFormat::AsStored) return w;
  if (groups.count() == c.kv_heads) {
    quantise_whole_layer(w);
  } else {
    const std::string o = layer_name(l, "self_attn.o_proj.weight");
    const std::string down = layer_name(l, "mlp.down_proj.weight");
    quantise_layer(w, read_largest(from, o, c.hidden, c.heads * c.head_dim),
                   read_largest(from, down, c.hidden, c.intermediate));
  }
  return w;
}

Embedding load_embedding(const SafetensorsFolder& files, const ModelConfig& c) {
  const auto place = files.tensor("model.embed_tokens.weight");
  const TensorEntry& t = *place.entry;
  Embedding e;
  e.dtype = t.dtype;
  e.rows = c.vocab;
  e.cols = c.hidden;
  e.values = std::make_unique_for_overwrite<std::byte[]>(t.bytes());
  place.file->read_raw(t, 0, t.elements, e.values.get());
  std::vector<float> row(size_t(c.hidden));
  for (int64_t id = 0; id < c.vocab; ++id) {
    e.row(int32_t(id), row.data());
    for (const float x : row) {
      CERTKV_EXPECT(std::isfinite(x), BadFile,
                    "{}: tensor '{}' holds a value that is NaN or infinite in row {}",
                    place.file->path(), t.name, id);
    }
  }
  return e;
}

[[noreturn]] void throw_out_of_memory(const std::string& whose, uint64_t needed,
                                      uint64_t available) {
  CERTKV_THROW(OutOfMemory,
               "the weights of {} need {} of host memory in float32, and {} is available on this "
               "node: use more ranks on more nodes (a larger parallel.tensor), a node with more "
               "memory, or a smaller model",
               whose, byte_size_text(needed), byte_size_text(available));
}

}  // namespace

void Embedding::row(int32_t id, float* out) const {
  const std::byte* from = values.get() + size_t(id) * size_t(cols) * dtype_bytes(dtype);
  if (dtype == DType::F32) {
    std::memcpy(out, from, size_t(cols) * 4);
    return;
  }
  for (int64_t i = 0; i < cols; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    out[i] = float_from_16(dtype, bits);
  }
}

WeightFormat weight_format(const std::string& quantization) {
  if (quantization == "int8") return WeightFormat::Int8;
  CERTKV_EXPECT(quantization == "none", InvalidArgument,
                "model.quantization is '{}': use none or int8", quantization);
  return WeightFormat::AsStored;
}

void quantise_weights(Weights& whole) {
  whole.format = WeightFormat::Int8;
  for (LayerWeights& layer : whole.layers) quantise_whole_layer(layer);
}

uint64_t weights_bytes(const ModelConfig& config, int64_t tensor, WeightFormat format) {
  uint64_t most = rank_bytes(config, tensor, 0, format);  // also judges tensor
  for (int64_t r = 1; r < tensor; ++r) most = std::max(most, rank_bytes(config, tensor, r, format));
  return most;
}

void check_weights_fit(const ModelConfig& config, int64_t tensor, int64_t ranks_on_node,
                       uint64_t available, WeightFormat format) {
  CERTKV_EXPECT(ranks_on_node >= 1, InvalidArgument, "{} ranks on this node: at least 1 is needed",
                ranks_on_node);
  const uint64_t each = weights_bytes(config, tensor, format);
  // Written as a division so that nothing overflows.
  if (each > available / uint64_t(ranks_on_node)) {
    throw_out_of_memory(fmt::format("{} of {} tensor-parallel ranks ({} each)", ranks_on_node,
                                    tensor, byte_size_text(each)),
                        each * uint64_t(ranks_on_node), available);
  }
}

Weights load_weights(const std::filesystem::path& folder, const ModelConfig& config, int64_t tensor,
                     int64_t rank, WeightFormat format) {
  const ShardRange groups = kv_heads_of_rank(config.kv_heads, tensor, rank);
  const SafetensorsFolder files(folder);
  check_tensors(files, config);
  const uint64_t needed = rank_bytes(config, tensor, rank, format),
                 available = available_memory_bytes();
  const std::string whose = fmt::format("rank {} of {}", rank, tensor);
  if (needed > available) throw_out_of_memory(whose, needed, available);

  try {
    CERTKV_FAILPOINT(model_weights);
    const Loader from(files);
    Weights w;
    w.groups = groups;
    w.format = format;
    w.embed = load_embedding(files, config);
    w.layers.reserve(size_t(config.layers));
    for (int64_t l = 0; l < config.layers; ++l) {
      w.layers.push_back(load_layer(from, config, l, groups, format));
    }
    const ShardRange hidden{0, config.hidden};
    w.final_norm = from.vector("model.norm.weight", hidden);
    const char* head = config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const ShardRange rows = shard_range(config.vocab, config.kv_heads, g);
      Matrix tile = new_matrix(rows.count(), config.hidden);
      from.block(head, rows, hidden, tile.values.get());
      w.lm_head.push_back(std::move(tile));
      w.lm_head_rows.push_back(rows);
    }
    return w;
  } catch (const std::bad_alloc&) {
    throw_out_of_memory(whose, needed, available_memory_bytes());
  }
}

}  // namespace certkv
