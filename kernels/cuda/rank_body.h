// Ranking consistency: whether codes leave open which blocks are the r heaviest. After a pass.
// Under policy `budget` the blocks that leave it open are noted, for climb() to promote. SOURCE:
// method section 6; the host's ranking_unresolved() and same_order_under_codes().
#pragma once

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/chains.h"
#include "kernels/cuda/lanes.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

inline constexpr int kRankWarps = 32;
inline constexpr int kOrders = 2;  // by original keys, and by codes

struct RankShared {
  // The heaviest block of F below the last one, of each warp; block -1: none.
  double mass[kOrders][kMaxHeads][kRankWarps];
  int32_t block[kOrders][kMaxHeads][kRankWarps];
  double last[kOrders][kMaxHeads];  // the places given so far end with this one
  int32_t last_block[kOrders][kMaxHeads];
  bool bad[kMaxHeads];          // unresolved, whatever else
  bool beyond_last[kMaxHeads];  // F has fewer blocks; places go on outside of it
  int32_t outside[kRankWarps];  // blocks without original keys
  uint32_t open[kRankWarps];    // heads that a block outside leaves unresolved
};

// A block of warps for each item.
struct Rank {
  const LadderArgs& args;
  const PaperArgs& paper;
  int index, warp;
  RankShared* shared;

  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN const LadderItem& item() const { return args.items[index]; }

  // Whether there is something to decide: else its heads stay as they are.
  CERTKV_FN bool due() const {
    return (paper.all_items || *item().again != 0) && paper.ranking > 0;
  }
  CERTKV_FN bool lists() const { return args.undecided != nullptr; }
  CERTKV_FN uint32_t* undecided() const {
    return args.undecided + size_t(index) * args.undecided_of_item;
  }
  CERTKV_FN int places() const {  // no more than there are blocks; one shows that F has no more
    const int blocks = pass().page_count * kPageTiles;
    return (paper.ranking < blocks ? paper.ranking : blocks) + (lists() ? 1 : 0);
  }

  CERTKV_FN void prepare() const {
    if (lists()) own_pages([&](int page) { store_word(&undecided()[page], 0); });
    if (warp >= pass().heads) return;
    for (int order = 0; order < kOrders; ++order) {
      shared->last[order][warp] = double(__builtin_inff());
      shared->last_block[order][warp] = -1;
    }
    shared->bad[warp] = shared->beyond_last[warp] = false;
  }

  // Blocks of four heads of a page: a lane has a head and a tile, the upper lanes nothing.
  struct Cell {
    D by_keys, by_codes, delta, flushed;  // log-masses; the first with what was flushed, beside it
    I block;
    B there, inside;
  };
  CERTKV_FN Cell cell(int page, int group) const {
    const PassItem& p = pass();
    const I lane = lane_index(), tile = (lane >> 2) & 3, at = lane & 15;
    const PageEntry entry = p.pages[page];
    const int tokens = entry.page != nullptr ? kPageTokens : entry.tokens;
    const size_t record = size_t(page) * size_t(args.groups) + size_t(group);
    const float* from = p.records + record * kRecordFloats;
    Cell x;
    x.block = tile + page * kPageTiles;
    x.there = (lane < 16) & (tile < (tokens + 15) / 16) & ((lane & 3) + 4 * group < p.heads);
    const U used = load1(reinterpret_cast<const std::byte*>(p.used), splat_i(page * kPageTiles)) >>
                   word_of(tile * 8);
    x.inside = x.there & ((used & kUsedOriginalKey) != 0u);
    const D sum = to_double(load_float(from, at));
    const D ref = to_double(load_float(from, at + kRecordRef));
    x.delta = to_double(load_float(from, at + kRecordDelta));
    x.by_keys = ref + logarithm(sum);
    // A weight below the exponential's flush lies between 0 and it.
    x.flushed = ref + logarithm(sum + 16 * double(kExpAbsolute));
    x.by_codes =
        lists()
            ? x.by_keys
            : load_double(paper.scored + size_t(index) * paper.scored_of_item + record * 16, at);
    return x;
  }
  template <typename Body>
  CERTKV_FN void own_pages(Body body) const {
    for (int page = warp; page < pass().page_count; page += kRankWarps) body(page);
  }
  // A lane's head, of a group.
  CERTKV_FN D of_heads(const double (&x)[kMaxHeads], int group) const {
    return load_double(&x[0], (lane_index() & 3) + 4 * group);
  }

