// What a KV head is likely to want at its next step, read beside what follows this one: the
// ladder's own choice (climb_body.h), as though heads might spend a share of their tolerance.
// Included by prefetch_kernels.cu and cache_emulated.cc alone. See lanes.h and DESIGN.md. SOURCE:
// method section 5.4: F and X may be any sets, so soundness does not depend on what is read.
#pragma once

#include "kernels/cuda/cache_body.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

struct PrefetchShared {
  ClimbShared climb;
  // What the ladder is shown of the item, and what it writes that nobody reads.
  PassItem pass;
  LadderItem item;
  LadderArgs args;
  LadderCounts counts;
  Certificate candidate[kMaxHeads];
  uint32_t near, again;
  int32_t free_count[2], left_alone[2];
};

// One block of kClimbWarps warps for each item, after learn(), with barriers between: prepare();
// where due(), all parts of climb() in order; then take() and, once that is done, page().
struct Prefetch {
  const LadderArgs& args;
  double share;
  int index, warp;
  PrefetchShared* shared;

  CERTKV_FN bool due() const { return shared->near != 0; }
  CERTKV_FN Climb climb() const { return {shared->args, 0, warp, &shared->climb}; }

  CERTKV_FN void prepare() const {
    if (warp != 0) return;
    const PassItem& pass = args.passes[index];
    const LadderItem& item = args.items[index];
    uint32_t near = 0;
    // On rung 4, now or once all ranks repeat the layer, nothing is near its tolerance.
    if (!args.halt.passed() && item.counts->canary == 0)
      for (int h = 0; h < pass.heads; ++h)
        if (!within_tolerance(pass.judged[h], pass.relative != 0, pass.tolerance * share))
          near |= 1u << h;
    shared->near = near;
    shared->pass = pass;
    shared->pass.tolerance = pass.tolerance * share;
    shared->pass.failing = &shared->near;
    shared->item = item;
    shared->item.again = &shared->again;
    shared->item.candidate = shared->candidate;
    shared->item.counts = &shared->counts;
    shared->item.free_count = shared->free_count;
    shared->counts.rounds = 0;
    for (int part = 0; part < 2; ++part) {
      // Half of what is free stays so: what the next step misses beside must find room.
      const int all = item.free_count[part], most = (all + 1) / 2;
      shared->free_count[part] = most;
      shared->left_alone[part] = all - most;
      shared->item.free_slots[part] = item.free_slots[part] + (all - most);
    }
    shared->args = args;
    shared->args.passes = &shared->pass;
    shared->args.items = &shared->item;
    shared->args.count = 1;
    shared->args.list = list_of(args, index);
    shared->args.listed = args.listed + index;
    shared->args.listed[0] = 0;
  }

  CERTKV_FN void take() const {
    if (warp != 0) return;
    for (int part = 0; part < 2; ++part)
      args.items[index].free_count[part] = shared->left_alone[part] + shared->free_count[part];
  }

  CERTKV_FN void page() const {
    const LadderItem& item = args.items[index];
    const int count = int(args.listed[index]);
    for (int n = warp; n < count; n += kClimbWarps) {
      const PageInRequest r = shared->args.list[n];
      const int slot = item.first_slot[r.part] + r.slot;
      std::byte* rows = item.slots + size_t(slot) * size_t(16 * args.head_dim * 2);
      const bool sound = fetch_block(args, item, r.block, r.part, rows);
      add_count(&item.counts->prefetched, 1);
      sync_lanes();  // all lanes' rows are there
      const uint32_t broken = sound ? Canary{args, index, r.block, rows}.look_ahead(r.part) : 0;
      if (sound && broken == 0) {
        want(item, r.block, r.part, slot);
        store_where(lane_index() < 1, item.score[r.part], splat_i(r.slot), splat(kJustPrefetched));
        continue;
      }
      // The codes go on standing in for it; learn() frees the slot.
      store_where(lane_index() < 1, item.block_of[r.part], splat_i(r.slot), splat_i(-1));
      if (broken != 0) {
        add_count(&item.counts->canary_ahead, 1);
        keep_largest(&item.counts->canary_last, uint32_t(r.block) * 4 + broken);
        continue;
      }
      add_count(&item.counts->digest, 1);
      raise_flag(args.passes[index].flags, kFlagDigest);
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
