// Runs a function as N thread ranks of one world.
#pragma once

#include <functional>
#include <memory>

#include "parallel/local_world.h"

namespace certkv {

// Calls body(world, r) on a thread of its own for every r in [0, ranks) and returns when all have
// ended. When one throws, the world is aborted in its name, so that the others do not wait for it.
// Rethrows the error of the rank that failed first.
void run_thread_ranks(int ranks, const std::function<void(LocalWorld&, int rank)>& body);

// The same with the communicator of all ranks.
void run_thread_ranks(int ranks, const std::function<void(Communicator&)>& body);

}  // namespace certkv
