// What every host communicator asks of the views it is given, before anything is enqueued.
#pragma once

#include "kernels/base/tensor_view.h"
#include "parallel/communicator.h"

namespace certkv {

// All throw InvalidArgument with `what` in front.
void check_host_view(const TensorView& view, const char* what);
void check_sum(const TensorView& inout);
void check_gather(const TensorView& in, const TensorView& out, int rank, int size);
void check_broadcast(const TensorView& inout, int root, int size);

}  // namespace certkv
