// Which part of the model a rank of a tensor-parallel group holds.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/base/error.h"

namespace certkv {

// [begin, end), in whatever is being shared out.
struct ShardRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
};

// Part g of `items` shared by `parts` as evenly as whole items allow: [g*I/G, (g+1)*I/G). Parts
// follow one another without gap or overlap; some are empty when items < parts.
// REQUIRES items >= 0, 0 <= g < parts, items * parts < 2^63
inline ShardRange shard_range(int64_t items, int64_t parts, int64_t g) {
  CERTKV_EXPECT(items >= 0 && parts > 0 && g >= 0 && g < parts, InvalidArgument,
                "no part {} of {} items in {} parts", g, items, parts);
  return {g * items / parts, (g + 1) * items / parts};
}

// "1, 2, 4, 8": the sizes of a tensor-parallel group that a model with these KV heads allows.
inline std::string tensor_sizes_that_fit(int64_t kv_heads) {
  std::string text;
  for (int64_t t = 1; t <= kv_heads; ++t) {
    if (kv_heads % t == 0) text += (text.empty() ? "" : ", ") + std::to_string(t);
  }
  return text;
}

// KV heads of one rank, global indices; each keeps the query heads of its group with it.
// InvalidArgument unless tensor divides kv_heads.
inline ShardRange kv_heads_of_rank(int64_t kv_heads, int64_t tensor, int64_t rank) {
  CERTKV_EXPECT(tensor > 0 && kv_heads > 0 && kv_heads % tensor == 0, InvalidArgument,
                "parallel.tensor is {}, which does not divide the model's {} KV heads: use one of {}",
                tensor, kv_heads, tensor_sizes_that_fit(kv_heads));
  return shard_range(kv_heads, tensor, rank);
}

}  // namespace certkv
