// What the closing arithmetic of a certificate takes of a split's blocks: sums and largest notes.
//
// tally() of all warps after the block's walk() and a barrier, for which page was whose no longer
// matters; finish_tally() after one more.
// SOURCE: method sections 4 and 4b; the sums are those of sum_blocks() in runtime/certify.
#pragma once

#include "kernels/cuda/pass_mixed.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

CERTKV_FN F sound_notes(F note) {
  return select(note >= 0, note, splat(__builtin_nanf("")));
}

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct PassJudge : PassMixed<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassMixed<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::item, Base::entries, Base::first_page, Base::kHeads, Base::kPage, Base::kSums;
  using Base::pages, Base::split, Base::sums, Base::warp;

  // After the warp's own sums, which other warps still read.
  CERTKV_FN double* tallies(int w) const {
    return reinterpret_cast<double*>(sums(w) + kHeads * kSums);
  }
  static_assert(kHeads * kSums * 4 + kHeads * kTallyCount * 8 <= int(Base::kShared.warp_bytes));

  CERTKV_FN static int tiles_of(const PageEntry& e) {
    return e.page != nullptr ? kPageTiles : (e.tokens + 15) / 16;
  }
  // Where a page's notes are read, in floats; with codes [tile][6] after a header of 8.
  CERTKV_FN const float* notes_of(const PageEntry& e, int page) const {
    return e.page != nullptr ? reinterpret_cast<const float*>(e.page + kPage.notes)
                             : item.open_nu + size_t(page) * kPageTiles;
  }

  // A lane is a head of four and a tile, of two pages at a time or, with two groups, of one.
  CERTKV_FN void tally() const {
    constexpr int kTogether = kGroups == 1 ? 2 : 1;
    const I lane = lane_index(), quad = lane & 3, tile = (lane >> 2) & 3;
    const B second = lane >= 16;
    const I head = kGroups == 1 ? quad : quad + (lane >> 4) * 4;

    F ref = load_float(sums(0), head * kSums + int(kSumRef));
    for (int w = 1; w < kWarps; ++w)
      ref = max_nan(ref, load_float(sums(w), head * kSums + int(kSumRef)));
    const D zero = to_double(splat(0));
    D t[kTallyFirstMax];
    CERTKV_EACH (k, kTallyFirstMax) t[k] = zero;
    F nu_max = splat(0), eta_max = splat(0), vbar_max = splat(0);

    const int count = pages();
    CERTKV_UNROLL_BY_2
    for (int n = warp * kTogether; n < count; n += kWarps * kTogether) {
      const int m = kTogether == 2 && n + 1 < count ? n + 1 : n;
      const PageEntry a = entries()[n], b = entries()[m];
      const B there = kTogether == 1 ? tile < tiles_of(a)
                      : m == n       ? (lane < 16) & (tile < tiles_of(a))
                               : tile < select(second, splat_i(tiles_of(b)), splat_i(tiles_of(a)));
      const I coded = kTogether == 1
                          ? splat_i(a.page != nullptr)
                          : select(second, splat_i(b.page != nullptr), splat_i(a.page != nullptr));
      const float* ra = this->record_of(first_page() + n, 0);
      const float* rb = kTogether == 1 ? this->record_of(first_page() + n, 1)
                                       : this->record_of(first_page() + m, 0);
      const float* na = notes_of(a, first_page() + n);
      const float* nb = notes_of(b, first_page() + m);
      // Tiles that are not there read the first one's.
      const I here = select(there, tile, splat_i(0));
      const I cell = here * 4 + quad;
      const I note = select(coded > 0, here * 6 + 8, here);
      const F sum = load_float(second, rb, ra, cell);
      const F block_ref = load_float(second, rb, ra, cell + kRecordRef);
      const F delta = load_float(second, rb, ra, cell + kRecordDelta);
      const F c_codes = load_float(second, rb, ra, quad + kRecordC);
      const F nu = sound_notes(load_float(second, nb, na, select(coded > 0, note + 1, note)));
      const F eta = select(coded > 0, sound_notes(load_float(second, nb, na, note)), splat(0));
      const F vbar = sound_notes(load_float(second, nb, na, select(coded > 0, note + 5, note)));
      const U used_a = load1(reinterpret_cast<const std::byte*>(item.used),
                             splat_i((first_page() + n) * kPageTiles));
      const U used_b = load1(reinterpret_cast<const std::byte*>(item.used),
                             splat_i((first_page() + m) * kPageTiles));
      const U used =
          (kTogether == 1 ? used_a : select(second, used_b, used_a)) >> word_of(here * 8);
      const B key = (used & kUsedOriginalKey) != 0u, value = (used & kUsedOriginalValue) != 0u;

      const F c = select(key, c_of(delta), c_codes);
      const F eta_used = select(value, splat(0), eta), bar = select(value, nu, vbar);
      const F over_codes = select(key, splat(0), splat(1));
      const D present = to_double(select(there, splat(1), splat(0)));
      // A mass or a c that is no number >= 0 must not certify; what is not there counts as 0.
      const F poison = select((sum >= 0) & (c >= 0), splat(0), splat(__builtin_nanf("")));
      const D weight = to_double(select(there, sum + poison, splat(0))) *
                       exponential(to_double(select(there, block_ref, ref)) - to_double(ref));
      const D c_there = to_double(select(there, c, splat(0)));
      const D cw = c_there * weight, codes = to_double(over_codes), cw_codes = cw * codes;
      const D cw_rest = cw * (1.0 - codes), eta_d = to_double(eta_used), nu_d = to_double(nu);
      t[kTallyS] = t[kTallyS] + cw_codes;
      t[kTallyH2] = t[kTallyH2] + cw_codes * eta_d * eta_d;
      t[kTallyABar] = t[kTallyABar] + cw_codes * to_double(bar);
      t[kTallyTNu] = t[kTallyTNu] + cw_codes * nu_d;
      t[kTallyFSum] = t[kTallyFSum] + cw_rest;
      t[kTallyFNu] = t[kTallyFNu] + cw_rest * nu_d;
      // exp(-Delta), with what keep_of() takes off for its roundings.
      t[kTallyDen] = t[kTallyDen] + weight / (1.0 + c_there) * (1 - 0x1p-20);
      t[kTallyValue] = t[kTallyValue] + weight * eta_d;
      t[kTallyGO] = t[kTallyGO] + weight * to_double(bar);
      t[kTallyTail] = t[kTallyTail] + weight * codes;
      // A block's reference is at most the split's: the factor between them is at most 1.
      t[kTallyFlushed] = t[kTallyFlushed] + kMaxBlockTokens * (present + c_there);
      nu_max = max_nan(nu_max, select(there, nu, splat(0)));
      eta_max = max_nan(eta_max, select(there, eta, splat(0)));
      vbar_max = max_nan(vbar_max, select(there, vbar, splat(0)));
    }
    const auto over_tiles = [](auto x, auto add) {
      x = add(x, shuffle_xor(x, 4));
      x = add(x, shuffle_xor(x, 8));
      return kGroups == 1 ? add(x, shuffle_xor(x, 16)) : x;
    };
    double* to = tallies(warp);
    CERTKV_EACH (k, kTallyFirstMax)  // lanes of one head store the same
      store(to, head * int(kTallyCount) + k, over_tiles(t[k], [](D x, D y) { return x + y; }));
    const auto largest = [](F x, F y) { return max_nan(x, y); };
    store(to, head * int(kTallyCount) + int(kTallyNuMax), to_double(over_tiles(nu_max, largest)));
    store(to, head * int(kTallyCount) + int(kTallyEtaMax), to_double(over_tiles(eta_max, largest)));
    store(to, head * int(kTallyCount) + int(kTallyVbarMax),
          to_double(over_tiles(vbar_max, largest)));
  }

  // The warps' tallies, in order.
  CERTKV_FN void finish_tally() const {
    constexpr int kAll = kHeads * kTallyCount;
    double* to = item.tally + size_t(split) * size_t(item.heads) * kTallyCount;
    for (int at = warp * 32; at < kAll; at += kWarps * 32) {
      const I i = lane_index() + at, from = select(i < kAll, i, splat_i(0));
      D sum = to_double(splat(0));
      F most = splat(0);
      for (int w = 0; w < kWarps; ++w) {
        const D x = load_double(tallies(w), from);
        sum = sum + x;
        most = max_nan(most, to_float(x));
      }
      const B is_sum = from % int(kTallyCount) < int(kTallyFirstMax);
      const B mine = i < item.heads * int(kTallyCount);
      store_where(mine & is_sum, to, i, sum);
      store_where(mine & !is_sum, to, i, to_double(most));
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
