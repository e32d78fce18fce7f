// The certified pass of the device, last part: a warp's pages, a block's sums, the merge of splits.
// Included by attend_kernels.cu and attend_emulated.cc alone. See pass_block.h.
//
// A block's work is one split of one KV head. begin_copies() and begin() of all warps, then walk()
// of all, then combine() of all, with a barrier between; MergeSplits and judge_head() later, in a
// launch of its own.
#pragma once

#include "kernels/cuda/pass_mixed.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct Pass : PassMixed<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassMixed<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using Base::first_page, Base::pages, Base::sums;
  using Base::key_slot, Base::value_slot, Base::state, Base::entries, Base::query, Base::norms;
  using Base::split, Base::warp, Base::kSums;
  using typename Base::LargestNotes;
  using typename Base::Sums;
  static_assert(kHeads * kSums * 4 <= int(Base::kShared.warp_bytes));

  CERTKV_FN int next_coded(int page, int count) const {  // the warp's next page that it reads
    while (page < count && !Base::coded(entries()[page])) page += kWarps;
    return page;
  }

  CERTKV_FN void walk() const {
    const I lane = lane_index();
    const int count = pages(), first = first_page();
    // begin() has begun the copies of the first page, if it has codes.
    const bool begun = warp < count && Base::coded(entries()[warp]);
    int next_key = begun ? next_coded(warp + kWarps, count) : next_coded(warp, count);
    int next_value = next_key;
    const auto begin_key = [&](int slot) {
      if (next_key >= count) return;
      copy_begin(state(slot), key_slot(slot), entries()[next_key].page, kPage.key_bytes);
      next_key = next_coded(next_key + kWarps, count);
    };
    const auto begin_value = [&] {
      if (next_value >= count) return;
      copy_begin(state(kKeySlots), value_slot(), entries()[next_value].page + kPage.key_bytes,
                 kPage.value_bytes);
      next_value = next_coded(next_value + kWarps, count);
    };
    for (int n = begun ? 1 : 0; n < kKeySlots; ++n) begin_key(n);
    if (!begun) begin_value();

    F q[kGroups][kSteps * 4], norm[kGroups];
    Sums x[kGroups];
    CERTKV_EACH (g, kGroups) {
      const I head = (lane >> 3) + 4 * g;
      norm[g] = load_float(norms(), head);
      CERTKV_EACH (i, kSteps)
        CERTKV_EACH (e, 4)
          q[g][i * 4 + e] =
              load_float(query(), head * kDim + (32 * i + e) + ((lane & 4) * 4 + (lane & 3) * 4));
      x[g].clear();
    }

    const int originals = this->list_tiles();
    this->call_originals(originals);
    LargestNotes largest;
    largest.clear();
    uint32_t seen = 0;
    float tiles = 0;  // served from codes
    for (int n = next_coded(warp, count); n < count; n = next_coded(n + kWarps, count)) {
      const int slot = int(seen % kKeySlots);
      const uint32_t skip = Base::mixed(entries()[n]);
      copy_wait(state(slot), seen / kKeySlots & 1);
      this->page_of_codes(
          first + n, skip, key_slot(slot), q, norm, x, &largest, [&] { begin_key(slot); },
          [&] { copy_wait(state(kKeySlots), seen & 1); });
      if (kCertificate)
        CERTKV_EACH (t, kPageTiles) tiles += (skip >> t & 1) != 0 ? 0 : 1;
      begin_value();
      ++seen;
    }
    if (kCertificate)
      CERTKV_EACH (g, kGroups) {  // of pages: from sums that are there already
        const B first_tile = ((lane >> 2) & 3) == 0;
        x[g].sum(kSumTail) = select(first_tile, sum_rows(x[g].l), splat(0));
        x[g].sum(kSumFlushed) = select(
            first_tile,
            x[g].c_tokens * float(kMaxBlockTokens / 16) + splat(tiles * float(kMaxBlockTokens)),
            splat(0));
      }
    if (originals > 0) {
      Sums part[kGroups];
      this->blocks_of_originals(originals, q, norm, part, &largest);
      CERTKV_EACH (g, kGroups) Base::join(part[g], &x[g]);
    }

    float* to = sums(warp);
    sync_lanes();
    CERTKV_EACH (g, kGroups) {
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
      CERTKV_EACH (i, Base::kBlockSums) {
        F sum = x[g].of_blocks[i];
        sum = sum + shuffle_xor(sum, 4);
        sum = sum + shuffle_xor(sum, 8);
        const int entry = kFirstOfBlocks + i;
        store_where(one, to, at + entry, sum * (entry == kSumDen ? 1 - kSumsOff : 1 + kSumsOff));
      }
      store_where(one, to, at + int(kSumNuMax), LargestNotes::over_tiles(largest.nu));
      store_where(one, to, at + int(kSumEtaMax), LargestNotes::over_tiles(largest.eta));
      store_where(one, to, at + int(kSumVbarMax), LargestNotes::over_tiles(largest.vbar));
      CERTKV_EACH (i, kCells)
        CERTKV_EACH (half, 2) {
          const I element = at + (kSumsHeader + 16 * i + half) + (lane >> 2) * 2;
          store(to, element, x[g].o[i][half]);
          store(to, element + kDim, x[g].a[i][half]);
        }
    }
  }

  // The warps' sums about the largest of their references, in order: 32 elements of a head at a
  // time, and the heads' headers, of which a lane has an entry. Rolled up: run once, code costs
  // what fetching it does.
  CERTKV_FN void combine() const {
    constexpr int kParts = kDim / 32;
    const I lane = lane_index(), own = select(lane < kWarps, lane, splat_i(0));
    float* to = item.splits + size_t(split) * size_t(item.heads) * kSums;
    CERTKV_NO_UNROLL
    for (int task = warp; task < item.heads * (kParts + 1); task += kWarps) {
      const bool elements = task < item.heads * kParts;
      const int head = elements ? task / kParts : task - item.heads * kParts;
      const float* from = sums(0) + head * kSums;
      constexpr int kStride = int(Base::kShared.warp_bytes / sizeof(float));
      const F refs = load_float(from, own * kStride + int(kSumRef));
      F ref = refs;
      CERTKV_UNROLL
      for (int mask = 1; mask < 16; mask *= 2) ref = larger(ref, shuffle_xor(ref, mask));
      const F factors = exponential(refs - ref);
      const I at = elements ? lane + (kSumsHeader + task % kParts * 32)
                            : select(lane < int(kSumCount), lane, splat_i(0));
      const I other = elements ? at + kDim : at;
      const B plain = elements ? lane < 0 : lane >= int(kFirstPlain);
      F sum = splat(0), other_sum = splat(0), most = splat(-__builtin_inff());
      CERTKV_UNROLL_BY_2
      for (int w = 0; w < kWarps; ++w) {
        const float less = uniform(factors, w);
        const F x = load_float(from, at + w * kStride), y = load_float(from, other + w * kStride);
        sum = fma(select(plain, splat(1), splat(less)), x, sum);
        other_sum = fma(splat(less), y, other_sum);
        most = max_nan(most, x);
      }
      if (elements) {
        store(to + head * kSums, at, sum);
        store(to + head * kSums, other, other_sum);
      } else {
        sum = select(lane < int(kFirstMax), sum, most);
        sum = select(lane == int(kSumRef), ref, sum);
        store_where(lane < int(kSumCount), to + head * kSums, at, sum);
      }
    }
  }
};

