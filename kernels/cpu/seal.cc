// Sealing. Tokens are the lanes, eight at a time: every sum over a token's elements runs in their
// order, so that a page has the same bytes whatever the machine's vectors are.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/arith/rounding.h"
#include "kernels/cpu/page_codes.h"
#include "kernels/quantize.h"

namespace certkv {

using namespace cpu;

namespace {

constexpr size_t kMostGroupTokens = 64;

// Doubles hold 53 bits: sums of a few hundred terms are exact to 2^-43 relative.
constexpr double kInflate = 1 + 0x1p-40;
float annotation(double x) {
  return float_up(x * kInflate);
}

CERTKV_SIMD Double8 to_double(const Float8& x) {
  return __builtin_convertvector(x, Double8);
}
CERTKV_SIMD Double8 larger(const Double8& a, const Double8& b) {
  return b > a ? b : a;
}
CERTKV_SIMD Double8 magnitude(const Double8& x) {
  return std::bit_cast<Double8>(std::bit_cast<Int8x64>(x) & std::numeric_limits<int64_t>::max());
}
CERTKV_SIMD double largest8(const Double8& v) {
  double most = v[0];
  for (int i = 1; i < 8; ++i) most = std::max(most, double(v[i]));
  return most;
}
template <typename Mask>
CERTKV_SIMD bool any(const Mask& m) {
  auto all = m[0];
  for (int i = 1; i < 8; ++i) all |= m[i];
  return all != 0;
}

// Elements c .. c + 7 of eight rows: of each element the eight rows' in one vector.
CERTKV_SIMD void load_columns(const uint16_t* const (&rows)[8], size_t c, Half8 (&column)[8]) {
  for (int i = 0; i < 8; ++i) column[i] = load_halves(rows[i] + c);
  transpose8(column);
}

// ---- directed rounding over lanes: what the functions of arith/rounding.h give of each
// -----------

// REQUIRES x >= 0
CERTKV_SIMD Float8 float_up8(const Double8& x) {
  const Float8 near = __builtin_convertvector(x, Float8);
  const Int8x32 below = __builtin_convertvector(to_double(near) < x, Int8x32);
  return std::bit_cast<Float8>(std::bit_cast<Int8x32>(near) - below);  // a comparison gives -1
}

// The nearest halves not below x (inf on overflow), as floats. REQUIRES x finite
CERTKV_SIMD Float8 half_up8(const Float8& x) {
  const Int8x32 bits = std::bit_cast<Int8x32>(x);
  const Int8x32 sign = bits & std::numeric_limits<int32_t>::min();
  const Int8x32 rest = bits ^ sign;
  const Float8 size = std::bit_cast<Float8>(rest);
  const Int8x32 away = sign == 0;  // from zero; negative numbers are rounded towards it
  const Int8x32 kept = (rest + (away & 0x1fff)) & ~0x1fff;
  // Beyond 65504, the bits of which are these: infinity or, towards zero, 65504.
  const Int8x32 beyond = kept > 0x477fe000;
  const Int8x32 normal = beyond ? (away ? Int8x32{} + 0x7f800000 : Int8x32{} + 0x477fe000) : kept;
  // Below 2^-14 halves are multiples of 2^-24, as floats in [1/2, 1) are.
  const Float8 near = (size + 0.5f) - 0.5f;
  const Float8 up = near < size ? near + 0x1p-24f : near;
  const Float8 down = near > size ? near - 0x1p-24f : near;
  const Int8x32 small = std::bit_cast<Int8x32>(away ? up : down);
  return std::bit_cast<Float8>((size < 0x1p-14f ? small : normal) | sign);
}
CERTKV_SIMD Float8 half_down8(const Float8& x) {
  return -half_up8(-x);
}

// ---- scale and offset ---------------------------------------------------------------------------

struct Affine8 {
  Float8 scale, offset;
};

// SOURCE: method section 3. REQUIRES lo <= hi, both finite. Returns false where one over- or
// underflows.
CERTKV_SIMD bool fit_affine(const Float8& lo, const Float8& hi, int levels, DType type,
                            Affine8* out) {
  const bool f16 = type == DType::F16;
  const Float8 offset = f16 ? half_down8(lo) : lo;
  const Double8 width = to_double(hi) - to_double(offset);
  const Float8 up = float_up8(width / double(levels));
  const Float8 scale = f16 ? half_up8(up) : up;
  // A subnormal FP32 scale could be flushed by hardware; a half is never subnormal as a float. An
  // infinite offset makes the width and the scale infinite. Width 0: constant and exactly
  // representable, scale 0 reconstructs exactly.
  const Int8x32 usable =
      (scale >= std::numeric_limits<float>::min() && scale <= std::numeric_limits<float>::max()) ||
      __builtin_convertvector(width == 0, Int8x32);
  *out = {scale, offset};
  return !any(!usable);
}

CERTKV_SIMD void store_metadata8(DType type, std::byte* section, size_t index, const Float8& x) {
  if (type == DType::F32) {
    std::memcpy(section + index * 4, &x, sizeof x);
    return;
  }
  const Int8x32 bits = std::bit_cast<Int8x32>(x);
  const Int8x32 rest = bits & 0x7fffffff;
  const Int8x32 small =
      __builtin_convertvector(std::bit_cast<Float8>(rest) * 0x1p24f, Int8x32);  // exact
  const Int8x32 half = rest < 0x38800000 ? small : (rest - 0x38000000) >> 13;
  const Half8 stored = __builtin_convertvector(half | (bits >> 16 & 0x8000), Half8);
  std::memcpy(section + index * 2, &stored, sizeof stored);
}

// code = clamp(rint((x - offset) / scale), 0, levels). Codes stay below 2^51, so adding 1.5 2^52
// rounds them to integers. divisor: scale, or 1 where it is 0 and x = offset.
CERTKV_SIMD Double8 encode(const Double8& x, const Double8& offset, const Double8& divisor,
                           double levels) {
  constexpr double kMagic = 0x1.8p52;
  const Double8 code = ((x - offset) / divisor + kMagic) - kMagic;
  const Double8 least = code > 0 ? code : Double8{};
  return least < levels ? least : Double8{} + levels;
}
CERTKV_SIMD Double8 divisor_of(const Double8& scale) {
  return scale == 0 ? Double8{} + 1 : scale;
}
// What the planes that are read keep of codes.
CERTKV_SIMD Double8 kept_code(const Double8& code, int shift) {
  if (shift == 0) return code;
  return __builtin_convertvector(__builtin_convertvector(code, Int8x32) >> shift, Double8);
}

// ---- annotations of originals -------------------------------------------------------------------

// Largest squared norm of the rows; NaN or infinite where one element is.
template <DType dtype>
CERTKV_SIMD double largest_norm2(size_t d, const uint16_t* x, size_t tokens) {
  Double8 most{}, rest{};
  for (size_t first = 0; first < tokens; first += kLanes) {
    const uint16_t* rows[8];
    for (size_t i = 0; i < kLanes; ++i) rows[i] = x + std::min(first + i, tokens - 1) * d;
    Double8 norm2{};
    for (size_t c = 0; c < d; c += 8) {
      Half8 column[8];
      load_columns(rows, c, column);
      for (const Half8& h : column) {
        const Double8 value = to_double(widen8<dtype>(h));
        norm2 += value * value;  // squares of floats fit a double
      }
    }
    most = larger(most, norm2);
    rest += norm2 - norm2;  // 0, or NaN for ever
  }
  return largest8(most) + sum8(rest);
}

CERTKV_CPU_VERSIONS double largest_norm2(DType dtype, size_t d, const uint16_t* x, size_t tokens) {
  return dtype == DType::BF16 ? largest_norm2<DType::BF16>(d, x, tokens)
                              : largest_norm2<DType::F16>(d, x, tokens);
}

// ---- keys: one affine per channel over the whole group ------------------------------------------

// As doubles, [head_dim] each.
struct KeyAffine {
  double offset[kMaxHeadDim], divisor[kMaxHeadDim], step[kMaxHeadDim], base[kMaxHeadDim];
};

template <DType dtype>
CERTKV_SIMD bool fit_keys(const PageFormat& format, const uint16_t* k, std::byte* page,
                          KeyAffine* out) {
  const TensorPlanes& kp = format.layout.key;
  const ServedPlanes served(kp);
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  bool ok = true;
  for (size_t c = 0; c < d; c += kLanes) {
    Float8 lo = widen8<dtype>(k + c), hi = lo;
    for (size_t t = 1; t < n; ++t) {
      const Float8 x = widen8<dtype>(k + t * d + c);
      lo = x < lo ? x : lo;
      hi = hi < x ? x : hi;
    }
    Affine8 a;
    ok = fit_affine(lo, hi, kp.levels(), kp.metadata, &a) && ok;
    store_metadata8(kp.metadata, page + format.key_scale, c, a.scale);
    store_metadata8(kp.metadata, page + format.key_offset, c, a.offset);
    store8(out->offset + c, to_double(a.offset));
    store8(out->divisor + c, divisor_of(to_double(a.scale)));
    store8(out->step + c, to_double(served.step(a.scale)));
    store8(out->base + c, to_double(served.base(a.scale, a.offset)));
  }
  return ok;
}

// The largest lane of each of eight vectors.
CERTKV_SIMD Double8 largest_lanes(const Double8 (&x)[8]) {
  Double8 two[4], four[2];
  for (int i = 0; i < 4; ++i)
    two[i] = larger(__builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14),
                    __builtin_shufflevector(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15));
  for (int i = 0; i < 2; ++i)
    four[i] =
        larger(__builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13),
               __builtin_shufflevector(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15));
  return larger(__builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11),
                __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15));
}

