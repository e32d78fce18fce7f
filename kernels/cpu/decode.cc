// Decoding: what a page's codes stand for.
#include <cmath>

#include "kernels/cpu/page_codes.h"
#include "kernels/quantize.h"

namespace certkv {

using namespace cpu;

ServedAffine served_key_affine(const PageFormat& format, const std::byte* page, int channel) {
  const TensorPlanes& kp = format.layout.key;
  const ServedPlanes served(kp);
  const float scale = load_metadata(kp.metadata, page + format.key_scale, size_t(channel));
  const float offset = load_metadata(kp.metadata, page + format.key_offset, size_t(channel));
  return {served.step(scale), served.base(scale, offset), kp.levels() >> served.shift};
}

namespace {

double decode_key(const PageFormat& format, const std::byte* page, size_t t, size_t c) {
  const TensorPlanes& kp = format.layout.key;
  int code = std::to_integer<int>(page[format.key_base + key_cell(format, t, c)]);
  if (kp.read_residual) {
    const int pair =
        std::to_integer<int>(page[format.key_residual + key_residual_cell(format, t, c)]);
    code = code << kp.residual_bits | (c % 2 == 1 ? pair >> 4 : pair & 15);
  }
  const ServedAffine s = served_key_affine(format, page, int(c));
  return double(code) * s.step + s.base;
}

// Largest squares over the tokens. NaN, once seen, stays.
struct Squares {
  double error = 0, norm = 0;
};
CERTKV_SIMD void raise(double& largest, double x) {
  if (!(x <= largest) && largest == largest) largest = x;
}

constexpr size_t kMostValueGroups = kMaxHeadDim / 16, kMostBlockTokens = 32;
struct BlockAffine {
  float step[kMostValueGroups][kMostBlockTokens], base[kMostValueGroups][kMostBlockTokens];
};

// Step and base of each token and group from `first` on.
CERTKV_SIMD void block_affine(const PageFormat& format, const std::byte* page, size_t first,
                              BlockAffine* out) {
  const TensorPlanes& vp = format.layout.value;
  const ServedPlanes served(vp);
  for (size_t g = 0; g < size_t(format.value_groups); ++g)
    for (size_t t = 0; t < size_t(format.block_tokens); t += kLanes) {
      const size_t at = g * size_t(format.group_tokens) + first + t;
      const Float8 scale = load_metadata8(vp.metadata, page + format.value_scale, at);
      const Float8 offset = load_metadata8(vp.metadata, page + format.value_offset, at);
      store8(out->step[g] + t, served.step(scale));
      store8(out->base[g] + t, served.base(scale, offset));
    }
}

template <DType dtype>
CERTKV_SIMD Squares block_squares(const PageFormat& format, const std::byte* page, size_t first,
                                  const uint16_t* v) {
  BlockAffine affine;
  block_affine(format, page, first, &affine);
  const size_t d = size_t(format.head_dim), groups = size_t(format.value_groups);
  const size_t group = size_t(format.value_group);
  Squares worst;
  for (size_t t = 0; t < size_t(format.block_tokens); ++t) {
    uint8_t codes[kMaxHeadDim];
    unpack_value_codes(format, page, first + t, codes);
    Double8 error2[2], norm2[2];
    for (size_t g = 0; g < groups; ++g) {
      const Double8 step = splat8(double(affine.step[g][t])),
                    base = splat8(double(affine.base[g][t]));
      for (size_t c = g * group; c < (g + 1) * group; c += 2 * kLanes) {
        Double8 code[2];
        bytes16(codes + c, &code[0], &code[1]);
        for (size_t i = 0; i < 2; ++i) {
          const Double8 x = to_double(widen8<dtype>(v + t * d + c + i * kLanes));
          const Double8 e = x - (code[i] * step + base);
          error2[i] += e * e;
          norm2[i] += x * x;
        }
      }
    }
    raise(worst.error, sum8(error2[0] + error2[1]));
    raise(worst.norm, sum8(norm2[0] + norm2[1]));
  }
  return worst;
}

CERTKV_CPU_VERSIONS Squares block_squares(const PageFormat& format, const std::byte* page,
                                          size_t first, DType dtype, const uint16_t* v) {
  return dtype == DType::BF16 ? block_squares<DType::BF16>(format, page, first, v)
                              : block_squares<DType::F16>(format, page, first, v);
}

}  // namespace

// Halves are multiples of 2^-24 below 2^16: a served value is exact in double, and a difference
// from it rounds once. What remains are sums of at most 256 terms >= 0 in 53 bits: within 2^-44 of
// the true norms, in seal_page and here, and seal_page adds 2^-40. So undamaged values never
// exceed their annotations, and a true error beyond annotation (1 + 2^-44) always does.
ValueErrors value_errors(const PageFormat& format, const std::byte* page, int block, DType dtype,
                         const uint16_t* v) {
  const Squares worst =
      block_squares(format, page, size_t(block) * size_t(format.block_tokens), dtype, v);
  return {std::sqrt(worst.error), std::sqrt(worst.norm)};
}

void decode_page(const PageFormat& format, const std::byte* page, double* k_out, double* v_out) {
  const TensorPlanes& vp = format.layout.value;
  const ServedPlanes served(vp);
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  uint8_t codes[kMaxHeadDim];
  for (size_t t = 0; t < n; ++t) {
    unpack_value_codes(format, page, t, codes);
    for (size_t c = 0; c < d; ++c) {
      k_out[t * d + c] = decode_key(format, page, t, c);
      const size_t at = c / size_t(format.value_group) * n + t;
      const float scale = load_metadata(vp.metadata, page + format.value_scale, at);
      const float offset = load_metadata(vp.metadata, page + format.value_offset, at);
      v_out[t * d + c] = double(codes[c]) * served.step(scale) + served.base(scale, offset);
    }
  }
}

}  // namespace certkv
