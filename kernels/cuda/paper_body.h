// Policy `paper`: what its second phase promotes, chosen from the first one's masses.
//
// Blocks are taken by descending weight, ties by their number. The last weight taken is found digit
// by digit: each sweep over the pages counts blocks and adds up masses by one digit of a weight's
// bits, as whole numbers, so no order of adding matters.
// SOURCE: method section 5, "Policies"; the host's select_paper_keys() and select_paper_values() in
// runtime/certify do the same with sorted blocks.
#pragma once

#include "kernels/cuda/climb_body.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

inline constexpr int kDigits = 5, kDigitBits = 7;
inline constexpr uint64_t kWhole = uint64_t(kFixed);  // mass 1; values: v_tol
static_assert(1 << kDigitBits <= kBins);
CERTKV_FN int digit_shift(int n) {
  return n + 1 < kDigits ? 32 - kDigitBits * (n + 1) : 0;
}
CERTKV_FN int digit_bits(int n) {
  return n + 1 < kDigits ? kDigitBits : 32 - kDigitBits * (kDigits - 1);
}

struct PaperShared {
  ClimbShared climb;  // bins[0]: masses, bins[1]: numbers of blocks
  // Of a part and head: blocks of larger bits are taken, and so many of equal ones.
  uint32_t least[2][kMaxHeads];
  int32_t ties[2][kMaxHeads];
  bool searching[kMaxHeads];
  uint64_t count[kMaxHeads], mass[kMaxHeads];  // heavier than what the search has come to
  uint64_t all[kMaxHeads];                     // mass of all blocks with codes
  int32_t k_max[kMaxHeads];
  int32_t tied[2][kMaxHeads][kClimbWarps];  // blocks of equal bits, by warp
  int32_t chosen[2][kClimbWarps], missing[2][kClimbWarps];
  uint32_t open[2][kMostSlots / 32];  // slots that hold nothing that was chosen
};

struct SelectPaper {
  const LadderArgs& args;
  const PaperArgs& paper;
  int index, warp;
  PaperShared* shared;

  CERTKV_FN Climb climb() const { return {args, index, warp, &shared->climb}; }
  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN const LadderItem& item() const { return args.items[index]; }
  CERTKV_FN uint32_t everyone() const { return (1u << pass().heads) - 1; }

  // Before anything else: every head takes part.
  CERTKV_FN void prepare() const {
    if (warp < pass().heads) {
      shared->climb.may[warp] = paper.v_tol > 1e-300 ? paper.v_tol : 1e-300;
      shared->climb.norm[warp] = 0;
      item().candidate[warp] = pass().judged[warp];
    }
    if (warp == 0) pass().failing[0] = everyone();
    keep_scores();
  }
  // Log-masses of all blocks, for rank(); a lane has four heads of a tile, or of two.
  CERTKV_FN void keep_scores() const {
    double* to = paper.scored + size_t(index) * paper.scored_of_item;
    const int count = pass().page_count * args.groups;
    for (int n = warp; n < count; n += kClimbWarps) {
      const float* record = pass().records + size_t(n) * kRecordFloats;
      const I at = lane_index() & 15;
      const D mass = to_double(load_float(record, at));
      const D ref = to_double(load_float(record, at + kRecordRef));
      store_where(lane_index() < 16, to + size_t(n) * 16, at, ref + logarithm(mass));
    }
  }

  // ---- the last weight that is taken ------------------------------------------------------------

  CERTKV_FN static U bits_of_weight(F x) {  // in the order of weights; NaN is the heaviest
    return select(x >= 0, bits_of(x), splat_u(0xffffffffu));
  }
  CERTKV_FN F weight(const Climb::Cell& x, int part) const {
    return part == kKeys ? x.rho : x.value;
  }
  // Blocks with codes: of others the ladder's choice says -1.
  CERTKV_FN B with_codes(const Climb::Cell& x) const { return x.failing & !(x.value < 0); }

