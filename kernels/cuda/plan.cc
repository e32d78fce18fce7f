#include "kernels/cuda/plan.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/cuda/pass.h"

namespace certkv::cuda {

namespace {

constexpr int kLeastPages = 8;

int divided(int a, int b) {  // rounded up
  return (a + b - 1) / b;
}

struct Room {
  int warps, most_pages;  // of a block
  int blocks;             // of each item, that the device holds at once; at least 1
};
Room room_of(const DeviceShape& device, int head_dim, int groups, PageKind kind, int max_pages,
             int items) {
  CERTKV_EXPECT(max_pages >= 1 && items >= 1 && device.multiprocessors >= 1, InvalidArgument,
                "a pass over {} pages of {} heads on {} multiprocessors: each must be at least 1",
                max_pages, items, device.multiprocessors);
  const int warps = pass_warps(device, head_dim, groups, kind);
  // A block may use all but 1 KiB of a multiprocessor, which the device keeps for itself.
  const size_t shared = shared_layout(head_dim, groups, warps, kind).bytes + 1024;
  const size_t resident =
      std::clamp<size_t>(device.shared_per_multiprocessor / shared, 1, kMostResident);
  return {warps, warps * kMaxPagesPerWarp,
          std::max(1, device.multiprocessors * int(resident) / items)};
}

}  // namespace

int pass_warps(const DeviceShape& device, int head_dim, int groups, PageKind kind) {
  uint32_t least = 0;
  const WarpCounts counts = warp_counts(kind);
  for (int warps : {counts.most, counts.fewest}) {
    least = shared_layout(head_dim, groups, warps, kind).bytes;
    if (least <= device.shared_per_block) return warps;
  }
  CERTKV_THROW(InvalidArgument,
               "the device's pass needs {} bytes of shared memory a block at head_dim {} and {} "
               "query heads a KV head with codes of {}, the device offers {}: use the CPU backend",
               least, head_dim, groups == 1 ? "1 to 4" : "5 to 8", page_kind_name(kind),
               device.shared_per_block);
}

SplitPlan plan_splits(const DeviceShape& device, int head_dim, int groups, PageKind kind,
                      int max_pages, int items) {
  const Room room = room_of(device, head_dim, groups, kind, max_pages, items);
  // As many splits as fill the device once, but 8 pages each at least: a block costs what one
  // costs.
  int wanted = std::min(room.blocks, divided(max_pages, kLeastPages));
  // Where blocks cannot take that many pages they fill the device several times. Few warps meet
  // that early, in two or three rounds of which the last must not be half empty; 12 only where
  // there are many.
  if (room.warps < kMostWarps) wanted *= divided(divided(max_pages, wanted), room.most_pages);
  const int pages = std::min(divided(max_pages, wanted), room.most_pages);
  return {pages, divided(max_pages, pages), room.warps};
}

int most_pages_per_split(const DeviceShape& device, int head_dim, int groups, PageKind kind,
                         int max_pages, int items) {
  // Up to 8 pages a block of the device they are at most 8; from there on they grow with the pages
  // to what a block can take.
  const Room room = room_of(device, head_dim, groups, kind, max_pages, items);
  return std::min(max_pages,
                  std::clamp(divided(max_pages, room.blocks), kLeastPages, room.most_pages));
}

void check_shape(const PassArgs& args, const PassShape& s) {
  CERTKV_EXPECT(s.head_dim == 64 || s.head_dim == 128, InvalidArgument,
                "head_dim is {}: the device serves 64 and 128", s.head_dim);
  CERTKV_EXPECT(s.heads >= 1 && s.heads <= 8, InvalidArgument,
                "{} query heads share a KV head: the device serves 1 to 8", s.heads);
  const WarpCounts counts = warp_counts(s.kind);
  CERTKV_EXPECT(s.warps == counts.most || s.warps == counts.fewest, InvalidArgument,
                "blocks of {} warps: the device's pass over codes of {} is compiled for {} and {}, "
                "as pass_warps() chooses",
                s.warps, page_kind_name(s.kind), counts.most, counts.fewest);
  CERTKV_EXPECT(args.pages_per_split >= 0 && args.pages_per_split <= s.warps * kMaxPagesPerWarp,
                InvalidArgument,
                "{} pages a split of {} warps: 1 to {} are what the rounding analysis allows",
                args.pages_per_split, s.warps, s.warps * kMaxPagesPerWarp);
}

}  // namespace certkv::cuda
