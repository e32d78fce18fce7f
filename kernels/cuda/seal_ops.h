// Sealing and digests behind CacheOps: what both of its implementations need.
#pragma once

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/seal_args.h"

namespace certkv::cuda {

// Throws InvalidArgument, saying what is wrong.
void check_seal(const SealArgs& args);
void check_digest(const DigestArgs& args);
void seal_emulated(const SealArgs& args);

}  // namespace certkv::cuda
