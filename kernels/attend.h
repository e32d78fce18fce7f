// The certified pass: attention of one KV head's query heads over quantised and original blocks,
// with everything its error bound needs accumulated in the same pass.
//
// SOURCE: method sections 3, 4, 4b and 5.1. What the CPU backend does beyond the text:
//  - Values are accumulated about a centre r that the query heads of the KV head share, so that
//    O = r + o / l. Every sum of the certificate that the method writes with v and O is then a sum
//    with v - r and O - r; the problem is translated, the bounds are the same.
//  - The sequence is cut into splits of kSplitTokens. Within one, all scores come first, then the
//    weights about the split's own maximum: no token meets a rescale inside a split, and one
//    (J = 1) when splits are merged. Splits are merged in double precision, in order.
//  - Inside a pass values are multiplied by a power of two that brings the largest norm near 1, so
//    that squares neither overflow (BF16 reaches 3e38) nor vanish; sums leave the pass unscaled.
//  - Delta_b uses the worst case of eps_w (m - min s >= 104), known before the pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/arith/exp.h"
#include "kernels/arith/rounding.h"
#include "kernels/layout.h"

namespace certkv {

inline constexpr int kSplitTokens = 1024;
inline constexpr int kMaxGroupHeads = 16;  // query heads of a KV head that one pass serves; callers cut more

// Where one block's keys and values come from in a pass. A snapshot: valid while the pass runs.
struct BlockRef {
  const std::byte* page = nullptr;  // sealed page holding the block; nullptr: originals only
  int16_t index = 0;                // of the block within its page
  int16_t tokens = 0;               // valid rows; fewer than block_tokens only in the open block
  const uint16_t* k = nullptr;      // originals used for scoring [tokens, head_dim]; nullptr: codes
  const uint16_t* v = nullptr;      // originals used for weighing; nullptr: codes
  float nu = 0, k_norm = 0;         // annotations that hold for originals
};

// eps_w for J = 1 and any spread of scores. SOURCE: method 4b.
inline constexpr double kEpsW = 2 * (double(kExpError) + 2 * kUnit) + 3 * kUnit * 104;

// Longest summation chain + 4, and the roundings of q / sqrt(d) and q * step, per operation.
CERTKV_INLINE double chain_codes(int head_dim) { return head_dim / 4 + 4 + 4 + 6; }
CERTKV_INLINE double chain_originals(int head_dim) { return head_dim / 16 + 4 + 4 + 4; }
// Tokens of a tile, tiles of a split, the per-tile combination, and the merge.
inline constexpr double kChainOutput = kTile + kSplitTokens / kTile + 8;
// n_m of method E2: the chain of the squared distances' sum and of m2 itself.
CERTKV_INLINE double chain_m2(int head_dim) { return head_dim / 8 + kChainOutput + 8; }

// Query heads that share a KV head, prepared once per step and layer.
struct QueryGroup {
  int heads = 0, head_dim = 0;
  std::vector<float> scaled;   // [heads, head_dim] q / sqrt(d)
  std::vector<float> norm;     // [heads] ||q|| / sqrt(d), rounded up
};
// q: [heads, head_dim]
QueryGroup make_query_group(int heads, int head_dim, const float* q);

// Sums of one head about r and a reference maximum m.
struct HeadSums {
  double m = 0;            // reference of the weights: w = exp(s - m)
  double l = 0;            // sum w
  std::vector<double> o;   // [head_dim] sum w (v^ - r)
  std::vector<double> a;   // [head_dim] sum c_b w (v^ - r)
  double m2 = 0;           // sum c_b w ||v^ - r||^2
  double big_a = 0;        // sum w ||v^ - r||     (A of method 4b, about r)
  double s1 = 0;           // sum w ||v^||         (S of method E5, before division)
};

// Result of a pass for one KV head. Arrays are [heads, blocks].
struct PassState {
  int heads = 0, head_dim = 0;
  size_t blocks = 0, tokens = 0;
  std::vector<float> r;            // [head_dim] the centre
  float unit = 1;                  // power of two the values were multiplied by inside the pass
  std::vector<HeadSums> head;      // [heads]
  std::vector<float> block_sum;    // sum of exp(s - block_ref) over the block
  std::vector<float> block_ref;    // reference the block's weights were computed with
  std::vector<float> delta;        // Delta_b charged, for the data really used (NaN-propagating)
  std::vector<float> score_bound;  // D_b + g_b of the codes, also where originals were used; 0: no page
  std::vector<uint8_t> used;       // what this head's state was accumulated from: kUsedKey | kUsedValue
  size_t at(int h, size_t b) const { return size_t(h) * blocks + b; }
};
inline constexpr uint8_t kUsedKey = 1, kUsedValue = 2;  // originals were used

struct AttendContext {
  const PageFormat* format = nullptr;
  DType dtype = DType::BF16;  // of the originals
};

// Runs the pass over all blocks. r: [head_dim] any finite vector (last step's O; zeros are valid).
// REQUIRES blocks.size() >= 1, every block with tokens >= 1, and originals where page is null.
void attend_pass(const AttendContext& context, const QueryGroup& q, std::span<const BlockRef> blocks,
                 const float* r, PassState* state);

// One block's contribution to every head of the group: what the pass adds, and, called again with
// the same reference, sources and unit, bitwise what a correction must subtract. Sums of values are
// in units: o, big_a and s1 times unit, m2 times unit^2.
struct BlockTerms {
  float ref[kMaxGroupHeads];          // in: reference wished; out: reference used
  float sum[kMaxGroupHeads];          // sum p, p = exp(s - ref)
  float m2[kMaxGroupHeads];           // sum p ||v^ - r||^2, without the factor c_b
  float big_a[kMaxGroupHeads], s1[kMaxGroupHeads];
  float delta[kMaxGroupHeads];        // Delta_b of the sources used
  float score_bound[kMaxGroupHeads];  // D_b + g_b of the codes; 0 without a page
  float score[kMaxGroupHeads][32];
  float o[kMaxGroupHeads][kMaxHeadDim];  // sum p (v^ - r)
};
// raise_ref: where a score exceeds the wished reference, that score becomes the reference.
void block_terms(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 const float* r, float unit, bool raise_ref, BlockTerms* out);

// c_b = expm1(Delta_b), rounded up; NaN and overflow propagate.
CERTKV_HD inline float c_of_delta(float delta) {
  if (delta < 0.25f) {  // expm1(x) <= x (1 + x/2 (1 + x/3 (1 + x/4 (1 + x/4)))) for x in [0, 1/4]
    const float x = delta;
    return x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 4)))) * (1 + 0x1p-19f);
  }
  return float(std::expm1(double(delta))) * (1 + 0x1p-19f);
}

}  // namespace certkv
