// The pass and its merge on the CPU, for one kind of block. Included where blocks are instantiated:
// attend_emulated.cc has those that a device's cache asks for, tests bring the others
// (PassEmulation), for each is a quarter of a megabyte of code.
#pragma once

#include <boost/align/aligned_allocator.hpp>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/cuda/pass.h"
#include "kernels/cuda/pass_body.h"

namespace certkv::cuda {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
void emulate_pass(const PassArgs& args, const PassShape& shape) {
  using Block = emulated::Pass<kDim, kGroups, kCertificate, kWarps, kKind>;
  const uint32_t bytes = shared_layout(kDim, kGroups, kWarps, kKind).bytes;
  for (int i = 0; i < shape.items; ++i) {
    const PassItem& item = args.items[i];
    if (args.repeated && *item.again == 0) continue;
    const bool served = !args.of_kind || item.kind == kKind;
    for (int split = args.first_split; split < args.first_split + shape.splits; ++split) {
      if (!served || split * pages_per_split(args, item) >= item.page_count) continue;
      // Of its own for each block, and poison: what a block reads it must have written.
      std::vector<std::byte, boost::alignment::aligned_allocator<std::byte, 128>> shared(
          bytes, std::byte(0xff));
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.begin_copies();
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.begin();
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.walk();
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.combine();
    }
    for (int head = 0; shape.merge && head < item.heads; ++head) {
      emulated::MergeShared shared;
      std::memset(&shared, 0xff, sizeof shared);
      const int each = pages_per_split(args, item);
      const bool judged = kCertificate && item.judged != nullptr;
      const emulated::MergeSplits merge{item, kDim, (item.page_count + each - 1) / each, head};
      for (int element = 0; element < kDim; element += 32) merge.elements(element, judged, &shared);
      merge.header(&shared);
      if (!judged) continue;
      Certificate c = emulated::judge_head(item, kDim, shared);
      c.e_key_paper = emulated::published_bound(shared);
      emulated::state_verdict(args, item, head, c);
    }
  }
}

// Calls body(dim, groups) with constants.
template <typename Body>
void with_dim_and_groups(const PassShape& shape, Body body) {
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const auto pick = [&](auto dim) { shape.groups() == 1 ? body(dim, one) : body(dim, two); };
  if (shape.head_dim == 64)
    pick(std::integral_constant<int, 64>{});
  else
    pick(std::integral_constant<int, 128>{});
}

}  // namespace certkv::cuda
