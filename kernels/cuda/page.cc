#include "kernels/cuda/page.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/arith/rounding.h"
#include "kernels/base/error.h"
#include "kernels/cuda/lanes_emulated.h"
#include "kernels/quantize.h"

namespace certkv::cuda {
namespace {

constexpr double kInflate = 1 + 0x1p-40;  // sums of a few hundred doubles

// ---- the CPU page, through its public meaning where it has one ----------------------------------

struct ValueAffine {
  double step, base;
};
ValueAffine value_affine(const PageFormat& f, const std::byte* page, int token, int group) {
  const size_t at = (size_t(group) * size_t(f.group_tokens) + size_t(token)) * 2;
  uint16_t step, base;
  std::memcpy(&step, page + f.value_scale + at, 2);
  std::memcpy(&base, page + f.value_offset + at, 2);
  return {f16_to_float(step), f16_to_float(base)};
}

int code_of(double value, double step, double base) {
  return step == 0 ? 0 : int(std::nearbyint((value - base) / step));
}

// ---- where things lie ---------------------------------------------------------------------------

size_t key_code_at(int d, int t, int c) {
  const int row = t % 16, k = c % 32;
  const int lane = row % 8 * 4 + k % 16 / 4, reg = row / 8 + k / 16 * 2;
  return size_t((((t / 16) * (d / 32) + c / 32) * 32 + lane) * 16 + reg * 4 + k % 4);
}
size_t key_affine_at(const PageLayoutDevice& p, int c) {  // of the scale; the offset is 8 behind
  const int k = c % 32;
  return p.key_affine + size_t(((c / 32 * 2 + k / 16) * 4 + k % 16 / 4) * 16 + k % 4 * 2);
}
// Of the lower four bits of a key of 12; their bit is 0, or 4 of tokens 8 to 15 of a tile.
size_t key_rest_at(const PageLayoutDevice& p, int t, int c) {
  const int k = c % 32, lane = t % 8 * 4 + k % 16 / 4, step = c / 32;
  const int steps = (t / 16) * (p.head_dim / 64) + step / 2;
  return p.key_rest + size_t((((steps * 32 + lane) * 2 + step % 2) * 2 + k / 16) * 4 + k % 4);
}
int key_rest_bit(int t) {
  return t % 16 / 8 * 4;
}
struct ValueCode {
  size_t byte;
  int bit;  // of the code's lowest, within the byte
};
ValueCode value_code_at(const PageLayoutDevice& p, int t, int c) {
  const int cell = c / 16, row = c % 16 / 2, k = t % 16, d = p.head_dim;
  const int lane = row * 4 + k % 8 / 2, half = k / 8;
  // In each half of the word: bits 0 and 4 for the even element, 8 and 12 for the odd one.
  const int quad = (t / 16) * (d / 64) + cell / 4;
  const int part = value_bits(p.kind) == 8 ? quad * 2 + half : quad;
  const int word = (part * 32 + lane) * 4 + cell % 4;
  return {size_t(word * 4 + k % 2 * 2 + c % 2), value_bits(p.kind) == 8 ? 0 : half * 4};
}
size_t value_affine_at(const PageLayoutDevice& p, int t, int group) {  // of the step; base: + 4
  const int k = t % 16, groups = p.head_dim / value_group(p.kind);
  return p.value_affine +
         size_t((((t / 16) * groups + group) * 4 + k % 8 / 2) * 16 + k / 8 * 8 + k % 2 * 2);
}
size_t norm_at(const PageLayoutDevice& p, int t) {
  return p.norms + size_t(t % 8 * 16 + t / 16 * 4 + t % 16 / 8 * 2);
}

void put_half(std::byte* at, uint16_t bits) {
  std::memcpy(at, &bits, 2);
}
uint16_t half_at(const std::byte* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return bits;
}
int code_at(const PageLayoutDevice& p, const std::byte* values, int t, int c) {
  const ValueCode at = value_code_at(p, t, c);
  return std::to_integer<int>(values[at.byte]) >> at.bit & ((1 << value_bits(p.kind)) - 1);
}

// Whether a token's code words have their code four bits higher.
bool is_upper(PageKind kind, int token) {
  return value_bits(kind) == 4 && token % 16 >= 8;
}

// What the decoding instruction yields, before 2^exponent.
double served_half(PageKind kind, int code, int token, uint16_t step, uint16_t base) {
  const auto word = uint16_t(is_upper(kind, token) ? code << 4 : code);
  return f16_to_float(emulated::fma_half(word, step, base));
}

// 2^-exponent brings the largest step to what a code word of 2^-24 needs and the largest base to
// at most 16: then products and sums are exact in double and nothing overflows.
int value_exponent(double largest_step, double largest_base) {
  constexpr double kMaxStep = 65504 * 0x1p-24, kMaxBase = 16;
  int exponent = -100;
  if (largest_step > 0) exponent = std::ilogb(largest_step / kMaxStep) + 1;
  if (largest_base > 0) exponent = std::max(exponent, std::ilogb(largest_base / kMaxBase) + 1);
  return exponent == -100 ? 0 : exponent;
}

}  // namespace

PageKind page_kind_of(const PageFormat& f) {
  const TensorPlanes &k = f.layout.key, &v = f.layout.value;
  CERTKV_EXPECT(f.block_tokens == 16, InvalidArgument,
                "cache.block_tokens is {}: the device serves blocks of 16 tokens", f.block_tokens);
  CERTKV_EXPECT(f.head_dim == 64 || f.head_dim == 128, InvalidArgument,
                "head_dim is {}: the device serves 64 and 128", f.head_dim);
  const bool common = k.metadata == DType::F16 && v.residual_bits == 0 &&
                      v.metadata == DType::F16 && f.group_tokens == kPageTokens;
  for (const PageKind kind : kPageKinds)
    if (common && k.code_bits == key_bits(kind) && k.residual_bits == key_bits(kind) - 8 &&
        k.read_residual == (k.residual_bits > 0) && v.code_bits == value_bits(kind) &&
        f.value_group == value_group(kind))
      return kind;
  CERTKV_THROW(InvalidArgument,
               "layout {} is not served on the device: it takes keys of 8 bits in groups of 64 "
               "tokens with values of 4 bits in groups of 16 elements (compact, k8v4) or of 8 bits "
               "in groups of 64 (balanced, k8v8), and with these also keys of 12 bits (k12v8), "
               "with F16 metadata",
               f.layout.name);
}

void convert_page(const PageFormat& f, const std::byte* page, std::byte* out) {
  const PageKind kind = page_kind_of(f);
  const int d = f.head_dim, each = value_group(kind), groups = d / each;
  const PageLayoutDevice p = page_layout(d, kind);
  std::byte* const values = out + p.key_bytes;
  std::memset(out, 0, p.page_bytes());
  std::vector<double> k(size_t(kPageTokens * d)), v(k.size());
  decode_page(f, page, k.data(), v.data());

  for (int c = 0; c < d; ++c) {
    const ServedAffine a = served_key_affine(f, page, c);
    put_half(out + key_affine_at(p, c), float_to_f16(a.step));
    put_half(out + key_affine_at(p, c) + 8, float_to_f16(a.base));
    for (int t = 0; t < kPageTokens; ++t) {
      const int code = code_of(k[size_t(t * d + c)], a.step, a.base);
      out[key_code_at(d, t, c)] = std::byte(code >> (key_bits(kind) - 8));
      if (key_bits(kind) == 12)
        out[key_rest_at(p, t, c)] |= std::byte((code & 15) << key_rest_bit(t));
    }
  }

  double largest_step = 0, largest_base = 0;
  for (int t = 0; t < kPageTokens; ++t)
    for (int g = 0; g < groups; ++g) {
      const ValueAffine a = value_affine(f, page, t, g);
      largest_step = std::max(largest_step, a.step);
      largest_base = std::max(largest_base, std::abs(a.base));
    }
  const int exponent = value_exponent(largest_step, largest_base);
  double norm[kPageTokens], moved[kPageTiles] = {}, vbar[kPageTiles] = {}, largest = 0;
  for (int t = 0; t < kPageTokens; ++t) {
    double norm2 = 0, moved2 = 0;
    for (int g = 0; g < groups; ++g) {
      const ValueAffine a = value_affine(f, page, t, g);
      // Steps and bases far below the page's largest may lose bits here: it is measured below.
      const int shift = (is_upper(kind, t) ? 20 : 24) - exponent;
      const uint16_t step = float_to_f16(float(std::ldexp(a.step, shift)));
      const uint16_t base = float_to_f16(float(std::ldexp(a.base, -exponent)));
      std::byte* at = values + value_affine_at(p, t, g);
      put_half(at, step);
      put_half(at + 4, base);
      for (int c = g * each; c < (g + 1) * each; ++c) {
        const double wanted = v[size_t(t * d + c)];
        const int code = code_of(wanted, a.step, a.base);
        const ValueCode to = value_code_at(p, t, c);
        values[to.byte] |= std::byte(code << to.bit);
        const double served = std::ldexp(served_half(kind, code, t, step, base), exponent);
        norm2 += served * served;
        moved2 += (served - wanted) * (served - wanted);
      }
    }
    norm[t] = std::sqrt(norm2) * kInflate;
    moved[t / 16] = std::max(moved[t / 16], std::sqrt(moved2));
    vbar[t / 16] = std::max(vbar[t / 16], norm[t]);
    largest = std::max(largest, norm[t]);
  }

  const double lost = kLostWeight * largest;
  PageNotesDevice notes{};
  const PageNotes& of_page = page_notes(f, page);
  notes.kbar_norm = of_page.kbar_norm;
  notes.kappa = of_page.kappa;
  notes.e = of_page.e;
  notes.value_factor = float(std::ldexp(1.0, exponent));
  notes.norm_step = float_up(largest / 65535 * kInflate);
  for (int t = 0; t < kPageTokens; ++t) {
    const double below = (norm[t] * (2 - kInflate * kInflate) - lost) / notes.norm_step;
    put_half(values + norm_at(p, t), below > 0 ? uint16_t(below) : uint16_t(0));
  }
  for (int b = 0; b < kPageTiles; ++b) {
    const BlockAnnotations& note = page_annotations(f, page, b);
    notes.block[b] = {float_up((note.eta + moved[b] + lost) * kInflate),
                      note.nu,
                      note.kappa,
                      note.e,
                      note.k_norm,
                      float_up((vbar[b] + lost) * kInflate)};
  }
  std::memcpy(out + p.notes, &notes, sizeof notes);
}

void decode_device_page(int d, PageKind kind, const std::byte* page, double* k_out, double* v_out) {
  const PageLayoutDevice p = page_layout(d, kind);
  const std::byte* const values = page + p.key_bytes;
  const double factor = device_notes(d, page).value_factor;
  for (int t = 0; t < kPageTokens; ++t)
    for (int c = 0; c < d; ++c) {
      const double step = f16_to_float(half_at(page + key_affine_at(p, c)));
      const double base = f16_to_float(half_at(page + key_affine_at(p, c) + 8));
      int key = std::to_integer<int>(page[key_code_at(d, t, c)]);
      if (key_bits(kind) == 12)
        key = key << 4 | (std::to_integer<int>(page[key_rest_at(p, t, c)]) >> key_rest_bit(t) & 15);
      k_out[t * d + c] = key * step + base;
      const std::byte* at = values + value_affine_at(p, t, c / value_group(kind));
      v_out[t * d + c] =
          served_half(kind, code_at(p, values, t, c), t, half_at(at), half_at(at + 4)) * factor;
    }
}

}  // namespace certkv::cuda