  CERTKV_FN void begin(int part, bool again) const {
    clear_bins();
    if (warp >= pass().heads) return;
    const int h = warp;
    bool searching = true;
    if (again) {  // of keys: once more with 2 k_max, where the tail is too heavy
      const uint64_t left = shared->all[h] - shared->mass[h];
      searching = !(double(left) <= paper.expand_tail * double(total(h)));
    }
    const bool local = part == kValues && !paper.greedy_values;
    sync_lanes();
    shared->searching[h] = searching && !local;
    if (searching) {
      shared->least[part][h] = local ? 0x3f800000u : 0;  // of 1: v_tol
      shared->ties[part][h] = 0;
      shared->count[h] = shared->mass[h] = 0;
      const int64_t most = int64_t(paper.k_max) * (again ? 2 : 1);
      shared->k_max[h] = int32_t(most < 0x7fffffff ? most : 0x7fffffff);
    }
  }
  CERTKV_FN void clear_bins() const {
    auto* words = reinterpret_cast<int32_t*>(shared->climb.bins);
    constexpr int kWords = int(sizeof shared->climb.bins / 4);
    for (int at = warp * 32; at < kWords; at += kClimbWarps * 32)
      store_where(lane_index() + at < kWords, words, lane_index() + at, splat_i(0));
  }
  CERTKV_FN bool searches() const {
    bool any_head = false;
    for (int h = 0; h < pass().heads; ++h) any_head = any_head || shared->searching[h];
    return any_head;
  }

  CERTKV_FN void sweep(int part, int digit) const {
    const int shift = digit_shift(digit), bits = digit_bits(digit);
    climb().own_pages([&](int page) {
      const Climb::Cell x = climb().cell(page);
      const F w = weight(x, part);
      const U key = bits_of_weight(w);
      U settled = splat_u(0);
      I searching = splat_i(0);
      for (int h = 0; h < pass().heads; ++h) {
        settled = select(x.head == h, splat_u(shared->least[part][h]), settled);
        searching = select(x.head == h, splat_i(shared->searching[h] ? 1 : 0), searching);
      }
      // In two steps: a shift by 32 is none.
      const B counts = with_codes(x) & (searching > 0) &
                       ((key >> (shift + bits - 1) >> 1) == (settled >> (shift + bits - 1) >> 1));
      const I bin = index_of(key >> shift & ((1u << bits) - 1));
      const F within = select(w < kMostShare, w, splat(kMostShare));
      add_where(counts, &shared->climb.bins[0][0][0], x.head * kBins + bin,
                to_double(within) * kFixed + 1.0);  // none weighs nothing: a share of 1 is all
      add_where(counts, &shared->climb.bins[1][0][0], x.head * kBins + bin, to_double(splat(1)));
    });
  }

  CERTKV_FN uint64_t total(int h) const {  // with the blocks that have no codes
    return shared->all[h] < kWhole ? kWhole : shared->all[h];
  }
  // Whether the heaviest `count` blocks, of `mass` together, are enough.
  CERTKV_FN bool enough(int h, int part, uint64_t count, uint64_t mass) const {
    const uint64_t all = shared->all[h];
    if (part == kValues) return all - mass <= kWhole;
    const uint64_t open = total(h) - all;  // exact already
    return (count >= uint64_t(paper.k_min) &&
            double(open + mass) >= paper.tau_cov * double(total(h))) ||
           count >= uint64_t(shared->k_max[h]);
  }

  // A warp a head: the digit in which enough is reached.
  CERTKV_FN void settle(int part, int digit) const {
    if (warp >= pass().heads || !shared->searching[warp]) return;
    const int h = warp, shift = digit_shift(digit);
    const uint64_t *masses = shared->climb.bins[0][h], *counts = shared->climb.bins[1][h];
    uint64_t count = shared->count[h], mass = shared->mass[h];
    uint32_t least = shared->least[part][h];
    if (digit == 0) {
      uint64_t all = 0;
      for (int b = 0; b < 1 << kDigitBits; ++b) all += masses[b];
      sync_lanes();
      shared->all[h] = all;
      sync_lanes();
    }
    int ties = 0;
    bool done = digit == 0 && enough(h, part, 0, 0);
    if (done) {
      least = 0xffffffffu;  // nothing is heavier, and no equal ones are taken
    } else {
      int b = (1 << digit_bits(digit)) - 1;
      while (b >= 0 && !enough(h, part, count + counts[b], mass + masses[b])) {
        count += counts[b];
        mass += masses[b];
        --b;
      }
      if (b < 0) {  // all of them, and no more is to be had
        least = 0;
        ties = 0x7fffffff;
        done = true;
      } else {
        least |= uint32_t(b) << shift;
        if (digit + 1 == kDigits) {  // equal weights: as many as it takes
          const uint64_t each = counts[b] > 0 ? masses[b] / counts[b] : 0;
          while (!enough(h, part, count, mass)) {
            ++ties;
            ++count;
            mass += each;
          }
          done = true;
        }
      }
    }
    sync_lanes();  // all have read before any writes
    shared->count[h] = count;
    shared->mass[h] = mass;
    shared->least[part][h] = least;
    shared->ties[part][h] = ties;
    if (done) shared->searching[h] = false;
  }

