// attend_tiles for one instruction set; see attend_tiles.inc.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/arith/exp.h"
#include "kernels/cpu/attend_tiles.h"

namespace certkv::cpu {
namespace {
#include "kernels/cpu/attend_tiles.inc"

constexpr TileKernels kKernels = {.isa = "avx2",
                                  .score_codes = score_codes,
                                  .score_originals = score_originals,
                                  .weigh = weigh,
                                  .weigh_values = weigh_values};
}  // namespace

const TileKernels* tile_kernels_avx2() { return &kKernels; }

}  // namespace certkv::cpu
