// A page of which some blocks, or all, are served from originals. See pass_block.h.
#pragma once

#include "kernels/cuda/pass_codes.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate>
struct PassMixed : PassCodes<kDim, kGroups, kCertificate> {
  using Base = PassCodes<kDim, kGroups, kCertificate>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using typename Base::Query;
  using typename Base::Sums;

  CERTKV_FN F original(U pair, bool second) const {
    if (args.dtype == DType::BF16) return float_of_bits(second ? pair & 0xffff0000u : pair << 16);
    return second ? high_half(pair) : low_half(pair);
  }
  // Rows of a block in the slot pool; nullptr if no slot holds them.
  CERTKV_FN const std::byte* rows(int slot) const {
    if (slot < 0 || slot >= args.slot_count) {
      raise_flag(item.flags, kFlagMissing);
      return nullptr;
    }
    return args.slots + size_t(slot) * size_t(16 * kDim * 2);
  }
  CERTKV_FN void mma_original(F (&sum)[4], const U (&a)[4], U b0, U b1) const {
    if (args.dtype == DType::BF16)
      mma_brains(sum, a, b0, b1);
    else
      mma_halves(sum, a, b0, b1);
  }
  // Row of token r + 8 half, of a valid token: beyond the last a weight is 0, a NaN would not be.
  CERTKV_FN static I row_of(int half, int tokens) {
    const I wanted = (lane_index() >> 2) + 8 * half;
    return select(wanted < tokens, wanted, splat_i(tokens - 1));
  }

