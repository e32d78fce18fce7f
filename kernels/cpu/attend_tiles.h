// The vectorised inner loops of the certified pass, compiled once per instruction set and chosen at
// run time. One tile is 16 tokens. Everything else of the pass is in attend_pass.cc.
#pragma once

#include "kernels/layout.h"

namespace certkv::cpu {

struct TileKernels {
  const char* isa;

  // codes of one tile -> scores. scaled_step: [heads, head_dim] q step / sqrt(d).
  // base: [heads] sum_c q_c base_c / sqrt(d). scores: [heads, stride], 16 written a head.
  void (*score_codes)(const PageFormat& format, const std::byte* page, int tile, int heads,
                      const float* scaled_step, const float* base, float* scores, int stride);

  // originals [tokens, head_dim] -> scores; `tokens` <= 16 written a head.
  void (*score_originals)(DType dtype, int head_dim, const uint16_t* k, int tokens, int heads,
                          const float* scaled, float* scores, int stride);

  // p = exp(score - ref) for `tokens` <= 16, 0 beyond; returns their sum.
  float (*weigh)(const float* scores, int tokens, float ref, float* p);

  // values of one tile, times `unit` (a power of two), weighted about r (already times unit).
  // Source: page and tile, or originals when v is given. p: [heads, 16].
  // Adds to o [heads, o_stride], m2, big_a, s1 [heads].
  void (*weigh_values)(const PageFormat& format, DType dtype, const std::byte* page, int tile,
                       const uint16_t* v, float unit, int tokens, int heads, const float* p,
                       const float* r, float* o, int o_stride, float* m2, float* big_a, float* s1);
};

const TileKernels& tile_kernels();           // the best this machine runs
const TileKernels& tile_kernels_baseline();  // x86-64 or whatever the compiler targets
const TileKernels* tile_kernels_avx2();      // nullptr where not built

}  // namespace certkv::cpu
