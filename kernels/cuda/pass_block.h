// The certified pass of the device, first part: what a block of warps shares, and its beginning.
//
// The pass is written once for nvcc and once for the emulation (lanes.h says how, DESIGN.md why),
// in layers: pass_block.h, pass_query.h (a query for one page), pass_codes.h (a page of codes),
// pass_mixed.h (a page with originals), pass_body.h (a warp's pages, a block's sums, the merge).
//
// Lanes play two parts. In C fragments lane 4 r + h holds tokens r and r + 8 of a tile, or elements
// 2 r and 2 r + 1 of a cell, of head h of four. In B fragments, and while a query is prepared, lane
// 8 h + j works for head h.
// SOURCE: method sections 3, 4, 4b and 5.1; kernels/METHOD.md, section 12b.
#pragma once

#include "kernels/cuda/chains.h"
#include "kernels/cuda/lanes.h"
#include "kernels/cuda/pass_args.h"
#include "kernels/cuda/plan.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

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

// c_b >= expm1(Delta_b). SOURCE: method E2; as c_of_deltas, without its divisions. NaN stays.
CERTKV_FN F c_of(F x) {
  constexpr float kThird = 0.333333373f;  // rounded up
  const F small =
      x * (1 + x * 0.5f * (1 + x * kThird * (1 + x * 0.25f * (1 + x * 0.25f)))) * (1 + 0x1p-19f);
  if (!any(!(x < 0.25f))) return small;
  const F large = c_of_large(x);
  return select(x < 0.25f, small, large);
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

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct PassBlock {
  static constexpr PageLayoutDevice kPage = page_layout(kDim, kKind);
  static constexpr SharedLayout kShared = shared_layout(kDim, kGroups, kWarps, kKind);
  static constexpr int kSteps = kDim / 32;  // of m16n8k32
  static constexpr int kCells = kDim / 16;  // of 16 elements
  static constexpr int kHeads = 4 * kGroups;
  static constexpr int kSums = sums_floats(kDim);
  static constexpr int kBlockSums = kFirstMax - 1 - kFirstOfBlocks;  // c_tokens is apart
  static_assert(kFirstMax - 1 == kSumCTokens);

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
  CERTKV_FN uint32_t* own_tiles() const {
    return reinterpret_cast<uint32_t*>(shared + kShared.tiles) + warp * kMaxTilesPerWarp;
  }
  CERTKV_FN float* query() const { return reinterpret_cast<float*>(shared + kShared.query); }
  CERTKV_FN float* norms() const { return reinterpret_cast<float*>(shared + kShared.norm); }
  // The warp's terms of the queries for original keys, see split_query, and 1 over their scales;
  // where its pages were.
  CERTKV_FN std::byte* terms() const { return own(); }
  CERTKV_FN float* scales() const { return reinterpret_cast<float*>(own() + kTermBytes); }
  static constexpr int kTermBytes = kHeads * kDim * 3 * 2;
  static_assert(kTermBytes + kHeads * 4 <= int(kShared.warp_bytes));
  CERTKV_FN float* sums(int w) const {
    return reinterpret_cast<float*>(shared + w * int(kShared.warp_bytes));
  }

  // Blocks of an entry that are served from originals, as wished; bit t: tile t.
  CERTKV_FN static uint32_t mixed(const PageEntry& e) {
    return e.page != nullptr ? (e.wants | e.wants >> 4) & 0xfu : (1u << ((e.tokens + 15) / 16)) - 1;
  }
  // Whether the warp that has the entry reads its page.
  CERTKV_FN static bool coded(const PageEntry& e) { return e.page != nullptr && mixed(e) != 0xfu; }

  CERTKV_FN int first_page() const { return split * pages_per_split(args, item); }
  CERTKV_FN int pages() const {
    const int left = item.page_count - first_page();
    return left < pages_per_split(args, item) ? left : pages_per_split(args, item);
  }

  // 16-byte pieces [0, count) of `from`, zeros up to `padded`; by `all` warps, this one `at`.
  CERTKV_FN static void fetch(const void* from, int count, int padded, int at, int all, void* to) {
    CERTKV_NO_UNROLL
    for (int first = at * 32; first < padded; first += all * 32) {
      const I i = lane_index() + first;
      U piece[4];
      load4(static_cast<const std::byte*>(from), select(i < count, i, splat_i(0)) * 16, piece);
      CERTKV_EACH (n, 4) piece[n] = select(i < count, piece[n], splat_u(0));
      store4_where(i < padded, static_cast<std::byte*>(to), i * 16, piece);
    }
  }

  // The first copies are begun before anything else, of sealed pages: they need nothing of the
  // append that may still be at work.
  CERTKV_FN void begin_copies() const {
    for (int n = 0; n < kKeySlots + kValueSlots; ++n) copy_init(state(n));
    if (warp < pages()) {
      const PageEntry first = item.pages[first_page() + warp];
      if (coded(first)) {
        copy_begin(state(0), key_slot(0), first.page, kPage.key_bytes);
        copy_begin(state(kKeySlots), value_slot(), first.page + kPage.key_bytes, kPage.value_bytes);
      }
    }
  }
  // Then the warps fetch what all of them need.
  CERTKV_FN void begin() const {
    fetch(item.pages + first_page(), pages(), pages(), warp, kWarps, entries());
    fetch(item.scaled, item.heads * kDim / 4, kHeads * kDim / 4, kWarps - 1 - warp, kWarps,
          query());
    if (warp == kWarps / 2) {
      const I i = lane_index();
      const F norm = load_float(item.norm, select(i < item.heads, i, splat_i(0)));
      store_where(i < kHeads, norms(), i, select(i < item.heads, norm, splat(0)));
    }
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
    CERTKV_EACH (i, kPairs)
      CERTKV_EACH (e, 2) {
        x[i][e] = load_float(query(), lane * 2 + (head * kDim + 64 * i + e));
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
    CERTKV_EACH (i, kPairs) {
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
    CERTKV_EACH (n, 3) {
      const U high_a = bits_of(a) & 0xffff0000u, high_b = bits_of(b) & 0xffff0000u;
      term[n] = high_a >> 16 | high_b;
      a = a - float_of_bits(high_a);
      b = b - float_of_bits(high_b);
    }
  }

  // A head's sums about m, in registers as a C fragment. l, m2 and s1: of this lane's tokens alone;
  // of_blocks: of the tile that lane 4 r + h stands for, r % 4, with the unit.
  struct Sums {
    F m, l, m2, s1, c_tokens, score_max;
    F of_blocks[kBlockSums];
    F o[kCells][2], a[kCells][2];

    CERTKV_FN F& sum(int entry) { return of_blocks[entry - kFirstOfBlocks]; }
    CERTKV_FN void clear() {
      m = splat(-__builtin_inff());
      l = m2 = s1 = c_tokens = score_max = splat(0);
      CERTKV_EACH (i, kBlockSums) of_blocks[i] = splat(0);
      CERTKV_EACH (i, kCells) o[i][0] = o[i][1] = a[i][0] = a[i][1] = splat(0);
    }
    // About a reference at least as large as `most`. NaN: what is weighed is NaN, and stays.
    CERTKV_FN void rise(F most) {
      if (!any(most > m)) return;
      const F risen = larger(m, most), less = exponential(m - risen);
      m = risen;
      l = l * less;
      if (kCertificate) {
        m2 = m2 * less;
        s1 = s1 * less;
        CERTKV_EACH (i, kFirstPlain - kFirstOfBlocks) of_blocks[i] = of_blocks[i] * less;
      }
      CERTKV_EACH (i, kCells)
        CERTKV_EACH (half, 2) {
          o[i][half] = o[i][half] * less;
          if (kCertificate) a[i][half] = a[i][half] * less;
        }
    }
  };

  // The largest notes of the blocks that a warp serves, as words: a NaN is above infinity, and what
  // is negative above both.
  struct LargestNotes {
    U nu, eta, vbar;
    CERTKV_FN void clear() { nu = eta = vbar = splat_u(0); }
    CERTKV_FN void take(F of_nu, F of_eta, F of_vbar) {
      nu = larger_word(nu, bits_of(of_nu));
      eta = larger_word(eta, bits_of(of_eta));
      vbar = larger_word(vbar, bits_of(of_vbar));
    }
    CERTKV_FN static U larger_word(U a, U b) { return select(a < b, b, a); }
    CERTKV_FN static F over_tiles(U x) {
      x = larger_word(x, shuffle_xor(x, 4));
      x = larger_word(x, shuffle_xor(x, 8));
      return select(x <= 0x7f800000u, float_of_bits(x), splat(__builtin_nanf("")));
    }
  };

  // What a block adds to the sums of the blocks: of weight w about m, keys charged with c and
  // delta, values with eta_b and vbar_b (0 and nu_b where originals served them). Notes have the
  // unit. SOURCE: method E1, E2, E4; sum_blocks() of runtime/certify takes the same sums.
  CERTKV_FN static void add_block(F w, F c, F delta, F nu, F eta, F vbar, bool quantised_key,
                                  Sums* to) {
    const F cw = c * w;
    const auto add = [&](int entry, F a, F b) { to->sum(entry) = fma(a, b, to->sum(entry)); };
    if (quantised_key) {
      const F cw_eta = cw * eta;
      to->sum(kSumS) = to->sum(kSumS) + cw;
      add(kSumH2, cw_eta, eta);
      add(kSumABar, cw, vbar);
      add(kSumTNu, cw, nu);
    } else {
      to->sum(kSumFSum) = to->sum(kSumFSum) + cw;
      add(kSumFNu, cw, nu);
    }
    add(kSumDen, w, exponential(splat(0) - delta));  // within kExpError
    add(kSumValue, w, eta);
    add(kSumGO, w, vbar);
  }

  CERTKV_FN static F charged(F bound) {  // Delta_b
    return (bound + float(kEpsWDevice * (1 + 8 * kUnit))) * (1 + 0x1p-22f);
  }
  CERTKV_FN float* record_of(int page, int group) const {
    return item.records + (size_t(page) * kGroups + size_t(group)) * kRecordFloats;
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
