// What every communicator asks of the views it is given, before anything is enqueued.
#pragma once

#include "kernels/base/tensor_view.h"
#include "parallel/communicator.h"

namespace certkv {

// All throw InvalidArgument with `what` in front.
// `moves`: the memory that the communicator moves. That a device view points to the device, the
// communicator itself must see.
enum class Moves { HostMemory, HostAndDeviceMemory };
void check_sum(const TensorView& inout, Moves moves = Moves::HostMemory);
void check_gather(const TensorView& in, const TensorView& out, int rank, int size,
                  Moves moves = Moves::HostMemory);
void check_broadcast(const TensorView& inout, int root, int size, Moves moves = Moves::HostMemory);

}  // namespace certkv
