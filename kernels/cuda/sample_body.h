// Drawing a token from a row of logits, for nvcc and for C++: as kernels/sample.h, without sorting.
//
// The last token that top_k or top_p keeps is found by its logit's order, 11 bits, 11 and 10 at a
// time: a stage counts the tokens whose leading bits are those found so far, and their mass, by the
// next bits; the following one looks in which bin what is wanted is reached. top_k first, then, of
// the mass that it left, top_p. All sums are of whole numbers: blocks and threads add in any order.
#pragma once

#include "kernels/cuda/block_threads.h"
#include "kernels/cuda/model_body.h"
#include "kernels/cuda/sample_args.h"

namespace certkv::cuda {

inline constexpr int kSampleThreads = 1024;
inline constexpr int kSampleGroup = 32;  // of numbers that one thread adds up
inline constexpr int kSampleAhead = int(kSamplePart) / kSampleThreads;
static_assert(kSampleAhead * kSampleThreads == int(kSamplePart));
static_assert(kSampleThreads == kSampleParts, "a thread brings a part's sum");

// A block's shared memory, all of it set by its threads.
struct SampleShared {
  // 64-bit sums as two words each: shared memory adds words at once, wider numbers in a loop.
  uint32_t low[kSampleBins], high[kSampleBins], count[kSampleBins];
  uint64_t group_mass[kSampleBins / kSampleGroup], group_count[kSampleBins / kSampleGroup];
  SampleCut cut;
  SampleKept kept;
  uint64_t total, place, equals;
  int32_t part;

  CERTKV_INLINE uint64_t mass(int i) const { return uint64_t(high[i]) << 32 | low[i]; }
  CERTKV_INLINE void set(int i, uint64_t mass, uint64_t number) {
    low[i] = uint32_t(mass);
    high[i] = uint32_t(mass >> 32);
    count[i] = uint32_t(number);
  }
};

CERTKV_INLINE uint32_t fetch_add(uint32_t* to, uint32_t x) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(to, x);
#else
  const uint32_t before = *to;
  *to += x;
  return before;
#endif
}
CERTKV_INLINE void add_to(uint64_t* to, uint64_t x) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(to), (unsigned long long)(x));
#else
  *to += x;
#endif
}
CERTKV_INLINE uint32_t order_of(float x) {
  return uint32_t(argmax_word(x, 0) >> 32);
}

struct SampleBlock {
  const SampleRows& a;
  size_t row, part;
  SampleShared& s;
  SampleDraw draw;
  float largest;
  int bits;

  CERTKV_INLINE SampleBlock(const SampleRows& rows, size_t r, size_t p, SampleShared& shared)
      : a(rows), row(r), part(p), s(shared), draw(rows.draws[r]), bits(weight_bits(rows.n)) {
    uint64_t best = 0;
    for (size_t piece = 0; piece < a.pieces; ++piece) {
      const uint64_t word = a.best[piece * a.rows + row];
      if (word > best) best = word;
    }
    largest = argmax_value(best);  // of equals any
  }

  CERTKV_INLINE bool drawn() const { return draw.temperature > 0 && finite_float(largest); }
  CERTKV_INLINE bool by_count() const { return draw.top_k > 0 && draw.top_k < a.n; }
  CERTKV_INLINE bool by_mass() const { return draw.top_p < kWholeShare; }
  CERTKV_INLINE bool twice() const { return by_count() && by_mass(); }
  CERTKV_INLINE bool searched(int stage) const {
    return drawn() && (stage < 3 ? by_count() || by_mass() : twice());
  }
  CERTKV_INLINE SampleScratch& scratch() const { return a.scratch[row]; }
  CERTKV_INLINE uint64_t weight(float x) const {
    return sample_weight(x, largest, draw.temperature, bits);
  }
  CERTKV_INLINE uint64_t weight_of_order(uint32_t order) const {
    return weight(argmax_value(uint64_t(order) << 32));
  }

  // The part's tokens.
  CERTKV_INLINE size_t piece() const { return part / a.parts_of_piece(); }
  CERTKV_INLINE size_t first() const { return part % a.parts_of_piece() * kSamplePart; }
  CERTKV_INLINE size_t end() const { return a.begins[piece() + 1] - a.begins[piece()]; }
  CERTKV_INLINE const float* logits() const { return a.x + (piece() * a.rows + row) * a.stride; }
  // Calls body(x) for a thread's tokens of the part, side by side with the other threads'.
  template <typename Body>
  CERTKV_INLINE void tokens(int thread, Body body) const {
    const float* x = logits();
    const size_t stop = end();
    float value[kSampleAhead] = {};
    for (int j = 0; j < kSampleAhead; ++j) {
      const size_t i = first() + size_t(thread + j * kSampleThreads);
      if (i < stop) value[j] = x[i];
    }
    for (int j = 0; j < kSampleAhead; ++j)
      if (first() + size_t(thread + j * kSampleThreads) < stop) body(value[j]);
  }

