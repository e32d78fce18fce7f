// A device's products with the matrices of the layers.
#include <algorithm>

#include "runtime/device/device_transformer.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

// A decode's output projection may be done beside another product (DeviceAttention::Following); of
// so many rows each wants a workspace.
bool two_workspaces(int64_t tensor, size_t max_batch) {
  return tensor == 1 && max_batch > cuda::kInt8MostRows;
}

}  // namespace

// Of the largest rank; each as small as its largest matrix where that is less.
uint64_t DeviceTransformer::int8_workspaces_bytes(const ModelConfig& c, int64_t tensor,
                                                  const DeviceTransformerOptions& options) {
  constexpr uint64_t kEnough = uint64_t(32) << 20;  // for a library's product, and the L2 cache
  const uint64_t element = dtype_bytes(options.weights), hidden = uint64_t(c.hidden);
  const uint64_t kv = uint64_t(c.kv_heads / tensor * c.head_dim);
  const uint64_t q = kv * uint64_t(c.heads_per_group());
  uint64_t mlp = 0;
  for (int64_t r = 0; r < tensor; ++r) {
    const ShardRange g = kv_heads_of_rank(c.kv_heads, tensor, r);
    mlp = std::max<uint64_t>(mlp, shard_range(c.intermediate, c.kv_heads, g.end - 1).end -
                                      shard_range(c.intermediate, c.kv_heads, g.begin).begin);
  }
  const uint64_t largest = hidden * std::max(q + 2 * kv, 2 * mlp) * element;
  const uint64_t least = std::max({hidden, q, mlp}) * element;  // of one output
  const uint64_t each = (std::max(least, std::min(largest, kEnough)) + 15) / 16 * 16;
  return each * (two_workspaces(tensor, options.max_batch) ? 2 : 1);
}

void DeviceTransformer::project(const DeviceMatrix& matrix, const void* x, size_t rows, float* y,
                                bool beside) {
  if (matrix.scales.count() == 0)
    return ops_.linear.linear({.weight = matrix.values.data(),
                               .dtype = weights_.dtype,
                               .out = matrix.out,
                               .in = matrix.in,
                               .x = x,
                               .x_stride = matrix.in,
                               .y = y,
                               .y_stride = matrix.out,
                               .rows = rows,
                               .beside = beside});
  const bool two = two_workspaces(int64_t(ranks_), options_.max_batch);
  const size_t workspace = size_t(int8_workspaces_.bytes()) / (two ? 2 : 1);
  ops_.linear.linear(
      cuda::Int8Product{.codes = reinterpret_cast<const int8_t*>(matrix.values.data()),
                        .scales = matrix.scales.data(),
                        .dtype = weights_.dtype,
                        .out = matrix.out,
                        .in = matrix.in,
                        .x = x,
                        .x_stride = matrix.in,
                        .y = y,
                        .y_stride = matrix.out,
                        .rows = rows,
                        .beside = beside,
                        .workspace = int8_workspaces_.data() + (two && beside ? workspace : 0),
                        .workspace_bytes = workspace});
}

}  // namespace certkv
