// Rounding of the device's pass, in place of kernels/arith/chains.h where the GPU adds up
// otherwise. SOURCE: method sections 3 and 4b; kernels/METHOD.md, "The GPU's arithmetic".
#pragma once

#include "kernels/arith/chains.h"
#include "kernels/cuda/page.h"

namespace certkv::cuda {

// Error of one m16n8k16 of halves, in u of the sum of magnitudes (the sum before it included):
// products are exact, addends are cut at 2^-24 (sm_80: twice 8 products) or 2^-25 (sm_90) of the
// largest, the result at 2^-23: 2 (9 + 2) u and (17 / 2 + 2) u. gpu_lanes_test looks for more.
inline constexpr int kMatrixUnits = 24;

inline constexpr int kMostWarps = 12;        // of a block; each walks pages of its own
inline constexpr int kMaxPagesPerWarp = 11;  // by plan
// Blocks that a warp serves from originals, at most: those of a split are dealt out to its warps.
inline constexpr int kMaxTilesPerWarp = kPageTiles * kMaxPagesPerWarp;
// Rescales a weight can meet: one to its warp's reference, a rise for each page or block of
// originals, three merges.
inline constexpr int kRescales = kMaxTilesPerWarp + 5;
inline constexpr double kEpsWDevice =
    (kRescales + 1) * (double(kExpError) + 2 * kUnit) + 3 * kUnit * 104;

// Of the value sums. Codes: two matrix instructions in a row and what is added to them, the
// weight's two halves (2^-22), for each page a fused operation and a rise. Originals: one matrix
// instruction with its terms and scale, the weight, for each block a sum and a rise. Then originals
// join codes, warps each other, the split the output.
inline constexpr int kChainMerges = 2 + kMostWarps + 1;
inline constexpr int kChainCodes = 2 * kMatrixUnits + 5 + 4 + 2 * kMaxPagesPerWarp + kChainMerges;
inline constexpr int kChainOriginals = kMatrixUnits + 3 + 4 + 2 * kMaxTilesPerWarp + kChainMerges;
inline constexpr int kChainDevice = kChainCodes > kChainOriginals ? kChainCodes : kChainOriginals;
static_assert(kChainDevice <= kChainOutput, "runtime/certify charges kChainOutput");

// Of the sums over blocks that a certificate closes: 7 roundings of a block's terms, an addition
// and a rise for each, joining and rows, warps, and what raises them to the safe side.
inline constexpr float kSumsOff = 0x1p-17f;
static_assert((7 + 2 * kMaxTilesPerWarp + 4 + kMostWarps + 1) * kUnit + double(kExpError) <=
              double(kSumsOff));

// Scores of originals: half of the products in a row, the halves and terms of the query added up
// (6), what its terms as halves lose (2^-22 and a little), and as chain_originals.
CERTKV_INLINE double chain_originals_device(int head_dim) {
  return kMatrixUnits * (head_dim / 32) + 6 + 5 + 8;
}

}  // namespace certkv::cuda