  // ---- parts of the program --------------------------------------------------------------------

  // The sums of each kSampleGroup of the `count` numbers in shared memory.
  CERTKV_HD void add_groups(const BlockThreads& threads, int numbers) const {
    threads.each(numbers / kSampleGroup, [&](int t) {
      uint64_t mass = 0, count = 0;
      for (int i = t * kSampleGroup; i < (t + 1) * kSampleGroup; ++i) {
        mass += s.mass(i);
        count += s.count[i];
      }
      s.group_mass[t] = mass;
      s.group_count[t] = count;
    });
  }

  CERTKV_HD void load_bins(const BlockThreads& threads, const SampleBins& bins) const {
    threads.each(kSampleThreads, [&](int t) {
      for (int i = t; i < kSampleBins; i += kSampleThreads) s.set(i, bins.mass[i], bins.count[i]);
    });
    add_groups(threads, kSampleBins);
  }

  // A search's beginning, of all tokens' mass or of what top_k has left.
  CERTKV_INLINE SampleCut begin_search(bool count, uint64_t total) const {
    SampleCut cut{};
    cut.by_mass = count ? 0 : 1;
    cut.want = count ? draw.top_k : mass_to_reach(total, draw.top_p);
    return cut;
  }

  // By one thread: the bin in which what is wanted is reached, from the largest logits down. It is
  // reached, because no more is wanted than there is.
  CERTKV_INLINE void descend(SampleCut cut, int new_bits) const {
    int group = kSampleBins / kSampleGroup - 1;
    for (; group > 0; --group) {
      const uint64_t here = cut.by_mass != 0 ? s.group_mass[group] : s.group_count[group];
      if (here >= cut.want) break;
      cut.want -= here;
      cut.above += s.group_mass[group];
    }
    int bin = (group + 1) * kSampleGroup - 1;
    for (; bin > group * kSampleGroup; --bin) {
      const uint64_t here = cut.by_mass != 0 ? s.mass(bin) : s.count[bin];
      if (here >= cut.want) break;
      cut.want -= here;
      cut.above += s.mass(bin);
    }
    cut.prefix = cut.prefix << new_bits | uint32_t(bin);
    s.cut = cut;
  }

  // A search's end: the whole order is known.
  CERTKV_INLINE SampleKept finish(const SampleCut& cut) const {
    SampleKept kept{};
    kept.order = cut.prefix;
    kept.equal_weight = weight_of_order(cut.prefix);
    kept.equals = cut.by_mass != 0 ? equals_to_reach(cut.want, kept.equal_weight) : cut.want;
    kept.mass = cut.above + kept.equals * kept.equal_weight;
    return kept;
  }

  // What the stage knows of the cut, into shared memory.
  CERTKV_HD void find_cut(const BlockThreads& threads, int stage) const {
    const SampleScratch& kept = scratch();
    load_bins(threads, kept.bins[stage - 1]);
    if (stage == 1) {
      threads.each(1, [&](int) {
        uint64_t total = 0;
        for (int i = 0; i < kSampleBins / kSampleGroup; ++i) total += s.group_mass[i];
        descend(begin_search(by_count(), total), 11);
      });
    } else if (stage == 3) {
      threads.each(1, [&](int) {
        descend(kept.cuts[2], 10);
        s.total = finish(s.cut).mass;
      });
      load_bins(threads, kept.bins[0]);
      threads.each(1, [&](int) { descend(begin_search(false, s.total), 11); });
    } else {
      threads.each(1, [&](int) { descend(kept.cuts[stage - 1], 11); });
    }
  }

  // ---- the program -----------------------------------------------------------------------------

  // Stages 0 to 4: the part's tokens that share the prefix, into the stage's bins.
  CERTKV_HD void search(const BlockThreads& threads, int stage) const {
    if (!searched(stage)) return;
    if (stage > 0) find_cut(threads, stage);
    const bool last = stage == 2 || stage == 4;
    const int shift = stage == 0 ? 21 : last ? 0 : 10, width = last ? 10 : 11;
    const uint32_t prefix = stage == 0 ? 0 : s.cut.prefix;
    threads.each(kSampleThreads, [&](int t) {
      if (part == 0 && t == 0 && stage > 0) scratch().cuts[stage] = s.cut;
      for (int i = t; i < kSampleBins; i += kSampleThreads) s.set(i, 0, 0);
    });
    threads.each(kSampleThreads, [&](int t) {
      tokens(t, [&](float x) {
        const uint32_t order = order_of(x);
        if (stage > 0 && order >> (shift + width) != prefix) return;
        const uint32_t bin = order >> shift & ((1u << width) - 1);
        fetch_add(&s.count[bin], 1);
        const uint64_t w = weight(x);
        const uint32_t low = uint32_t(w), before = fetch_add(&s.low[bin], low);
        const uint32_t high = uint32_t(w >> 32) + (before + low < before ? 1 : 0);
        if (high != 0) fetch_add(&s.high[bin], high);
      });
    });
    SampleBins& bins = scratch().bins[stage];
    threads.each(kSampleThreads, [&](int t) {
      for (int i = t; i < kSampleBins; i += kSampleThreads) {
        if (s.count[i] == 0) continue;
        fetch_add(&bins.count[i], s.count[i]);
        add_to(&bins.mass[i], s.mass(i));
      }
    });
  }

