// Sealing behind CacheOps::seal(): what both of its implementations need.
#pragma once

#include "kernels/cuda/seal_args.h"

namespace certkv::cuda {

// Throws InvalidArgument, saying what is wrong.
void check_seal(const SealArgs& args);
void seal_emulated(const SealArgs& args);

}  // namespace certkv::cuda