  // Scores of tokens r and r + 8 of a block of original keys.
  CERTKV_FN void score_rows(const std::byte* keys, int tokens, F (&s)[kGroups][2]) const {
    const I lane = lane_index();
    U k[2][kSteps][4];
    CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) CERTKV_UNROLL
    for (int i = 0; i < kSteps; ++i)
      load4(keys + i * 64, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 16, k[half][i]);
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      F sum[2][4], last[4];  // of the first two terms, half of the steps each; of the third
      CERTKV_UNROLL
      for (int i = 0; i < 4; ++i) sum[0][i] = sum[1][i] = last[i] = splat(0);
      const I term = (lane >> 2) & 1, head = (lane >> 3) + 4 * g;
      CERTKV_UNROLL
      for (int step = 0; step < 2 * kSteps; ++step) {
        const int i = step / 2, z = step % 2 * 2;
        const U a[4] = {k[0][i][z], k[1][i][z], k[0][i][z + 1], k[1][i][z + 1]};
        const std::byte* from = this->terms() + step * (3 * kHeads * 32);
        U b[2];
        load2(from, (term * kHeads + head) * 32 + (lane & 3) * 8, b);
        mma_original(sum[step / kSteps], a, b[0], b[1]);
        if (args.dtype == DType::BF16) {
          load2(from + 2 * kHeads * 32, head * 32 + (lane & 3) * 8, b);
          mma_brains(last, a, b[0], b[1]);
        }
      }
      // `last` has the third term in both columns of a head: one is taken.
      const F scale = load_float(this->scales(), (lane & 3) + 4 * g);
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * half;
        const F small = last[n] + (sum[0][n + 1] + sum[1][n + 1]);
        s[g][half] = ((sum[0][n] + sum[1][n]) + small) * scale;
      }
    }
  }

  // sum p v of a block of original values, in units, and what its norms add to s1 and m2.
  CERTKV_FN void weigh_rows(const std::byte* values, int tokens, const F (&p)[kGroups][2],
                            const U (&w)[kGroups][2], F (&v_sum)[kGroups][kCells][2],
                            F (&s1)[kGroups], F (&squares)[kGroups]) const {
    const I lane = lane_index();
    const bool halves = args.dtype == DType::F16;
    U v[2][kCells][2];
    CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) CERTKV_UNROLL
    for (int c = 0; c < kCells; ++c)
      load2(values + c * 32, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 8, v[half][c]);
    if (kCertificate) {
      // Roundings of squares and sums, half of them after the root, and the root's own.
      constexpr float kSlack = float((kDim / 4 + 8) * 0x1p-24) + 0x1p-20f;
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        F n2 = splat(0);
        CERTKV_UNROLL
        for (int c = 0; c < kCells; ++c) CERTKV_UNROLL
        for (int e = 0; e < 4; ++e) {
          const F x = original(v[half][c][e / 2], e % 2 == 1) * item.unit;
          n2 = fma(x, x, n2);
        }
        n2 = n2 + shuffle_xor(n2, 1);
        const F norm = root(n2 + shuffle_xor(n2, 2));
        const F below = norm * (1 - kSlack), above = norm * (1 + kSlack);
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          s1[g] = fma(p[g][half], below, s1[g]);
          squares[g] = fma(p[g][half], above * above, squares[g]);
        }
      }
    }
    U b[kGroups][2][2];  // of bfloat16: first two terms of a weight, and the third
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
    for (int half = 0; half < 2; ++half) {
      U term[3];
      Base::split_brains(p[g][half], splat(0), term);
      b[g][0][half] = halves ? w[g][half] : transpose_8x8(term[0] | term[1] << 16);
      b[g][1][half] = halves ? splat_u(0) : transpose_8x8(term[2]);
    }
    const float scale = halves ? item.unit / kWeightScale : item.unit;
    CERTKV_UNROLL
    for (int c = 0; c < kCells; ++c) {
      U a[4];
      CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        a[2 * half] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x5410));
        a[2 * half + 1] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x7632));
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        F sum[4], last[4];
        CERTKV_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] = last[i] = splat(0);
        mma_original(sum, a, b[g][0][0], b[g][0][1]);
        if (!halves) mma_brains(last, a, b[g][1][0], b[g][1][1]);
        v_sum[g][c][0] = (sum[0] + (sum[1] + last[0])) * scale;
        v_sum[g][c][1] = (sum[2] + (sum[3] + last[2])) * scale;
      }
    }
  }

  // Rows that a page will need, on their way to the L2 cache while another is served.
  CERTKV_FN void prefetch_originals(int page, const PageEntry& entry) const {
    const uint32_t wants = entry.page != nullptr ? entry.wants : 0xffu;
    if (wants == 0) return;
    // Lanes 0 to 3 have the blocks' keys, 4 to 7 their values.
    const I lane = lane_index(), block = (lane & 3) * 4;
    const U slots = select(
        (lane & 4) == 0, load1(reinterpret_cast<const std::byte*>(item.key_slot + page * 4), block),
        load1(reinterpret_cast<const std::byte*>(item.value_slot + page * 4), block));
    CERTKV_UNROLL
    for (int n = 0; n < 2 * kPageTiles; ++n) {
      const int slot = int(uniform(slots, n));
      if ((wants >> n & 1) == 0 || slot < 0 || slot >= args.slot_count) continue;
      prefetch(args.slots + size_t(slot) * size_t(16 * kDim * 2), lane * kDim);
    }
  }

  // Blocks of which something is served from originals, one after the other, a tile each; their
  // sums join each other and then the warp's. Others are page_of_codes()'s: `alone` says there are
  // none. REQUIRES that values have arrived where the page has codes.
  CERTKV_FN void blocks_of_originals(int page, const PageEntry& entry, bool alone,
                                     const std::byte* keys, const F (&q)[kGroups][kSteps * 4],
                                     const F (&norm)[kGroups], Sums (&sums)[kGroups]) const {
    const I lane = lane_index();
    const bool coded = entry.page != nullptr;
    const uint32_t wants = coded ? entry.wants : 0xffu;
    Query query[kGroups];
    F c[kGroups], delta[kGroups];
    float norm_step = 0, factor = 0;
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) query[g].bound = c[g] = delta[g] = splat(0);
    // Slots of all four blocks at once.
    const I block = (lane & 3) * 4;
    const U key_slots = load1(reinterpret_cast<const std::byte*>(item.key_slot + page * 4), block);
    const U value_slots =
        load1(reinterpret_cast<const std::byte*>(item.value_slot + page * 4), block);
    const U k_norms = load1(reinterpret_cast<const std::byte*>(item.k_norm + page * 4), block);
    const int tiles = (entry.tokens + 15) / 16;
    const std::byte *key_rows[kPageTiles], *value_rows[kPageTiles];
    uint32_t used = 0;
    CERTKV_UNROLL
    for (int t = 0; t < kPageTiles; ++t) {
      key_rows[t] = value_rows[t] = nullptr;
      if (t >= tiles) continue;
      if ((wants >> t & 1) != 0) key_rows[t] = rows(int(uniform(key_slots, t)));
      if ((wants >> (4 + t) & 1) != 0) value_rows[t] = rows(int(uniform(value_slots, t)));
      used |= (key_rows[t] != nullptr ? 1u : 0u) << t | (value_rows[t] != nullptr ? 16u : 0u) << t;
    }

    const uint32_t mixed = (wants | wants >> 4) & 0xfu;
    if (coded) {
      const PageNotesDevice& notes = *reinterpret_cast<const PageNotesDevice*>(keys + kPage.notes);
      norm_step = accepted(notes.norm_step) * item.unit;
      factor = accepted(notes.value_factor) * (item.unit / kWeightScale);
    }
    // A block may have original values alone, or want what no slot holds.
    if (coded && (alone || (mixed & ~used) != 0)) {
      const PageNotesDevice& notes = *reinterpret_cast<const PageNotesDevice*>(keys + kPage.notes);
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        this->prepare(keys, notes, q[g], norm[g], &query[g]);
        delta[g] = Base::charged(query[g].bound);
        c[g] = c_of(delta[g]);
      }
    }
    Sums part[kGroups];
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) part[g].clear();
    sync_lanes();  // what page_of_codes() has recorded for these blocks is overwritten
    CERTKV_NO_UNROLL
    for (int t = 0; t < tiles; ++t) {
      if ((mixed >> t & 1) == 0) continue;
      const int tokens = entry.tokens - 16 * t < 16 ? entry.tokens - 16 * t : 16;
      const std::byte *k = key_rows[t], *v = value_rows[t];
      const bool quantised = coded && k == nullptr;  // T
      const bool lost = !coded && (k == nullptr || v == nullptr);
      F s[kGroups][2], p[kGroups][2], s1[kGroups], squares[kGroups];
      U w[kGroups][2];
      if (k != nullptr) {
        score_rows(k, tokens, s);
      } else if (coded) {
        Base::score_codes(keys, t, query, s);
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (lost) s[g][half] = splat(__builtin_nanf(""));
          s[g][half] =
              select((lane >> 2) + 8 * half < tokens, s[g][half], splat(-__builtin_inff()));
        }
        part[g].rise(largest_of_rows(larger(s[g][0], s[g][1])));
        CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          p[g][half] = exponential(s[g][half] - part[g].m);
          w[g][half] = Base::weight_halves(p[g][half]);
        }
        const F sum = p[g][0] + p[g][1];
        part[g].l = part[g].l + sum;
        s1[g] = squares[g] = splat(0);
        if (kCertificate) {
          F charge = delta[g];
          if (k != nullptr) {
            const float k_norm = accepted(uniform(float_of_bits(k_norms), t));
            const float gamma =
                float(gamma_n(chain_originals_device(kDim)) * (1 + 8 * kUnit) * (1 + 0x1p-20));
            charge =
                Base::charged(load_float(this->norms(), (lane & 3) + 4 * g) * (gamma * k_norm));
          }
          const I row = lane >> 2;
          const F cell = select(row < 1, sum_rows(sum), select(row < 2, part[g].m, charge));
          store_where(row < 3, this->record_of(page, g) + t * 4, row * 16 + (lane & 3), cell);
          if (quantised) {
            part[g].c_tokens = fma(c[g], splat(float(tokens)), part[g].c_tokens);
            part[g].score_max = query[g].bound;
          }
        }
      }

      F of_tile[kGroups][kCells][2];
      if (v != nullptr) {
        weigh_rows(v, tokens, p, w, of_tile, s1, squares);
      } else if (coded) {
        const std::byte* values = this->value_slot();
        const U n = load1(values + kPage.norms + t * 4, (lane >> 2) * 16);
        CERTKV_UNROLL
        for (int g = 0; g < kGroups; ++g) {
          Base::add_norms(n, p[g], &s1[g], &squares[g]);
          s1[g] = s1[g] * norm_step;
          squares[g] = squares[g] * (norm_step * norm_step);
        }
        CERTKV_UNROLL
        for (int quad = 0; quad < kCells / 4; ++quad) {
          F acc[kGroups][4][4];
          Base::clear(acc);
          Base::weigh_codes(values, quad, t, w, acc);
          CERTKV_UNROLL
          for (int g = 0; g < kGroups; ++g) CERTKV_UNROLL
          for (int i = 0; i < 4; ++i) {
            of_tile[g][quad * 4 + i][0] = (acc[g][i][0] + acc[g][i][1]) * factor;
            of_tile[g][quad * 4 + i][1] = (acc[g][i][2] + acc[g][i][3]) * factor;
          }
        }
      } else {
        continue;  // nothing to weigh: its weights are NaN already
      }
      CERTKV_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const F in_t = quantised ? c[g] : splat(0);
        part[g].s1 = part[g].s1 + s1[g];
        if (quantised) part[g].m2 = fma(c[g], squares[g], part[g].m2);
        CERTKV_UNROLL
        for (int i = 0; i < kCells; ++i) CERTKV_UNROLL
        for (int half = 0; half < 2; ++half) {
          part[g].o[i][half] = part[g].o[i][half] + of_tile[g][i][half];
          if (kCertificate && quantised)
            part[g].a[i][half] = fma(of_tile[g][i][half], in_t, part[g].a[i][half]);
        }
      }
    }

    if (kCertificate) store_word(item.used + page, used);
    CERTKV_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      Sums& x = sums[g];
      if (kCertificate && alone) {
        const I row = lane >> 2;
        store_where(row < 2, this->record_of(page, g) + kRecordBound, lane,
                    select(row < 1, query[g].bound, c[g]));
      }
      x.rise(part[g].m);
      const F f = exponential(part[g].m - x.m);
      x.l = fma(f, part[g].l, x.l);
      x.s1 = fma(f, part[g].s1, x.s1);
      x.m2 = fma(f, part[g].m2, x.m2);
      x.c_tokens = x.c_tokens + part[g].c_tokens;
      x.score_max = max_nan(x.score_max, part[g].score_max);
      CERTKV_UNROLL
      for (int i = 0; i < kCells; ++i) CERTKV_UNROLL
      for (int half = 0; half < 2; ++half) {
        x.o[i][half] = fma(f, part[g].o[i][half], x.o[i][half]);
        if (kCertificate) x.a[i][half] = fma(f, part[g].a[i][half], x.a[i][half]);
      }
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
