// A query prepared for one page: signed bytes, and what they lose. See pass_block.h.
#pragma once

#include "kernels/cuda/pass_block.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
struct PassQuery : PassBlock<kDim, kGroups, kCertificate, kWarps, kKind> {
  using Base = PassBlock<kDim, kGroups, kCertificate, kWarps, kKind>;
  using Base::args, Base::item, Base::kCells, Base::kHeads, Base::kPage, Base::kSteps;
  using typename Base::Sums;

  // q times the channels' scales as signed bytes: unit (256 high + low), and what that loses: of
  // the rests, those about the codes' middle are lost, and the middle's share is in the base.
  // SOURCE: method section 3 (dq); kernels/METHOD.md, "Integer scores".
  static constexpr float kMiddle = float(1 << (key_bits(kKind) - 1));
  struct Query {
    U b[kSteps][2];       // fragments B: columns 2 h and 2 h + 1 are high and low of head h
    F unit, base, bound;  // C fragment; bound: D_b + g_b
  };

  CERTKV_FN void prepare(const std::byte* keys, const PageNotesDevice& notes,
                         const F (&q)[kSteps * 4], F norm, Query* out) const {
    const I lane = lane_index();
    F x[kSteps * 4];
    F sum = splat(0), base = splat(0), most = splat(0);
    CERTKV_EACH (i, kSteps) {
      U m[4];
      load4(keys + kPage.key_affine + i * 128, (lane & 7) * 16, m);
      const F scale[4] = {low_half(m[0]), high_half(m[0]), low_half(m[1]), high_half(m[1])};
      const F offset[4] = {low_half(m[2]), high_half(m[2]), low_half(m[3]), high_half(m[3])};
      CERTKV_EACH (e, 4) {
        const F stepped = q[i * 4 + e] * scale[e];
        x[i * 4 + e] = stepped;
        sum = sum + magnitude(stepped);
        most = larger(most, magnitude(stepped));
        base = fma(q[i * 4 + e], offset[e], base);
      }
    }
    sum = sum_eight(sum);
    base = sum_eight(base);
    most = larger(most, shuffle_xor(most, 1));
    most = larger(most, shuffle_xor(most, 2));
    most = larger(most, shuffle_xor(most, 4)) + (sum - sum);  // NaN if one x is not finite
    const B usable = most > 0x1p-100f;
    // Any inverse will do that leaves the levels within 32639: the rests are taken from `unit`.
    const F inverse = select(usable, reciprocal(most) * kQueryLevels, splat(0));
    const F unit = select(usable, most * (1 / kQueryLevels), most - most);
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the integer lies in the lowest bits
    F rests = splat(0), lost = splat(0);
    U high[kSteps], low[kSteps];
    CERTKV_EACH (i, kSteps) {
      U n[4];
      CERTKV_EACH (e, 4) {
        const F shifted = fma(x[i * 4 + e], inverse, splat(kMagic));
        n[e] = bits_of(shifted);
        const F rest = fma(splat(kMagic) - shifted, unit, x[i * 4 + e]);
        rests = rests + rest;
        lost = lost + magnitude(rest);
      }
      low[i] = pick_bytes(pick_bytes(n[0], n[1], 0x0040), pick_bytes(n[2], n[3], 0x0040), 0x5410);
      // The low byte is a signed one; the high byte makes up for its sign.
      high[i] = pick_bytes(pick_bytes(n[0] + 128u, n[1] + 128u, 0x0051),
                           pick_bytes(n[2] + 128u, n[3] + 128u, 0x0051), 0x5410);
    }
    rests = sum_eight(rests);
    lost = sum_eight(lost);
    // This lane has one half of the channels, its neighbour 4 lanes on the other.
    const B of_high = (lane & 4) == 0;
    CERTKV_EACH (i, kSteps) {
      const U other = shuffle_xor(select(of_high, low[i], high[i]), 4);
      out->b[i][0] = select(of_high, high[i], other);
      out->b[i][1] = select(of_high, other, low[i]);
    }
    // As kernels/cpu/attend_tiles.inc; chains here are shorter.
    const float gamma =
        float(gamma_n(chain_codes(kDim)) * (1 + 8 * kUnit)) * accepted(notes.kbar_norm);
    const F rounding = norm * gamma + lost * (kMiddle * (1 + 0x1p-18f));
    const F by_channel = sum * ((1 + 0x1p-18f) * accepted(notes.kappa));
    const F bound = (min_nan(by_channel, norm * accepted(notes.e)) + rounding) * (1 + 0x1p-20f);
    const I from = (lane & 3) * 8;
    out->unit = shuffle(unit, from);
    out->base = shuffle(base + rests * kMiddle, from);
    out->bound = shuffle(bound, from);
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE
