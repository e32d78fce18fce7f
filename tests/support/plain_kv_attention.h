// A KvAttention without quantisation, blocks or certificates: originals in memory, attention in
// float64. What the transformer is compared with goldens on.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "kernels/base/dtype.h"
#include "runtime/kv_attention.h"

namespace certkv::test {

class PlainKvAttention : public KvAttention {
 public:
  PlainKvAttention(size_t kv_heads, size_t heads_per_group, size_t head_dim, DType dtype)
      : kv_heads_(kv_heads),
        heads_per_group_(heads_per_group),
        head_dim_(head_dim),
        dtype_(dtype) {}

  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, std::span<const float>) override;
  void decode(int layer, std::span<const DecodeRow> rows, float* flags) override;
  void decode_dense(int layer, std::span<const DecodeRow> rows) override;

  size_t tokens(int64_t sequence, int layer) const;
  // Originals of a sequence's layer and head: [tokens, head_dim].
  const std::vector<uint16_t>& keys(int64_t sequence, int layer, size_t head) const;
  const std::vector<uint16_t>& values(int64_t sequence, int layer, size_t head) const;

  // Faults: a row for which `broken` says so raises its flag and gets a wrong output (all 1e3), as
  // a cache whose precondition broke would; decode_dense repairs it.
  std::function<bool(int layer, int64_t sequence)> broken;
  std::vector<std::pair<int, int64_t>> dense_calls;  // (layer, sequence), in order

 private:
  struct Head {
    std::vector<uint16_t> k, v;  // [tokens, head_dim]
  };
  void attend(int layer, const DecodeRow& row) const;
  Head& head(int64_t sequence, int layer, size_t h);
  const Head& head(int64_t sequence, int layer, size_t h) const;

  size_t kv_heads_, heads_per_group_, head_dim_;
  DType dtype_;
  std::map<std::pair<int64_t, int>, std::vector<Head>> layers_;
};

}  // namespace certkv::test
