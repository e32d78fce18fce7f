// The ladder's choice of what to promote. See cache_body.h.
// SOURCE: method section 5.3; the host's select_for_budget() in runtime/certify does the same with
// sorted blocks.
#pragma once

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/chains.h"
#include "kernels/cuda/lanes.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

// Each item has a stretch of the list, as long as its quotas.
CERTKV_FN PageInRequest* list_of(const LadderArgs& args, int index) {
  PageInRequest* list = args.list;
  for (int i = 0; i < index; ++i) list += args.items[i].quota[0] + args.items[i].quota[1];
  return list;
}

// ---- the ladder: what to promote ----------------------------------------------------------------

inline constexpr int kClimbWarps = 32;
// Eighths of octaves of a contribution over what a head may spend, from 2^-18 to 2^4: in a context
// of 128K tokens most of the bound may come from thousands of blocks of 2^-13 each.
inline constexpr int kBins = 176, kBinBits = 3, kLowestExponent = -18;
inline constexpr double kFixed = 0x1p40;  // of a contribution: whole numbers add up in any order
inline constexpr float kMostShare = 256;  // 2^15 blocks of it still fit
// Below the limit, because the estimate errs and the next step drifts; where that asks for more
// than there is room for, just below it.
inline constexpr int kAims = 2;
CERTKV_FN double aim_of(int n) {
  return n == 0 ? 0.9 : 0.985;
}

inline constexpr uint32_t kOpen = 1, kByShare = 2;
struct ClimbShared {
  uint64_t bins[2][kMaxHeads][kBins];
  double may[kMaxHeads], norm[kMaxHeads];  // what a head may spend; ||O||
  float least[kAims][2][kMaxHeads];        // contributions from here on are promoted
  // Where ranking is asked for, what a head promotes. kByShare: what `least` says, which is nothing
  // where promotions are not predicted to do; kOpen: blocks that leave its ranking unresolved.
  uint32_t takes[kAims][kMaxHeads];
  int32_t chosen[kAims][2][kClimbWarps];
};

// One block of warps for an item some of whose heads are failing.
struct Climb {
  const LadderArgs& args;
  int index, warp;
  ClimbShared* shared;

  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN const LadderItem& item() const { return args.items[index]; }
  CERTKV_FN int together() const { return args.groups == 1 ? 2 : 1; }

  CERTKV_FN void clear() const {
    auto* words = reinterpret_cast<int32_t*>(shared->bins);
    constexpr int kWords = int(sizeof shared->bins / 4);
    for (int at = warp * 32; at < kWords; at += kClimbWarps * 32)
      store_where(lane_index() + at < kWords, words, lane_index() + at, splat_i(0));
    if (warp >= pass().heads) return;
    const Certificate& j = pass().judged[warp];
    shared->may[warp] = allowed_error(j, pass().relative != 0, pass().tolerance);
    shared->norm[warp] = j.out_norm;
  }

