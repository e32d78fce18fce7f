// Numbers that depend on nothing but a seed and a place: the same on every machine and backend, for
// every number of ranks. SOURCE: SplitMix64's finaliser, Steele, Lea, Flood 2014.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv {

// One part of the place mixed into what the parts before it gave, the seed first. W: uint64_t, or a
// vector of them.
template <typename W>
CERTKV_INLINE W mix_counter(W x, W part) {
  x = x ^ part;
  x = x + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace certkv
