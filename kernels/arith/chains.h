// Rounding of the certified pass: the longest chains of its sums, and what a Delta_b stands for.
// SOURCE: method sections 3, 4 and 4b; kernels/METHOD.md, section 12.
#pragma once

#include <cstdint>

#include "kernels/arith/exp.h"
#include "kernels/arith/rounding.h"
#include "kernels/layout.h"

namespace certkv {

inline constexpr int kSplitTokens = 1024;

// eps_w for J = 1 and any spread of scores. SOURCE: method 4b.
inline constexpr double kEpsW = 2 * (double(kExpError) + 2 * kUnit) + 3 * kUnit * 104;

// Longest summation chain + 4, and the roundings of q / sqrt(d) and q * step, per operation.
CERTKV_INLINE double chain_codes(int head_dim) {
  return head_dim / 4 + 4 + 4 + 6;
}
CERTKV_INLINE double chain_originals(int head_dim) {
  return head_dim / 16 + 4 + 4 + 4;
}
// Tokens of a run, runs of a split, and the few operations around them: the value's two products,
// the sum of p base, the merge.
inline constexpr double kChainOutput = 64 + kSplitTokens / kTile + 8;
// Where scores of codes are sums of integers, the query is rounded to so many levels a side: what
// that loses is part of g_b. The builds that do not round lose less.
inline constexpr float kQueryLevels = 32600;
// Squared norms of originals: d / 16 squares a lane, the lanes' sum, the square itself.
CERTKV_INLINE double chain_norm(int head_dim) {
  return head_dim / 16 + 8;
}

// c_b = expm1(Delta_b), rounded up; NaN and overflow propagate. T is float or a vector of floats of
// the compiler; I the matching integer type.
template <typename T, typename I>
CERTKV_INLINE T c_of_deltas(T x) {
  // expm1(x) <= x (1 + x/2 (1 + x/3 (1 + x/4 (1 + x/4)))) for x in [0, 1/4]
  const T small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 4)))) * (1 + 0x1p-19f);
  // exp(-x) is within kExpError of E, so exp(x) <= (1 + 2 kExpError) / E; expm1(x) >= 0.28 here.
  const T large = ((1 + 0x1p-19f) / exp_nonpositive<T, I>(-x) - 1) * (1 + 0x1p-19f);
  const T beyond = x * __builtin_inff();  // a NaN stays one
  return x < 0.25f ? small : (x < 80.0f ? large : beyond);
}

CERTKV_INLINE float c_of_delta(float delta) {
  return c_of_deltas<float, int32_t>(delta);
}

// exp(-Delta_b) from c_b, rounded down. NaN propagates.
template <typename T = float>
CERTKV_INLINE T keep_of(T c) {
  return 1 / (1 + c) * (1 - 0x1p-20f);
}

}  // namespace certkv
