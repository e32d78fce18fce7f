// Sealing: 64 rows of keys and values of a KV head become a page of the device, with the bytes that
// seal_page() and convert_page() give on the host. Included by seal_kernels.cu and
// seal_emulated.cc alone.
//
// A block of threads does a page. What it does together is cut into phases with a barrier between
// (in emulation one thread after the other). A thread has a channel or a token, so every sum runs
// over a token's elements in their order, as on the host. Everything is computed in double by
// operations that IEEE 754 rounds (sums, products, quotients, roots) and nothing is fused, hence
// the same bits from both compilers. SOURCE: method sections 2 and 3; page.h.
#pragma once

#include <cmath>

#include "kernels/cuda/lanes.h"
#include "kernels/cuda/seal_args.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

// ---- numbers ------------------------------------------------------------------------------------

// a b + c of halves by the instruction that decodes values.
CERTKV_FN uint16_t decoded_half(uint16_t a, uint16_t b, uint16_t c) {
#if defined(__CUDACC__)
  return uint16_t(fma_halves(a, b, c));
#else
  return fma_half(a, b, c);
#endif
}

CERTKV_FN float next_up(float x) {  // REQUIRES 0 <= x < inf
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) + 1);
}
// As float_up(), f16_up() and f16_down() of kernels/arith/rounding.h. REQUIRES x >= 0, or NaN
CERTKV_FN float rounded_up(double x) {
  const float f = float(x);
  return double(f) < x ? next_up(f) : f;
}
CERTKV_FN uint16_t half_up(float x) {
  const uint16_t h = float_to_f16(x);
  if (!(f16_to_float(h) < x)) return h;
  return (h & 0x8000u) != 0 ? uint16_t(h - 1) : uint16_t(h + 1);
}
CERTKV_FN uint16_t half_down(float x) {
  return half_up(-x) ^ 0x8000u;
}
CERTKV_FN double two_to(int n) {  // REQUIRES |n| < 1023
  return std::bit_cast<double>(uint64_t(1023 + n) << 52);
}
CERTKV_FN int exponent_of(double x) {  // REQUIRES x > 0, normal
  return int(std::bit_cast<uint64_t>(x) >> 52) - 1023;
}
CERTKV_FN bool finite(double x) {
  return x - x == 0;
}
CERTKV_FN double magnitude_of(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0x7fffffffffffffffu);
}

inline constexpr double kSealInflate = 1 + 0x1p-40;  // sums of a few hundred doubles
CERTKV_FN float annotation(double x) {
  return rounded_up(x * kSealInflate);
}

// Scale and offset as halves, rounded outwards. `fits` is false where one over- or underflows.
struct HalfAffine {
  uint16_t scale, offset;
  bool fits;
};
CERTKV_FN HalfAffine fit_affine(float lo, float hi, int levels) {
  HalfAffine a;
  a.offset = half_down(lo);
  const double width = double(hi) - double(f16_to_float(a.offset));
  a.scale = half_up(rounded_up(width / double(levels)));
  const float scale = f16_to_float(a.scale);
  a.fits = (scale > 0 && scale <= 3.4e38f) || !(0 < width);
  return a;
}
// The nearest code, by the addition that rounds to integers. 0 where there is none.
CERTKV_FN int code_of(double x, double offset, double scale, int levels) {
  const double magic = 0x1.8p52, divisor = scale == 0 ? 1.0 : scale;
  const double code = ((x - offset) / divisor + magic) - magic;
  return code >= 0 && code <= double(levels) ? int(code) : 0;
}

// ---- a page -------------------------------------------------------------------------------------

inline constexpr int kSealDims = 128;           // at most
inline constexpr int kSealRow = kSealDims + 4;  // bytes: threads of a warp in different banks
inline constexpr int kSealGroups = kSealDims / 16;