  // Contributions of the blocks of one page (or two), over what each head may spend; -1 where there
  // is nothing to promote. A lane is a head and a tile of one of the pages.
  struct Cell {
    F key, value, rho;
    I head, block;
    B failing;
  };
  CERTKV_FN Cell cell(int page) const {
    const PassItem& p = pass();
    const int d = args.head_dim, both = together();
    const int m = both == 2 && page + 1 < item().coded_pages ? page + 1 : page;
    const I lane = lane_index(), quad = lane & 3, tile = (lane >> 2) & 3;
    const B second = lane >= 16;
    Cell x;
    x.head = both == 2 ? quad : quad + (lane >> 4) * 4;
    const I which = both == 2 ? select(second, splat_i(m), splat_i(page)) : splat_i(page);
    x.block = which * kPageTiles + tile;
    const I head = select(x.head < p.heads, x.head, splat_i(0));
    B there = x.head < p.heads;
    if (both == 2 && m == page) there = there & (lane < 16);
    const auto record = [&](int n, int group) {
      return p.records + (size_t(n) * size_t(args.groups) + size_t(group)) * kRecordFloats;
    };
    const float* ra = record(page, 0);
    const float* rb = both == 2 ? record(m, 0) : record(page, 1 < args.groups ? 1 : 0);
    // A page without codes has nothing to promote (`used`); any readable numbers do for its notes.
    const auto notes = [&](int n) {
      const std::byte* coded = p.pages[n].page;
      return coded == nullptr ? record(n, 0)
                              : reinterpret_cast<const float*>(coded + notes_offset(d));
    };
    const float *na = notes(page), *nb = notes(m);
    const I c4 = tile * 4 + quad, note = tile * 6 + 8;
    const F sum = load_float(second, rb, ra, c4);
    const F ref = load_float(second, rb, ra, c4 + kRecordRef);
    const F delta = load_float(second, rb, ra, c4 + kRecordDelta);
    const F c = load_float(second, rb, ra, quad + kRecordC);
    const F eta = load_float(second, nb, na, note), nu = load_float(second, nb, na, note + 1);
    const U word_a = load1(reinterpret_cast<const std::byte*>(p.used), splat_i(page * kPageTiles));
    const U word_b = load1(reinterpret_cast<const std::byte*>(p.used), splat_i(m * kPageTiles));
    const U used = (both == 2 ? select(second, word_b, word_a) : word_a) >> word_of(tile * 8);
    const I sums = head * sums_floats(d);
    const D m_ref = load_double(p.merged, sums + int(kSumRef));
    const D l = load_double(p.merged, sums + int(kSumL));
    const D may = load_double(shared->may, head), norm = load_double(shared->norm, head);
    const D rho = to_double(sum) * exponential(to_double(ref) - m_ref) / l;
    x.rho = to_float(rho);
    const F key = to_float(to_double(c) * rho * (to_double(nu) + norm) / may);
    const F value = to_float(rho * to_double(eta) / may);
    x.failing = there & ((splat_u(p.failing[0]) >> word_of(head) & 1u) != 0u);
    // Not servable from codes for this query (method 3): promoted whatever it contributes.
    const F forced = select(delta <= 8.0f, key, splat(__builtin_inff()));
    x.key = select(x.failing & ((used & kUsedOriginalKey) == 0u), forced, splat(-1));
    x.value = select(x.failing & ((used & kUsedOriginalValue) == 0u), value, splat(-1));
    return x;
  }

  template <typename Body>
  CERTKV_FN void own_pages(Body body) const {  // a stretch of pages for each warp, in order
    const int pages = item().coded_pages, each0 = (pages + kClimbWarps - 1) / kClimbWarps;
    const int each = (each0 + 1) / 2 * 2, first = warp * each;
    const int last = first + each < pages ? first + each : pages;
    for (int page = first; page < last; page += together()) body(page);
  }

  CERTKV_FN static I bin_of(F x) {  // NaN and what is beyond: the last
    const I raw =
        index_of(bits_of(x) >> (23 - kBinBits)) - (127 + kLowestExponent) * (1 << kBinBits);
    return select(raw < 0, splat_i(0), select(raw < kBins, raw, splat_i(kBins - 1)));
  }

  CERTKV_FN void rate() const {
    own_pages([&](int page) {
      const Cell x = cell(page);
      const auto add = [&](int part, F share) {
        const B counts = x.failing & !(share < 0);
        const F within = select(share < kMostShare, share, splat(kMostShare));
        const D amount = to_double(within) * kFixed;
        add_where(counts, &shared->bins[part][0][0], x.head * kBins + bin_of(share), amount);
      };
      add(kKeys, x.key);
      add(kValues, x.value);
    });
  }

  // A warp for each head and aim: the fewest whole bins of values that bring E_val to its share,
  // then the fewest of keys that bring the bound below the limit.
  CERTKV_FN void choose() const {
    if (warp < pass().heads * kAims) choose_for(warp / kAims, warp % kAims);
  }
  static_assert(kMaxHeads * kAims <= kClimbWarps);
  CERTKV_FN void choose_for(int h, int n) const {
    const PassItem& p = pass();
    const double aim = aim_of(n);
    float least[2] = {__builtin_inff(), __builtin_inff()};
    bool feasible = true;
    // A head may be here for its ranking alone.
    const bool fits_already =
        args.undecided != nullptr && within_tolerance(p.judged[h], p.relative != 0, p.tolerance);
    if ((p.failing[0] >> h & 1u) != 0 && !fits_already) {
      const Certificate& j = p.judged[h];
      const double may = shared->may[h];
      double left[2] = {0, 0};
      for (int part = 0; part < 2; ++part)
        for (int b = 0; b < kBins; ++b) left[part] += double(shared->bins[part][h][b]) / kFixed;
      const auto take = [&](int part, auto fits) {
        int b = kBins;
        while (b > 0 && !fits(left[part])) {
          --b;
          left[part] -= double(shared->bins[part][h][b]) / kFixed;
        }
        const uint32_t edge = uint32_t(b + (127 + kLowestExponent) * (1 << kBinBits));
        if (b == 0)
          least[part] = 0;  // everything
        else if (b < kBins)
          least[part] = uniform(float_of_bits(splat_u(edge << (23 - kBinBits))), 0);
        return fits(left[part]);
      };
      const double value_limit = aim * args.value_share;
      take(kValues, [&](double x) { return x <= value_limit; });
      // Both forms of the key term shrink about as the sum over blocks does.
      const double key_now = (j.key_sqrt <= j.key_sum ? j.key_sqrt : j.key_sum) / may;
      const double all = left[kKeys] > 0 ? left[kKeys] : 1;
      const double limit = aim - (left[kValues] > 0 ? left[kValues] : 0) - j.e_acc / may;
      feasible = take(kKeys, [&](double x) { return key_now * (x / all) <= limit; }) && may > 0;
    }
    shared->takes[n][h] = fits_already ? kOpen : (feasible ? kOpen | kByShare : kByShare);
    for (int part = 0; part < 2; ++part)
      store(&shared->least[n][part][0], splat_i(h),
            splat(feasible ? least[part] : __builtin_inff()));
  }

  // Tiles whose part is to be promoted for some head: in the lanes of that tile's first head.
  CERTKV_FN B chosen(const Cell& x, int n, int part) const {
    const F share = part == kKeys ? x.key : x.value;
    const F least =
        load_float(&shared->least[n][part][0], select(x.head < kMaxHeads, x.head, splat_i(0)));
    B taken = !(share < least);
    if (args.undecided != nullptr) taken = with_open(x, n, part, taken);
    U wanted = select(x.failing & !(share < 0) & taken, splat_u(1), splat_u(0));
    wanted = wanted | shuffle_xor(wanted, 1);
    wanted = wanted | shuffle_xor(wanted, 2);
    if (together() == 1) wanted = wanted | shuffle_xor(wanted, 16);
    const B first = (lane_index() & 3) == 0;
    return first & (wanted != 0u) & (together() == 2 ? lane_index() >= 0 : lane_index() < 16);
  }

  // With the blocks that a head's ranking waits for; and of a head that waits for nothing else,
  // these alone.
  CERTKV_FN B with_open(const Cell& x, int n, int part, B by_share) const {
    const auto* words =
        reinterpret_cast<const std::byte*>(args.undecided + size_t(index) * args.undecided_of_item);
    U takes = splat_u(0);
    for (int h = 0; h < pass().heads; ++h)
      takes = select(x.head == h, splat_u(shared->takes[n][h]), takes);
    const B counted = by_share & ((takes & kByShare) != 0u);
    if (part == kValues) return counted;
    const U open = load1(words, (x.block >> 2) * 4) >> word_of((x.block & 3) * 8 + x.head);
    return counted | ((open & takes & kOpen) != 0u);
  }

