// The vectorised inner loops of the certified pass, compiled once per instruction set and chosen at
// run time. One tile is 16 tokens. Everything else of the pass is in attend_pass.cc.
//
// Lanes: 16 everywhere, whatever the machine's registers hold, and sums in one fixed order: with
// fused products the instruction sets give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/layout.h"

namespace certkv::cpu {

inline constexpr int kRunTiles = 4;  // tiles of a run, at most: one scale group of 64 tokens

// What the queries become for the blocks of one page: computed once per page.
struct PageQuery {
  const std::byte* page = nullptr;
  float base[kMaxGroupHeads];      // sum q base / sqrt(d), and what else the scores need added
  float sum_step[kMaxGroupHeads];  // sum |q| step / sqrt(d), rounded up
  float rounding[kMaxGroupHeads];  // g_b: how far this build's scores are from q.k^ / sqrt(d)
  float unit[kMaxGroupHeads];      // integer scores only: value of their last place
  // [heads, head_dim] x = q step / sqrt(d); or, for integer scores, x = unit (256 high + low).
  alignas(64) float scaled_step[kMaxGroupHeads * kMaxHeadDim];
  alignas(64) int8_t high[kMaxGroupHeads * kMaxHeadDim], low[kMaxGroupHeads * kMaxHeadDim];
};

// Delta_b of a run and what follows from it, lane = head.
struct Charge {
  alignas(64) float bound[16];  // D_b + g_b of the codes; 0 where no codes exist
  alignas(64) float delta[16], c[16], keep[16];
};

// Memory that will be needed soon, brought into the cache beside other work.
struct Ahead {
  const std::byte* at = nullptr;
  size_t bytes = 0;
};

// A stretch of at most kRunTiles tiles of one page, or of at most 16 rows of originals.
struct ValueRun {
  const PageFormat* format;
  DType dtype;
  const std::byte* page;  // codes; used where v is null
  int tile;               // first one within the page
  int tokens;             // 16 a tile with codes
  const uint16_t* v;      // originals [tokens, head_dim]
  float unit;
};

// Where a run's terms go. Arrays over heads.
struct ValueSums {
  float* o;  // [heads, o_stride]: added to
  float* a;  // [heads, o_stride]: c times the same is added; null: no certificate, or original keys
  const float* c;  // [heads]
  size_t o_stride;
};

struct TileKernels {
  const char* isa;

  // scaled: [heads, head_dim] q / sqrt(d); norm: [heads] its norm, rounded up.
  void (*prepare_page)(const PageFormat& format, int heads, const float* scaled, const float* norm,
                       const std::byte* page, PageQuery* out);

  // Charges a run. kappa, e: largest of its blocks', or NaN. k_norm: negative where the keys used
  // are codes; else largest of its blocks', and pq is null where there are no codes. norm: [16],
  // zeros beyond the heads.
  void (*charge)(int head_dim, const PageQuery* pq, const float* norm, float kappa, float e,
                 float k_norm, Charge* out);

  // codes of `tiles` tiles -> scores. scores: [heads, stride], 16 a tile written.
  void (*score_codes)(const PageFormat& format, const std::byte* page, int tile, int tiles,
                      int heads, const PageQuery& pq, Ahead ahead, float* scores, int stride);

  // originals [tokens, head_dim] -> scores; `tokens` <= 16 written a head, padded to 16 with the
  // last one's.
  void (*score_originals)(DType dtype, int head_dim, const uint16_t* k, int tokens, int heads,
                          const float* scaled, Ahead ahead, float* scores, int stride);

  // ref: [heads], the largest of `tokens` scores each; NaN if one is NaN or infinite.
  void (*largest)(const float* scores, int stride, int tokens, int heads, float* ref);

  // Scores of at most 16 * kRunTiles tokens become p = exp(score - ref), 0 beyond `tokens`.
  // sums: [heads, kRunTiles], one a tile.
  void (*weigh)(float* scores, int stride, int tokens, int heads, const float* ref, float* sums);

  // sum p v^ into `sums`. p: [heads, stride]. ahead: two stretches of memory.
  void (*values)(const ValueRun& run, int heads, const float* p, int stride, const Ahead ahead[2],
                 const ValueSums& sums);

  // Norms of the run's values (of codes: as sealed; of originals: computed), rounded down into s1
  // and up into m2: s1[h] = sum p ||v^||, m2[h] = sum p ||v^||^2, in units.
  void (*norms)(const ValueRun& run, int heads, const float* p, int stride, float* s1, float* m2);
};

// The best that this machine runs, or the one that CERTKV_ISA names: read once, at the first call.
const TileKernels& tile_kernels();
// nullptr or "": the best. Throws InvalidArgument naming those that this machine runs.
const TileKernels& tile_kernels_named(const char* name);
const TileKernels& tile_kernels_baseline();  // x86-64 or whatever the compiler targets
const TileKernels* tile_kernels_avx2();      // nullptr where not built
const TileKernels* tile_kernels_avx512();
const TileKernels* tile_kernels_avx512vnni();

}  // namespace certkv::cpu