// What the warps of a merge share about their head.
struct MergeShared {
  double dots[kMaxHeadDim / 32][3];  // ||O||^2, O . a / l, ||O - o / l||^2, of each warp's elements
  double header[kSumsHeader];
  double published;  // e_key_paper
};

// Sum, or largest, over the lanes.
template <typename V, typename Add>
CERTKV_FN V over_lanes(V x, Add add) {
  CERTKV_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) x = add(x, shuffle_xor(x, mask));
  return x;
}

// The splits of one head are merged in double precision and in a fixed order; while factors are
// computed a lane has a split of its own.
struct MergeSplits {
  static constexpr int kTogether = 16;  // splits whose sums are on their way at once

  const PassItem& item;
  int head_dim, splits, head;

  CERTKV_FN I own(int first) const {  // the lane's split; beyond the end: the first one again
    const I lane = lane_index();
    return select(lane + first < splits, lane + first, splat_i(0));
  }
  CERTKV_FN D here(int first) const {
    return to_double(select(lane_index() + first < splits, splat(1), splat(0)));
  }
  CERTKV_FN double* merged() const {
    return item.merged + size_t(head) * size_t(sums_floats(head_dim));
  }
  CERTKV_FN const float* from() const { return item.splits + head * sums_floats(head_dim); }
  CERTKV_FN int stride() const { return item.heads * sums_floats(head_dim); }
  CERTKV_FN static F larger_one(F a, F b) { return max_nan(a, b); }

