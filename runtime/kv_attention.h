// What the transformer asks of the KV cache: keep what prefill made, and answer decode queries.
//
// The transformer never sees blocks, tiers or certificates; the cache never sees weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace certkv {

// One sequence's part of a decode step at one layer, on this rank (local heads only).
struct DecodeRow {
  int64_t sequence = 0;         // handle given out by the cache
  const float* q = nullptr;     // [local_query_heads, head_dim], after RoPE
  const uint16_t* k = nullptr;  // [local_kv_heads, head_dim], after RoPE, in the originals' dtype
  const uint16_t* v = nullptr;  // [local_kv_heads, head_dim]
  float* out = nullptr;         // [local_query_heads, head_dim]
};

class KvAttention {
 public:
  virtual ~KvAttention() = default;

  // Tokens of a new sequence's prompt, from the first on, whose originals are there already, so
  // that prefill goes on behind them: whole segments (kvstore/content_owner.h), the same on all
  // ranks.
  virtual size_t shared_tokens(int64_t /*sequence*/) const { return 0; }
  // Reads them, digests checked, into the first rows of k and v [local_kv_heads, tokens, head_dim].
  // False where one cannot be had, or is not what was sealed; k and v are then unspecified.
  virtual bool load_shared(int64_t /*sequence*/, int /*layer*/, size_t /*tokens*/, uint16_t* /*k*/,
                           uint16_t* /*v*/) {
    return false;
  }

  // Hands over the originals of one layer after its prefill. The cache seals and offloads them
  // before it returns; the memory may be reused afterwards. Shared tokens are among them.
  // k, v: [local_kv_heads, tokens, head_dim]
  // last_q: queries of the prompt's last tokens, after RoPE, [queries, local_query_heads,
  // head_dim]; at most kLastQueries, for the cache to choose by how it stores a head; may be empty.
  static constexpr size_t kLastQueries = 4;
  virtual void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                             const uint16_t* v, std::span<const float> last_q) = 0;

  // One decode step of one layer: appends each row's k and v, then writes its out.
  // flags [rows]: 0, or 1 where a precondition broke (rung 4 must be entered by all ranks), which
  // the transformer sums over the tensor-parallel group on the layer's own all-reduce.
  virtual void decode(int layer, std::span<const DecodeRow> rows, float* flags) = 0;

  // Rung 4: repeats the rows' attention densely over originals (k and v are already appended).
  // A row whose originals cannot be had is recorded as failed and gets a zero out.
  virtual void decode_dense(int layer, std::span<const DecodeRow> rows) = 0;
};

}  // namespace certkv
