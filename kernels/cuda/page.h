// How a sealed page lies in the device's memory, and how one is made from a page of the CPU
// backend.
//
// One scale group of 64 tokens, in the order in which a warp needs it: each of its loads takes 16
// bytes a lane, in the fragments of the matrix instructions. Two parts, each copied as a whole:
//
//   keys    codes    [tile 4][step d/32][lane 32][16 B]: fragment A of m16n8k32, row = token,
//                    k = channel
//           affine   [step d/32][half 2][class 4][4 scales, 4 offsets, f16]: channel
//                    32 step + 16 half + 4 class + i
//           notes    PageNotesDevice
//           rest     of keys of 12 bits, whose `codes` are the upper 8: the lower 4,
//                    [tile 4][steps d/64][lane 32][step 2][word 2]: words 2 w and 2 w + 1 of
//                    `codes` in the lower and upper half of each byte
//   values  codes    fragment A of m16n8k16, k = token, for elements 16 (4 cell + word) +
//                    2 (lane / 4) + {0, 1}
//                    of 4 bits [tile 4][cell d/64][lane 32][word 4]
//                    of 8 bits [tile 4][cell d/64][half 2][lane 32][word 4]: tokens 8 half to
//                    8 half + 7 of the tile
//           affine   [tile 4][group][class 4][step t0 t1, base t0 t1, step t8 t9, base t8 t9,
//                    f16]: t = 2 class; groups of value_group() elements
//           norms    [lane / 4: 8][tile 4][2] u16, of tokens lane / 4 and lane / 4 + 8
//
// A served value is 2^exponent fma(code word, step, base), rounded to a half by the one instruction
// that decodes it: that number is what the annotations are about. A code word is the code's bits as
// a subnormal half: a mask is all that unpacking takes. Of 4 bits they lie at bits 0 (tokens 0 to 7
// of a tile) or 4 (8 to 15, whose step is a 16th). SOURCE: method section 2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/layout.h"

namespace certkv::cuda {

inline constexpr int kPageTokens = 64;
inline constexpr int kPageTiles = kPageTokens / 16;  // a tile is a block: 16 tokens

struct BlockNotesDevice {
  float eta, nu, kappa, e, k_norm, vbar;  // as BlockAnnotations, of what the device serves
};
inline constexpr int kBlockNotes = 6, kNoteEta = 0, kNoteNu = 1, kNoteVbar = 5;  // in floats
static_assert(sizeof(BlockNotesDevice) == kBlockNotes * sizeof(float));
struct PageNotesDevice {
  float kbar_norm, kappa, e;  // as PageNotes
  float norm_step;            // norm_step code <= ||v^_t|| <= norm_step (code + kNormMargin)
  float value_factor;         // 2^exponent
  float unused[3];
  BlockNotesDevice block[kPageTiles];
};
static_assert(sizeof(PageNotesDevice) == 128);

// Above a norm's code by this: its own last place, and what weights lose as halves (kLostWeight).
inline constexpr float kNormMargin = 1 + 0x1p-10f;

// A weight is two halves whose sum is within max(2^-22 p, 2^-40) of p <= 1. The second part, over a
// page's 64 tokens, moves the value of its heaviest token (p = 1) by at most this share of the
// page's largest norm: it is part of eta, vbar and the norms.
inline constexpr double kLostWeight = 0x1p-34;

// Which codes a page has, named as the precision classes: bits of keys, then of values.
enum class PageKind : uint8_t { K8V4, K8V8, K12V8 };
inline constexpr PageKind kPageKinds[] = {PageKind::K8V4, PageKind::K8V8, PageKind::K12V8};
constexpr const char* page_kind_name(PageKind kind) {
  return kind == PageKind::K8V4 ? "k8v4" : kind == PageKind::K8V8 ? "k8v8" : "k12v8";
}

CERTKV_HD constexpr int key_bits(PageKind kind) {
  return kind == PageKind::K12V8 ? 12 : 8;
}
CERTKV_HD constexpr int value_bits(PageKind kind) {
  return kind == PageKind::K8V4 ? 4 : 8;
}
// Elements of a token that share a step and a base.
CERTKV_HD constexpr int value_group(PageKind kind) {
  return kind == PageKind::K8V4 ? 16 : 64;
}

// UNITS: bytes; offsets from the start of a part. One KV head.
struct PageLayoutDevice {
  int head_dim = 0;
  PageKind kind = PageKind::K8V4;
  uint32_t key_affine = 0, notes = 0, key_rest = 0, key_bytes = 0;
  uint32_t value_affine = 0, norms = 0, value_bytes = 0;
  CERTKV_INLINE constexpr uint32_t page_bytes() const { return key_bytes + value_bytes; }
};

// REQUIRES head_dim in {64, 128}.
CERTKV_HD constexpr PageLayoutDevice page_layout(int head_dim, PageKind kind) {
  const uint32_t d = uint32_t(head_dim);
  PageLayoutDevice p;
  p.head_dim = head_dim;
  p.kind = kind;
  p.key_affine = kPageTokens * d;
  p.notes = p.key_affine + 4 * d;
  p.key_rest = p.notes + uint32_t(sizeof(PageNotesDevice));
  p.key_bytes = p.key_rest + (key_bits(kind) == 12 ? kPageTokens * d / 2 : 0);
  p.value_affine = kPageTokens * d * uint32_t(value_bits(kind)) / 8;
  p.norms = p.value_affine + kPageTokens * d / uint32_t(value_group(kind)) * 4;
  p.value_bytes = p.norms + kPageTokens * 2;
  return p;
}

// Where a page has its notes: whatever its kind is.
CERTKV_HD constexpr uint32_t notes_offset(int head_dim) {
  return page_layout(head_dim, PageKind::K8V4).notes;
}

// The kind of page that serves this format. Throws InvalidArgument if there is none, saying what
// the device takes.
PageKind page_kind_of(const PageFormat& format);

// page: as seal_page wrote it. out: page_bytes() of the format's kind, 16-byte aligned.
void convert_page(const PageFormat& format, const std::byte* page, std::byte* out);

// The numbers that the device serves, exact in double: [64, head_dim] each. Read from the device's
// bytes alone. For tests and audits.
void decode_device_page(int head_dim, PageKind kind, const std::byte* page, double* k_out,
                        double* v_out);

inline const PageNotesDevice& device_notes(int head_dim, const std::byte* page) {
  return *reinterpret_cast<const PageNotesDevice*>(page + notes_offset(head_dim));
}

}  // namespace certkv::cuda