struct SealShared {
  // Codes, a byte each; of keys of 12 bits the upper eight, and the lower four, eight a word.
  uint32_t key[kPageTokens][kSealRow / 4], value[kPageTokens][kSealRow / 4];
  uint32_t key_rest[kPageTokens][kSealDims / 8 + 1];
  uint16_t scale[kPageTokens][kSealGroups], offset[kPageTokens][kSealGroups];  // of values
  uint16_t step[kPageTokens][kSealGroups], base[kPageTokens][kSealGroups];     // as decoded
  float key_scale[kSealDims], key_offset[kSealDims];
  // Of a token: squared norms of the originals, of errors, and of |base| + code step; the largest
  // key error over its scale; the norm of what is served, and how far decoding moves it.
  double key_norm2[kPageTokens], key_error2[kPageTokens], kappa[kPageTokens];
  double norm2[kPageTokens], error2[kPageTokens];
  double norm[kPageTokens], moved[kPageTokens];
  float largest_scale[kPageTokens], largest_offset[kPageTokens];
  uint8_t key_fits[kSealDims], value_fits[kPageTokens];
  float kbar_norm;
};

struct alignas(16) EightHalves {
  uint16_t x[8];
};

struct SealPage {
  const SealArgs& args;
  int number;  // of the page
  SealShared* shared;

  CERTKV_FN int head() const { return number / args.pages; }
  CERTKV_FN int page() const { return number % args.pages; }
  CERTKV_FN const std::byte* rows(const std::byte* of) const {
    return of + uint64_t(head()) * args.rows_of_head + uint64_t(page()) * args.rows_of_page;
  }
  CERTKV_FN EightHalves eight(const std::byte* of, int t, int c) const {
    return *reinterpret_cast<const EightHalves*>(rows(of) + (t * args.head_dim + c) * 2);
  }
  CERTKV_FN std::byte* out() const {
    return args.page + uint64_t(head()) * args.page_of_head + uint64_t(page()) * args.page_of_page;
  }
  CERTKV_FN bool quantises() const { return args.page != nullptr; }
  CERTKV_FN PageLayoutDevice layout() const { return page_layout(args.head_dim, kind()); }
  CERTKV_FN PageKind kind() const { return args.kinds != nullptr ? args.kinds[head()] : args.kind; }
  CERTKV_FN int key_levels() const { return (1 << key_bits(kind())) - 1; }
  CERTKV_FN int group() const { return value_group(kind()); }  // elements
  CERTKV_FN bool is_upper(int t) const {                       // its codes lie four bits higher
    return value_bits(kind()) == 4 && t % 16 >= 8;
  }

  // ---- phase 1: a thread has a channel ----------------------------------------------------------

  CERTKV_FN void fit_keys(int c) const {
    copy_originals(c);
    if (c >= args.head_dim || !quantises()) return;
    const auto* x = reinterpret_cast<const uint16_t*>(rows(args.k)) + c;
    float lo = float_from_16(args.dtype, x[0]), hi = lo;
    for (int t = 1; t < kPageTokens; ++t) {
      const float k = float_from_16(args.dtype, x[t * args.head_dim]);
      lo = k < lo ? k : lo;
      hi = hi < k ? k : hi;
    }
    const HalfAffine a = fit_affine(lo, hi, key_levels());
    shared->key_scale[c] = f16_to_float(a.scale);
    shared->key_offset[c] = f16_to_float(a.offset);
    shared->key_fits[c] = a.fits;
    const int k = c % 32;
    auto* at = reinterpret_cast<uint16_t*>(
        out() + layout().key_affine + ((c / 32 * 2 + k / 16) * 4 + k % 16 / 4) * 16 + k % 4 * 2);
    at[0] = a.scale;
    at[4] = a.offset;
  }
  CERTKV_FN void copy_originals(int thread) const {
    if (args.originals == nullptr) return;
    const int each = kPageTokens * args.head_dim * 2;
    std::byte* to = args.originals + uint64_t(number) * uint64_t(2 * each);
    for (int at = thread * 16; at < each; at += kSealThreads * 16) {
      *reinterpret_cast<EightHalves*>(to + at) =
          *reinterpret_cast<const EightHalves*>(rows(args.k) + at);
      *reinterpret_cast<EightHalves*>(to + each + at) =
          *reinterpret_cast<const EightHalves*>(rows(args.v) + at);
    }
  }