  CERTKV_FN float reference() const {
    F most = load_float(from(), own(0) * stride() + int(kSumRef));
    for (int first = 32; first < splits; first += 32)
      most = max_nan(most, load_float(from(), own(first) * stride() + int(kSumRef)));
    return uniform(over_lanes(most, larger_one), 0);
  }
  CERTKV_FN D factor(int first, float ref) const {
    const F less = exponential(load_float(from(), own(first) * stride() + int(kSumRef)) - ref);
    return to_double(less) * here(first);
  }
  CERTKV_FN static D sum(D x) {
    return over_lanes(x, [](D a, D b) { return a + b; });
  }

  // 32 elements; out of the unit, which is exact. `judged`: leaves the output's dot products. Sums
  // of the first splits are on their way before their factors are computed.
  CERTKV_FN void elements(int element, bool judged, MergeShared* shared) const {
    const I lane = lane_index();
    F o[kTogether], a[kTogether];
    const auto load = [&](int first) {
      CERTKV_EACH (i, kTogether) {
        const int split = first + i < splits ? first + i : 0;
        const float* h = from() + split * stride() + kSumsHeader + element;
        o[i] = load_float(h, lane);
        a[i] = load_float(h, lane + head_dim);
      }
    };
    load(0);
    const float ref = reference();
    const double inverse = 1.0 / item.unit;
    const D zero = to_double(splat(0));
    D l = zero, o_sum = zero, a_sum = zero;
    for (int first = 0; first < splits; first += 32) {
      const D less = factor(first, ref), scaled = less * inverse;
      l = l + less * to_double(load_float(from(), own(first) * stride() + int(kSumL)));
      for (int half = 0; half < 32 && first + half < splits; half += kTogether) {
        if (first + half > 0) load(first + half);
        CERTKV_EACH (i, kTogether) {  // beyond the last split the factor is 0
          const double of_split = uniform(scaled, half + i);
          o_sum = o_sum + to_double(o[i]) * of_split;
          a_sum = a_sum + to_double(a[i]) * of_split;
        }
      }
    }
    l = sum(l);
    const I place = lane + (kSumsHeader + element);
    store(merged(), place, o_sum);
    store(merged(), place + head_dim, a_sum);
    const F out = to_float(o_sum / l);
    store(item.out + head * head_dim, lane + element, out);
    if (!judged) return;
    const D written = to_double(out), cast = written - o_sum / l;
    double* dots = shared->dots[element / 32];
    store(dots, splat_i(0), sum(written * written));
    store(dots, splat_i(1), sum(written * (a_sum / l)));
    store(dots, splat_i(2), sum(cast * cast));
  }