// error2: [group_tokens] squared norms of the errors. kappa: [group_tokens / 8], of eight tokens.
template <DType dtype>
CERTKV_SIMD void encode_keys(const PageFormat& format, const uint16_t* k, const KeyAffine& a,
                             std::byte* page, double* error2, double* kappa) {
  const TensorPlanes& kp = format.layout.key;
  const int shift = ServedPlanes(kp).shift, residual_bits = kp.residual_bits;
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  for (size_t t = 0; t < n; t += kLanes) {
    const uint16_t* rows[8];
    for (size_t i = 0; i < kLanes; ++i) rows[i] = k + (t + i) * d;
    Double8 sum{}, worst{};
    for (size_t c = 0; c < d; c += kLanes) {
      Half8 column[8];
      load_columns(rows, c, column);
      Double8 error[8];
      Int8x32 code[8];
      for (size_t i = 0; i < 8; ++i) {
        const size_t at = c + i;
        const Double8 x = to_double(widen8<dtype>(column[i]));
        const Double8 whole =
            encode(x, Double8{} + a.offset[at], Double8{} + a.divisor[at], kp.levels());
        code[i] = __builtin_convertvector(whole, Int8x32);
        error[i] = magnitude(x - (kept_code(whole, shift) * a.step[at] + a.base[at]));
        sum += error[i] * error[i];
      }
      // Four channels of a token lie beside each other, then the next token's.
      for (size_t i = 0; i < 8; i += 4) {
        const Int8x32 bytes = code[i] >> residual_bits | code[i + 1] >> residual_bits << 8 |
                              code[i + 2] >> residual_bits << 16 |
                              code[i + 3] >> residual_bits << 24;
        std::memcpy(page + format.key_base + key_cell(format, t, c + i), &bytes, sizeof bytes);
      }
      if (residual_bits > 0)
        for (size_t i = 0; i < 8; i += 2) {
          const Int8x32 pairs = (code[i] & 15) | (code[i + 1] & 15) << 4;
          std::byte* to = page + format.key_residual + key_residual_cell(format, t, c + i);
          for (int lane = 0; lane < 8; ++lane) to[lane] = std::byte(pairs[lane]);
        }
      // Division is monotone: the largest quotient of a channel is that of its largest error. Where
      // the scale is 0, so is the error.
      worst = larger(worst, largest_lanes(error) / divisor_of(load8(a.step + c)));
    }
    store8(error2 + t, sum);
    kappa[t / kLanes] = largest8(worst);
  }
}

