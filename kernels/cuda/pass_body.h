// The certified pass of the device, once for nvcc and once for the emulation: see lanes.h for how,
// DESIGN.md for why. Included by attend_kernels.cu and attend_emulated.cc alone.
//
// A block's work is one split of one KV head. begin() of all warps, then walk() of all, then
// combine() of all, with a barrier between; merge() later, in a launch of its own.
//
// Lanes play two parts. In C fragments lane 4 r + h holds tokens r and r + 8 of a tile, or elements
// 2 r and 2 r + 1 of a cell, of head h of four. In B fragments, and while a query is prepared, lane
// 8 h + j works for head h.
// SOURCE: method sections 3, 4, 4b and 5.1; kernels/METHOD.md, "The GPU's arithmetic".
#pragma once

#include "kernels/cuda/chains.h"
#include "kernels/cuda/lanes.h"
#include "kernels/cuda/pass_args.h"
#include "kernels/cuda/plan.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

#define CERTKV_FN CERTKV_LANES_FUNCTION

inline constexpr float kWeightScale = 0x1p15f;  // weights as halves: the largest is 2^15
static_assert(sizeof(CopyState) == kCopyStateBytes);

CERTKV_FN float accepted(float note) {  // a damaged note must not pass for a small one
  return note >= 0 ? note : __builtin_nanf("");
}
CERTKV_FN double max_nan(double a, double b) {
  return a > b ? a : (a <= b ? b : __builtin_nan(""));
}
CERTKV_FN F max_nan(F a, F b) {
  return select(a > b, a, select(a <= b, b, a + b));
}
CERTKV_FN F min_nan(F a, F b) {
  return select(a < b, a, select(b <= a, b, a + b));
}

// Sum over the lanes of a head: the eight rows r of a C fragment.
CERTKV_FN F sum_rows(F x) {
  x = x + shuffle_xor(x, 4);
  x = x + shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}
CERTKV_FN F largest_of_rows(F x) {
  x = larger(x, shuffle_xor(x, 4));
  x = larger(x, shuffle_xor(x, 8));
  return larger(x, shuffle_xor(x, 16));
}
// Sum over the eight lanes 8 h + j that prepare a head's query.
CERTKV_FN F sum_eight(F x) {
  x = x + shuffle_xor(x, 1);
  x = x + shuffle_xor(x, 2);
  return x + shuffle_xor(x, 4);
}

template <int kDim, int kGroups, bool kCertificate>
struct Pass {
  static constexpr PageLayoutDevice kPage = page_layout(kDim);
  static constexpr SharedLayout kShared = shared_layout(kDim, kGroups);
  static constexpr int kSteps = kDim / 32;  // of m16n8k32
  static constexpr int kCells = kDim / 16;  // of 16 elements
  static constexpr int kHeads = 4 * kGroups;
  static constexpr int kSums = sums_floats(kDim);

  const PassArgs& args;
  const PassItem& item;
  std::byte* shared;
  int split, warp;

  // ---- shared memory ----------------------------------------------------------------------------

  CERTKV_FN std::byte* own() const { return shared + warp * int(kShared.warp_bytes); }
  CERTKV_FN std::byte* key_slot(int n) const { return own() + n * int(kPage.key_bytes); }
  CERTKV_FN std::byte* value_slot() const { return own() + kShared.values; }
  CERTKV_FN CopyState* state(int n) const {
    return reinterpret_cast<CopyState*>(shared + kShared.states) +
           warp * (kKeySlots + kValueSlots) + n;
  }
  CERTKV_FN PageEntry* entries() const {
    return reinterpret_cast<PageEntry*>(shared + kShared.entries);
  }
  CERTKV_FN float* query() const { return reinterpret_cast<float*>(shared + kShared.query); }
  CERTKV_FN float* norms() const { return reinterpret_cast<float*>(shared + kShared.norm); }
  // Terms of the queries for original keys, see split_query; and 1 over their scales.
  CERTKV_FN std::byte* terms() const { return shared + kShared.terms; }
  CERTKV_FN float* scales() const { return reinterpret_cast<float*>(shared + kShared.scale); }
  CERTKV_FN float* sums(int w) const {
    return reinterpret_cast<float*>(shared + w * int(kShared.warp_bytes));
  }

  CERTKV_FN int first_page() const { return split * args.pages_per_split; }
  CERTKV_FN int pages() const {
    const int left = item.page_count - first_page();
    return left < args.pages_per_split ? left : args.pages_per_split;
  }

  // Words [0, count) of `from`, zeros up to `padded`; by all warps of the block.
  CERTKV_FN void fetch(const float* from, int count, int padded, float* to) const {
    for (int at = warp * 32; at < padded; at += kWarps * 32) {
      const I i = lane_index() + at;
      store_where(i < padded, to, i,
                  select(i < count, load_float(from, select(i < count, i, splat_i(0))), splat(0)));
    }
  }

  CERTKV_FN void begin() const {
    for (int n = 0; n < kKeySlots + kValueSlots; ++n) copy_init(state(n));
    fetch(reinterpret_cast<const float*>(item.pages + first_page()), pages() * 4, pages() * 4,
          reinterpret_cast<float*>(entries()));
    fetch(item.scaled, item.heads * kDim, kHeads * kDim, query());
    fetch(item.norm, item.heads, kHeads, norms());
    if (warp < kHeads) split_query(warp);
  }

