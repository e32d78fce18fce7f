#include "kernels/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/arith/rounding.h"
#include "kernels/simd.h"

namespace certkv {
namespace {

// Metadata as stored: bits of F16 or F32.
void store_metadata(DType type, std::byte* section, size_t index, float value) {
  if (type == DType::F32) {
    std::memcpy(section + index * 4, &value, 4);
  } else {
    const uint16_t bits = float_to_f16(value);  // exact: the caller rounded already
    std::memcpy(section + index * 2, &bits, 2);
  }
}

float load_metadata(DType type, const std::byte* section, size_t index) {
  if (type == DType::F32) {
    float value;
    std::memcpy(&value, section + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, section + index * 2, 2);
  return f16_to_float(bits);
}

struct Affine {
  float scale = 0, offset = 0;
  bool ok = true;  // false: over- or underflow
};

// SOURCE: method section 3. REQUIRES lo <= hi, both finite.
Affine fit_affine(float lo, float hi, int levels, DType type) {
  Affine a;
  const bool f16 = type == DType::F16;
  a.offset = f16 ? f16_to_float(f16_down(lo)) : lo;
  if (!std::isfinite(a.offset)) return {0, 0, false};
  const double width = double(hi) - double(a.offset);
  if (width == 0) return a;  // constant and exactly representable: scale 0 reconstructs exactly
  a.scale = f16 ? f16_to_float(f16_up(width / levels)) : float_up(width / levels);
  // A subnormal FP32 scale could be flushed by hardware; a half is never subnormal as a float.
  if (!std::isfinite(a.scale) || a.scale < std::numeric_limits<float>::min()) return {0, 0, false};
  return a;
}

int encode(float x, const Affine& a, int levels) {
  if (a.scale == 0) return 0;
  const double code = std::nearbyint((double(x) - a.offset) / a.scale);
  return int(std::clamp(code, 0.0, double(levels)));
}

// What the kernels reconstruct from the planes they read.
struct Served {
  float step, base;
  int shift;  // of the full code
  double value(int code) const { return double(code >> shift) * step + base; }
};

Served served(const TensorPlanes& planes, const Affine& a) {
  const int shift = planes.read_residual ? 0 : planes.residual_bits;
  if (shift == 0) return {a.scale, a.offset, 0};
  // The base plane alone decodes at the middle of the codes that share it.
  const float middle = float((1 << shift) - 1) / 2;
  return {a.scale * float(1 << shift), a.offset + middle * a.scale, shift};
}

// Doubles hold 53 bits: sums of a few hundred terms are exact to 2^-43 relative.
constexpr double kInflate = 1 + 0x1p-40;
float annotation(double x) {
  return float_up(x * kInflate);
}

void put_nibble(std::byte* section, size_t index, bool high, int code) {
  section[index] |= std::byte(high ? code << 4 : code);
}

size_t key_cell(const PageFormat& format, size_t tile, size_t lane, size_t c) {
  return ((tile * size_t(format.head_dim) / 4 + c / 4) * kTile + lane) * 4 + c % 4;
}

// Where element c of a token lies in a plane of 16-byte cells that cover `elements` elements each.
size_t value_cell(const PageFormat& format, size_t t, size_t c, size_t elements) {
  return (c / elements * size_t(format.group_tokens) + t) * 16 + c % 16;
}

// Norms as codes, see PageNotes. Returns the step.
float store_norms(const std::vector<double>& norm, std::byte* section) {
  const double largest = *std::max_element(norm.begin(), norm.end());
  float step = annotation(largest / 65535);
  if (step > 0) step = std::max(step, std::numeric_limits<float>::min());  // never subnormal
  for (size_t t = 0; t < norm.size(); ++t) {
    const auto code = uint16_t(step > 0 ? std::floor(norm[t] * (2 - kInflate) / step) : 0.0);
    std::memcpy(section + t * 2, &code, 2);
  }
  return step;
}

}  // namespace

SealStatus annotate_originals(const PageFormat& format, DType dtype, const uint16_t* k,
                              const uint16_t* v, int tokens, BlockAnnotations* out) {
  const int d = format.head_dim;
  double k_max = 0, v_max = 0;
  bool finite = true;
  for (int t = 0; t < tokens; ++t) {
    double kk = 0, vv = 0;
    for (int c = 0; c < d; ++c) {
      const double x = float_from_16(dtype, k[t * d + c]), y = float_from_16(dtype, v[t * d + c]);
      kk += x * x;
      vv += y * y;
    }
    finite = finite && std::isfinite(kk) && std::isfinite(vv);  // squares of floats fit a double
    k_max = std::max(k_max, kk);
    v_max = std::max(v_max, vv);
  }
  if (!finite) return SealStatus::NonFinite;
  const float nu = annotation(std::sqrt(v_max));
  *out = {0, nu, 0, 0, annotation(std::sqrt(k_max)), nu};
  return SealStatus::Sealed;
}

SealStatus seal_page(const PageFormat& format, DType dtype, const uint16_t* k, const uint16_t* v,
                     std::byte* page) {
  const int d = format.head_dim, n = format.group_tokens, blocks = format.blocks();
  const TensorPlanes& kp = format.layout.key;
  const TensorPlanes& vp = format.layout.value;
  std::memset(page, 0, format.page_bytes);

  std::vector<BlockAnnotations> notes(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) {
    const size_t first = size_t(b) * size_t(format.block_tokens) * size_t(d);
    if (annotate_originals(format, dtype, k + first, v + first, format.block_tokens,
                           &notes[size_t(b)]) != SealStatus::Sealed)
      return SealStatus::NonFinite;
  }

  // Keys: one affine per channel over the whole group.
  std::vector<double> k_error(static_cast<size_t>(n), 0.0);  // squared, per token
  std::vector<double> kappa(static_cast<size_t>(blocks), 0.0);
  const int key_residual_mask = (1 << kp.residual_bits) - 1;
  double kbar2 = 0;
  for (int c = 0; c < d; ++c) {
    float lo = float_from_16(dtype, k[c]), hi = lo;
    for (int t = 1; t < n; ++t) {
      const float x = float_from_16(dtype, k[t * d + c]);
      lo = std::min(lo, x);
      hi = std::max(hi, x);
    }
    const Affine a = fit_affine(lo, hi, kp.levels(), kp.metadata);
    if (!a.ok) return SealStatus::Unquantisable;
    store_metadata(kp.metadata, page + format.key_scale, size_t(c), a.scale);
    store_metadata(kp.metadata, page + format.key_offset, size_t(c), a.offset);
    const Served s = served(kp, a);
    const double kbar = std::abs(double(s.base)) + double(kp.levels() >> s.shift) * s.step;
    kbar2 += kbar * kbar;
    for (int t = 0; t < n; ++t) {
      const float x = float_from_16(dtype, k[t * d + c]);
      const int code = encode(x, a, kp.levels());
      const size_t tile = size_t(t / kTile), lane = size_t(t % kTile);
      page[format.key_base + key_cell(format, tile, lane, size_t(c))] =
          std::byte(code >> kp.residual_bits);
      if (kp.residual_bits > 0)
        put_nibble(page + format.key_residual,
                   (tile * size_t(d / 2) + size_t(c / 2)) * kTile + lane, c % 2 == 1,
                   code & key_residual_mask);
      const double error = std::abs(double(x) - s.value(code));
      k_error[size_t(t)] += error * error;
      double& worst = kappa[size_t(t / format.block_tokens)];
      if (a.scale > 0)
        worst = std::max(worst, error / s.step);
      else if (error != 0)
        return SealStatus::Unquantisable;  // scale 0 promises bit-exact reconstruction
    }
  }

  // Values: one affine per group of elements within a token.
  const int value_residual_mask = (1 << vp.residual_bits) - 1;
  std::vector<double> eta(static_cast<size_t>(blocks), 0.0),
      vbar2(static_cast<size_t>(blocks), 0.0);
  std::vector<double> norm(static_cast<size_t>(n));
  for (int t = 0; t < n; ++t) {
    double error2 = 0, bar2 = 0, norm2 = 0;
    for (int g = 0; g < format.value_groups; ++g) {
      const uint16_t* row = v + size_t(t) * size_t(d) + size_t(g) * size_t(format.value_group);
      float lo = float_from_16(dtype, row[0]), hi = lo;
      for (int i = 1; i < format.value_group; ++i) {
        const float x = float_from_16(dtype, row[i]);
        lo = std::min(lo, x);
        hi = std::max(hi, x);
      }
      const Affine a = fit_affine(lo, hi, vp.levels(), vp.metadata);
      if (!a.ok) return SealStatus::Unquantisable;
      const size_t at = size_t(g) * size_t(n) + size_t(t);
      store_metadata(vp.metadata, page + format.value_scale, at, a.scale);
      store_metadata(vp.metadata, page + format.value_offset, at, a.offset);
      const Served s = served(vp, a);
      for (int i = 0; i < format.value_group; ++i) {
        const float x = float_from_16(dtype, row[i]);
        const int code = encode(x, a, vp.levels());
        const size_t c = size_t(g * format.value_group + i);
        const int base = code >> vp.residual_bits;
        if (vp.base_bits() == 8)
          page[format.value_base + value_cell(format, size_t(t), c, 16)] = std::byte(base);
        else
          put_nibble(page + format.value_base, value_cell(format, size_t(t), c, 32), c % 32 >= 16,
                     base);
        if (vp.residual_bits > 0)
          put_nibble(page + format.value_residual, value_cell(format, size_t(t), c, 32),
                     c % 32 >= 16, code & value_residual_mask);
        const double served_value = s.value(code), error = double(x) - served_value;
        error2 += error * error;
        norm2 += served_value * served_value;
        const double bar = std::abs(double(s.base)) + double(code >> s.shift) * s.step;
        bar2 += bar * bar;
      }
    }
    const size_t block = size_t(t / format.block_tokens);
    eta[block] = std::max(eta[block], std::sqrt(error2));
    vbar2[block] = std::max(vbar2[block], bar2);
    norm[size_t(t)] = std::sqrt(norm2);
  }

  for (int b = 0; b < blocks; ++b) {
    double e2 = 0;
    for (int t = b * format.block_tokens; t < (b + 1) * format.block_tokens; ++t)
      e2 = std::max(e2, k_error[size_t(t)]);
    BlockAnnotations& note = notes[size_t(b)];
    note.eta = annotation(eta[size_t(b)]);
    note.kappa = annotation(kappa[size_t(b)]);
    note.e = annotation(std::sqrt(e2));
    note.vbar = annotation(std::sqrt(vbar2[size_t(b)]));
  }
  std::memcpy(page + format.annotations, notes.data(), notes.size() * sizeof(BlockAnnotations));
  PageNotes of_page{store_norms(norm, page + format.value_norms), annotation(std::sqrt(kbar2)), 0,
                    0};
  for (const BlockAnnotations& note : notes) {
    of_page.kappa = std::max(of_page.kappa, note.kappa);
    of_page.e = std::max(of_page.e, note.e);
  }
  std::memcpy(page + format.notes, &of_page, sizeof of_page);
  return SealStatus::Sealed;
}

ServedAffine served_key_affine(const PageFormat& format, const std::byte* page, int channel) {
  const TensorPlanes& kp = format.layout.key;
  const Affine a{load_metadata(kp.metadata, page + format.key_scale, size_t(channel)),
                 load_metadata(kp.metadata, page + format.key_offset, size_t(channel))};
  const Served s = served(kp, a);
  return {s.step, s.base, kp.levels() >> s.shift};
}

namespace {

int nibble(const std::byte* section, size_t index, bool high) {
  const int byte = std::to_integer<int>(section[index]);
  return high ? byte >> 4 : byte & 15;
}

double decode_key(const PageFormat& format, const std::byte* page, int t, int c) {
  const TensorPlanes& kp = format.layout.key;
  const size_t tile = size_t(t / kTile), lane = size_t(t % kTile);
  int code = std::to_integer<int>(page[format.key_base + key_cell(format, tile, lane, size_t(c))]);
  if (kp.read_residual)
    code = code << kp.residual_bits |
           nibble(page + format.key_residual,
                  (tile * size_t(format.head_dim / 2) + size_t(c / 2)) * kTile + lane, c % 2 == 1);
  const ServedAffine s = served_key_affine(format, page, c);
  return double(code) * s.step + s.base;
}

// The codes of one token's values as they are served, [head_dim]. Values have at most 8 bits.
CERTKV_SIMD void unpack_value_codes(const PageFormat& format, const std::byte* page, size_t t,
                                    uint8_t* codes) {
  const TensorPlanes& vp = format.layout.value;
  const std::byte *base = page + format.value_base, *residual = page + format.value_residual;
  const size_t d = size_t(format.head_dim);
  if (vp.base_bits() == 8) {
    for (size_t c = 0; c < d; c += 16)
      std::memcpy(codes + c, base + value_cell(format, t, c, 16), 16);
    return;
  }
  for (size_t c = 0; c < d; c += 32) {
    Byte16 cell;
    std::memcpy(&cell, base + value_cell(format, t, c, 32), 16);
    Byte16 low = cell & 15, high = cell >> 4;
    if (vp.read_residual) {
      std::memcpy(&cell, residual + value_cell(format, t, c, 32), 16);
      low = low << 4 | (cell & 15);
      high = high << 4 | cell >> 4;
    }
    std::memcpy(codes + c, &low, 16);
    std::memcpy(codes + c + 16, &high, 16);
  }
}

Served served_value(const PageFormat& format, const std::byte* page, size_t t, size_t group) {
  const TensorPlanes& vp = format.layout.value;
  const size_t at = group * size_t(format.group_tokens) + t;
  const Affine a{load_metadata(vp.metadata, page + format.value_scale, at),
                 load_metadata(vp.metadata, page + format.value_offset, at)};
  return served(vp, a);
}

// ---- value_errors -------------------------------------------------------------------------------

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

CERTKV_SIMD Float8 load_metadata8(DType type, const std::byte* section, size_t index) {
  if (type == DType::F32) return load8(reinterpret_cast<const float*>(section) + index);
  return widen8<DType::F16>(reinterpret_cast<const uint16_t*>(section) + index);
}

// What served() gives of each token and group from `first` on.
CERTKV_SIMD void block_affine(const PageFormat& format, const std::byte* page, size_t first,
                              BlockAffine* out) {
  const TensorPlanes& vp = format.layout.value;
  const int shift = vp.read_residual ? 0 : vp.residual_bits;
  const float factor = float(1 << shift), middle = float((1 << shift) - 1) / 2;
  for (size_t g = 0; g < size_t(format.value_groups); ++g)
    for (size_t t = 0; t < size_t(format.block_tokens); t += kLanes) {
      const size_t at = g * size_t(format.group_tokens) + first + t;
      const Float8 scale = load_metadata8(vp.metadata, page + format.value_scale, at);
      const Float8 offset = load_metadata8(vp.metadata, page + format.value_offset, at);
      store8(out->step[g] + t, scale * factor);
      store8(out->base[g] + t, shift == 0 ? offset : offset + middle * scale);
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
    Double8 error2[2]{}, norm2[2]{};
    for (size_t g = 0; g < groups; ++g) {
      const double step = affine.step[g][t], base = affine.base[g][t];
      for (size_t c = g * group; c < (g + 1) * group; c += 2 * kLanes) {
        Double8 code[2];
        bytes16(codes + c, &code[0], &code[1]);
        for (size_t i = 0; i < 2; ++i) {
          const Float8 original = widen8<dtype>(v + t * d + c + i * kLanes);
          const Double8 x = __builtin_convertvector(original, Double8);
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
// the true norms, in seal_page and here, and annotation() adds 2^-40. So undamaged values never
// exceed their annotations, and a true error beyond annotation (1 + 2^-44) always does.
ValueErrors value_errors(const PageFormat& format, const std::byte* page, int block, DType dtype,
                         const uint16_t* v) {
  const Squares worst =
      block_squares(format, page, size_t(block) * size_t(format.block_tokens), dtype, v);
  return {std::sqrt(worst.error), std::sqrt(worst.norm)};
}

void decode_page(const PageFormat& format, const std::byte* page, double* k_out, double* v_out) {
  uint8_t codes[kMaxHeadDim];
  for (int t = 0; t < format.group_tokens; ++t) {
    unpack_value_codes(format, page, size_t(t), codes);
    for (int c = 0; c < format.head_dim; ++c) {
      k_out[t * format.head_dim + c] = decode_key(format, page, t, c);
      const Served s = served_value(format, page, size_t(t), size_t(c / format.value_group));
      v_out[t * format.head_dim + c] = double(codes[c]) * s.step + s.base;
    }
  }
}

}  // namespace certkv