  CERTKV_FN void count() const {
    int counts[kAims][2] = {};
    own_pages([&](int page) {
      const Cell x = cell(page);
      for (int n = 0; n < kAims; ++n)
        for (int part = 0; part < 2; ++part)
          counts[n][part] += population(ballot(chosen(x, n, part)));
    });
    for (int n = 0; n < kAims; ++n)
      for (int part = 0; part < 2; ++part) shared->chosen[n][part][warp] = counts[n][part];
  }

  // The first aim whose blocks all fit, -1 if none does; and how many there are.
  CERTKV_FN int picked(int (&all)[2]) const {
    const LadderItem& to = item();
    // A head for which promotions are not predicted to do chose none: it goes to rung 3.
    int heads = 0;
    for (int h = 0; h < pass().heads; ++h) heads += int(pass().failing[0] >> h & 1u);
    const double most = args.max_share * (to.coded_pages * kPageTiles) * heads;
    for (int n = 0; n < kAims; ++n) {
      for (int part = 0; part < 2; ++part) {
        all[part] = 0;
        for (int w = 0; w < kClimbWarps; ++w) all[part] += shared->chosen[n][part][w];
      }
      if (all[0] + all[1] > 0 && all[0] <= to.free_count[0] && all[1] <= to.free_count[1] &&
          double(all[0] + all[1]) <= most)
        return n;
    }
    return -1;
  }

  // All or nothing: an item whose blocks do not all fit goes to rung 3.
  CERTKV_FN void place() const {
    const LadderItem& to = item();
    int all[2];
    const int n = picked(all);
    const bool fits = n >= 0;
    if (warp == 0) {
      const bool first = to.counts->rounds == 0;
      sync_lanes();
      if (first)
        for (int h = 0; h < pass().heads; ++h) to.candidate[h] = pass().judged[h];
      add_count(&to.counts->rounds, 1);
      *to.again = fits ? 1 : 0;
      args.listed[index] = fits ? uint32_t(all[0] + all[1]) : 0;
      if (fits) {
        add_count(&to.counts->promoted_keys, uint32_t(all[0]));
        add_count(&to.counts->promoted_values, uint32_t(all[1]));
      }
    }
    if (!fits) return;
    int before[2] = {0, 0};
    for (int part = 0; part < 2; ++part)
      for (int w = 0; w < warp; ++w) before[part] += shared->chosen[n][part][w];
    // Places in the list by the number of the block within all that were chosen.
    auto* list = reinterpret_cast<int32_t*>(list_of(args, index));
    own_pages([&](int page) {
      const Cell x = cell(page);
      for (int part = 0; part < 2; ++part) {
        const uint32_t mask = ballot(chosen(x, n, part));
        if (mask == 0) continue;
        const B mine = (splat_u(mask) >> word_of(lane_index()) & 1u) != 0u;
        const I number = rank_in(mask) + before[part];
        const I from_top = splat_i(to.free_count[part] - 1) - number;
        const I slot = load_int(to.free_slots[part], select(mine, from_top, splat_i(0)));
        const I at = (number + (part == kValues ? all[0] : 0)) * 4;
        store_where(mine, list, at, splat_i(0));
        store_where(mine, list, at + 1, x.block);
        store_where(mine, list, at + 2, splat_i(part));
        store_where(mine, list, at + 3, slot);
        store_where(mine, to.block_of[part], slot, x.block);
        before[part] += population(mask);
      }
    });
  }
  CERTKV_FN void close() const {
    if (warp != 0) return;
    const LadderItem& to = item();
    if (*to.again == 0) return;  // its heads stay failing
    int all[2];
    (void)picked(all);
    const int left[2] = {to.free_count[0] - all[0], to.free_count[1] - all[1]};
    sync_lanes();
    to.free_count[0] = left[0];
    to.free_count[1] = left[1];
    pass().failing[0] = 0;
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
