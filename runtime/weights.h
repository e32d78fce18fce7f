// The weights that one rank of a tensor-parallel group needs, in the tiles in which it multiplies.
//
// The unit of work is the KV group: group g in [0, G), G = kv_heads, is KV head g with its query
// heads, tile g of the MLP's intermediate size and tile g of the vocabulary (uneven where G does
// not divide them: parallel/shard.h). Rank r of T owns the groups [r*G/T, (r+1)*G/T). Every product
// is called on one group's tile, whatever T is, so that its result does not depend on T.
//
// All matrices are float, row-major [out, in] as Hugging Face stores them: y = W x.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "parallel/shard.h"
#include "runtime/model_config.h"

namespace certkv {

struct Matrix {
  int64_t rows = 0, cols = 0;
  std::unique_ptr<float[]> values;  // [rows, cols]
  // [rows], where the weights are INT8: a row's values are its codes times this, exactly. Else
  // empty.
  std::vector<float> scales = {};
  const float* data() const { return values.get(); }
};

// How the layers' matrices are kept; Int8: kernels/arith/int8_weight.h. A row is one of the model's
// matrix, so that ranks which have some of its columns have the same scale.
enum class WeightFormat : uint8_t { AsStored, Int8 };
WeightFormat weight_format(const std::string& quantization);  // of model.quantization

// d = head_dim, H = hidden, n = heads / kv_heads, t = rows of this group's MLP tile.
struct GroupWeights {
  Matrix qkv;                       // [(n + 2) d, H]: n query heads, then the key, then the value
  std::vector<float> qkv_bias;      // [(n + 2) d], or empty
  Matrix o;                         // [H, n d]: this group's columns of o_proj
  Matrix gate_up;                   // [2 t, H]: gate rows, then up rows
  std::vector<float> gate_up_bias;  // [2 t], or empty
  Matrix down;                      // [H, t]: this group's columns of down_proj
  int64_t tile() const { return down.cols; }
};

struct LayerWeights {
  std::vector<float> input_norm;           // [H], before attention
  std::vector<float> post_attention_norm;  // [H], before the MLP
  std::vector<float> q_norm, k_norm;       // [d], or empty; per head, before RoPE
  std::vector<float> o_bias, down_bias;    // [H], or empty; whole on every rank: to be added once,
                                           // after the sum over groups
  std::vector<GroupWeights> groups;        // the owned ones, in order
};

// embed_tokens, whole on every rank, as the file has it.
struct Embedding {
  DType dtype = DType::BF16;   // F32, F16 or BF16
  int64_t rows = 0, cols = 0;  // [vocab, hidden]
  std::unique_ptr<std::byte[]> values;
  void row(int32_t id, float* out) const;  // REQUIRES 0 <= id < rows; out [cols]
};

struct Weights {
  ShardRange groups;  // owned KV groups, global indices
  WeightFormat format = WeightFormat::AsStored;
  Embedding embed;
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;         // [H]
  std::vector<Matrix> lm_head;           // per owned group: [vocabulary tile, H]
  std::vector<ShardRange> lm_head_rows;  // vocabulary ids of each tile
};

// Bytes that load_weights will allocate on the rank of the group that needs most, for an embedding
// in config.dtype. ERRORS: InvalidArgument unless tensor divides kv_heads.
uint64_t weights_bytes(const ModelConfig& config, int64_t tensor,
                       WeightFormat format = WeightFormat::AsStored);

// Checks that the weights of `ranks_on_node` ranks fit `available` bytes of host memory together.
// Call it on every rank before any of them loads (with a barrier between), so that no rank counts
// what another has taken already. ERRORS: OutOfMemory saying what is needed, what is there, and
// what to do.
void check_weights_fit(const ModelConfig& config, int64_t tensor, int64_t ranks_on_node,
                       uint64_t available, WeightFormat format = WeightFormat::AsStored);

// Loads the shard of `rank`. Before allocating: every tensor is present, float-like, of the shape
// the configuration implies, no tensor of the folder would go unused, and this rank alone fits the
// memory available now. Values that are NaN or infinite are an error. Int8 takes no less memory
// here than float; several ranks each read o_proj and down_proj whole.
// ERRORS: BadFile, InvalidArgument, OutOfMemory.
Weights load_weights(const std::filesystem::path& folder, const ModelConfig& config, int64_t tensor,
                     int64_t rank, WeightFormat format = WeightFormat::AsStored);

// Makes weights that hold all groups, as stored, INT8 as load_weights does.
void quantise_weights(Weights& whole);

}  // namespace certkv
