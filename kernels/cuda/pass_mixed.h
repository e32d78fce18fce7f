// A page of which some blocks, or all, are served from originals. See pass_block.h.
#pragma once

#include "kernels/cuda/pass_codes.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct PassMixed : PassCodes<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassCodes<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using typename Base::LargestNotes;
  using typename Base::Query;
  using typename Base::Sums;

  CERTKV_FN F original(U pair, bool second) const {
    if (args.dtype == DType::BF16) return float_of_bits(second ? pair & 0xffff0000u : pair << 16);
    return second ? high_half(pair) : low_half(pair);
  }
  // Rows of a block in the slot pool; nullptr if no slot holds them.
  CERTKV_FN const std::byte* rows(int slot) const {
    if (slot < 0 || slot >= item.slot_count) {
      raise_flag(item.flags, kFlagMissing);
      return nullptr;
    }
    return item.slots + size_t(slot) * size_t(16 * kDim * 2);
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
    CERTKV_EACH (half, 2)
      CERTKV_EACH (i, kSteps)
        load4(keys + i * 64, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 16, k[half][i]);
    CERTKV_EACH (g, kGroups) {
      F sum[2][4], last[4];  // of the first two terms, half of the steps each; of the third
      CERTKV_EACH (i, 4) sum[0][i] = sum[1][i] = last[i] = splat(0);
      const I term = (lane >> 2) & 1, head = (lane >> 3) + 4 * g;
      CERTKV_EACH (step, 2 * kSteps) {
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
      CERTKV_EACH (half, 2) {
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
    CERTKV_EACH (half, 2)
      CERTKV_EACH (c, kCells)
        load2(values + c * 32, row_of(half, tokens) * (kDim * 2) + (lane & 3) * 8, v[half][c]);
    if (kCertificate) {
      // Roundings of squares and sums, half of them after the root, and the root's own.
      constexpr float kSlack = float((kDim / 4 + 8) * 0x1p-24) + 0x1p-20f;
      CERTKV_EACH (half, 2) {
        F n2 = splat(0);
        CERTKV_EACH (c, kCells)
          CERTKV_EACH (e, 4) {
            const F x = original(v[half][c][e / 2], e % 2 == 1) * item.unit;
            n2 = fma(x, x, n2);
          }
        n2 = n2 + shuffle_xor(n2, 1);
        const F norm = root(n2 + shuffle_xor(n2, 2));
        const F below = norm * (1 - kSlack), above = norm * (1 + kSlack);
        CERTKV_EACH (g, kGroups) {
          s1[g] = fma(p[g][half], below, s1[g]);
          squares[g] = fma(p[g][half], above * above, squares[g]);
        }
      }
    }
    U b[kGroups][2][2];  // of bfloat16: first two terms of a weight, and the third
    CERTKV_EACH (g, kGroups)
      CERTKV_EACH (half, 2) {
        U term[3];
        Base::split_brains(p[g][half], splat(0), term);
        b[g][0][half] = halves ? w[g][half] : transpose_8x8(term[0] | term[1] << 16);
        b[g][1][half] = halves ? splat_u(0) : transpose_8x8(term[2]);
      }
    const float scale = halves ? item.unit / kWeightScale : item.unit;
    CERTKV_EACH (c, kCells) {
      U a[4];
      CERTKV_EACH (half, 2) {
        a[2 * half] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x5410));
        a[2 * half + 1] = transpose_8x8(pick_bytes(v[half][c][0], v[half][c][1], 0x7632));
      }
      CERTKV_EACH (g, kGroups) {
        F sum[4], last[4];
        CERTKV_EACH (i, 4) sum[i] = last[i] = splat(0);
        mma_original(sum, a, b[g][0][0], b[g][0][1]);
        if (!halves) mma_brains(last, a, b[g][1][0], b[g][1][1]);
        v_sum[g][c][0] = (sum[0] + (sum[1] + last[0])) * scale;
        v_sum[g][c][1] = (sum[2] + (sum[3] + last[2])) * scale;
      }
    }
  }

  // Blocks served from originals, of all entries of the split in order, are dealt out to the warps,
  // the last one first, for it has the fewest pages: this warp's, as 4 entry + tile. Returns how
  // many.
  CERTKV_FN int list_tiles() const {
    const I lane = lane_index();
    const int count = this->pages(), place = kWarps - 1 - this->warp;
    int dealt = 0;
    for (int first = 0; first < count; first += 32) {
      const I n = select(lane + first < count, lane + first, splat_i(count - 1));
      U words[4];  // of a PageEntry
      load4(reinterpret_cast<const std::byte*>(this->entries()), n * 16, words);
      const U wished = (words[2] | words[2] >> 4) & 0xfu;
      const U open = (splat_u(1) << ((words[3] + 15u) >> 4)) - 1u;
      U tiles = select((words[0] | words[1]) == 0u, open, wished);
      tiles = select(lane + first < count, tiles, splat_u(0));
      if (!any(tiles != 0u)) continue;
      const U own = (tiles & 1u) + (tiles >> 1 & 1u) + (tiles >> 2 & 1u) + (tiles >> 3);
      U sum = own;
      CERTKV_UNROLL
      for (int step = 1; step < 32; step *= 2)
        sum = sum + select(lane >= step, shuffle(sum, lane - step), splat_u(0));
      U at = sum - own + uint32_t(dealt);
      CERTKV_EACH (t, kPageTiles) {
        const B has = (tiles >> t & 1u) == 1u;
        const U turn = at / uint32_t(kWarps), whose = at - turn * uint32_t(kWarps);
        store_where(has & (whose == uint32_t(place)), reinterpret_cast<float*>(this->own_tiles()),
                    index_of(turn), float_of_bits(word_of(n * kPageTiles + t)));
        at = at + select(has, splat_u(1), splat_u(0));
      }
      dealt += int(uniform(sum, 31));
    }
    sync_lanes();
    return (dealt + kWarps - 1 - place) / kWarps;
  }

  // The rows of the warp's blocks of originals, on their way to the L2 cache.
  CERTKV_FN void call_originals(int count) const {
    const I lane = lane_index();
    CERTKV_NO_UNROLL
    for (int first = 0; first < count; first += 32) {
      const I own = select(lane + first < count, lane + first, splat_i(first));
      const U id = load1(reinterpret_cast<const std::byte*>(this->own_tiles()), own * 4);
      const I block = (index_of(id) + this->first_page() * kPageTiles) * 4;
      const U keys = load1(reinterpret_cast<const std::byte*>(item.key_slot), block);
      const U values = load1(reinterpret_cast<const std::byte*>(item.value_slot), block);
      for (int i = 0; i < count - first && i < 32; ++i)
        for (const int slot : {int(uniform(keys, i)), int(uniform(values, i))})
          if (slot >= 0 && slot < item.slot_count)
            prefetch(item.slots + size_t(slot) * size_t(16 * kDim * 2), lane * kDim);
    }
  }

  // The warp's blocks of originals, one after the other, into sums of their own. Its slots are
  // free.
  CERTKV_FN void blocks_of_originals(int count, const F (&q)[kGroups][kSteps * 4],
                                     const F (&norm)[kGroups], Sums (&part)[kGroups],
                                     LargestNotes* largest) const {
    const I lane = lane_index();
    sync_lanes();
    CERTKV_NO_UNROLL
    for (int head = 0; head < kHeads; ++head) this->split_query(head);
    sync_lanes();
    CERTKV_EACH (g, kGroups) part[g].clear();
    CERTKV_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      const int id = int(this->own_tiles()[i]), t = id % kPageTiles;
      const PageEntry entry = this->entries()[id / kPageTiles];
      const int page = this->first_page() + id / kPageTiles, cell = page * kPageTiles + t;
      const int left = entry.tokens - 16 * t, tokens = left < 16 ? left : 16;
      const bool coded = entry.page != nullptr;
      const uint32_t wants = coded ? entry.wants : 0xffu;
      const std::byte* k = (wants >> t & 1) != 0 ? rows(item.key_slot[cell]) : nullptr;
      const std::byte* v = (wants >> (4 + t) & 1) != 0 ? rows(item.value_slot[cell]) : nullptr;
      const bool quantised = coded && k == nullptr;  // T
      const bool lost = !coded && (k == nullptr || v == nullptr);
      const bool alone = coded && Base::mixed(entry) == 0xfu;
      F s[kGroups][2], p[kGroups][2], s1[kGroups], squares[kGroups], c[kGroups], delta[kGroups],
          bound[kGroups];
      U w[kGroups][2];
      float norm_step = 0, factor = 0, nu = 0, eta = 0, vbar = 0;
      CERTKV_EACH (g, kGroups)
        bound[g] = c[g] = delta[g] = s[g][0] = s[g][1] = s1[g] = squares[g] = splat(0);
      if (coded) {  // what codes are needed is read where it lies: the page is another warp's
        const PageNotesDevice& notes =
            *reinterpret_cast<const PageNotesDevice*>(entry.page + kPage.notes);
        norm_step = accepted(notes.norm_step) * item.unit;
        factor = accepted(notes.value_factor) * (item.unit / kWeightScale);
        nu = notes.block[t].nu;
        eta = notes.block[t].eta;
        vbar = notes.block[t].vbar;
        if (quantised || alone) {
          Query query[kGroups];
          CERTKV_EACH (g, kGroups) {
            this->prepare(entry.page, notes, q[g], norm[g], &query[g]);
            bound[g] = query[g].bound;
            delta[g] = Base::charged(bound[g]);
            c[g] = c_of(delta[g]);
          }
          if (quantised) Base::score_codes(entry.page, t, query, s);
        }
      }
      if (kCertificate) {
        if (!coded) nu = vbar = item.open_nu[cell];
        largest->take(splat(nu), splat(eta), splat(vbar));
        if (v != nullptr) {
          eta = 0;
          vbar = nu;
        }
      }
      if (k != nullptr) score_rows(k, tokens, s);
      CERTKV_EACH (g, kGroups) {
        CERTKV_EACH (half, 2) {
          if (lost) s[g][half] = splat(__builtin_nanf(""));
          s[g][half] =
              select((lane >> 2) + 8 * half < tokens, s[g][half], splat(-__builtin_inff()));
        }
        part[g].rise(largest_of_rows(larger(s[g][0], s[g][1])));
        CERTKV_EACH (half, 2) {
          p[g][half] = exponential(s[g][half] - part[g].m);
          w[g][half] = Base::weight_halves(p[g][half]);
        }
        const F sum = p[g][0] + p[g][1];
        part[g].l = part[g].l + sum;
        if (kCertificate) {
          F charge = delta[g];
          if (k != nullptr) {
            const float gamma =
                float(gamma_n(chain_originals_device(kDim)) * (1 + 8 * kUnit) * (1 + 0x1p-20));
            charge = Base::charged(load_float(this->norms(), (lane & 3) + 4 * g) *
                                   (gamma * accepted(item.k_norm[cell])));
          }
          const I row = lane >> 2;
          const F of_rows = sum_rows(sum), c_used = k != nullptr ? c_of(charge) : c[g];
          // In the rows that stand for the tile.
          const F weight = select((row & 3) == t, of_rows, splat(0));
          Base::add_block(weight, c_used, charge, splat(nu * item.unit), splat(eta * item.unit),
                          splat(vbar * item.unit), k == nullptr, &part[g]);
          if (k == nullptr) part[g].sum(kSumTail) = part[g].sum(kSumTail) + weight;
          part[g].sum(kSumFlushed) =
              part[g].sum(kSumFlushed) +
              select((row & 3) == t, (c_used + 1) * float(kMaxBlockTokens), splat(0));
          const F one = select(row < 1, of_rows, select(row < 2, part[g].m, charge));
          float* to = this->record_of(page, g);
          store_where(row < 3, to + t * 4, row * 16 + (lane & 3), one);
          if (alone || !coded)
            store_where(row < 2, to + kRecordBound, lane, select(row < 1, bound[g], c[g]));
          if (quantised) {
            part[g].c_tokens = fma(c[g], splat(float(tokens)), part[g].c_tokens);
            part[g].score_max = max_nan(part[g].score_max, bound[g]);
          }
        }
      }
      if (kCertificate)
        store_byte(item.used + cell, uint8_t((k != nullptr ? kUsedOriginalKey : 0) |
                                             (v != nullptr ? kUsedOriginalValue : 0)));

      F of_tile[kGroups][kCells][2];
      if (v != nullptr) {
        weigh_rows(v, tokens, p, w, of_tile, s1, squares);
      } else if (coded) {
        const std::byte* values = entry.page + kPage.key_bytes;
        const U n = load1(values + kPage.norms + t * 4, (lane >> 2) * 16);
        CERTKV_EACH (g, kGroups) {
          Base::add_norms(n, p[g], &s1[g], &squares[g]);
          s1[g] = s1[g] * norm_step;
          squares[g] = squares[g] * (norm_step * norm_step);
        }
        CERTKV_EACH (quad, kCells / 4) {
          F acc[kGroups][4][4];
          Base::clear(acc);
          Base::weigh_codes(values, quad, t, w, acc);
          CERTKV_EACH (g, kGroups)
            CERTKV_EACH (n4, 4) {
              of_tile[g][quad * 4 + n4][0] = (acc[g][n4][0] + acc[g][n4][1]) * factor;
              of_tile[g][quad * 4 + n4][1] = (acc[g][n4][2] + acc[g][n4][3]) * factor;
            }
        }
      } else {
        continue;  // nothing to weigh: its weights are NaN already
      }
      CERTKV_EACH (g, kGroups) {
        part[g].s1 = part[g].s1 + s1[g];
        if (quantised) part[g].m2 = fma(c[g], squares[g], part[g].m2);
        CERTKV_EACH (n, kCells)
          CERTKV_EACH (half, 2) {
            part[g].o[n][half] = part[g].o[n][half] + of_tile[g][n][half];
            if (kCertificate && quantised)
              part[g].a[n][half] = fma(of_tile[g][n][half], c[g], part[g].a[n][half]);
          }
      }
    }
  }

  CERTKV_FN static void join(const Sums& part, Sums* to) {
    to->rise(part.m);
    // Both are minus infinity where a warp had nothing to do.
    const F f = select(part.m == to->m, splat(1), exponential(part.m - to->m));
    to->l = fma(f, part.l, to->l);
    to->s1 = fma(f, part.s1, to->s1);
    to->m2 = fma(f, part.m2, to->m2);
    if (kCertificate) {
      for (int entry = kFirstOfBlocks; entry < kFirstPlain; ++entry)
        to->of_blocks[entry - kFirstOfBlocks] =
            fma(f, part.of_blocks[entry - kFirstOfBlocks], to->of_blocks[entry - kFirstOfBlocks]);
      to->of_blocks[kSumFlushed - kFirstOfBlocks] = to->of_blocks[kSumFlushed - kFirstOfBlocks] +
                                                    part.of_blocks[kSumFlushed - kFirstOfBlocks];
    }
    to->c_tokens = to->c_tokens + part.c_tokens;
    to->score_max = max_nan(to->score_max, part.score_max);
    CERTKV_EACH (n, kCells)
      CERTKV_EACH (half, 2) {
        to->o[n][half] = fma(f, part.o[n][half], to->o[n][half]);
        if (kCertificate) to->a[n][half] = fma(f, part.a[n][half], to->a[n][half]);
      }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