  // ---- phase 2: a thread has a token's keys or its values ---------------------------------------

  CERTKV_FN void encode(int thread) const {
    if (thread < kPageTokens)
      encode_keys(thread);
    else
      encode_values(thread - kPageTokens);
  }
  CERTKV_FN void encode_keys(int t) const {
    double norm2 = 0, error2 = 0, worst = 0;
    for (int c = 0; c < args.head_dim; c += 8) {
      const EightHalves from = eight(args.k, t, c);
      uint32_t words[2] = {0, 0}, rests = 0;
      CERTKV_EACH (i, 8) {
        const double x = float_from_16(args.dtype, from.x[i]);
        norm2 += x * x;
        if (!quantises()) continue;
        const double scale = shared->key_scale[c + i], offset = shared->key_offset[c + i];
        const int code = code_of(x, offset, scale, key_levels());
        words[i / 4] |= uint32_t(code) >> (key_bits(kind()) - 8) << (8 * (i % 4));
        rests |= uint32_t(code & 15) << (4 * i);
        const double error = magnitude_of(x - (double(code) * scale + offset));
        error2 += error * error;
        const double share = error / (scale == 0 ? 1.0 : scale);
        worst = share > worst ? share : worst;
      }
      shared->key[t][c / 4] = words[0];
      shared->key[t][c / 4 + 1] = words[1];
      shared->key_rest[t][c / 8] = rests;
    }
    shared->key_norm2[t] = norm2;
    shared->key_error2[t] = error2;
    shared->kappa[t] = worst;
  }
  CERTKV_FN void encode_values(int t) const {
    double norm2 = 0, error2 = 0;
    float largest_scale = 0, largest_offset = 0;
    bool fits = true;
    const int levels = (1 << value_bits(kind())) - 1;
    for (int g = 0; g < args.head_dim / group(); ++g) {
      float lo = __builtin_inff(), hi = -__builtin_inff();
      for (int c = g * group(); c < (g + 1) * group(); c += 8) {
        const EightHalves from = eight(args.v, t, c);
        CERTKV_EACH (i, 8) {
          const float x = float_from_16(args.dtype, from.x[i]);
          norm2 += double(x) * double(x);
          lo = x < lo ? x : lo;
          hi = hi < x ? x : hi;
        }
      }
      if (!quantises()) continue;
      const HalfAffine a = fit_affine(lo, hi, levels);
      fits = fits && a.fits;
      shared->scale[t][g] = a.scale;
      shared->offset[t][g] = a.offset;
      const float scale = f16_to_float(a.scale), offset = f16_to_float(a.offset);
      const float size = offset < 0 ? -offset : offset;
      largest_scale = scale > largest_scale ? scale : largest_scale;
      largest_offset = size > largest_offset ? size : largest_offset;
      for (int c = g * group(); c < (g + 1) * group(); c += 8) {
        const EightHalves from = eight(args.v, t, c);
        uint32_t words[2] = {0, 0};
        CERTKV_EACH (i, 8) {
          const double original = float_from_16(args.dtype, from.x[i]);
          const int code = code_of(original, offset, scale, levels);
          words[i / 4] |= uint32_t(code) << (8 * (i % 4));
          const double error = original - (double(code) * double(scale) + double(offset));
          error2 += error * error;
        }
        shared->value[t][c / 4] = words[0];
        shared->value[t][c / 4 + 1] = words[1];
      }
    }
    shared->norm2[t] = norm2;
    shared->error2[t] = error2;
    shared->largest_scale[t] = largest_scale;
    shared->largest_offset[t] = largest_offset;
    shared->value_fits[t] = fits;
  }

  // ---- phase 3: values as they are decoded; codes of keys to their place ------------------------