  // ---- what is taken ----------------------------------------------------------------------------

  // body(head, mask): the lanes whose block has the last weight of that head.
  template <typename Body>
  CERTKV_FN void each_tie(const Climb::Cell& x, int part, Body body) const {
    const U key = bits_of_weight(weight(x, part));
    for (int h = 0; h < pass().heads; ++h)
      body(h, ballot(with_codes(x) & (x.head == h) & (key == shared->least[part][h])));
  }
  CERTKV_FN void count_ties() const {
    for (int part = 0; part < 2; ++part) {
      int tied[kMaxHeads] = {};
      climb().own_pages([&](int page) {
        each_tie(climb().cell(page), part,
                 [&](int h, uint32_t mask) { tied[h] += population(mask); });
      });
      for (int h = 0; h < pass().heads; ++h) shared->tied[part][h][warp] = tied[h];
    }
  }

  // Writes what the pages want.
  CERTKV_FN void mark() const {
    int before[2][kMaxHeads] = {}, chosen[2] = {};
    for (int part = 0; part < 2; ++part)
      for (int h = 0; h < pass().heads; ++h)
        for (int w = 0; w < warp; ++w) before[part][h] += shared->tied[part][h][w];
    const bool two = climb().together() == 2;
    climb().own_pages([&](int page) {
      const Climb::Cell x = climb().cell(page);
      uint32_t wants[2] = {0, 0};
      for (int part = 0; part < 2; ++part) {
        const U key = bits_of_weight(weight(x, part));
        B taken = lane_index() < 0;
        each_tie(x, part, [&](int h, uint32_t mask) {
          const uint32_t least = shared->least[part][h];
          const B of_head = x.head == h, tie = of_head & (key == least);
          const B first = rank_in(mask) + before[part][h] < shared->ties[part][h];
          taken = taken | (of_head & (key > least)) | (tie & first);
          before[part][h] += population(mask);
        });
        const uint32_t lanes = ballot(taken & with_codes(x));
        for (int t = 0; t < kPageTiles; ++t) {
          const uint32_t quads = two ? lanes : lanes | lanes >> 16;
          if ((quads >> (4 * t) & 15u) != 0) wants[0] |= 1u << (t + 4 * part);
          if (two && (lanes >> (16 + 4 * t) & 15u) != 0) wants[1] |= 1u << (t + 4 * part);
        }
      }
      for (int n = 0; n < climb().together(); ++n) {
        if (page + n >= item().coded_pages || item().pages[page + n].page == nullptr) continue;
        store_word(&item().pages[page + n].wants, wants[n]);
        chosen[0] += population(wants[n] & 0xfu);
        chosen[1] += population(wants[n] & 0xf0u);
      }
    });
    for (int part = 0; part < 2; ++part) shared->chosen[part][warp] = chosen[part];
  }

  CERTKV_FN B wanted(I block, B exists, int part) const {
    const I page = select(exists, block >> 2, splat_i(0));
    const U wants = load1(reinterpret_cast<const std::byte*>(item().pages), page * 16 + 8);
    return exists & ((wants >> word_of((block & 3) + 4 * part) & 1u) != 0u) & coded(page);
  }
  CERTKV_FN B coded(I page) const {
    const auto* pages = reinterpret_cast<const std::byte*>(item().pages);
    return (load1(pages, page * 16) | load1(pages, page * 16 + 4)) != 0u;
  }
  CERTKV_FN int slot_words(int part) const { return (item().quota[part] + 31) / 32; }

