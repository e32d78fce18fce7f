// A page served from codes alone. See pass_block.h.
#pragma once

#include "kernels/cuda/pass_query.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct PassCodes : PassQuery<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassQuery<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using typename Base::LargestNotes;
  using typename Base::Query;
  using typename Base::Sums;

  // Scores of a tile's codes: tokens r and r + 8.
  CERTKV_FN static void score_codes(const std::byte* keys, int tile, const Query (&query)[kGroups],
                                    F (&s)[kGroups][2]) {
    I sum[kGroups][4];
    CERTKV_EACH (g, kGroups)
      CERTKV_EACH (i, 4) sum[g][i] = splat_i(0);
    CERTKV_EACH (i, kSteps) {
      U a[4];
      load4(keys + (tile * kSteps + i) * 512, lane_index() * 16, a);
      CERTKV_EACH (g, kGroups) mma_bytes(sum[g], a, query[g].b[i][0], query[g].b[i][1]);
    }
    // |256 high + low| <= 32640 * 255 * 128 < 2^31.
    if constexpr (key_bits(kKind) == 12) {
      I rest[kGroups][4];
      score_rests(keys, tile, query, rest);
      CERTKV_EACH (g, kGroups)
        CERTKV_EACH (half, 2) {
          const F upper = to_float(sum[g][2 * half] * 256 + sum[g][2 * half + 1]);
          const F lower = to_float(rest[g][2 * half] * 256 + rest[g][2 * half + 1]);
          s[g][half] = fma(fma(upper, splat(16), lower), query[g].unit, query[g].base);
        }
    } else {
      CERTKV_EACH (g, kGroups) {
        s[g][0] = fma(to_float(sum[g][0] * 256 + sum[g][1]), query[g].unit, query[g].base);
        s[g][1] = fma(to_float(sum[g][2] * 256 + sum[g][3]), query[g].unit, query[g].base);
      }
    }
  }
  // The same of the lower four bits of keys of 12, as integers.
  CERTKV_FN static void score_rests(const std::byte* keys, int tile, const Query (&query)[kGroups],
                                    I (&sum)[kGroups][4]) {
    CERTKV_EACH (g, kGroups)
      CERTKV_EACH (i, 4) sum[g][i] = splat_i(0);
    CERTKV_EACH (pair, kSteps / 2) {
      U words[4];
      load4(keys + kPage.key_rest + (tile * (kSteps / 2) + pair) * 512, lane_index() * 16, words);
      CERTKV_EACH (step, 2) {
        const U first = words[2 * step], second = words[2 * step + 1];
        const U a[4] = {first & 0x0f0f0f0fu, first >> 4 & 0x0f0f0f0fu, second & 0x0f0f0f0fu,
                        second >> 4 & 0x0f0f0f0fu};
        const int i = 2 * pair + step;
        CERTKV_EACH (g, kGroups) mma_bytes(sum[g], a, query[g].b[i][0], query[g].b[i][1]);
      }
    }
  }

  // 2^15 p as two halves, as a row of B: columns 2 h and 2 h + 1 are the high and low parts.
  CERTKV_FN static U weight_halves(F p) {
    const F scaled = p * kWeightScale;
    const F low = scaled - low_half(pack_halves(scaled, scaled));
    return transpose_8x8(pack_halves(scaled, low));
  }

  // sum 2^15 p v^ of four cells of a tile, added to acc.
  CERTKV_FN static void weigh_codes(const std::byte* values, int quad, int tile,
                                    const U (&w)[kGroups][2], F (&acc)[kGroups][4][4]) {
    const I lane = lane_index();
    if constexpr (value_bits(kKind) == 8) {
      U words[2][4], m[4];  // of tokens 0 to 7 and 8 to 15; one step and base for all four cells
      const int cells = tile * (kDim / 64) + quad;
      load4(values + cells * 1024, lane * 16, words[0]);
      load4(values + cells * 1024 + 512, lane * 16, words[1]);
      load4(values + kPage.value_affine + cells * 64, (lane & 3) * 16, m);
      CERTKV_EACH (c, 4) {
        const U v[4] = {fma_halves(words[0][c] & 0x00ff00ffu, m[0], m[1]),
                        fma_halves(words[0][c] >> 8 & 0x00ff00ffu, m[0], m[1]),
                        fma_halves(words[1][c] & 0x00ff00ffu, m[2], m[3]),
                        fma_halves(words[1][c] >> 8 & 0x00ff00ffu, m[2], m[3])};
        CERTKV_EACH (g, kGroups) mma_halves(acc[g][c], v, w[g][0], w[g][1]);
      }
    } else {
      U words[4];
      load4(values + (tile * (kDim / 64) + quad) * 512, lane * 16, words);
      CERTKV_EACH (c, 4) {
        U m[4];
        load4(values + kPage.value_affine + (tile * kCells + quad * 4 + c) * 64, (lane & 3) * 16,
              m);
        const U next = words[c] >> 8;
        const U v[4] = {fma_halves(words[c] & 0x000f000fu, m[0], m[1]),
                        fma_halves(next & 0x000f000fu, m[0], m[1]),
                        fma_halves(words[c] & 0x00f000f0u, m[2], m[3]),
                        fma_halves(next & 0x00f000f0u, m[2], m[3])};
        CERTKV_EACH (g, kGroups) mma_halves(acc[g][c], v, w[g][0], w[g][1]);
      }
    }
  }
  CERTKV_FN static void clear(F (&acc)[kGroups][4][4]) {
    CERTKV_EACH (g, kGroups)
      CERTKV_EACH (c, 4)
        CERTKV_EACH (i, 4) acc[g][c][i] = splat(0);
  }

  // What a page leaves for its blocks; one reference for all. Returns the sum of the tile that the
  // lane stands for.
  CERTKV_FN F record(int page, int group, const F (&tile_sum)[kPageTiles], F ref, F bound, F c,
                     F delta, uint32_t skip) const {
    const I lane = lane_index(), row = lane >> 2;
    // Half of the sums go to the neighbour rows, twice: rows r and r + 4 end with tile r % 4.
    const B odd = (row & 1) != 0, upper = (row & 2) != 0;
    F first = select(odd, tile_sum[1], tile_sum[0]), second = select(odd, tile_sum[3], tile_sum[2]);
    first = first + shuffle_xor(select(odd, tile_sum[0], tile_sum[1]), 4);
    second = second + shuffle_xor(select(odd, tile_sum[2], tile_sum[3]), 4);
    F sum = select(upper, second, first);
    sum = sum + shuffle_xor(select(upper, first, second), 8);
    sum = sum + shuffle_xor(sum, 16);
    float* to = this->record_of(page, group);
    const B here = ((splat_u(skip) >> (row & 3)) & 1u) == 0u;
    store_where(here, to, lane, select(row < 4, sum, ref));
    store_where((here & (row < 4)) | ((row & 6) == 4), to + kRecordDelta, lane,
                select(row < 4, delta, select(row < 5, bound, c)));
    return sum;
  }

  // Tiles in `skip` (bit t) count nothing: they are served otherwise; not all of them.
  // after_keys() runs once scores are there, before_values() before the page's values are needed.
  template <typename AfterKeys, typename BeforeValues>
  CERTKV_FN void page_of_codes(int page, uint32_t skip, const std::byte* keys,
                               const F (&q)[kGroups][kSteps * 4], const F (&norm)[kGroups],
                               Sums (&sums)[kGroups], LargestNotes* largest, AfterKeys after_keys,
                               BeforeValues before_values) const {
    const I lane = lane_index();
    const PageNotesDevice& notes = *reinterpret_cast<const PageNotesDevice*>(keys + kPage.notes);
    const float norm_step = accepted(notes.norm_step) * item.unit;
    const float factor = accepted(notes.value_factor) * (item.unit / kWeightScale);
    F nu, eta, vbar;  // of the lane's tile
    if (kCertificate) {
      const float* block = reinterpret_cast<const float*>(notes.block);
      const I at = ((lane >> 2) & 3) * kBlockNotes;
      nu = load_float(block, at + kNoteNu);
      eta = load_float(block, at + kNoteEta);
      vbar = load_float(block, at + kNoteVbar);
      largest->take(nu, eta, vbar);
    }
    F s[kPageTiles][kGroups][2];
    F bound[kGroups], c[kGroups];
    {
      Query query[kGroups];
      CERTKV_EACH (g, kGroups) {
        this->prepare(keys, notes, q[g], norm[g], &query[g]);
        bound[g] = query[g].bound;
      }
      CERTKV_EACH (t, kPageTiles) {
        score_codes(keys, t, query, s[t]);
        if ((skip >> t & 1) == 0) continue;
        CERTKV_EACH (g, kGroups) s[t][g][0] = s[t][g][1] = splat(-__builtin_inff());
      }
    }
    after_keys();

    // Weights about the page's own largest score; the page's sums about the warp's.
    F p[kPageTiles][kGroups][2];
    U w[kPageTiles][kGroups][2];
    F f[kGroups];
    float counted = kPageTokens;
    CERTKV_EACH (t, kPageTiles) counted -= (skip >> t & 1) != 0 ? 16 : 0;
    CERTKV_EACH (g, kGroups) {
      Sums& x = sums[g];
      F most = larger(s[0][g][0], s[0][g][1]);
      CERTKV_UNROLL
      for (int t = 1; t < kPageTiles; ++t) most = larger(most, larger(s[t][g][0], s[t][g][1]));
      most = largest_of_rows(most);
      x.rise(most);
      f[g] = exponential(most - x.m);
      F tile_sum[kPageTiles];
      CERTKV_EACH (t, kPageTiles) {
        CERTKV_EACH (half, 2) {
          p[t][g][half] = exponential(s[t][g][half] - most);
          w[t][g][half] = weight_halves(p[t][g][half]);
        }
        tile_sum[t] = p[t][g][0] + p[t][g][1];
      }
      x.l = fma(f[g], (tile_sum[0] + tile_sum[1]) + (tile_sum[2] + tile_sum[3]), x.l);
      if (kCertificate) {
        const F delta = Base::charged(bound[g]);
        c[g] = c_of(delta);
        const F sum = record(page, g, tile_sum, most, bound[g], c[g], delta, skip);
        Base::add_block(f[g] * sum, c[g], delta, nu * item.unit, eta * item.unit, vbar * item.unit,
                        true, &x);
        x.c_tokens = fma(c[g], splat(counted), x.c_tokens);
        x.score_max = max_nan(x.score_max, bound[g]);
      }
    }
    if (kCertificate) {
      CERTKV_EACH (t, kPageTiles)
        if ((skip >> t & 1) == 0) store_byte(item.used + page * kPageTiles + t, 0);
    }

    before_values();
    const std::byte* values = this->value_slot();
    if (kCertificate) {
      U n[4];
      load4(values + kPage.norms, (lane >> 2) * 16, n);
      CERTKV_EACH (g, kGroups) {
        F s1 = splat(0), squares = splat(0);
        CERTKV_EACH (t, kPageTiles) add_norms(n[t], p[t][g], &s1, &squares);
        sums[g].s1 = fma(f[g] * norm_step, s1, sums[g].s1);
        sums[g].m2 = fma(f[g] * c[g] * (norm_step * norm_step), squares, sums[g].m2);
      }
    }
    CERTKV_EACH (quad, kCells / 4) {
      F acc[2][kGroups][4][4];  // two tiles each: shorter chains
      CERTKV_EACH (pair, 2) {
        clear(acc[pair]);
        weigh_codes(values, quad, 2 * pair, w[2 * pair], acc[pair]);
        weigh_codes(values, quad, 2 * pair + 1, w[2 * pair + 1], acc[pair]);
      }
      CERTKV_EACH (g, kGroups) {
        const F scale = f[g] * factor, weighed = scale * c[g];
        CERTKV_EACH (i, 4)
          CERTKV_EACH (half, 2) {
            const F v = (acc[0][g][i][2 * half] + acc[0][g][i][2 * half + 1]) +
                        (acc[1][g][i][2 * half] + acc[1][g][i][2 * half + 1]);
            F& o = sums[g].o[quad * 4 + i][half];
            F& a = sums[g].a[quad * 4 + i][half];
            o = fma(v, scale, o);
            if (kCertificate) a = fma(v, weighed, a);
          }
      }
    }
  }

  // Norms of a tile's tokens r and r + 8, in steps: from below into s1, squares from above.
  CERTKV_FN static void add_norms(U codes, const F (&p)[2], F* s1, F* squares) {
    const F code[2] = {to_float(codes & 0xffffu), to_float(codes >> 16)};
    CERTKV_EACH (half, 2) {
      *s1 = fma(p[half], code[half], *s1);
      const F above = code[half] + kNormMargin;
      *squares = fma(p[half], above * above, *squares);
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