CERTKV_CPU_VERSIONS bool seal_keys(const PageFormat& format, DType dtype, const uint16_t* k,
                                   std::byte* page, KeyAffine* a, double* error2, double* kappa) {
  const bool bf16 = dtype == DType::BF16;
  if (!(bf16 ? fit_keys<DType::BF16>(format, k, page, a)
             : fit_keys<DType::F16>(format, k, page, a)))
    return false;
  if (bf16)
    encode_keys<DType::BF16>(format, k, *a, page, error2, kappa);
  else
    encode_keys<DType::F16>(format, k, *a, page, error2, kappa);
  return true;
}

// ---- values: one affine per group of elements within a token
// -------------------------------------

// Squared norms, [group_tokens] each: of the errors, of the served values, and of |base| + code
// step.
struct ValueSquares {
  double error[kMostGroupTokens], norm[kMostGroupTokens], bar[kMostGroupTokens];
};

template <DType dtype>
CERTKV_SIMD bool seal_values(const PageFormat& format, const uint16_t* v, std::byte* page,
                             ValueSquares* out) {
  const TensorPlanes& vp = format.layout.value;
  const ServedPlanes served(vp);
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  const size_t group = size_t(format.value_group);
  bool ok = true;
  for (size_t t = 0; t < n; t += kLanes) {
    const uint16_t* rows[8];
    for (size_t i = 0; i < kLanes; ++i) rows[i] = v + (t + i) * d;
    uint8_t codes[8][kMaxHeadDim];
    Double8 error2{}, norm2{}, bar2{};
    for (size_t g = 0; g * group < d; ++g) {
      Float8 x[kMaxHeadDim];
      Float8 lo = splat8(INFINITY), hi = -lo;
      for (size_t i = 0; i < group; i += 8) {
        Half8 column[8];
        load_columns(rows, g * group + i, column);
        for (size_t j = 0; j < 8; ++j) {
          const Float8 one = x[i + j] = widen8<dtype>(column[j]);
          lo = one < lo ? one : lo;
          hi = hi < one ? one : hi;
        }
      }
      Affine8 a;
      ok = fit_affine(lo, hi, vp.levels(), vp.metadata, &a) && ok;
      store_metadata8(vp.metadata, page + format.value_scale, g * n + t, a.scale);
      store_metadata8(vp.metadata, page + format.value_offset, g * n + t, a.offset);
      const Double8 offset = to_double(a.offset), divisor = divisor_of(to_double(a.scale));
      const Double8 step = to_double(served.step(a.scale));
      const Double8 base = to_double(served.base(a.scale, a.offset)), size = magnitude(base);
      for (size_t i = 0; i < group; i += 4) {
        Int8x32 bytes{};
        for (size_t j = 0; j < 4; ++j) {
          const Double8 original = to_double(x[i + j]);
          const Double8 whole = encode(original, offset, divisor, vp.levels());
          bytes |= __builtin_convertvector(whole, Int8x32) << int(8 * j);
          const Double8 product = kept_code(whole, served.shift) * step;
          const Double8 value = product + base, error = original - value, bar = size + product;
          error2 += error * error;
          norm2 += value * value;
          bar2 += bar * bar;
        }
        for (int lane = 0; lane < 8; ++lane) {
          const int32_t four = bytes[lane];
          std::memcpy(&codes[lane][g * group + i], &four, 4);
        }
      }
    }
    for (size_t i = 0; i < kLanes; ++i) pack_value_codes(format, page, t + i, codes[i]);
    store8(out->error + t, error2);
    store8(out->norm + t, norm2);
    store8(out->bar + t, bar2);
  }
  return ok;
}

