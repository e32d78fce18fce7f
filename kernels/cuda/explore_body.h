// Exploration: a seeded random share of the blocks that nothing is resident of, promoted so that
// the canary sees the whole cache over time. SOURCE: method section 7; the host's explore().
#pragma once

#include "kernels/arith/counter.h"
#include "kernels/cuda/climb_body.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

struct ExploreShared {
  int32_t chosen[kClimbWarps];
};

// A block of warps for each item: count(), place(), close(), with a barrier between.
struct Explore {
  const LadderArgs& args;
  int index, warp;
  ExploreShared* shared;

  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN const LadderItem& item() const { return args.items[index]; }

  // 32 blocks at a time, a stretch for each warp, in order: body(blocks, which of them).
  template <typename Body>
  CERTKV_FN void own_blocks(Body body) const {
    const int blocks = item().coded_pages * kPageTiles, words = (blocks + 31) / 32;
    const int each = (words + kClimbWarps - 1) / kClimbWarps, first = warp * each;
    const auto* pages = reinterpret_cast<const std::byte*>(item().pages);
    for (int word = first; word < words && word < first + each; ++word) {
      const I block = lane_index() + word * 32;
      const I at = select(block < blocks, (block >> 2) * 16, splat_i(0));
      const B coded = (load1(pages, at) | load1(pages, at + 4)) != 0u;
      const U wants = load1(pages, at + 8) >> word_of(block & 3);
      const W drawn = mix_counter(splat_w(item().exploration_seed), widen(word_of(block))) >> 11;
      body(block,
           (block < blocks) & coded & ((wants & 0x11u) == 0u) & below(drawn, args.explored_below));
    }
  }
  CERTKV_FN void count() const {
    int chosen = 0;
    own_blocks([&](I, B taken) { chosen += population(ballot(taken)); });
    shared->chosen[warp] = chosen;
  }
  CERTKV_FN int before(int warps) const {
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared->chosen[w];
    return sum;
  }
  // All or nothing, as in the ladder.
  CERTKV_FN bool fits() const {
    const int all = before(kClimbWarps);
    return all > 0 && all <= item().free_count[0] && all <= item().free_count[1];
  }
  CERTKV_FN void place() const {
    if (!fits()) return;
    auto* list = reinterpret_cast<int32_t*>(list_of(args, index));
    const int all = before(kClimbWarps);
    int number = before(warp);
    own_blocks([&](I block, B taken) {
      const uint32_t mask = ballot(taken);
      const I nth = rank_in(mask) + number;
      for (int part = 0; part < 2; ++part) {
        const I from_top = splat_i(item().free_count[part] - 1) - nth;
        const I slot = load_int(item().free_slots[part], select(taken, from_top, splat_i(0)));
        const I at = (nth + (part == kValues ? all : 0)) * 4;
        store_where(taken, list, at, splat_i(0));
        store_where(taken, list, at + 1, block);
        store_where(taken, list, at + 2, splat_i(part));
        store_where(taken, list, at + 3, slot);
        store_where(taken, item().block_of[part], slot, block);
      }
      number += population(mask);
    });
  }
  CERTKV_FN void close() const {
    if (warp != 0) return;
    const LadderItem& to = item();
    const bool fit = fits();
    const int all = before(kClimbWarps);
    const int left[2] = {to.free_count[0] - all, to.free_count[1] - all};
    sync_lanes();  // all have read before any writes
    *to.again = fit ? 1 : 0;
    args.listed[index] = fit ? uint32_t(2 * all) : 0;
    if (!fit) return;
    for (int part = 0; part < 2; ++part) to.free_count[part] = left[part];
    for (int h = 0; h < pass().heads; ++h) to.candidate[h] = pass().judged[h];
    to.counts->rounds = 1;  // of passes repeated
    to.counts->explored = uint32_t(all);
    pass().failing[0] = 0;  // the pass that follows says anew
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
