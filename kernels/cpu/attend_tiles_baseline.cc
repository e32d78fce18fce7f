// attend_tiles for one instruction set; see attend_tiles.inc.
#if defined(__AVX__)  // where the compiler targets it anyway
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/arith/chains.h"
#include "kernels/cpu/attend_tiles.h"

namespace certkv::cpu {
namespace {
#include "kernels/cpu/lanes.inc"

constexpr const char* kIsa = "baseline";
constexpr int kTilesAtOnce = 1;  // as many as the registers hold sums for
#include "kernels/cpu/attend_tiles.inc"
}  // namespace

const TileKernels& tile_kernels_baseline() {
  return kKernels;
}

}  // namespace certkv::cpu