  CERTKV_FN I beyond_of(I head) const {
    I out = splat_i(0);
    for (int h = 0; h < pass().heads; ++h)
      out = select(head == h, splat_i(shared->beyond_last[h] ? 1 : 0), out);
    return out;
  }

  // The heaviest of F after those that have their places, ties by number.
  CERTKV_FN void find() const {
    for (int group = 0; group < args.groups; ++group)
      for (int order = 0; order < kOrders; ++order) {
        const I head = (lane_index() & 3) + 4 * group;
        const D last = of_heads(shared->last[order], group);
        const I last_block = load_int(&shared->last_block[order][0], head);
        const I beyond = beyond_of(head);
        D most = to_double(splat(0));
        I block = splat_i(-1);
        B bad = lane_index() < 0;
        own_pages([&](int page) {
          const Cell x = cell(page, group);
          const B among = ((beyond > 0) & x.there & !x.inside) | ((beyond == 0) & x.inside);
          const D mass = select(beyond > 0, x.flushed, order == 0 ? x.by_keys : x.by_codes);
          const B number = at_most(mass, mass);
          bad = bad | (x.inside & !number);
          const B left = (!at_most(last, mass)) | (at_most(mass, last) & (x.block > last_block));
          const B better = (block < 0) | !at_most(mass, most);
          const B take = among & number & left & better;
          most = select(take, mass, most);
          block = select(take, x.block, block);
        });
        for (int mask = 4; mask < 16; mask *= 2) {
          const D other = shuffle_xor(most, mask);
          const I theirs = index_of(shuffle_xor(word_of(block), mask));
          const B equal = at_most(other, most) & at_most(most, other);
          const B take =
              (theirs >= 0) & ((block < 0) | !at_most(other, most) | (equal & (theirs < block)));
          most = select(take, other, most);
          block = select(take, theirs, block);
        }
        const I at = head * kRankWarps + warp;
        store_where(lane_index() < 4, &shared->mass[order][0][0], at, most);
        store_where(lane_index() < 4, &shared->block[order][0][0], at, block);
        const uint32_t heads = ballot(bad);
        for (int h = 0; h < 4 && 4 * group + h < pass().heads; ++h)
          if ((heads >> h & 0x1111u) != 0) shared->bad[4 * group + h] = true;
      }
  }

  // A warp a head: the next place.
  CERTKV_FN void settle(int place) const {
    if (warp >= pass().heads) return;
    const int h = warp;
    if (place >= paper.ranking && !shared->beyond_last[h]) return;  // F has them all
    int next[kOrders];
    double mass[kOrders];
    for (int order = 0; order < kOrders; ++order) {
      next[order] = -1;
      mass[order] = 0;
      for (int w = 0; w < kRankWarps; ++w) {
        const int block = shared->block[order][h][w];
        const double m = shared->mass[order][h][w];
        if (block >= 0 &&
            (next[order] < 0 || m > mass[order] || (m == mass[order] && block < next[order]))) {
          next[order] = block;
          mass[order] = m;
        }
      }
    }
    const bool beyond = shared->beyond_last[h];
    sync_lanes();  // all have read before any writes
    if (beyond) {
      if (next[0] < 0 || !lists()) return;
      or_where(lane_index() < 1, undecided(), splat_i(next[0] / kPageTiles),
               splat_u(1u << (next[0] % kPageTiles * 8 + h)));
    } else if (next[0] < 0) {
      shared->beyond_last[h] = true;
      for (int order = 0; order < kOrders; ++order) {
        shared->last[order][h] = double(__builtin_inff());
        shared->last_block[order][h] = -1;
      }
      return;
    } else if (next[0] != next[1]) {
      shared->bad[h] = true;
    }
    for (int order = 0; order < kOrders; ++order) {
      shared->last[order][h] = mass[order];
      shared->last_block[order][h] = next[order];
    }
  }

