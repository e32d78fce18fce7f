// The certified pass of the device, last part: a warp's pages, a block's sums, the merge of splits.
// Included by attend_kernels.cu and attend_emulated.cc alone. See pass_block.h.
//
// A block's work is one split of one KV head. begin_copies() and begin() of all warps, then walk()
// of all, then combine() and tally() of all, then finish_tally() of all, with a barrier between;
// MergeSplits and judge_head() later, in a launch of its own.
#pragma once

#include "kernels/cuda/pass_judge.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct Pass : PassJudge<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassJudge<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using Base::first_page, Base::pages, Base::sums;
  using Base::key_slot, Base::value_slot, Base::state, Base::entries, Base::query, Base::norms;
  using Base::split, Base::warp, Base::kSums;
  using typename Base::Sums;

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

    Sums part[kGroups];
    this->blocks_of_originals(q, norm, part);
    uint32_t seen = 0;
    for (int n = next_coded(warp, count); n < count; n = next_coded(n + kWarps, count)) {
      const int slot = int(seen % kKeySlots);
      copy_wait(state(slot), seen / kKeySlots & 1);
      this->page_of_codes(
          first + n, Base::mixed(entries()[n]), key_slot(slot), q, norm, x,
          [&] { begin_key(slot); }, [&] { copy_wait(state(kKeySlots), seen & 1); });
      begin_value();
      ++seen;
    }
    CERTKV_EACH (g, kGroups) Base::join(part[g], &x[g]);

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
      CERTKV_EACH (i, kCells)
        CERTKV_EACH (half, 2) {
          const I element = at + (kSumsHeader + 16 * i + half) + (lane >> 2) * 2;
          store(to, element, x[g].o[i][half]);
          store(to, element + kDim, x[g].a[i][half]);
        }
    }
  }

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
        CERTKV_EACH (i, kSumsHeader) store_where(one, to, splat_i(head * kSums + i), header[i]);
      }
    }
  }
};

// What the warps of a merge share about their head.
struct MergeShared {
  double dots[kMaxHeadDim / 32][3];  // ||O||^2, O . a / l, ||O - o / l||^2, of each warp's elements
  double tally[kTallyCount];
  double header[kSumsHeader];
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
  const PassItem& item;
  int head_dim, splits, head;

  CERTKV_FN I own(int first) const {  // the lane's split; beyond the end: the first one again
    const I lane = lane_index();
    return select(lane + first < splits, lane + first, splat_i(0));
  }
  CERTKV_FN D here(int first) const {
    return to_double(select(lane_index() + first < splits, splat(1), splat(0)));
  }
  CERTKV_FN const float* from() const { return item.splits + head * sums_floats(head_dim); }
  CERTKV_FN int stride() const { return item.heads * sums_floats(head_dim); }
  CERTKV_FN static F larger_one(F a, F b) { return max_nan(a, b); }

  CERTKV_FN double reference() const {
    F most = load_float(from(), own(0) * stride() + int(kSumRef));
    for (int first = 32; first < splits; first += 32)
      most = max_nan(most, load_float(from(), own(first) * stride() + int(kSumRef)));
    return uniform(over_lanes(most, larger_one), 0);
  }
  CERTKV_FN D factor(int first, double ref) const {
    return exponential(to_double(load_float(from(), own(first) * stride() + int(kSumRef))) - ref) *
           here(first);
  }
  CERTKV_FN static D sum(D x) {
    return over_lanes(x, [](D a, D b) { return a + b; });
  }