  // Slots that hold what is wanted: their blocks are found there.
  CERTKV_FN void reuse() const {
    for (int part = 0; part < 2; ++part)
      for (int word = warp; word < slot_words(part); word += kClimbWarps) {
        const I slot = lane_index() + word * 32;
        const B exists = slot < item().quota[part];
        const I held = load_int(item().block_of[part], select(exists, slot, splat_i(0)));
        const B hit = wanted(select(held >= 0, held, splat_i(0)), exists & (held >= 0), part);
        store_where(hit, item().slot_of[part], held, slot + item().first_slot[part]);
        shared->open[part][word] = ballot(exists & !hit);
        if (any(hit)) add_count(&item().counts->hits, uint32_t(population(ballot(hit))));
      }
  }

  // 32 blocks at a time, a stretch for each warp, in order.
  template <typename Body>
  CERTKV_FN void own_blocks(Body body) const {
    const int blocks = item().coded_pages * kPageTiles, words = (blocks + 31) / 32;
    const int each = (words + kClimbWarps - 1) / kClimbWarps, first = warp * each;
    for (int word = first; word < words && word < first + each; ++word) {
      const I block = lane_index() + word * 32;
      body(block, block < blocks);
    }
  }
  CERTKV_FN B is_missing(I block, B want, int part) const {
    return want & (load_int(item().slot_of[part], select(want, block, splat_i(0))) < 0);
  }
  CERTKV_FN void count_missing() const {
    for (int part = 0; part < 2; ++part) {
      int chosen = 0, missing = 0;
      own_blocks([&](I block, B exists) {
        const B want = wanted(block, exists, part);
        chosen += population(ballot(want));
        missing += population(ballot(is_missing(block, want, part)));
      });
      shared->tied[part][0][warp] = chosen;  // by these stretches; the ties are done with
      shared->missing[part][warp] = missing;
    }
  }
  CERTKV_FN int sum(const int32_t (&of_warps)[kClimbWarps], int before) const {
    int all = 0;
    for (int w = 0; w < before; ++w) all += of_warps[w];
    return all;
  }
  CERTKV_FN bool fits() const {
    return sum(shared->chosen[0], kClimbWarps) <= item().quota[0] &&
           sum(shared->chosen[1], kClimbWarps) <= item().quota[1];
  }

  // The other slots, the oldest first.
  CERTKV_FN void list_slots() const {
    for (int part = 0; part < 2; ++part) {
      const int quota = item().quota[part];
      if (quota == 0) continue;
      const int oldest = item().free_count[part] % quota;
      int all = 0, younger = 0;
      for (int word = 0; word < slot_words(part); ++word) {
        const uint32_t open = shared->open[part][word];
        if (word < oldest / 32) younger += population(open);
        if (word == oldest / 32) younger += population(open & ((1u << oldest % 32) - 1));
        all += population(open);
      }
      int before = 0;
      for (int word = 0; word < slot_words(part); ++word) {
        const uint32_t open = shared->open[part][word];
        if (word % kClimbWarps == warp) {
          const I slot = lane_index() + word * 32, number = rank_in(open) + before;
          const B mine = (splat_u(open) >> word_of(lane_index()) & 1u) != 0u;
          store_where(mine, item().free_slots[part],
                      number + select(slot < oldest, splat_i(all - younger), splat_i(-younger)),
                      slot);
        }
        before += population(open);
      }
    }
  }