  // Blocks outside F against the last place.
  CERTKV_FN void compare() const {
    uint32_t open = 0;
    int outside = 0;
    for (int group = 0; group < args.groups; ++group) {
      const I head = (lane_index() & 3) + 4 * group;
      const D last = of_heads(shared->last[0], group);
      // Delta of the last place: of whatever page has it.
      D least = to_double(splat(0));
      for (int h = 0; h < 4 && 4 * group + h < pass().heads; ++h) {
        const int block = shared->last_block[0][4 * group + h];
        if (block < 0) continue;
        const float* record =
            pass().records +
            (size_t(block / kPageTiles) * size_t(args.groups) + size_t(group)) * kRecordFloats;
        const float delta = record[kRecordDelta + block % kPageTiles * 4 + h];
        least = select(head == 4 * group + h, to_double(splat(delta)), least);
      }
      own_pages([&](int page) {
        const Cell x = cell(page, group);
        const B out = x.there & !x.inside;
        if (group == 0) outside += population(ballot(out & ((lane_index() & 3) == 0)));
        const D own = magnitude(x.flushed), theirs = magnitude(last);
        const D eps = gamma_n(16 + 4) + 2 * kUnit * select(at_most(own, theirs), theirs, own);
        const B resolved = at_most(x.flushed + x.delta + eps, last - least - eps);
        if (lists())
          or_where(out & !resolved & (beyond_of(head) == 0), undecided(), splat_i(page),
                   splat_u(1) << word_of((x.block & 3) * 8 + head));
        const uint32_t lanes = ballot(out & !resolved);
        for (int h = 0; h < 4; ++h)
          if ((lanes >> h & 0x1111u) != 0) open |= 1u << (4 * group + h);
      });
    }
    shared->outside[warp] = outside;
    shared->open[warp] = open;
  }

  CERTKV_FN void close() const {
    if (warp != 0) return;
    uint32_t open = 0;
    int outside = 0;
    for (int w = 0; w < kRankWarps; ++w) {
      open |= shared->open[w];
      outside += shared->outside[w];
    }
    for (int h = 0; h < pass().heads; ++h) {
      const bool unresolved = outside > 0 && (shared->beyond_last[h] || (open >> h & 1u) != 0);
      if (!shared->bad[h] && !unresolved) continue;
      raise_flag(pass().failing, 1u << h);
      raise_flag(pass().climbed, 1u);
      if (!lists()) continue;
      raise_flag(pass().any_failing, 1u);
      raise_flag(&item().counts->ranked, 1u << h);
    }
  }
  // Policy paper: whatever is left for rungs 3 and 4.
  CERTKV_FN void report() const {
    if (warp != 0 || lists()) return;
    if (pass().failing[0] != 0 || item().counts->canary != 0) raise_flag(pass().any_failing, 1u);
  }
};

// The phases in order, as select_phases().
template <typename Run>
CERTKV_FN void rank_phases(bool due, int places, Run run) {
  if (due) {
    run([](const Rank& r) { r.prepare(); });
    CERTKV_NO_UNROLL
    for (int place = 0; place < places; ++place) {
      run([](const Rank& r) { r.find(); });
      run([=](const Rank& r) { r.settle(place); });
    }
    run([](const Rank& r) { r.compare(); });
    run([](const Rank& r) { r.close(); });
  }
  run([](const Rank& r) { r.report(); });
}

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