CERTKV_CPU_VERSIONS bool seal_values(const PageFormat& format, DType dtype, const uint16_t* v,
                                     std::byte* page, ValueSquares* out) {
  return dtype == DType::BF16 ? seal_values<DType::BF16>(format, v, page, out)
                              : seal_values<DType::F16>(format, v, page, out);
}

// Norms as codes, see PageNotes. Returns the step.
float store_norms(const double* norm2, size_t tokens, std::byte* section) {
  const double largest = std::sqrt(*std::max_element(norm2, norm2 + tokens));
  float step = annotation(largest / 65535);
  if (step > 0) step = std::max(step, std::numeric_limits<float>::min());  // never subnormal
  for (size_t t = 0; t < tokens; ++t) {
    const auto code = uint16_t(step > 0 ? std::sqrt(norm2[t]) * (2 - kInflate) / step : 0.0);
    std::memcpy(section + t * 2, &code, 2);
  }
  return step;
}

double most_of(const double* x, size_t first, size_t count) {
  return *std::max_element(x + first, x + first + count);
}

}  // namespace

SealStatus annotate_originals(const PageFormat& format, DType dtype, const uint16_t* k,
                              const uint16_t* v, int tokens, BlockAnnotations* out) {
  const size_t d = size_t(format.head_dim);
  const double k_norm2 = largest_norm2(dtype, d, k, size_t(tokens));
  const double v_norm2 = largest_norm2(dtype, d, v, size_t(tokens));
  if (!std::isfinite(k_norm2) || !std::isfinite(v_norm2)) return SealStatus::NonFinite;
  const float nu = annotation(std::sqrt(v_norm2));
  *out = {0, nu, 0, 0, annotation(std::sqrt(k_norm2)), nu};
  return SealStatus::Sealed;
}

