#include <boost/align/aligned_allocator.hpp>
#include <cstring>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cuda/pass.h"
#include "kernels/cuda/pass_body.h"

namespace certkv::cuda {
namespace {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
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
      if (!kCertificate || item.judged == nullptr) continue;
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.tally();
      for (int warp = 0; warp < kWarps; ++warp)
        Block{args, item, shared.data(), split, warp}.finish_tally();
    }
    for (int head = 0; shape.merge && head < item.heads; ++head) {
      emulated::MergeShared shared;
      std::memset(&shared, 0xff, sizeof shared);
      const int each = pages_per_split(args, item);
      const bool judged = kCertificate && item.judged != nullptr;
      const emulated::MergeSplits merge{item, kDim, (item.page_count + each - 1) / each, head};
      for (int element = 0; element < kDim; element += 32) merge.elements(element, judged, &shared);
      if (!judged) continue;
      merge.tally(&shared);
      emulated::judge_head(args, item, kDim, head, shared);
    }
  }
}

template <int kDim, int kGroups, int kWarps, PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
  if (shape.certificate)
    run<kDim, kGroups, true, kWarps, kKind>(args, shape);
  else
    run<kDim, kGroups, false, kWarps, kKind>(args, shape);
}

template <int kDim, int kGroups, PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
  constexpr WarpCounts kCounts = warp_counts(kKind);  // check_shape() knows it to be one of them
  if (shape.warps == kCounts.most)
    run<kDim, kGroups, kCounts.most, kKind>(args, shape);
  else
    run<kDim, kGroups, kCounts.fewest, kKind>(args, shape);
}

template <PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
  if (shape.head_dim == 64)
    shape.groups() == 1 ? run<64, 1, kKind>(args, shape) : run<64, 2, kKind>(args, shape);
  else
    shape.groups() == 1 ? run<128, 1, kKind>(args, shape) : run<128, 2, kKind>(args, shape);
}

}  // namespace

void attend_emulated(const PassArgs& args, const PassShape& shape) {
  check_shape(args, shape);
  switch (shape.kind) {
    case PageKind::K8V4:
      return run<PageKind::K8V4>(args, shape);
    case PageKind::K8V8:
      return run<PageKind::K8V8>(args, shape);
    case PageKind::K12V8:
      return run<PageKind::K12V8>(args, shape);
  }
}

}  // namespace certkv::cuda
