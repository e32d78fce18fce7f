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

using Int4x64 = int64_t __attribute__((vector_size(32)));
using Float4 = float __attribute__((vector_size(16)));
using Int4x32 = int32_t __attribute__((vector_size(16)));

CERTKV_SIMD Double4 larger(const Double4& a, const Double4& b) {
  return b > a ? b : a;
}
CERTKV_SIMD Double8 larger(const Double8& a, const Double8& b) {
  return {larger(a.low, b.low), larger(a.high, b.high)};
}
CERTKV_SIMD Double4 magnitude(const Double4& x) {
  return std::bit_cast<Double4>(std::bit_cast<Int4x64>(x) & std::numeric_limits<int64_t>::max());
}
CERTKV_SIMD Double8 magnitude(const Double8& x) {
  return {magnitude(x.low), magnitude(x.high)};
}
CERTKV_SIMD double largest8(const Double8& v) {
  const Double4 m = larger(v.low, v.high);
  return std::max(std::max(double(m[0]), double(m[1])), std::max(double(m[2]), double(m[3])));
}
CERTKV_SIMD Int8x32 concat(const Int4x32& low, const Int4x32& high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
CERTKV_SIMD Int8x32 to_int(const Double8& x) {
  return concat(__builtin_convertvector(x.low, Int4x32), __builtin_convertvector(x.high, Int4x32));
}
CERTKV_SIMD Int8x32 less8(const Double8& a, const Double8& b) {  // -1 where a < b
  return concat(__builtin_convertvector(a.low < b.low, Int4x32),
                __builtin_convertvector(a.high < b.high, Int4x32));
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

// ---- directed rounding over lanes: what the functions of arith/rounding.h give of each ----------

// REQUIRES x >= 0
CERTKV_SIMD Float8 float_up8(const Double8& x) {
  const auto low = __builtin_convertvector(x.low, Float4);
  const auto high = __builtin_convertvector(x.high, Float4);
  const Float8 near = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  return std::bit_cast<Float8>(std::bit_cast<Int8x32>(near) - less8(to_double(near), x));
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
  const Float8 up = float_up8(width / splat8(double(levels)));
  const Float8 scale = f16 ? half_up8(up) : up;
  // A subnormal FP32 scale could be flushed by hardware; a half is never subnormal as a float. An
  // infinite offset makes the width and the scale infinite. Width 0: constant and exactly
  // representable, scale 0 reconstructs exactly.
  const Int8x32 usable =
      (scale >= std::numeric_limits<float>::min() && scale <= std::numeric_limits<float>::max()) ||
      ~less8(Double8{}, width);
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

// code = clamp(rint((x - offset) / scale), 0, levels), where there is nothing to clamp: offset <=
// x, and levels scale falls short of x - offset by 2^-52 of it at most. Codes stay below 2^51, so
// adding 1.5 2^52 rounds them to integers. divisor: scale, or 1 where it is 0 and x = offset.
CERTKV_SIMD Double8 encode(const Double8& x, const Double8& offset, const Double8& divisor) {
  const Double8 magic = splat8(0x1.8p52);
  return ((x - offset) / divisor + magic) - magic;
}
CERTKV_SIMD Double8 divisor_of(const Double8& scale) {
  const Double4 zero{}, one = zero + 1;
  return {scale.low == zero ? one : scale.low, scale.high == zero ? one : scale.high};
}
// What the planes that are read keep of codes.
CERTKV_SIMD Double8 kept_code(const Double8& code, int shift) {
  return shift == 0 ? code : to_double(to_int(code) >> shift);
}

// ---- annotations of originals -------------------------------------------------------------------

// Largest squared norm of the rows; NaN or infinite where one element is.
template <DType dtype>
CERTKV_SIMD double largest_norm2(size_t d, const uint16_t* x, size_t tokens) {
  Double8 most, rest;
  for (size_t first = 0; first < tokens; first += kLanes) {
    const uint16_t* rows[8];
    for (size_t i = 0; i < kLanes; ++i) rows[i] = x + std::min(first + i, tokens - 1) * d;
    Double8 norm2;
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
CERTKV_SIMD Double4 largest_lanes(const Double4 (&x)[4]) {
  const Double4 a = larger(__builtin_shufflevector(x[0], x[1], 0, 4, 2, 6),
                           __builtin_shufflevector(x[0], x[1], 1, 5, 3, 7));
  const Double4 b = larger(__builtin_shufflevector(x[2], x[3], 0, 4, 2, 6),
                           __builtin_shufflevector(x[2], x[3], 1, 5, 3, 7));
  return larger(__builtin_shufflevector(a, b, 0, 1, 4, 5),
                __builtin_shufflevector(a, b, 2, 3, 6, 7));
}
CERTKV_SIMD Double8 largest_lanes(const Double8 (&x)[8]) {
  Double4 low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    low[i] = larger(x[i].low, x[i].high);
    high[i] = larger(x[i + 4].low, x[i + 4].high);
  }
  return {largest_lanes(low), largest_lanes(high)};
}

// Squared norms, [group_tokens] each, of the originals and of the errors; kappa of eight tokens
// each.
struct KeySquares {
  double original[kMostGroupTokens], error[kMostGroupTokens];
  double kappa[kMostGroupTokens / kLanes];
};

template <DType dtype>
CERTKV_SIMD void encode_keys(const PageFormat& format, const uint16_t* k, const KeyAffine& a,
                             std::byte* page, KeySquares* out) {
  const TensorPlanes& kp = format.layout.key;
  const int shift = ServedPlanes(kp).shift, residual_bits = kp.residual_bits;
  const size_t d = size_t(format.head_dim), n = size_t(format.group_tokens);
  for (size_t t = 0; t < n; t += kLanes) {
    const uint16_t* rows[8];
    for (size_t i = 0; i < kLanes; ++i) rows[i] = k + (t + i) * d;
    Double8 norm2, error2, worst;
    for (size_t c = 0; c < d; c += kLanes) {
      Half8 column[8];
      load_columns(rows, c, column);
      Double8 error[8];
      Int8x32 code[8];
      for (size_t i = 0; i < 8; ++i) {
        const size_t at = c + i;
        const Double8 x = to_double(widen8<dtype>(column[i]));
        const Double8 whole = encode(x, splat8(a.offset[at]), splat8(a.divisor[at]));
        code[i] = to_int(whole);
        error[i] =
            magnitude(x - (kept_code(whole, shift) * splat8(a.step[at]) + splat8(a.base[at])));
        norm2 += x * x;
        error2 += error[i] * error[i];
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
    store8(out->original + t, norm2);
    store8(out->error + t, error2);
    out->kappa[t / kLanes] = largest8(worst);
  }
}

CERTKV_CPU_VERSIONS bool seal_keys(const PageFormat& format, DType dtype, const uint16_t* k,
                                   std::byte* page, KeyAffine* a, KeySquares* out) {
  const bool bf16 = dtype == DType::BF16;
  const bool ok =
      bf16 ? fit_keys<DType::BF16>(format, k, page, a) : fit_keys<DType::F16>(format, k, page, a);
  if (bf16)
    encode_keys<DType::BF16>(format, k, *a, page, out);
  else
    encode_keys<DType::F16>(format, k, *a, page, out);
  return ok;
}

// ---- values: one affine per group of elements of a token ----------------------------------------

// Squared norms, [group_tokens] each: of the originals, of the errors, of the served values, and of
// |base| + code step.
struct ValueSquares {
  double original[kMostGroupTokens], error[kMostGroupTokens], served[kMostGroupTokens],
      bar[kMostGroupTokens];
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
    Double8 norm2, error2, served2, bar2;
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
          const Double8 whole = encode(original, offset, divisor);
          bytes |= to_int(whole) << int(8 * j);
          const Double8 product = kept_code(whole, served.shift) * step;
          const Double8 value = product + base, error = original - value, bar = size + product;
          norm2 += original * original;
          error2 += error * error;
          served2 += value * value;
          bar2 += bar * bar;
        }
        for (int lane = 0; lane < 8; ++lane) {
          const int32_t four = bytes[lane];
          std::memcpy(&codes[lane][g * group + i], &four, 4);
        }
      }
    }
    for (size_t i = 0; i < kLanes; ++i) pack_value_codes(format, page, t + i, codes[i]);
    store8(out->original + t, norm2);
    store8(out->error + t, error2);
    store8(out->served + t, served2);
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
  KeyAffine affine;
  KeySquares keys;
  ValueSquares values;
  const bool keys_fit = seal_keys(format, dtype, k, page, &affine, &keys);
  const bool values_fit = seal_values(format, dtype, v, page, &values);
  for (size_t t = 0; t < n; ++t)
    if (!std::isfinite(keys.original[t]) || !std::isfinite(values.original[t]))
      return SealStatus::NonFinite;
  if (!keys_fit || !values_fit) return SealStatus::Unquantisable;

  PageNotes of_page{};
  for (size_t b = 0; b < blocks; ++b) {
    const size_t first = b * block;
    const auto norm = [&](const double* norm2) {  // the block's largest
      return annotation(std::sqrt(*std::max_element(norm2 + first, norm2 + first + block)));
    };
    const double* kappa = keys.kappa + first / kLanes;
    const BlockAnnotations note{
        .eta = norm(values.error),
        .nu = norm(values.original),
        .kappa = annotation(*std::max_element(kappa, kappa + block / kLanes)),
        .e = norm(keys.error),
        .k_norm = norm(keys.original),
        .vbar = norm(values.bar)};
    std::memcpy(page + format.annotations + b * sizeof note, &note, sizeof note);
    of_page.kappa = std::max(of_page.kappa, note.kappa);
    of_page.e = std::max(of_page.e, note.e);
  }
  const double most = format.layout.key.levels() >> ServedPlanes(format.layout.key).shift;
  double kbar2 = 0;
  for (size_t c = 0; c < d; ++c) {
    const double kbar = std::abs(affine.base[c]) + most * affine.step[c];
    kbar2 += kbar * kbar;
  }
  of_page.kbar_norm = annotation(std::sqrt(kbar2));
  of_page.norm_step = store_norms(values.served, n, page + format.value_norms);
  std::memcpy(page + format.notes, &of_page, sizeof of_page);
  return SealStatus::Sealed;
}

}  // namespace certkv
