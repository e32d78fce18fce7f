#include "kernels/base/error.h"
#include "kernels/cuda/emulate_pass.h"

namespace certkv::cuda {
namespace {

PassEmulation others = nullptr;

template <PageKind kKind>
void run(const PassArgs& args, const PassShape& shape) {
  constexpr int kWarps = warp_counts(kKind).most;
  with_dim_and_groups(shape, [&](auto dim, auto groups) {
    emulate_pass<decltype(dim)::value, decltype(groups)::value, true, kWarps, kKind>(args, shape);
  });
}

}  // namespace

void emulate_others_by(PassEmulation emulation) {
  others = emulation;
}

void attend_emulated(const PassArgs& args, const PassShape& shape) {
  check_shape(args, shape);
  if (!shape.certificate || shape.warps != warp_counts(shape.kind).most) {
    CERTKV_EXPECT(others != nullptr, InvalidArgument,
                  "this program emulates passes with certificates and of {} warps alone",
                  warp_counts(shape.kind).most);
    return others(args, shape);
  }
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
