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

constexpr int kTilesAtOnce = 1;  // as many as the registers hold sums for
constexpr int kApart = 2;
#include "kernels/cpu/attend_tiles.inc"

constexpr TileKernels kKernels = {.isa = "avx2",
                                  .prepare_page = prepare_page,
                                  .charge = charge,
                                  .score_codes = score_codes,
                                  .score_originals = score_originals,
                                  .largest = largest,
                                  .weigh = weigh,
                                  .values = values,
                                  .norms = norms};
}  // namespace

const TileKernels* tile_kernels_avx2() {
  return &kKernels;
}

}  // namespace certkv::cpu
