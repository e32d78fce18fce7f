// Links into a test the emulation of every shape of a pass (emulate_others_by).
#include "kernels/cuda/emulate_pass.h"

namespace certkv::cuda {
namespace {

template <bool kCertificate, int kWarps, PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
  with_dim_and_groups(shape, [&](auto dim, auto groups) {
    emulate_pass<decltype(dim)::value, decltype(groups)::value, kCertificate, kWarps, kKind>(args,
                                                                                             shape);
  });
}

template <PageKind kKind>
void run_kind(const PassArgs& args, const PassShape& shape) {
  constexpr WarpCounts kCounts = warp_counts(kKind);
  if (shape.warps == kCounts.most) return run<false, kCounts.most, kKind>(args, shape);
  shape.certificate ? run<true, kCounts.fewest, kKind>(args, shape)
                    : run<false, kCounts.fewest, kKind>(args, shape);
}

void run_any(const PassArgs& args, const PassShape& shape) {
  switch (shape.kind) {
    case PageKind::K8V4:
      return run_kind<PageKind::K8V4>(args, shape);
    case PageKind::K8V8:
      return run_kind<PageKind::K8V8>(args, shape);
    case PageKind::K12V8:
      return run_kind<PageKind::K12V8>(args, shape);
  }
}

[[maybe_unused]] const bool linked = (emulate_others_by(run_any), true);

}  // namespace
}  // namespace certkv::cuda
