#include "parallel/view_checks.h"

#include <cstdint>
#include <functional>

#include "kernels/base/error.h"
#include "parallel/ordered_sum.h"

namespace certkv {

namespace {

void check_view(const TensorView& view, const char* what, Moves moves) {
  CERTKV_EXPECT(view.memory == MemoryKind::Host || moves == Moves::HostAndDeviceMemory,
                InvalidArgument,
                "{}: the view is of device memory; this communicator moves host memory", what);
  CERTKV_EXPECT(view.data != nullptr || view.count == 0, InvalidArgument,
                "{}: a null view of {} elements", what, view.count);
  CERTKV_EXPECT(view.count <= SIZE_MAX / 2 / dtype_bytes(view.dtype), InvalidArgument,
                "{}: {} elements of {} are no tensor", what, view.count, dtype_name(view.dtype));
}

}  // namespace

void check_sum(const TensorView& inout, Moves moves) {
  check_view(inout, "all_reduce_sum", moves);
  CERTKV_EXPECT(summable(inout.dtype), InvalidArgument,
                "all_reduce_sum: sums over ranks are made of F32, F16, BF16 and U64, not of {}",
                dtype_name(inout.dtype));
}

void check_gather(const TensorView& in, const TensorView& out, int rank, int size, Moves moves) {
  check_view(in, "all_gather, in", moves);
  check_view(out, "all_gather, out", moves);
  CERTKV_EXPECT(in.memory == out.memory, InvalidArgument,
                "all_gather: one of in and out is of device memory, the other of host memory");
  CERTKV_EXPECT(in.dtype == out.dtype, InvalidArgument, "all_gather: {} cannot be gathered as {}",
                dtype_name(in.dtype), dtype_name(out.dtype));
  CERTKV_EXPECT(out.count % size_t(size) == 0 && out.count / size_t(size) == in.count,
                InvalidArgument, "all_gather: {} elements of each of {} ranks do not make {}",
                in.count, size, out.count);
  const std::less_equal<const char*> before;
  const char* a = static_cast<const char*>(in.data);
  const char* b = static_cast<const char*>(out.data);
  const bool apart = in.count == 0 || before(a + in.bytes(), b) || before(b + out.bytes(), a);
  CERTKV_EXPECT(apart || a == b + size_t(rank) * in.bytes(), InvalidArgument,
                "all_gather: in overlaps out and is not rank {}'s part of it", rank);
}

void check_broadcast(const TensorView& inout, int root, int size, Moves moves) {
  check_view(inout, "broadcast", moves);
  CERTKV_EXPECT(root >= 0 && root < size, InvalidArgument,
                "broadcast: root is {} in a group of {} ranks", root, size);
}

}  // namespace certkv
