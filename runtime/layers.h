// The parts of a decoder layer that are not attention, on one rank of a tensor-parallel group:
// norms, projections, rotary embedding, gate, and the sums over the group.
//
// Work is cut into KV groups (runtime/weights.h). Every product is called on one group's tile with
// a shape, or an order of summation, that does not depend on the number of ranks, threads or
// sequences in the batch. What crosses groups are only sums of partial outputs:
//  deterministic: all partial sums [G, rows, hidden] are gathered and added in group order, so that
//    the result has the same bits for every number of ranks;
//  otherwise: each rank adds its own in order, and the ranks' sums are all-reduced.
// Either way all ranks hold the same bits afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/linear.h"
#include "kernels/rope.h"

namespace certkv {

class Communicator;
class ThreadPool;
struct LayerWeights;
struct ModelConfig;
struct Weights;

// Time spent since it was last cleared. UNITS: seconds
struct ForwardPhases {
  double projections = 0, attention = 0, communicate = 0;
  double store = 0;  // of a prefill: the cache takes a layer's originals
};

// How products are called. Tiles: OpenBLAS on fixed tiles of rows counted from the first (prefill).
// Rows: every row for itself (decode).
enum class ProductShape : uint8_t { Tiles, Rows };

// Per row, beside the hidden sums, two elements travel: a count of ranks that ask for rung 4, and a
// count of ranks whose keys or values were not finite. They are tested as !(x == 0).
struct RowFlags {
  float fallback = 0;
  float nonfinite = 0;
};

class LayerForward {
 public:
  // All references must outlive this object.
  // Throws InvalidArgument if the weights do not belong to this rank of this group.
  LayerForward(const ModelConfig& config, const Weights& weights, Communicator& group,
               ThreadPool& pool, bool deterministic);

  size_t groups() const { return groups_; }  // owned KV groups = local KV heads
  size_t heads_per_group() const { return heads_per_group_; }
  size_t head_dim() const { return head_dim_; }
  size_t hidden() const { return hidden_; }

  void embed(std::span<const int32_t> tokens, float* x) const;  // x: [tokens, hidden]

  // Norm, qkv products, q and k norms, rotation: fills qkv(). x: [rows, hidden]; row r turns by row
  // r of the table.
  void project_qkv(size_t layer, const float* x, size_t rows, const RopeTable& table,
                   ProductShape shape);
  // [rows, heads_per_group + 2, head_dim] of the group: queries, key, value.
  const float* qkv(size_t group) const { return qkv_.data() + group * qkv_rows_ * qkv_width(); }
  size_t qkv_width() const { return (heads_per_group_ + 2) * head_dim_; }

  // Rounds keys and values of the last project_qkv to 16 bits: row r of group g goes to
  // k + g * group_stride + r * row_stride. Calls bad(row) where a value is not finite afterwards.
  void round_originals(DType dtype, size_t rows, uint16_t* k, uint16_t* v, size_t group_stride,
                       size_t row_stride, const std::function<void(size_t)>& bad);

  // o_proj summed over all groups. attention: row r of group g at
  // attention + g * group_stride + r * row_stride, [heads_per_group * head_dim].
  // Returns sums: [rows, sum_stride()], bias included, valid until the next product; `flags` [rows]
  // become their sums over the ranks.
  const float* output_projection(size_t layer, const float* attention, size_t group_stride,
                                 size_t row_stride, size_t rows, RowFlags* flags,
                                 ProductShape shape);
  size_t sum_stride() const { return hidden_ + 2; }

  // x [rows, hidden] += the hidden elements of sums [rows, sum_stride()]. Calls bad(row) for every
  // row whose sum is not finite, in order.
  void add_sums(const float* sums, size_t rows, float* x, const std::function<void(size_t)>& bad);

  // x += mlp(norm(x)). Calls bad(row) for every row whose sum is not finite.
  void mlp(size_t layer, float* x, size_t rows, ProductShape shape,
           const std::function<void(size_t)>& bad);

  // Final norm and lm_head over all ranks: out [rows, vocab] on every rank. x: [rows, hidden].
  void logits(const float* x, size_t rows, float* out);

  // A sign of life of this rank; called by the working threads at least once per tile.
  const std::function<void()>& tick() const { return tick_; }

  ForwardPhases phases;

 private:
  void multiply(std::span<const LinearRows> products, size_t rows, ProductShape shape);
  void rows_in_parallel(size_t rows, const std::function<void(size_t, size_t)>& body);
  void norm_rows(const float* x, size_t rows, const std::vector<float>& weight);
  float* partials(size_t rows);
  const float* sum_partials(size_t rows, const std::vector<float>& bias);

  const ModelConfig& config_;
  const Weights& weights_;
  Communicator& group_;
  ThreadPool& pool_;
  bool deterministic_;
  size_t hidden_, head_dim_, heads_per_group_, groups_, all_groups_;
  std::function<void()> tick_;

  std::vector<float> normed_;  // [rows, hidden]
  std::vector<float> qkv_;     // [groups, rows, (n + 2) d]
  size_t qkv_rows_ = 0;
  std::vector<float> gate_up_, gated_;     // [groups][rows, 2 t], [groups][rows, t]
  std::vector<float> partial_, gathered_;  // [groups, rows, hidden + 2], [all groups, ...]
  std::vector<float> sum_;                 // [rows, hidden + 2]
  std::vector<float> vocab_part_, vocab_all_;
  std::vector<uint8_t> finite_;  // per row of the work at hand
};

}  // namespace certkv