  // 32 elements; out of the unit, which is exact. `judged`: leaves the output's dot products. Sums
  // of the first splits are on their way before their factors are computed.
  CERTKV_FN void elements(int element, bool judged, MergeShared* shared) const {
    constexpr int kTogether = 16;
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
    const double ref = reference(), inverse = 1.0 / item.unit;
    const D zero = to_double(splat(0));
    D l = zero, m2 = zero, s1 = zero, c_tokens = zero, o_sum = zero, a_sum = zero;
    F score_max = splat(0);
    for (int first = 0; first < splits; first += 32) {
      const I at = own(first) * stride();
      const D less = factor(first, ref), scaled = less * inverse;
      l = l + less * to_double(load_float(from(), at + int(kSumL)));
      if (element == 0) {
        m2 = m2 + scaled * inverse * to_double(load_float(from(), at + int(kSumM2)));
        s1 = s1 + scaled * to_double(load_float(from(), at + int(kSumS1)));
        c_tokens = c_tokens + here(first) * to_double(load_float(from(), at + int(kSumCTokens)));
        score_max = max_nan(score_max, load_float(from(), at + int(kSumScoreMax)));
      }
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
    double* to = item.merged + size_t(head) * size_t(sums_floats(head_dim));
    const I place = lane + (kSumsHeader + element);
    store(to, place, o_sum);
    store(to, place + head_dim, a_sum);
    const F out = to_float(o_sum / l);
    store(item.out + head * head_dim, lane + element, out);
    if (element == 0) {  // every lane stores the same
      const D header[] = {zero + ref,    l,
                          sum(m2),       sum(s1),
                          sum(c_tokens), to_double(over_lanes(score_max, larger_one))};
      CERTKV_EACH (i, 6) {
        store(to, splat_i(i), header[i]);
        if (judged) store(shared->header, splat_i(i), header[i]);
      }
    }
    if (!judged) return;
    const D written = to_double(out), cast = written - o_sum / l;
    double* dots = shared->dots[element / 32];
    store(dots, splat_i(0), sum(written * written));
    store(dots, splat_i(1), sum(written * (a_sum / l)));
    store(dots, splat_i(2), sum(cast * cast));
  }

  // The tallies, by a warp of their own.
  CERTKV_FN void tally(MergeShared* shared) const {
    const double ref = reference();
    D sums[kTallyFirstMax];
    CERTKV_EACH (k, kTallyFirstMax) sums[k] = to_double(splat(0));
    F most[kTallyCount - kTallyFirstMax];
    CERTKV_EACH (k, kTallyCount - kTallyFirstMax) most[k] = splat(0);
    for (int first = 0; first < splits; first += 32) {
      const I split = (own(first) * item.heads + head) * int(kTallyCount);
      const D less = factor(first, ref);
      CERTKV_EACH (k, kTallyFirstMax) {
        const D x = load_double(item.tally, split + k);
        sums[k] = sums[k] + x * (k == kTallyFlushed ? here(first) : less);
      }
      CERTKV_EACH (k, kTallyCount - kTallyFirstMax)
        most[k] = max_nan(most[k], to_float(load_double(item.tally, split + (kTallyFirstMax + k))));
    }
    CERTKV_EACH (k, kTallyFirstMax) store(shared->tally, splat_i(k), sum(sums[k]));
    CERTKV_EACH (k, kTallyCount - kTallyFirstMax)
      store(shared->tally, splat_i(kTallyFirstMax + k), to_double(over_lanes(most[k], larger_one)));
  }
};

// One head's certificate and whether it holds; after all warps of its merge. All lanes compute the
// same.
CERTKV_FN void judge_head(const PassArgs& args, const PassItem& item, int head_dim, int head,
                          const MergeShared& shared) {
  if (item.judged == nullptr) return;
  const double* t = shared.tally;
  ClosingSums x;
  x.head_dim = head_dim;
  x.tokens = double(item.tokens);
  x.unit = item.unit;
  x.l = shared.header[kSumL];
  x.m2 = shared.header[kSumM2];
  x.s1 = shared.header[kSumS1];
  x.c_tokens = shared.header[kSumCTokens];
  x.score_max = shared.header[kSumScoreMax];
  for (int w = 0; w < head_dim / 32; ++w) {
    x.o2 += shared.dots[w][0];
    x.oa += shared.dots[w][1];
    x.cast2 += shared.dots[w][2];
  }
  x.nu_max = t[kTallyNuMax];
  x.eta_max = t[kTallyEtaMax];
  x.vbar_max = t[kTallyVbarMax];
  x.notes_sound = x.nu_max >= 0 && x.eta_max >= 0 && x.vbar_max >= 0;
  x.blocks.s = t[kTallyS];
  x.blocks.h2 = t[kTallyH2];
  x.blocks.a_bar = t[kTallyABar];
  x.blocks.t_nu = t[kTallyTNu];
  x.blocks.f_sum = t[kTallyFSum];
  x.blocks.f_nu = t[kTallyFNu];
  x.blocks.den = t[kTallyDen];
  x.blocks.value = t[kTallyValue];
  x.blocks.g_o = t[kTallyGO];
  x.blocks.tail = t[kTallyTail];
  x.blocks.flushed = t[kTallyFlushed];
  const Certificate c = close_certificate(x, {});
  item.judged[head] = c;
  if (within_tolerance(c, item.relative != 0, item.tolerance)) return;
  raise_flag(item.failing, 1u << head);
  raise_flag(item.any_failing, 1u);
  raise_flag(item.climbed, 1u);
  set_condition(args.sets_condition, args.condition);
}

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
