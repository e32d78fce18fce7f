#include "kernels/cuda/plan.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/cuda/pass.h"

namespace certkv::cuda {

namespace {
constexpr int kLeastPages = 8;
}

SplitPlan plan_splits(const DeviceShape& device, int head_dim, int groups, int max_pages,
                      int items) {
  CERTKV_EXPECT(max_pages >= 1 && items >= 1 && device.multiprocessors >= 1, InvalidArgument,
                "a pass over {} pages of {} heads on {} multiprocessors: each must be at least 1",
                max_pages, items, device.multiprocessors);
  // A block may use all but 1 KiB of a multiprocessor, which the device keeps for itself.
  const size_t shared = shared_layout(head_dim, groups).bytes;
  CERTKV_EXPECT(shared <= device.shared_per_block, InvalidArgument,
                "the device's pass needs {} bytes of shared memory a block at head_dim {}, the "
                "device offers {}: use the CPU backend",
                shared, head_dim, device.shared_per_block);
  const int resident = int(std::max<size_t>(1, device.shared_per_multiprocessor / (shared + 1024)));
  const int blocks = device.multiprocessors * resident;
  // As many splits as fill the device once, but 8 pages each at least: a block costs what one
  // costs.
  const int wanted = std::clamp(blocks / items, 1, (max_pages + kLeastPages - 1) / kLeastPages);
  int pages = (max_pages + wanted - 1) / wanted;
  pages = std::min(pages, kWarps * kMaxPagesPerWarp);
  return {pages, (max_pages + pages - 1) / pages};
}

int most_pages_per_split(const DeviceShape& device, int head_dim, int groups, int max_pages,
                         int items) {
  // Up to 8 pages a block of the device they are at most 8; from there on they grow with the pages.
  const int longest = plan_splits(device, head_dim, groups, max_pages, items).pages_per_split;
  return std::min(max_pages, std::max(kLeastPages, longest));
}

void check_shape(const PassArgs& args, const PassShape& s) {
  CERTKV_EXPECT(s.head_dim == 64 || s.head_dim == 128, InvalidArgument,
                "head_dim is {}: the device serves 64 and 128", s.head_dim);
  CERTKV_EXPECT(s.heads >= 1 && s.heads <= 8, InvalidArgument,
                "{} query heads share a KV head: the device serves 1 to 8", s.heads);
  CERTKV_EXPECT(args.pages_per_split >= 0 && args.pages_per_split <= kWarps * kMaxPagesPerWarp,
                InvalidArgument, "{} pages a split: 1 to {} are what the rounding analysis allows",
                args.pages_per_split, kWarps * kMaxPagesPerWarp);
}

}  // namespace certkv::cuda