  // Then: what is kept, and of each part what it has of it.
  CERTKV_HD void add_part(const BlockThreads& threads) const {
    if (!drawn()) return;
    if (searched(0)) {
      // The last bins are those of stage 2, or of stage 4 where two searches were made.
      const int last = twice() ? 4 : 2;
      load_bins(threads, scratch().bins[last]);
      threads.each(1, [&](int) {
        descend(scratch().cuts[last], 10);
        s.kept = finish(s.cut);
      });
    } else {
      threads.each(1, [&](int) { s.kept = SampleKept{}; });  // no logit's order is 0
    }
    threads.each(kSampleThreads, [&](int t) {
      uint64_t mass = 0, ties = 0;
      tokens(t, [&](float x) {
        const uint32_t order = order_of(x);
        if (order > s.kept.order) mass += weight(x);
        if (order == s.kept.order) ++ties;
      });
      s.set(t, mass, ties);
    });
    add_groups(threads, kSampleThreads);
    threads.each(1, [&](int) {
      SamplePartSum sum = {0, 0};
      for (int i = 0; i < kSampleThreads / kSampleGroup; ++i) {
        sum.mass += s.group_mass[i];
        sum.ties += s.group_count[i];
      }
      scratch().parts[part] = sum;
      if (part == 0) scratch().kept = s.kept;
    });
  }

  // By one thread: in which of the entries [from, to) the place lies; the place within it, and the
  // equals that are still kept.
  struct Walk {
    uint64_t place, equals, weight;
    CERTKV_INLINE bool here(uint64_t mass, uint64_t ties) {
      const uint64_t kept = ties < equals ? ties : equals;
      const uint64_t all = mass + kept * weight;
      if (place < all) return true;
      place -= all;
      equals -= kept;
      return false;
    }
  };
  CERTKV_INLINE int walk_shared(Walk* walk, int numbers) const {
    int group = 0;
    const int groups = numbers / kSampleGroup;
    while (group < groups && !walk->here(s.group_mass[group], s.group_count[group])) ++group;
    if (group == groups) return numbers;
    int i = group * kSampleGroup;
    while (!walk->here(s.mass(i), s.count[i])) ++i;
    return i;
  }

  // Last, by one block a row (its `part` is not used before it is found).
  CERTKV_HD void draw_token(const BlockThreads& threads) {
    threads.each(1, [&](int) { a.tokens[row] = -1; });
    if (!drawn()) return;
    const size_t parts = a.parts();
    threads.each(kSampleThreads, [&](int t) {
      const SamplePartSum none = {0, 0};
      const SamplePartSum sum = size_t(t) < parts ? scratch().parts[t] : none;
      s.set(t, sum.mass, sum.ties);
    });
    add_groups(threads, kSampleThreads);
    threads.each(1, [&](int) {
      const SampleKept& kept = scratch().kept;
      uint64_t mass = kept.mass;
      if (!searched(0))
        for (int i = 0; i < kSampleThreads / kSampleGroup; ++i) mass += s.group_mass[i];
      Walk walk{place_in_mass(mass, draw.uniform), kept.equals, kept.equal_weight};
      s.part = walk_shared(&walk, kSampleThreads);
      s.place = walk.place;
      s.equals = walk.equals;
    });
    part = size_t(s.part);
    if (part >= parts) return;  // nowhere: impossible, and the host sees the -1
    const uint32_t order = scratch().kept.order;
    threads.each(kSampleThreads, [&](int t) {
      uint64_t mass = 0, ties = 0;
      for (int j = 0; j < kSampleAhead; ++j) {
        const size_t i = first() + size_t(t * kSampleAhead + j);
        if (i >= end()) break;
        const float x = logits()[i];
        if (order_of(x) > order) mass += weight(x);
        if (order_of(x) == order) ++ties;
      }
      s.set(t, mass, ties);
    });
    add_groups(threads, kSampleThreads);
    threads.each(1, [&](int) {
      Walk walk{s.place, s.equals, scratch().kept.equal_weight};
      const int thread = walk_shared(&walk, kSampleThreads);
      for (int j = 0; j < kSampleAhead && thread < kSampleThreads; ++j) {
        const size_t i = first() + size_t(thread * kSampleAhead + j);
        if (i >= end()) break;
        const uint32_t here = order_of(logits()[i]);
        if (!walk.here(here > order ? weight(logits()[i]) : 0, here == order ? 1 : 0)) continue;
        a.tokens[row] = int32_t(a.begins[piece()] + i);
        break;
      }
    });
  }
};

}  // namespace certkv::cuda
