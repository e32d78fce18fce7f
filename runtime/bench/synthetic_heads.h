// Synthetic attention heads with the shape that trained models show, for benches.
//
// One KV head and the queries of its group. Scores of a query come from four kinds of tokens, and
// the strength of each is solved for, so that the shares of the attention mass are the same at
// every context length:
//
//   sinks   the first 4 tokens: high scores, values of a tenth of the usual norm
//   local   the newest 256 tokens, falling with age
//   far     4 topics of 3 places of 4 tokens each, anywhere in the context: sharp; each query head
//           looks at one topic with 7 tenths of the far mass and at the next with the rest
//   rest    all tokens: scores that are normally distributed with a standard deviation of 1
//
//   shares of the mass   sinks  local  far   rest
//   sharp                0.30   0.30   0.36  0.04
//   mixed                0.30   0.29   0.33  0.08
//   diffuse              0.20   0.10   0     0.70
//
// Keys and values have per-channel scales (log-normal; one channel in 32 is an outlier of 4 times
// the scale) and values a common mean. From step to step queries keep nine tenths of their
// direction among the rest, and what they look at varies by some tenths in log mass: F is learned
// by memory, but is not given. With F resident, `mixed` and `sharp` certify nearly every head-step
// at rung 0 under the default tolerance with every layout; `diffuse` does not, and climbs the
// ladder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"

namespace certkv {

enum class HeadKind : uint8_t { Diffuse, Mixed, Sharp };
const char* head_kind_name(HeadKind kind);
// Throws InvalidArgument for any word but diffuse, mixed and sharp.
HeadKind head_kind_from_name(std::string_view name);

struct SyntheticShape {
  HeadKind kind = HeadKind::Mixed;
  DType dtype = DType::F16;
  int query_heads = 4;  // of the KV head
  int head_dim = 128;
  size_t tokens = 0;     // at least 1024
  int query_steps = 16;  // queries of so many different steps are made
};

struct SyntheticHead {
  std::vector<uint16_t> k, v;  // [tokens, head_dim]
  std::vector<float> q;        // [query_steps, query_heads, head_dim]
};

// The same for the same shape and seed on every machine with the same libm. Throws InvalidArgument.
SyntheticHead make_synthetic_head(const SyntheticShape& shape, uint64_t seed);

}  // namespace certkv
