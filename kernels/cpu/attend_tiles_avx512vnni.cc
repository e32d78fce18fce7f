// attend_tiles for one instruction set; see attend_tiles.inc.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/arith/chains.h"
#include "kernels/cpu/attend_tiles.h"

namespace certkv::cpu {
namespace {
#include "kernels/cpu/lanes.inc"

constexpr const char* kIsa = "avx512vnni";
constexpr int kTilesAtOnce = 2;  // as many as the registers hold sums for
#include "kernels/cpu/attend_tiles.inc"
}  // namespace

const TileKernels* tile_kernels_avx512vnni() {
  return &kKernels;
}

}  // namespace certkv::cpu