  // The header, by a warp of its own: a lane has an entry.
  CERTKV_FN void header(MergeShared* shared) const {
    const I lane = lane_index();
    const I entry = select(lane < int(kSumCount), lane, splat_i(0));
    F x[kTogether];
    const auto load = [&](int first) {
      CERTKV_EACH (i, kTogether)
        x[i] = load_float(from() + (first + i < splits ? first + i : 0) * stride(), entry);
    };
    load(0);
    const float ref = reference();
    const double inverse = 1.0 / item.unit;
    D sum = to_double(splat(0));
    F most = x[0];
    for (int first = 0; first < splits; first += 32) {
      const D less = factor(first, ref), there = here(first);
      for (int half = 0; half < 32 && first + half < splits; half += kTogether) {
        if (first + half > 0) load(first + half);
        CERTKV_EACH (i, kTogether) {  // beyond the last split: 0, and the first one's once more
          const D about = to_double(splat(0)) + uniform(less, half + i);
          const D plain = to_double(splat(0)) + uniform(there, half + i);
          sum = sum + to_double(x[i]) * select(lane < int(kFirstPlain), about, plain);
          most = max_nan(most, x[i]);
        }
      }
    }
    I units = splat_i(0);
    CERTKV_EACH (i, kSumCount) units = select(lane == i, splat_i(units_in(i)), units);
    sum = select(units > 0, sum * inverse, sum);
    sum = select(units > 1, sum * inverse, sum);
    sum = select(lane < int(kFirstMax), sum, to_double(most));
    sum = select(lane == int(kSumRef), to_double(splat(ref)), sum);
    store_where(lane < int(kSumCount), merged(), entry, sum);
    store_where(lane < int(kSumCount), shared->header, entry, sum);
  }
};

// Beside judge_head's own arithmetic, by another warp.
CERTKV_FN double published_bound(const MergeShared& shared) {
  const double* h = shared.header;
  return published_key_bound(h[kSumNuMax], h[kSumScoreMax], h[kSumTail], h[kSumL]);
}

// One head's certificate, but for e_key_paper, after all warps of its merge. All lanes compute the
// same.
CERTKV_FN Certificate judge_head(const PassItem& item, int head_dim, const MergeShared& shared) {
  const double* h = shared.header;
  ClosingSums x;
  x.head_dim = head_dim;
  x.tokens = double(item.tokens);
  x.unit = item.unit;
  x.l = h[kSumL];
  x.m2 = h[kSumM2];
  x.s1 = h[kSumS1];
  x.c_tokens = h[kSumCTokens];
  x.score_max = h[kSumScoreMax];
  for (int w = 0; w < head_dim / 32; ++w) {
    x.o2 += shared.dots[w][0];
    x.oa += shared.dots[w][1];
    x.cast2 += shared.dots[w][2];
  }
  x.nu_max = h[kSumNuMax];
  x.eta_max = h[kSumEtaMax];
  x.vbar_max = h[kSumVbarMax];
  x.notes_sound = x.nu_max >= 0 && x.eta_max >= 0 && x.vbar_max >= 0;
  x.blocks.s = h[kSumS];
  x.s_share = 1 / (1 + double(kSumsOff));
  // Squares that are no float's multiple: the other sums lose less than close_certificate charges.
  const double lost = x.eta_max > 0 ? x.tokens * 0x1p-140 / (x.unit * x.unit) : 0;
  x.blocks.h2 = h[kSumH2] + lost;
  x.blocks.a_bar = h[kSumABar];
  x.blocks.t_nu = h[kSumTNu];
  x.blocks.f_sum = h[kSumFSum];
  x.blocks.f_nu = h[kSumFNu];
  x.blocks.den = h[kSumDen];
  x.blocks.value = h[kSumValue];
  x.blocks.g_o = h[kSumGO];
  x.blocks.tail = h[kSumTail];
  x.blocks.flushed = h[kSumFlushed];
  return close_bounds(x, {});
}

// What the certificate says, and what follows if it does not hold.
CERTKV_FN void state_verdict(const PassArgs& args, const PassItem& item, int head,
                             const Certificate& c) {
  item.judged[head] = c;
  if (within_tolerance(c, item.relative != 0, item.tolerance)) return;
  raise_flag(item.failing, 1u << head);
  raise_flag(item.any_failing, 1u);
  raise_flag(item.climbed, 1u);
  set_condition(args.sets_condition, args.condition);
}

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