  CERTKV_FN SealStatus status() const {
    bool fits = true;
    for (int t = 0; t < kPageTokens; ++t) {
      if (!finite(shared->key_norm2[t]) || !finite(shared->norm2[t])) return SealStatus::NonFinite;
      fits = fits && (!quantises() || shared->value_fits[t] != 0);
    }
    for (int c = 0; c < args.head_dim && quantises(); ++c) fits = fits && shared->key_fits[c] != 0;
    return fits ? SealStatus::Sealed : SealStatus::Unquantisable;
  }
  // See value_exponent() of page.cc.
  CERTKV_FN int exponent() const {
    double scale = 0, offset = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      scale = shared->largest_scale[t] > scale ? double(shared->largest_scale[t]) : scale;
      offset = shared->largest_offset[t] > offset ? double(shared->largest_offset[t]) : offset;
    }
    const int of_scale = scale > 0 ? exponent_of(scale / (65504 * 0x1p-24)) + 1 : -100;
    const int of_offset = offset > 0 ? exponent_of(offset / 16.0) + 1 : -100;
    const int larger_one = of_scale > of_offset ? of_scale : of_offset;
    return larger_one == -100 ? 0 : larger_one;
  }

  CERTKV_FN void serve(int thread) const {
    if (!quantises() || status() != SealStatus::Sealed) return;
    if (thread < kPageTokens)
      store_keys(thread);
    else
      serve_values(thread - kPageTokens);
  }
  CERTKV_FN void store_keys(int thread) const {
    const int steps = args.head_dim / 32;
    auto* to = reinterpret_cast<uint32_t*>(out());
    for (int at = thread; at < kPageTokens * args.head_dim / 4; at += kPageTokens) {
      const int reg = at % 4, lane = at / 4 % 32, step = at / 128 % steps, tile = at / 128 / steps;
      const int t = tile * 16 + lane / 4 + reg % 2 * 8;
      to[at] = shared->key[t][step * 8 + reg / 2 * 4 + lane % 4];
    }
    if (key_bits(kind()) == 12) store_rests(thread);
    if (thread == 0) {
      double kbar2 = 0;
      for (int c = 0; c < args.head_dim; ++c) {
        const double kbar = magnitude_of(shared->key_offset[c]) +
                            double(key_levels()) * double(shared->key_scale[c]);
        kbar2 += kbar * kbar;
      }
      shared->kbar_norm = annotation(std::sqrt(kbar2));
    }
  }
  CERTKV_FN void store_rests(int thread) const {
    const int pairs = args.head_dim / 64;
    auto* to = reinterpret_cast<uint32_t*>(out() + layout().key_rest);
    for (int at = thread; at < kPageTokens * args.head_dim / 8; at += kPageTokens) {
      const int word = at % 2, step = at / 2 % 2, lane = at / 4 % 32;
      const int pair = at / 128 % pairs, tile = at / 128 / pairs;
      const int t = tile * 16 + lane / 4, c = (2 * pair + step) * 32 + word * 16 + lane % 4 * 4;
      to[at] = rests_of(t, c) | rests_of(t + 8, c) << 4;
    }
  }
  // Of four channels, in the lower halves of bytes.
  CERTKV_FN uint32_t rests_of(int t, int c) const {
    const uint32_t four = shared->key_rest[t][c / 8] >> (4 * (c % 8)) & 0xffffu;
    const uint32_t two = (four | four << 8) & 0x00ff00ffu;
    return (two | two << 4) & 0x0f0f0f0fu;
  }
  CERTKV_FN void serve_values(int t) const {
    const int power = exponent();
    const double factor = two_to(power), over = two_to(-power);
    const bool upper = is_upper(t);
    double norm2 = 0, moved2 = 0;
    for (int g = 0; g < args.head_dim / group(); ++g) {
      const double scale = f16_to_float(shared->scale[t][g]);
      const double offset = f16_to_float(shared->offset[t][g]);
      // Steps and bases far below the page's largest may lose bits here: it is measured below.
      const uint16_t step = float_to_f16(float(scale * two_to((upper ? 20 : 24) - power)));
      const uint16_t base = float_to_f16(float(offset * over));
      shared->step[t][g] = step;
      shared->base[t][g] = base;
      for (int c = g * group(); c < (g + 1) * group(); c += 4) {
        const uint32_t word = shared->value[t][c / 4];
        CERTKV_EACH (i, 4) {
          const uint32_t code = word >> (8 * i) & 255;
          const double wanted = double(code) * scale + offset;
          const uint16_t half = decoded_half(uint16_t(upper ? code << 4 : code), step, base);
          const double served = double(f16_to_float(half)) * factor;
          norm2 += served * served;
          moved2 += (served - wanted) * (served - wanted);
        }
      }
    }
    shared->norm[t] = std::sqrt(norm2) * kSealInflate;
    shared->moved[t] = std::sqrt(moved2);
  }

  // ---- phase 4: codes of values to their place, and all notes -----------------------------------

  CERTKV_FN void finish(int thread) const {
    const SealStatus seal_status = status();
    if (thread == 0) args.status[number] = uint8_t(seal_status);
    if (thread < kPageTiles) store_notes_of_originals(thread);
    if (thread == kPageTiles && args.largest_nu != nullptr) {
      float nu = 0;
      for (int b = 0; b < kPageTiles; ++b) {
        const float of_block = largest_norm(shared->norm2, b);
        nu = nu < of_block ? of_block : nu;
      }
      args.largest_nu[number] = nu;
    }
    if (args.entries != nullptr && thread < 1 + kPageTiles) begin_entry(thread, seal_status);
    if (!quantises() || seal_status != SealStatus::Sealed) return;
    store_values(thread);
    double largest = 0;
    for (int t = 0; t < kPageTokens; ++t)
      largest = shared->norm[t] > largest ? shared->norm[t] : largest;
    const double lost = kLostWeight * largest;
    const float norm_step = rounded_up(largest / 65535 * kSealInflate);
    if (thread < kPageTokens) store_norm(thread, lost, norm_step);
    auto* notes = reinterpret_cast<PageNotesDevice*>(out() + layout().notes);
    if (thread < kPageTiles) store_block_notes(thread, lost, notes);
    if (thread == kPageTokens) store_page_notes(norm_step, notes);
  }
  CERTKV_FN void store_values(int thread) const {
    const int groups = args.head_dim / group();
    std::byte* values = out() + layout().key_bytes;
    auto* codes = reinterpret_cast<uint32_t*>(values);
    const int words = int(layout().value_affine / 4);
    for (int at = thread; at < words; at += kSealThreads)
      codes[at] = value_bits(kind()) == 8 ? word_of_bytes(at) : word_of_nibbles(at);
    auto* affine = reinterpret_cast<uint32_t*>(values + layout().value_affine);
    for (int at = thread; at < kPageTokens * groups; at += kSealThreads) {
      const int g = at / 16 % groups, tile = at / 16 / groups;
      const int first = tile * 16 + at / 4 % 4 * 2 + at % 4 / 2 * 8;
      const auto& of = at % 2 == 0 ? shared->step : shared->base;
      affine[at] = uint32_t(of[first][g]) | uint32_t(of[first + 1][g]) << 16;
    }
  }
  CERTKV_FN uint32_t pair_of(int t, int c) const {  // codes of elements c and c + 1; c is even
    return shared->value[t][c / 4] >> (8 * (c % 4)) & 0xffffu;
  }
  CERTKV_FN uint32_t word_of_nibbles(int at) const {
    const int cells = args.head_dim / 64;
    const int lane = at / 4 % 32, cell = at / 128 % cells, tile = at / 128 / cells;
    const int c = 16 * (4 * cell + at % 4) + lane / 4 * 2, first = tile * 16 + lane % 4 * 2;
    uint32_t word = 0;
    CERTKV_EACH (i, 4)  // tokens first, first + 1, first + 8, first + 9; two elements each
      word |= pair_of(first + i / 2 * 8 + i % 2, c) << (i % 2 * 16 + i / 2 * 4);
    return word;
  }
  CERTKV_FN uint32_t word_of_bytes(int at) const {
    const int cells = args.head_dim / 64, part = at / 128;
    const int lane = at / 4 % 32, half = part % 2, cell = part / 2 % cells;
    const int tile = part / 2 / cells;
    const int c = 16 * (4 * cell + at % 4) + lane / 4 * 2;
    const int first = tile * 16 + half * 8 + lane % 4 * 2;
    return pair_of(first, c) | pair_of(first + 1, c) << 16;
  }
  CERTKV_FN void store_norm(int t, double lost, float norm_step) const {
    constexpr double kBelow = 2 - kSealInflate * kSealInflate;
    const double below = (shared->norm[t] * kBelow - lost) / double(norm_step);
    std::byte* at =
        out() + layout().key_bytes + layout().norms + t % 8 * 16 + t / 16 * 4 + t % 16 / 8 * 2;
    *reinterpret_cast<uint16_t*>(at) = uint16_t(below > 0 ? int(below) : 0);
  }

  // Over the tokens of a block; 0 or more.
  CERTKV_FN double largest_of(const double* x, int block) const {
    double most = x[block * 16];
    for (int t = block * 16 + 1; t < block * 16 + 16; ++t) most = most < x[t] ? x[t] : most;
    return most;
  }
  CERTKV_FN float largest_norm(const double* squares, int block) const {
    return annotation(std::sqrt(largest_of(squares, block)));
  }
  CERTKV_FN void store_notes_of_originals(int block) const {
    const uint64_t at =
        uint64_t(head()) * args.notes_of_head + uint64_t(page()) * args.notes_of_page;
    reinterpret_cast<float*>(reinterpret_cast<std::byte*>(args.k_norm) + at)[block] =
        largest_norm(shared->key_norm2, block);
    reinterpret_cast<float*>(reinterpret_cast<std::byte*>(args.nu) + at)[block] =
        largest_norm(shared->norm2, block);
  }
  CERTKV_FN void store_block_notes(int block, double lost, PageNotesDevice* notes) const {
    const double eta = largest_norm(shared->error2, block);
    notes->block[block] = {
        rounded_up((eta + largest_of(shared->moved, block) + lost) * kSealInflate),
        largest_norm(shared->norm2, block),
        annotation(largest_of(shared->kappa, block)),
        largest_norm(shared->key_error2, block),
        largest_norm(shared->key_norm2, block),
        rounded_up((largest_of(shared->norm, block) + lost) * kSealInflate)};
  }
  CERTKV_FN void store_page_notes(float norm_step, PageNotesDevice* notes) const {
    float kappa = 0, e = 0;
    for (int b = 0; b < kPageTiles; ++b) {
      const float of_kappa = annotation(largest_of(shared->kappa, b));
      const float of_e = largest_norm(shared->key_error2, b);
      kappa = kappa < of_kappa ? of_kappa : kappa;
      e = e < of_e ? of_e : e;
    }
    notes->kbar_norm = shared->kbar_norm;
    notes->kappa = kappa;
    notes->e = e;
    notes->norm_step = norm_step;
    notes->value_factor = float(two_to(exponent()));
    for (float& x : notes->unused) x = 0;
  }

  // Entry 0 is the sealed page's, the others are of the open blocks behind it, empty yet. What
  // cannot be quantised has no slots: whoever reads the status must give it some.
  CERTKV_FN void begin_entry(int n, SealStatus seal_status) const {
    PageEntry* entries = args.entries + uint64_t(head()) * args.entries_of_head;
    PageEntry e;
    if (n == 0) {
      const bool coded = quantises() && seal_status == SealStatus::Sealed;
      e.page = coded ? out() : nullptr;
      e.wants = coded ? 0 : 0xffu;
      e.tokens = kPageTokens;
    }
    entries[n] = e;
    for (int part = 0; part < 2; ++part) {
      int32_t* slots =
          args.slot_of[part] + (uint64_t(head()) * args.entries_of_head + uint64_t(n)) * kPageTiles;
      for (int t = 0; t < kPageTiles; ++t) {
        int slot = n > 0 && t == 0 ? args.open_slot[part] + n - 1 : -1;
        if (n == 0 && !quantises()) slot = args.kept_slot[part] + t;
        slots[t] = slot;
      }
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
