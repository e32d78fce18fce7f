// Dense causal attention of many queries over one layer's 16-bit originals (prefill).
//
// Online softmax (SOURCE: Milakov and Gimelshein, 2018) over tiles: scores of a query tile against
// a key tile by OpenBLAS, exponentials in place, product with the value tile by OpenBLAS. Memory
// per thread does not depend on the length. A key and value tile is converted to float once per
// query tile and shared by the query heads of its KV head. Tiles that the causal mask hides
// entirely are not computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "kernels/base/dtype.h"

namespace certkv {

class ThreadPool;

struct PrefillAttention {
  // q: of query row i (position first + i), KV head g, head j of its group at
  // q + g * q_group_stride + i * q_row_stride + j * head_dim, after RoPE.
  const float* q = nullptr;
  size_t q_group_stride = 0, q_row_stride = 0;
  // k, v: [kv_heads, >= first + rows, head_dim] with heads kv_head_stride elements apart; the
  // first `first + rows` tokens are read.
  const uint16_t* k = nullptr;
  const uint16_t* v = nullptr;
  size_t kv_head_stride = 0;
  DType dtype = DType::BF16;  // of k and v: BF16 or F16
  // out: addressed as q is.
  float* out = nullptr;
  size_t out_group_stride = 0, out_row_stride = 0;

  size_t first = 0;  // position of the first query; a multiple of prefill_query_tile
  size_t rows = 0;
  size_t kv_heads = 0, heads_per_group = 0, head_dim = 0;
};

// Queries per tile. UNITS: tokens. It depends on the model alone, so that tiles lie at the same
// positions for every number of ranks and threads.
size_t prefill_query_tile(size_t heads_per_group);

// out = softmax(q k^T / sqrt(head_dim)) v over positions 0 .. own.
// `tick` (may be empty) is called by the working thread after every key tile: a sign of life.
// ENSURES each out depends only on its tile of queries and on the keys and values up to the tile's
// end: bitwise the same for every number of threads. A NaN, and an infinity but for a score of
// -infinity (weight 0), makes the outputs of the queries that see it, and may make others of the
// same tile, not finite. Throws InvalidArgument where first is no multiple of
// prefill_query_tile(heads_per_group), or dtype neither BF16 nor F16.
void prefill_attention(const PrefillAttention& a, ThreadPool& pool,
                       const std::function<void()>& tick = {});

}  // namespace certkv