SealStatus seal_page(const PageFormat& format, DType dtype, const uint16_t* k, const uint16_t* v,
                     std::byte* page) {
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  const size_t blocks = size_t(format.blocks()), block = size_t(format.block_tokens);
  std::memset(page, 0, format.page_bytes);
  auto* notes = reinterpret_cast<BlockAnnotations*>(page + format.annotations);
  for (size_t b = 0; b < blocks; ++b)
    if (annotate_originals(format, dtype, k + b * block * d, v + b * block * d, int(block),
                           &notes[b]) != SealStatus::Sealed)
      return SealStatus::NonFinite;

  KeyAffine keys;
  double k_error2[kMostGroupTokens], kappa[kMostGroupTokens / kLanes];
  ValueSquares values;
  if (!seal_keys(format, dtype, k, page, &keys, k_error2, kappa) ||
      !seal_values(format, dtype, v, page, &values))
    return SealStatus::Unquantisable;

  PageNotes of_page{};
  for (size_t b = 0; b < blocks; ++b) {
    const size_t first = b * block;
    BlockAnnotations& note = notes[b];
    note.eta = annotation(std::sqrt(most_of(values.error, first, block)));
    note.kappa = annotation(most_of(kappa, first / kLanes, block / kLanes));
    note.e = annotation(std::sqrt(most_of(k_error2, first, block)));
    note.vbar = annotation(std::sqrt(most_of(values.bar, first, block)));
    of_page.kappa = std::max(of_page.kappa, note.kappa);
    of_page.e = std::max(of_page.e, note.e);
  }
  const double most = format.layout.key.levels() >> ServedPlanes(format.layout.key).shift;
  double kbar2 = 0;
  for (size_t c = 0; c < d; ++c) {
    const double kbar = std::abs(keys.base[c]) + most * keys.step[c];
    kbar2 += kbar * kbar;
  }
  of_page.kbar_norm = annotation(std::sqrt(kbar2));
  of_page.norm_step = store_norms(values.norm, n, page + format.value_norms);
  std::memcpy(page + format.notes, &of_page, sizeof of_page);
  return SealStatus::Sealed;
}

}  // namespace certkv