  // All or nothing, as in the ladder.
  CERTKV_FN void place() const {
    auto* list = reinterpret_cast<int32_t*>(list_of(args, index));
    int first = 0;
    for (int part = 0; part < 2 && fits(); ++part) {
      if (item().quota[part] == 0) continue;  // nothing of it is chosen
      int chosen = first + sum(shared->tied[part][0], warp);
      int missing = sum(shared->missing[part], warp);
      own_blocks([&](I block, B exists) {
        const B want = wanted(block, exists, part), fresh = is_missing(block, want, part);
        const uint32_t mask = ballot(want), absent = ballot(fresh);
        const I number = rank_in(absent) + missing;
        const I taken = load_int(item().free_slots[part], select(fresh, number, splat_i(0)));
        const I held = load_int(item().slot_of[part], select(want, block, splat_i(0))) -
                       item().first_slot[part];
        const I slot = select(fresh, taken, held), at = (rank_in(mask) + chosen) * 4;
        store_where(want, list, at, select(fresh, splat_i(0), splat_i(1)));
        store_where(want, list, at + 1, block);
        store_where(want, list, at + 2, splat_i(part));
        store_where(want, list, at + 3, slot);
        store_where(fresh, item().block_of[part], slot, block);
        chosen += population(mask);
        missing += population(absent);
      });
      first = sum(shared->chosen[0], kClimbWarps);
    }
    if (fits()) return;
    own_blocks([&](I block, B exists) {
      for (int part = 0; part < 2; ++part) {
        const B want = wanted(block, exists, part);
        store_where(want, item().slot_of[part], block, splat_i(-1));
        and_where(want, reinterpret_cast<uint32_t*>(item().pages), (block >> 2) * 4 + 2,
                  ~(splat_u(1) << word_of((block & 3) + 4 * part)));
      }
    });
  }

  CERTKV_FN void close() const {
    if (warp != 0) return;
    const LadderItem& to = item();
    const bool fit = fits();
    *to.again = fit ? 1 : 0;
    *pass().climbed = 1;
    to.counts->rounds = 1;
    // What was chosen, as the host counts it.
    const int chosen[2] = {sum(shared->chosen[0], kClimbWarps),
                           sum(shared->chosen[1], kClimbWarps)};
    to.counts->promoted_keys = uint32_t(chosen[0]);
    to.counts->promoted_values = uint32_t(chosen[1]);
    args.listed[index] = fit ? uint32_t(chosen[0] + chosen[1]) : 0;
    if (!fit) return;  // all heads stay failing
    int oldest[2];
    for (int part = 0; part < 2; ++part) {
      const int taken = sum(shared->missing[part], kClimbWarps);
      oldest[part] = taken > 0 ? to.free_slots[part][taken - 1] + 1 : to.free_count[part];
    }
    sync_lanes();
    for (int part = 0; part < 2; ++part) to.free_count[part] = oldest[part];
    pass().failing[0] = 0;
  }
};

// The phases in order, a barrier behind each; run(phase) has all warps do it.
template <typename Run, typename Uniform>
CERTKV_FN void select_phases(Run run, Uniform searches) {
  run([](const SelectPaper& s) { s.prepare(); });
  CERTKV_NO_UNROLL
  for (int search = 0; search < 3; ++search) {  // keys, keys again, values
    const int part = search < 2 ? kKeys : kValues;
    run([=](const SelectPaper& s) { s.begin(part, search == 1); });
    CERTKV_NO_UNROLL
    for (int digit = 0; digit < kDigits; ++digit) {
      if (!searches()) break;
      run([=](const SelectPaper& s) { s.sweep(part, digit); });
      run([=](const SelectPaper& s) { s.settle(part, digit); });
      run([](const SelectPaper& s) { s.clear_bins(); });
    }
  }
  run([](const SelectPaper& s) { s.count_ties(); });
  run([](const SelectPaper& s) { s.mark(); });
  run([](const SelectPaper& s) { s.reuse(); });
  run([](const SelectPaper& s) { s.count_missing(); });
  run([](const SelectPaper& s) { s.list_slots(); });
  run([](const SelectPaper& s) { s.place(); });
  run([](const SelectPaper& s) { s.close(); });
}

// Policy `paper` keeps originals in the scratch and wants none of them at the next step's start.
CERTKV_FN void forget(const LadderArgs& args, int index, int warp, int warps) {
  const LadderItem& item = args.items[index];
  for (int part = 0; part < 2; ++part)
    for (int first = warp * 32; first < item.quota[part]; first += warps * 32) {
      const I slot = lane_index() + first;
      const B exists = slot < item.quota[part];
      const I held = load_int(item.block_of[part], select(exists, slot, splat_i(0)));
      const B holds = exists & (held >= 0);
      const I block = select(holds, held, splat_i(0));
      store_where(holds, item.slot_of[part], block, splat_i(-1));
      and_where(holds, reinterpret_cast<uint32_t*>(item.pages), (block >> 2) * 4 + 2,
                ~(splat_u(1) << word_of((block & 3) + 4 * part)));
    }
}

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
