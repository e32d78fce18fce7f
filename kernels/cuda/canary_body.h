// The canary: a block that is about to be served from originals has both forms at hand, so its
// codes must lie as close to the originals as its page's notes promise. See cache_body.h.
//
// In double, from the bytes that lie in the page: what exceeds a promise exceeds it in truth, for
// the promises are rounded up by far more than these sums err.
// SOURCE: method section 7; the host's canary() in runtime/certify.
#pragma once

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/lanes.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

CERTKV_FN F unpack_original(DType dtype, U pair, bool second) {
  if (dtype == DType::BF16) return float_of_bits(second ? pair & 0xffff0000u : pair << 16);
  return second ? high_half(pair) : low_half(pair);
}

// A note that must not be exceeded; a damaged one is NaN.
CERTKV_FN double promised(float note) {
  return note >= 0 ? double(note) : __builtin_nan("");
}

struct Canary {
  const LadderArgs& args;
  int index, block;
  const std::byte* rows;  // [16, head_dim] of the block's originals

  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN int page() const { return block / kPageTiles; }
  CERTKV_FN int tile() const { return block % kPageTiles; }
  CERTKV_FN const std::byte* codes() const { return pass().pages[page()].page; }

  // Of the block's keys: what its codes are off by, times -1. A lane has tokens r and r + 8 of the
  // block, four channels of each 16: body(first channel, off [2 tokens][4 channels], scale [4]).
  template <typename Body>
  CERTKV_FN void over_keys(Body body) const {
    const PassItem& p = pass();
    const int d = args.head_dim, steps = d / 32;
    const PageLayoutDevice layout = page_layout(d, p.kind);
    const bool fine = key_bits(p.kind) == 12;
    const I row = lane_index() >> 2, quad = lane_index() & 3;
    CERTKV_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      U code[4];
      load4(codes() + (tile() * steps + step) * 512, lane_index() * 16, code);
      U rest[2] = {splat_u(0), splat_u(0)};  // words 2 w and 2 w + 1 of `code` in halves of bytes
      if (fine)
        load2(codes() + layout.key_rest + (tile() * (steps / 2) + step / 2) * 512 + step % 2 * 8,
              lane_index() * 16, rest);
      CERTKV_EACH (half, 2) {
        U m[4], key[2][2];
        load4(codes() + layout.key_affine + step * 128 + half * 64, quad * 16, m);
        const F scale[4] = {low_half(m[0]), high_half(m[0]), low_half(m[1]), high_half(m[1])};
        const F offset[4] = {low_half(m[2]), high_half(m[2]), low_half(m[3]), high_half(m[3])};
        const I channel = quad * 4 + (32 * step + 16 * half);
        CERTKV_EACH (r, 2) load2(rows, (row + 8 * r) * (2 * d) + channel * 2, key[r]);
        D off[2][4];
        CERTKV_EACH (e, 4)
          CERTKV_EACH (r, 2) {
            U number = code[r + 2 * half] >> (8 * e) & 0xffu;
            if (fine) number = number << 4 | (rest[half] >> (8 * e + 4 * r) & 0xfu);
            const D served =
                to_double(to_float(number)) * to_double(scale[e]) + to_double(offset[e]);
            off[r][e] = to_double(unpack_original(args.dtype, key[r][e / 2], e % 2 == 1)) - served;
          }
        body(channel, off, scale);
      }
    }
  }

  // Whether some head's score of some token, the queries being those of the pass at hand, lies
  // farther from that of its codes than D_b + g_b of that pass.
  CERTKV_FN bool score_beyond() const {
    const PassItem& p = pass();
    const int d = args.head_dim;
    D apart[2][kMaxHeads];
    CERTKV_EACH (h, kMaxHeads) apart[0][h] = apart[1][h] = to_double(splat(0));
    over_keys([&](I channel, const D(&off)[2][4], const F(&)[4]) {
      CERTKV_EACH (h, kMaxHeads) {
        if (h < p.heads)
          CERTKV_EACH (e, 4) {
            const D q = to_double(load_float(p.scaled + h * d, channel + e));
            CERTKV_EACH (r, 2) apart[r][h] = apart[r][h] + q * off[r][e];
          }
      }
    });
    bool bad = false;
    CERTKV_EACH (h, kMaxHeads) {
      if (h < p.heads) {
        const float* record = p.records + (size_t(page()) * size_t(args.groups) + size_t(h / 4)) *
                                              size_t(kRecordFloats);
        const double bound = promised(record[kRecordBound + h % 4]);
        CERTKV_EACH (r, 2) {
          D sum = apart[r][h] + shuffle_xor(apart[r][h], 1);
          sum = sum + shuffle_xor(sum, 2);
          bad = any(beyond(sum, bound)) || bad;
        }
      }
    }
    return bad;
  }

  // What D_b rests on, whatever the query: whether a channel lies farther from its codes than
  // kappa_b of its scale, or a key than e_b.
  CERTKV_FN bool key_beyond() const {
    const auto& notes = *reinterpret_cast<const PageNotesDevice*>(
        codes() + page_layout(args.head_dim, pass().kind).notes);
    const BlockNotesDevice& own = notes.block[tile()];
    const double kappa = promised(own.kappa), e_b = promised(own.e);
    // The page's are no smaller than those of its blocks.
    bool far = !(notes.kappa >= own.kappa) || !(notes.e >= own.e);
    D square[2] = {to_double(splat(0)), to_double(splat(0))};
    over_keys([&](I, const D(&off)[2][4], const F(&scale)[4]) {
      CERTKV_EACH (r, 2)
        CERTKV_EACH (e, 4) {
          far = far || any(!at_most(magnitude(off[r][e]), to_double(scale[e]) * kappa));
          square[r] = square[r] + off[r][e] * off[r][e];
        }
    });
    CERTKV_EACH (r, 2) {
      D sum = square[r] + shuffle_xor(square[r], 1);
      sum = sum + shuffle_xor(sum, 2);
      far = any(beyond(sum, e_b * e_b)) || far;
    }
    return far;
  }

  // Of the block's values: whether one lies farther from its codes than eta_b, or is longer than
  // nu_b. A lane has tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9 and two elements of each 16.
  CERTKV_FN uint32_t value_beyond() const {
    const int d = args.head_dim;
    const PageLayoutDevice layout = page_layout(d, pass().kind);
    const bool bytes = value_bits(layout.kind) == 8;
    const int each = value_group(layout.kind);
    const auto& notes = *reinterpret_cast<const PageNotesDevice*>(codes() + layout.notes);
    const std::byte* values = codes() + layout.key_bytes;
    const I row = lane_index() >> 2, quad = lane_index() & 3;
    const double factor = notes.value_factor;
    D error2[4], norm2[4];
    CERTKV_EACH (n, 4) error2[n] = norm2[n] = to_double(splat(0));
    CERTKV_NO_UNROLL
    for (int cell = 0; cell < d / 16; ++cell) {
      const int quad_of = tile() * (d / 64) + cell / 4, group = cell * 16 / each;
      U m[4], v[4];
      load4(values + layout.value_affine + (tile() * (d / each) + group) * 64, quad * 16, m);
      const std::byte* at = values + quad_of * (bytes ? 1024 : 512) + cell % 4 * 4;
      const U word = load1(at, lane_index() * 16);
      if (bytes) {  // of tokens 0 to 7, and 8 to 15
        const U second = load1(at + 512, lane_index() * 16);
        v[0] = fma_halves(word & 0x00ff00ffu, m[0], m[1]);
        v[1] = fma_halves(word >> 8 & 0x00ff00ffu, m[0], m[1]);
        v[2] = fma_halves(second & 0x00ff00ffu, m[2], m[3]);
        v[3] = fma_halves(second >> 8 & 0x00ff00ffu, m[2], m[3]);
      } else {
        const U next = word >> 8;
        v[0] = fma_halves(word & 0x000f000fu, m[0], m[1]);
        v[1] = fma_halves(next & 0x000f000fu, m[0], m[1]);
        v[2] = fma_halves(word & 0x00f000f0u, m[2], m[3]);
        v[3] = fma_halves(next & 0x00f000f0u, m[2], m[3]);
      }
      CERTKV_EACH (n, 4) {
        const I token = quad * 2 + (n % 2 + n / 2 * 8);
        const U pair = load1(rows, token * (2 * d) + row * 4 + cell * 32);
        CERTKV_EACH (e, 2) {
          const U both = v[n / 2 * 2 + e];
          const D served = to_double(n % 2 == 1 ? high_half(both) : low_half(both)) * factor;
          const D x = to_double(unpack_original(args.dtype, pair, e == 1));
          error2[n] = error2[n] + (x - served) * (x - served);
          norm2[n] = norm2[n] + x * x;
        }
      }
    }
    // Squares of the notes are exact; they are above what they are of by 2^-40 and a float's
    // rounding, these sums err by 2^-44.
    const double eta = promised(notes.block[tile()].eta), nu = promised(notes.block[tile()].nu);
    bool far = false, longer = false;
    CERTKV_EACH (n, 4) {
      for (int mask = 4; mask < 32; mask *= 2) {
        error2[n] = error2[n] + shuffle_xor(error2[n], mask);
        norm2[n] = norm2[n] + shuffle_xor(norm2[n], mask);
      }
      far = any(beyond(error2[n], eta * eta)) || far;
      longer = any(beyond(norm2[n], nu * nu)) || longer;
    }
    return far ? kCanaryError : (longer ? kCanaryNorm : 0);
  }

  // 0, or the promise that is broken.
  CERTKV_FN uint32_t look(int part) const {
    if (part == kValues) return value_beyond();
    return score_beyond() ? kCanaryScore : 0;
  }
  // The same of what is read ahead, where no query is at hand any more.
  CERTKV_FN uint32_t look_ahead(int part) const {
    if (part == kValues) return value_beyond();
    return key_beyond() ? kCanaryScore : 0;
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