  // One head's query as sums of 16-bit floats of the originals' type, times a power of two that
  // brings its largest element to [1, 2) (halves: [2^14, 2^15)). Three bfloat16 hold it exactly,
  // two halves but for 2^-22 of each element and 2^-40 of the largest. Fragments B of m16n8k16:
  // [step d/16][term 3][head][class 4][2 words]; k 2 c, 2 c + 1 of step 2 i + z is channel
  // 32 i + 8 c + 4 z + {0, 1}, k 2 c + 8, 2 c + 9 the next two.
  CERTKV_FN void split_query(int head) const {
    constexpr int kPairs = kDim / 64;
    const I lane = lane_index();
    F x[kPairs][2];
    F most = splat(0);
    CERTKV_UNROLL
    for (int i = 0; i < kPairs; ++i) CERTKV_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float* from = head < item.heads ? item.scaled + head * kDim : item.scaled;
      x[i][e] = load_float(from, lane * 2 + (64 * i + e));
      if (head >= item.heads) x[i][e] = splat(0);
      most = larger(most, magnitude(x[i][e]));
    }
    CERTKV_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) most = larger(most, shuffle_xor(most, mask));
    // Within 2^-100 to 2^100, so that its inverse is one too; NaN and infinity stay what they are.
    const bool halves = args.dtype == DType::F16;
    U exponent = bits_of(most) >> 23;
    exponent = select(exponent < 27u, splat_u(27), select(exponent > 227u, splat_u(227), exponent));
    const F scale = float_of_bits((254u - exponent) << 23) * (halves ? 0x1p14f : 1.0f);
    const F inverse = float_of_bits(exponent << 23) * (halves ? 0x1p-14f : 1.0f);
    store_where(lane < 1, scales(), splat_i(head), inverse);
    CERTKV_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const F a = x[i][0] * scale, b = x[i][1] * scale;
      U term[3];
      if (halves) {
        term[0] = pack_halves(a, b);
        term[1] = pack_halves(a - low_half(term[0]), b - high_half(term[0]));
        term[2] = splat_u(0);
      } else {
        split_brains(a, b, term);
      }
      // Pair p of channels 2 p: span p / 16, class p % 16 / 4, step p % 4 / 2, word p % 2.
      const I p = lane + 32 * i;
      const I step = (p >> 4) * 2 + ((p & 3) >> 1);
      for (int n = 0; n < 3; ++n)
        store(reinterpret_cast<float*>(terms()),
              ((step * 3 + n) * kHeads + head) * 8 + ((p & 15) >> 2) * 2 + (p & 1),
              float_of_bits(term[n]));
    }
  }

  // a and b as three bfloat16 each, exactly; a in the lower halves.
  CERTKV_FN static void split_brains(F a, F b, U (&term)[3]) {
    CERTKV_UNROLL
    for (int n = 0; n < 3; ++n) {
      const U high_a = bits_of(a) & 0xffff0000u, high_b = bits_of(b) & 0xffff0000u;
      term[n] = high_a >> 16 | high_b;
      a = a - float_of_bits(high_a);
      b = b - float_of_bits(high_b);
    }
  }

  // ---- a head's state in registers, C fragment
  // ---------------------------------------------------

  struct Sums {
    F m, l, m2, s1, c_tokens, score_max;
    F o[kCells][2], a[kCells][2];
  };

  // ---- the query for one page -------------------------------------------------------------------

  // q times the channels' scales as signed bytes: unit (256 high + low), and what that loses.
  // SOURCE: method section 3 (dq); kernels/METHOD.md, "Integer scores".
  struct Query {
    U b[kSteps][2];       // fragments B: columns 2 h and 2 h + 1 are high and low of head h
    F unit, base, bound;  // C fragment; bound: D_b + g_b
  };

  CERTKV_FN void prepare(const std::byte* keys, const PageNotesDevice& notes, int group,
                         const F (&q)[kSteps * 4], F norm, Query* out) const {
    const I lane = lane_index();
    F x[kSteps * 4];
    F sum = splat(0), base = splat(0), most = splat(0);
    CERTKV_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      U m[4];
      load4(keys + kPage.key_affine + i * 128, (lane & 7) * 16, m);
      const F scale[4] = {low_half(m[0]), high_half(m[0]), low_half(m[1]), high_half(m[1])};
      const F offset[4] = {low_half(m[2]), high_half(m[2]), low_half(m[3]), high_half(m[3])};
      CERTKV_UNROLL
      for (int e = 0; e < 4; ++e) {
        const F stepped = q[i * 4 + e] * scale[e];
        x[i * 4 + e] = stepped;
        sum = sum + magnitude(stepped);
        most = larger(most, magnitude(stepped));
        base = fma(q[i * 4 + e], offset[e], base);
      }
    }
    sum = sum_eight(sum);
    base = sum_eight(base);
    most = larger(most, shuffle_xor(most, 1));
    most = larger(most, shuffle_xor(most, 2));
    most = larger(most, shuffle_xor(most, 4)) + (sum - sum);  // NaN if one x is not finite
    const B usable = most > 0x1p-100f;
    const F inverse = select(usable, splat(kQueryLevels) / most, splat(0));
    const F unit = select(usable, most * (1 / kQueryLevels), most - most);
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the integer lies in the lowest bits
    F rests = splat(0), lost = splat(0);
    U high[kSteps], low[kSteps];
    CERTKV_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      U n[4];
      CERTKV_UNROLL
      for (int e = 0; e < 4; ++e) {
        const F shifted = fma(x[i * 4 + e], inverse, splat(kMagic));
        n[e] = bits_of(shifted);
        const F rest = fma(splat(kMagic) - shifted, unit, x[i * 4 + e]);
        rests = rests + rest;
        lost = lost + magnitude(rest);
      }
      low[i] = pick_bytes(pick_bytes(n[0], n[1], 0x0040), pick_bytes(n[2], n[3], 0x0040), 0x5410);
      // The low byte is a signed one; the high byte makes up for its sign.
      high[i] = pick_bytes(pick_bytes(n[0] + 128u, n[1] + 128u, 0x0051),
                           pick_bytes(n[2] + 128u, n[3] + 128u, 0x0051), 0x5410);
    }
    rests = sum_eight(rests);
    lost = sum_eight(lost);
    // This lane has one half of the channels, its neighbour 4 lanes on the other.
    const B of_high = (lane & 4) == 0;
    CERTKV_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      const U other = shuffle_xor(select(of_high, low[i], high[i]), 4);
      out->b[i][0] = select(of_high, high[i], other);
      out->b[i][1] = select(of_high, other, low[i]);
    }
    // As kernels/cpu/attend_tiles.inc; chains here are shorter.
    const float gamma =
        float(gamma_n(chain_codes(kDim)) * (1 + 8 * kUnit)) * accepted(notes.kbar_norm);
    const F rounding = norm * gamma + lost * (128 * (1 + 0x1p-18f));
    const F by_channel = sum * ((1 + 0x1p-18f) * accepted(notes.kappa));
    const F bound = (min_nan(by_channel, norm * accepted(notes.e)) + rounding) * (1 + 0x1p-20f);
    const I from = (lane & 3) * 8;
    out->unit = shuffle(unit, from);
    out->base = shuffle(base + rests * 128.0f, from);
    out->bound = shuffle(bound, from);
    (void)group;
  }

  CERTKV_FN static F charged(F bound) {  // Delta_b
    return (bound + float(kEpsWDevice * (1 + 8 * kUnit))) * (1 + 0x1p-22f);
  }

  // ---- originals
  // ---------------------------------------------------------------------------------

  CERTKV_FN F original(U pair, bool second) const {
    if (args.dtype == DType::BF16) return float_of_bits(second ? pair & 0xffff0000u : pair << 16);
    return second ? high_half(pair) : low_half(pair);
  }
  // Rows of a block's keys or values; nullptr if no slot holds them.
  CERTKV_FN const std::byte* rows(const int32_t* slots, int block) const {
    const int slot = slots[block];
    if (slot < 0 || slot >= args.slot_count) {
      raise_flag(item.flags, kFlagMissing);
      return nullptr;
    }
    return args.slots + size_t(slot) * size_t(16 * kDim * 2);
  }

  CERTKV_FN void mma_original(F (&sum)[4], const U (&a)[4], U b0, U b1) const {
    if (args.dtype == DType::BF16)
      mma_brains(sum, a, b0, b1);
    else
      mma_halves(sum, a, b0, b1);
  }
  // Row of token r + 8 half, of a valid token: beyond the last a weight is 0, a NaN would not be.
  CERTKV_FN static I row_of(int half, int tokens) {
    const I wanted = (lane_index() >> 2) + 8 * half;
    return select(wanted < tokens, wanted, splat_i(tokens - 1));
  }

  // Scores of tokens r and r + 8 of a block of original keys.
  CERTKV_FN void score_rows(const std::byte* keys, int tokens, F (&s)[kGroups][kPageTiles][2],
                            int tile) const {
    const I lane = lane_index();
    U k[2][kSteps][4];
    CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) CERTKV_UNROLL
    for (int i = 0; i < kSteps; ++i)
      load4(keys + i * 64, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 16, k[half][i]);
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      F sum[2][4], last[4];  // of the first two terms, half of the steps each; of the third
      CERTKV_UNROLL
      for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = last[i] = splat(0);
      const I term = (lane >> 2) & 1, head = (lane >> 3) + 4 * g;
      CERTKV_UNROLL
      for (int step = 0; step < 2 * kSteps; ++step) {
        const int i = step / 2, z = step % 2 * 2;
        const U a[4] = {k[0][i][z], k[1][i][z], k[0][i][z + 1], k[1][i][z + 1]};
        const std::byte* from = terms() + step * (3 * kHeads * 32);
        U b[2];
        load2(from, (term * kHeads + head) * 32 + (lane & 3) * 8, b);
        mma_original(sum[step / kSteps], a, b[0], b[1]);
        if (args.dtype == DType::BF16) {
          load2(from + 2 * kHeads * 32, head * 32 + (lane & 3) * 8, b);
          mma_brains(last, a, b[0], b[1]);
        }
      }
      // `last` has the third term in both columns of a head: one is taken.
      const F scale = load_float(scales(), (lane & 3) + 4 * g);
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * half;
        const F small = last[n] + (sum[0][n + 1] + sum[1][n + 1]);
        s[g][tile][half] = ((sum[0][n] + sum[1][n]) + small) * scale;
      }
    }
  }

  // sum p v of a block of original values is added to v_sum, in units; what its norms add to s1 and
  // m2, to theirs.
  CERTKV_FN void weigh_rows(const std::byte* values, int tokens, int tile,
                            const F (&p)[kGroups][kPageTiles][2],
                            const U (&w)[kGroups][kPageTiles][2], F (&v_sum)[kGroups][kCells][2],
                            F (&s1)[kGroups], F (&squares)[kGroups]) const {
    const I lane = lane_index();
    const bool halves = args.dtype == DType::F16;
    U v[2][kCells][2];
    CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) CERTKV_UNROLL
    for (int c = 0; c < kCells; ++c)
      load2(values + c * 32, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 8, v[half][c]);
    if (kCertificate) {
      // Roundings of squares and sums, half of them after the root, and the root's own.
      constexpr float kSlack = float((kDim / 4 + 8) * 0x1p-24) + 0x1p-20f;
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        F n2 = splat(0);
        CERTKV_UNROLL
        for (int c = 0; c < kCells; ++c) CERTKV_UNROLL
        for (int e = 0; e < 4; ++e) {
          const F x = original(v[half][c][e / 2], e % 2 == 1) * item.unit;
          n2 = fma(x, x, n2);
        }
        n2 = n2 + shuffle_xor(n2, 1);
        const F norm = root(n2 + shuffle_xor(n2, 2));
        const F below = norm * (1 - kSlack), above = norm * (1 + kSlack);
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          s1[g] = fma(p[g][tile][half], below, s1[g]);
          squares[g] = fma(p[g][tile][half], above * above, squares[g]);
        }
      }
    }
    U b[kGroups][2][2];  // of bfloat16: first two terms of a weight, and the third
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      U term[3];
      split_brains(p[g][tile][half], splat(0), term);
      b[g][0][half] = halves ? w[g][tile][half] : transpose_8x8(term[0] | term[1] << 16);
      b[g][1][half] = halves ? splat_u(0) : transpose_8x8(term[2]);
    }
    const float scale = halves ? item.unit / kWeightScale : item.unit;
    CERTKV_UNROLL
    for (int c = 0; c < kCells; ++c) {
      U a[4];
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        a[2 * half] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x5410));
        a[2 * half + 1] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x7632));
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        F sum[4], last[4];
        CERTKV_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = last[i] = splat(0);
        mma_original(sum, a, b[g][0][0], b[g][0][1]);
        if (!halves) mma_brains(last, a, b[g][1][0], b[g][1][1]);
        v_sum[g][c][0] = fma(sum[0] + (sum[1] + last[0]), splat(scale), v_sum[g][c][0]);
        v_sum[g][c][1] = fma(sum[2] + (sum[3] + last[2]), splat(scale), v_sum[g][c][1]);
      }
    }
  }

  // ---- values as codes
  // ---------------------------------------------------------------------------

  // sum p v^ of four cells over the tiles in `mask`, weights as 2^15 p.
  CERTKV_FN static void weigh_codes(const std::byte* values, int quad, uint32_t mask,
                                    const U (&w)[kGroups][kPageTiles][2], F (&sum)[kGroups][4][2]) {
    const I lane = lane_index();
    CERTKV_UNROLL
    for (int pair = 0; pair < kPageTiles; pair += 2) {  // shorter chains
      F acc[kGroups][4][4];
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
      for (int c = 0; c < 4; ++c) CERTKV_UNROLL
      for (int i = 0; i < 4; ++i) acc[g][c][i] = splat(0);
      CERTKV_UNROLL
      for (int tile = pair; tile < pair + 2; ++tile) {
        if ((mask >> tile & 1) == 0) continue;
        U words[4];
        load4(values + (tile * (kDim / 64) + quad) * 512, lane * 16, words);
        CERTKV_UNROLL
        for (int c = 0; c < 4; ++c) {
          U m[4];
          load4(values + kPage.value_affine + (tile * kCells + quad * 4 + c) * 64, (lane & 3) * 16,
                m);
          const U next = words[c] >> 8;
          const U v[4] = {fma_halves(words[c] & 0x000f000fu, m[0], m[1]),
                          fma_halves(next & 0x000f000fu, m[0], m[1]),
                          fma_halves(words[c] & 0x00f000f0u, m[2], m[3]),
                          fma_halves(next & 0x00f000f0u, m[2], m[3])};
          CERTKV_UNROLL
          for (int g = 0; g < kGroups; ++g) mma_halves(acc[g][c], v, w[g][tile][0], w[g][tile][1]);
        }
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
      for (int c = 0; c < 4; ++c) {
        // High and low parts of a weight are neighbouring columns.
        const F x = acc[g][c][0] + acc[g][c][1], y = acc[g][c][2] + acc[g][c][3];
        sum[g][c][0] = pair == 0 ? x : sum[g][c][0] + x;
        sum[g][c][1] = pair == 0 ? y : sum[g][c][1] + y;
      }
    }
  }

  // ---- one page
  // ----------------------------------------------------------------------------------

  // What a page of this step is read as. Bit t: tile t.
  struct Sources {
    bool page;
    uint32_t tiles, keys, values;  // there are tokens; original keys, original values are used
    const std::byte* key_rows[kPageTiles];
    const std::byte* value_rows[kPageTiles];
    bool lost;  // a tile has neither codes nor originals
  };

  CERTKV_FN Sources sources(const PageEntry& entry, int page) const {
    Sources s;
    s.page = entry.page != nullptr;
    s.tiles = (1u << ((entry.tokens + 15) / 16)) - 1;
    s.keys = s.values = 0;
    s.lost = false;
    const uint32_t wants = s.page ? entry.wants : 0xffu;
    CERTKV_UNROLL
    for (int t = 0; t < kPageTiles; ++t) {
      s.key_rows[t] = s.value_rows[t] = nullptr;
      if ((s.tiles >> t & 1) == 0) continue;
      if ((wants >> t & 1) != 0) s.key_rows[t] = rows(item.key_slot, page * kPageTiles + t);
      if ((wants >> (4 + t) & 1) != 0)
        s.value_rows[t] = rows(item.value_slot, page * kPageTiles + t);
      s.keys |= s.key_rows[t] != nullptr ? 1u << t : 0u;
      s.values |= s.value_rows[t] != nullptr ? 1u << t : 0u;
      if (!s.page && (s.key_rows[t] == nullptr || s.value_rows[t] == nullptr)) s.lost = true;
    }
    return s;
  }

  CERTKV_FN void record(int page, int group, const F (&tile_sum)[kPageTiles], F ref, F bound, F c,
                        const F (&delta)[kPageTiles]) const {
    const I lane = lane_index(), row = lane >> 2;
    // Rows 2 n and 2 n + 1 ... end with the sum of tile r % 4 in rows r and r + 4.
    const B odd = (row & 1) != 0, upper = (row & 2) != 0;
    F even_pair = select(odd, tile_sum[1], tile_sum[0]);
    F odd_pair = select(odd, tile_sum[3], tile_sum[2]);
    even_pair = even_pair + shuffle_xor(select(odd, tile_sum[0], tile_sum[1]), 4);
    odd_pair = odd_pair + shuffle_xor(select(odd, tile_sum[2], tile_sum[3]), 4);
    F sum = select(upper, odd_pair, even_pair);
    sum = sum + shuffle_xor(select(upper, even_pair, odd_pair), 8);
    sum = sum + shuffle_xor(sum, 16);
    float* to = item.records + (size_t(page) * kGroups + size_t(group)) * kRecordFloats;
    const F first = select(row < 4, sum, select(row < 5, ref, select(row < 6, bound, c)));
    store_where(row < 7, to, lane, first);
    const F of_tile =
        select(row < 2, select(row < 1, delta[0], delta[1]), select(row < 3, delta[2], delta[3]));
    store_where(row < 4, to + kRecordDelta, lane, of_tile);
  }

  // Everything about one page but the copies. after_keys() runs once the key slot is not needed.
  template <bool kOriginals, typename AfterKeys, typename BeforeValues>
  CERTKV_FN void page_terms(int page, const PageEntry& entry, const Sources& from,
                            const std::byte* keys, const F (&q)[kGroups][kSteps * 4],
                            const F (&norm)[kGroups], Sums (&sums)[kGroups], AfterKeys after_keys,
                            BeforeValues before_values) const {
    const I lane = lane_index();
    F s[kGroups][kPageTiles][2];
    F bound[kGroups], c[kGroups], code_delta[kGroups];
    float norm_step = 0, factor = 0;
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      bound[g] = c[g] = code_delta[g] = splat(0);
      if (kOriginals) {
        CERTKV_UNROLL
        for (int t = 0; t < kPageTiles; ++t) s[g][t][0] = s[g][t][1] = splat(0);
      }
    }

    if (!kOriginals || from.page) {
      const PageNotesDevice& notes = *reinterpret_cast<const PageNotesDevice*>(keys + kPage.notes);
      norm_step = accepted(notes.norm_step) * item.unit;
      factor = accepted(notes.value_factor) * (item.unit / kWeightScale);
      Query query[kGroups];
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        prepare(keys, notes, g, q[g], norm[g], &query[g]);
        bound[g] = query[g].bound;
      }
      CERTKV_UNROLL
      for (int t = 0; t < kPageTiles; ++t) {
        I sum[kGroups][4];
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
        for (int i = 0; i < 4; ++i) sum[g][i] = splat_i(0);
        CERTKV_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          U a[4];
          load4(keys + (t * kSteps + i) * 512, lane * 16, a);
          CERTKV_UNROLL
          for (int g = 0; g < kGroups; ++g)
            mma_bytes(sum[g], a, query[g].b[i][0], query[g].b[i][1]);
        }
        // |256 high + low| <= 32640 * 255 * 128 < 2^31.
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          s[g][t][0] = fma(to_float(sum[g][0] * 256 + sum[g][1]), query[g].unit, query[g].base);
          s[g][t][1] = fma(to_float(sum[g][2] * 256 + sum[g][3]), query[g].unit, query[g].base);
        }
      }
      after_keys();
      if (kCertificate) {
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          code_delta[g] = charged(bound[g]);
          c[g] = c_of(code_delta[g]);
        }
      }
    }

    if (kOriginals) {
      CERTKV_UNROLL
      for (int t = 0; t < kPageTiles; ++t) {
        const int tokens = entry.tokens - 16 * t < 16 ? entry.tokens - 16 * t : 16;
        if ((from.keys >> t & 1) != 0) score_rows(from.key_rows[t], tokens, s, t);
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          const B inside = (lane >> 2) + 8 * half < tokens;
          s[g][t][half] = select(inside, s[g][t][half], splat(-__builtin_inff()));
          if (from.lost) s[g][t][half] = splat(__builtin_nanf(""));
        }
      }
    }

    // Weights about the page's own largest score; the page's sums about the warp's.
    F p[kGroups][kPageTiles][2];
    U w[kGroups][kPageTiles][2];
    F f[kGroups];
    const uint32_t quantised = from.page ? from.tiles & ~from.keys : 0;  // T
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      Sums& x = sums[g];
      F most = s[g][0][0];
      CERTKV_UNROLL
      for (int t = 0; t < kPageTiles; ++t) {
        most = larger(most, s[g][t][0]);
        most = larger(most, s[g][t][1]);
      }
      most = largest_of_rows(most);
      if (any(most > x.m)) {
        const F risen = larger(x.m, most);
        const F less = exponential(x.m - risen);
        x.m = risen;
        x.l = x.l * less;
        if (kCertificate) {
          x.m2 = x.m2 * less;
          x.s1 = x.s1 * less;
        }
        CERTKV_UNROLL
        for (int i = 0; i < kCells; ++i) CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          x.o[i][half] = x.o[i][half] * less;
          if (kCertificate) x.a[i][half] = x.a[i][half] * less;
        }
      }
      f[g] = exponential(most - x.m);
      F tile_sum[kPageTiles];
      CERTKV_UNROLL
      for (int t = 0; t < kPageTiles; ++t) {
        CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          const F weight = exponential(s[g][t][half] - most);
          p[g][t][half] = weight;
          const F scaled = weight * kWeightScale;
          const F low = scaled - low_half(pack_halves(scaled, scaled));
          w[g][t][half] = transpose_8x8(pack_halves(scaled, low));
        }
        tile_sum[t] = p[g][t][0] + p[g][t][1];
      }
      x.l = fma(f[g], (tile_sum[0] + tile_sum[1]) + (tile_sum[2] + tile_sum[3]), x.l);
      if (kCertificate) {
        F delta[kPageTiles];
        CERTKV_UNROLL
        for (int t = 0; t < kPageTiles; ++t) {
          delta[t] = code_delta[g];
          if (kOriginals && (from.keys >> t & 1) != 0) {
            const float k_norm = accepted(item.k_norm[page * kPageTiles + t]);
            const float gamma =
                float(gamma_n(chain_originals_device(kDim)) * (1 + 8 * kUnit) * (1 + 0x1p-20));
            delta[t] = charged(load_float(norms(), (lane & 3) + 4 * g) * (gamma * k_norm));
          }
        }
        record(page, g, tile_sum, most, bound[g], c[g], delta);
        int counted = 0;
        CERTKV_UNROLL
        for (int t = 0; t < kPageTiles; ++t) counted += int(quantised >> t & 1) * 16;
        x.c_tokens = fma(c[g], splat(float(counted)), x.c_tokens);
        if (quantised != 0) x.score_max = max_nan(x.score_max, bound[g]);
      }
    }
    if (kCertificate) store_word(item.used + page, from.keys | from.values << 4);

    // Original values: of blocks in T, then of the others.
    F v_sum[2][kGroups][kCells][2];
    if (kOriginals) {
      CERTKV_UNROLL
      for (int other = 0; other < 2; ++other) {
        F s1[kGroups], squares[kGroups];
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          s1[g] = squares[g] = splat(0);
          CERTKV_UNROLL
          for (int i = 0; i < kCells; ++i) v_sum[other][g][i][0] = v_sum[other][g][i][1] = splat(0);
        }
        CERTKV_UNROLL
        for (int t = 0; t < kPageTiles; ++t) {
          const bool here = (quantised >> t & 1) == (other == 0 ? 1u : 0u);
          const int tokens = entry.tokens - 16 * t < 16 ? entry.tokens - 16 * t : 16;
          if ((from.values >> t & 1) != 0 && here)
            weigh_rows(from.value_rows[t], tokens, t, p, w, v_sum[other], s1, squares);
        }
        if (kCertificate) {
          CERTKV_UNROLL
          for (int g = 0; g < kGroups; ++g) {
            sums[g].s1 = fma(f[g], s1[g], sums[g].s1);
            if (other == 0) sums[g].m2 = fma(f[g] * c[g], squares[g], sums[g].m2);
          }
        }
      }
    }

    const uint32_t codes = from.page ? from.tiles & ~from.values : 0;
    if (!kOriginals || from.page) before_values();
    const std::byte* values = value_slot();
    if (kCertificate && (!kOriginals || codes != 0)) {
      U n[4];
      load4(values + kPage.norms, (lane >> 2) * 16, n);
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        F s1 = splat(0), squares = splat(0);
        CERTKV_UNROLL
        for (int t = 0; t < kPageTiles; ++t) {
          if (kOriginals && (codes >> t & 1) == 0) continue;
          const F code[2] = {to_float(n[t] & 0xffffu), to_float(n[t] >> 16)};
          CERTKV_UNROLL
          for (int half = 0; half < 2; ++half) {
            s1 = fma(p[g][t][half], code[half], s1);
            const F above = code[half] + kNormMargin;
            if (!kOriginals || (quantised >> t & 1) != 0)
              squares = fma(p[g][t][half], above * above, squares);
          }
        }
        sums[g].s1 = fma(f[g] * norm_step, s1, sums[g].s1);
        sums[g].m2 = fma(f[g] * c[g] * (norm_step * norm_step), squares, sums[g].m2);
      }
    }
    CERTKV_UNROLL
    for (int quad = 0; quad < kCells / 4; ++quad) {
      F of_t[kGroups][4][2], rest[kGroups][4][2];
      const auto clear = [](F(&x)[kGroups][4][2]) {
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
        for (int i = 0; i < 4; ++i) x[g][i][0] = x[g][i][1] = splat(0);
      };
      if (!kOriginals) {
        weigh_codes(values, quad, 0xfu, w, of_t);
      } else {
        clear(of_t);
        clear(rest);
        if ((codes & quantised) != 0) weigh_codes(values, quad, codes & quantised, w, of_t);
        if ((codes & ~quantised) != 0) weigh_codes(values, quad, codes & ~quantised, w, rest);
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const F scale = f[g] * factor, weighed = scale * c[g];
        CERTKV_UNROLL
        for (int i = 0; i < 4; ++i) CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          F& o = sums[g].o[quad * 4 + i][half];
          F& a = sums[g].a[quad * 4 + i][half];
          if (!kOriginals) {
            o = fma(of_t[g][i][half], scale, o);
            if (kCertificate) a = fma(of_t[g][i][half], weighed, a);
          } else {
            // Both about the page's reference, out of the weights' scale.
            const F in_t = of_t[g][i][half] * factor + v_sum[0][g][quad * 4 + i][half];
            const F out_t = rest[g][i][half] * factor + v_sum[1][g][quad * 4 + i][half];
            o = fma(in_t + out_t, f[g], o);
            if (kCertificate) a = fma(in_t, f[g] * c[g], a);
          }
        }
      }
    }
  }

  // ---- a warp's pages
  // ----------------------------------------------------------------------------

  CERTKV_FN int coded(int page, int count) const {  // the warp's next page with codes
    while (page < count && entries()[page].page == nullptr) page += kWarps;
    return page;
  }

  CERTKV_FN void walk() const {
    const I lane = lane_index();
    const int count = pages(), first = first_page();
    int next_key = coded(warp, count), next_value = next_key;
    const auto begin_key = [&](int slot) {
      if (next_key >= count) return;
      copy_begin(state(slot), key_slot(slot), entries()[next_key].page, kPage.key_bytes);
      next_key = coded(next_key + kWarps, count);
    };
    const auto begin_value = [&] {
      if (next_value >= count) return;
      copy_begin(state(kKeySlots), value_slot(), entries()[next_value].page + kPage.key_bytes,
                 kPage.value_bytes);
      next_value = coded(next_value + kWarps, count);
    };
    begin_key(0);
    begin_value();
    begin_key(1);

    F q[kGroups][kSteps * 4], norm[kGroups];
    Sums x[kGroups];
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const I head = (lane >> 3) + 4 * g;
      norm[g] = load_float(norms(), head);
      CERTKV_UNROLL
      for (int i = 0; i < kSteps; ++i) CERTKV_UNROLL
      for (int e = 0; e < 4; ++e)
        q[g][i * 4 + e] =
            load_float(query(), head * kDim + (32 * i + e) + ((lane & 4) * 4 + (lane & 3) * 4));
      x[g].m = splat(-__builtin_inff());
      x[g].l = x[g].m2 = x[g].s1 = x[g].c_tokens = x[g].score_max = splat(0);
      CERTKV_UNROLL
      for (int i = 0; i < kCells; ++i)
        x[g].o[i][0] = x[g].o[i][1] = x[g].a[i][0] = x[g].a[i][1] = splat(0);
    }

    uint32_t seen = 0;  // pages with codes
    for (int n = warp; n < count; n += kWarps) {
      const PageEntry entry = entries()[n];
      const Sources from = sources(entry, first + n);
      const int slot = int(seen % kKeySlots);
      const std::byte* keys = key_slot(slot);
      if (from.page) copy_wait(state(slot), seen / kKeySlots & 1);
      const auto after_keys = [&] { begin_key(slot); };
      const auto before_values = [&] { copy_wait(state(kKeySlots), seen & 1); };
      if (from.page && from.keys == 0 && from.values == 0)
        page_terms<false>(first + n, entry, from, keys, q, norm, x, after_keys, before_values);
      else
        page_terms<true>(first + n, entry, from, keys, q, norm, x, after_keys, before_values);
      if (from.page) {
        begin_value();
        ++seen;
      }
    }

    float* to = sums(warp);
    sync_lanes();
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const I at = ((lane & 3) + 4 * g) * kSums;
      const F l = sum_rows(x[g].l), m2 = sum_rows(x[g].m2), s1 = sum_rows(x[g].s1);
      const B one = lane < 4;
      store_where(one, to, at + int(kSumRef), x[g].m);
      store_where(one, to, at + int(kSumL), l);
      // 2^-18: roundings of steps, codes and squares.
      store_where(one, to, at + int(kSumM2), m2 * (1 + 0x1p-18f));
      store_where(one, to, at + int(kSumS1), s1);
      store_where(one, to, at + int(kSumCTokens), x[g].c_tokens);
      store_where(one, to, at + int(kSumScoreMax), x[g].score_max);
      CERTKV_UNROLL
      for (int i = 0; i < kCells; ++i) CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const I element = at + (kSumsHeader + 16 * i + half) + (lane >> 2) * 2;
        store(to, element, x[g].o[i][half]);
        store(to, element + kDim, x[g].a[i][half]);
      }
    }
  }

  // ---- a split's sums
  // ----------------------------------------------------------------------------

  // The warps' sums about the largest of their references, in order.
  CERTKV_FN void combine() const {
    float* to = item.splits + size_t(split) * size_t(item.heads) * kSums;
    for (int at = warp * 32; at < item.heads * kDim; at += kWarps * 32) {
      const int head = at / kDim;  // kDim is a multiple of 32: one head a warp
      const int element = at % kDim;
      const I o = lane_index() + (head * kSums + kSumsHeader + element);
      float ref = sums(0)[head * kSums + kSumRef];
      for (int w = 1; w < kWarps; ++w) {
        const float other = sums(w)[head * kSums + kSumRef];
        ref = other > ref ? other : ref;
      }
      F o_sum = splat(0), a_sum = splat(0), header[kSumsHeader];
      for (int i = 0; i < kSumsHeader; ++i) header[i] = splat(0);
      header[kSumRef] = splat(ref);
      for (int w = 0; w < kWarps; ++w) {
        const float* from = sums(w);
        const float* h = from + head * kSums;
        const F less = exponential(splat(h[kSumRef] - ref));
        o_sum = fma(less, load_float(from, o), o_sum);
        a_sum = fma(less, load_float(from, o + kDim), a_sum);
        header[kSumL] = fma(less, splat(h[kSumL]), header[kSumL]);
        header[kSumM2] = fma(less, splat(h[kSumM2]), header[kSumM2]);
        header[kSumS1] = fma(less, splat(h[kSumS1]), header[kSumS1]);
        header[kSumCTokens] = header[kSumCTokens] + h[kSumCTokens];
        header[kSumScoreMax] = max_nan(header[kSumScoreMax], splat(h[kSumScoreMax]));
      }
      store(to, o, o_sum);
      store(to, o + kDim, a_sum);
      if (element == 0) {
        const B one = lane_index() < 1;
        CERTKV_UNROLL
        for (int i = 0; i < kSumsHeader; ++i)
          store_where(one, to, splat_i(head * kSums + i), header[i]);
      }
    }
  }
};

// The splits of one head, in order, in double; out of the unit, which is exact. 32 elements.
CERTKV_FN void merge_splits(const PassItem& item, int head_dim, int pages_per_split, int head,
                            int element) {
  const int splits = (item.page_count + pages_per_split - 1) / pages_per_split;
  const int sums = sums_floats(head_dim);
  const float* from = item.splits + head * sums;
  const int stride = item.heads * sums;
  double ref = from[kSumRef];
  for (int i = 1; i < splits; ++i) ref = max_nan(ref, double(from[i * stride + kSumRef]));
  const I o = lane_index() + (kSumsHeader + element);
  const double inverse = 1.0 / item.unit;
  double l = 0, m2 = 0, s1 = 0, c_tokens = 0, score_max = 0;
  D o_sum = to_double(splat(0)), a_sum = o_sum;
  for (int i = 0; i < splits; ++i) {
    const float* h = from + i * stride;
    const double less = exponential(double(h[kSumRef]) - ref), scaled = less * inverse;
    l += less * h[kSumL];
    m2 += scaled * inverse * h[kSumM2];
    s1 += scaled * h[kSumS1];
    c_tokens += h[kSumCTokens];
    score_max = max_nan(score_max, double(h[kSumScoreMax]));
    o_sum = o_sum + to_double(load_float(h, o)) * scaled;
    a_sum = a_sum + to_double(load_float(h, o + head_dim)) * scaled;
  }
  double* to = item.merged + size_t(head) * size_t(sums);
  store(to, o, o_sum);
  store(to, o + head_dim, a_sum);
  if (element == 0) {  // every lane stores the same
    const double header[kSumsHeader] = {ref, l, m2, s1, c_tokens, score_max, 0, 0};
    for (int i = 0; i < kSumsHeader; ++i) store(to, splat_i(i), to_double(splat(0)) + header[i]);
  }
  store(item.out + head * head_dim, lane_index() + element, to_float(o_sum / l));
}

#undef CERTKV_FN

}  // namespace certkv::CERTKV_LANES_NAMESPACE
