// A KvAttention of many sequences that go on from one shared prompt: its keys and values are kept
// once and read together, in float64, without quantisation. One process, one prompt.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "kernels/base/dtype.h"
#include "runtime/kv_attention.h"

namespace certkv::test {

class ForkedKvAttention : public KvAttention {
 public:
  ForkedKvAttention(size_t kv_heads, size_t heads_per_group, size_t head_dim, DType dtype)
      : kv_heads_(kv_heads),
        heads_per_group_(heads_per_group),
        head_dim_(head_dim),
        dtype_(dtype) {}

  // The shared prompt, whatever the handle: every sequence that is decoded afterwards begins with
  // it.
  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, std::span<const float>) override;
  void decode(int layer, std::span<const DecodeRow> rows, float* flags) override;
  void decode_dense(int layer, std::span<const DecodeRow> rows) override;  // never asked for

 private:
  struct Tokens {
    std::vector<double> k, v;  // [tokens, head_dim]
  };
  void append(Tokens& to, size_t tokens, const uint16_t* k, const uint16_t* v) const;
  void attend(const Tokens& shared, int layer, size_t h, std::span<const DecodeRow> rows) const;

  size_t kv_heads_, heads_per_group_, head_dim_;
  DType dtype_;
  std::map<int, std::vector<Tokens>> shared_;                   // by layer: one per KV head
  std::map<std::pair<int64_t, int>, std::vector<Tokens>> own_;  // by sequence and layer
};

}  // namespace certkv::test
