// How keys and values are stored in tier 1: a list of planes, scale groups and metadata types.
//
// A layout is data. Quantiser and kernels take it as it is; adding one means adding a row to the
// table in layout.cc. The order of bytes inside a page is the backend's own (PageFormat below is the
// CPU backend's). SOURCE: method section 2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/base/dtype.h"

namespace certkv {

// A code of `code_bits` bits is cut into a base plane (its high bits) and, if residual_bits > 0, a
// residual plane (its low bits). The base plane alone decodes at the middle of the codes it covers.
struct TensorPlanes {
  int code_bits = 8;      // base + residual
  int residual_bits = 0;  // 0 or 4
  bool read_residual = false;
  DType metadata = DType::F16;  // of scale and offset: F16 or F32

  CERTKV_INLINE int base_bits() const { return code_bits - residual_bits; }
  CERTKV_INLINE int levels() const { return (1 << code_bits) - 1; }
};

struct Layout {
  std::string_view name;
  TensorPlanes key;
  TensorPlanes value;
  int key_group_tokens = 64;      // tokens that share a key scale (per channel)
  int value_group_elements = 16;  // elements of a token that share a value scale, at most
};

// The named layouts: paper, compact, balanced; the precision classes k8v4 (compact's list), k8v8
// (balanced's) and k12v8; and k12v8split, which keeps every tensor in two planes.
std::span<const Layout> layouts();
// The precision classes, cheapest first. Their scale groups hold the same tokens, so that a KV head
// can go from one to another page by page. SOURCE: method section 5b.
std::span<const std::string_view> class_layouts();
// Throws InvalidArgument naming the known ones.
const Layout& layout_by_name(std::string_view name);

// Measured per block at sealing time on the bytes that will be served, all rounded up, overflow =
// inf. SOURCE: method section 2, "Annotations".
struct BlockAnnotations {
  float eta;    // max_t ||v^_t - v_t||_2, the rounding of the value decode included
  float nu;     // max_t ||v_t||_2
  float kappa;  // max_{t,c} |k_tc - k^_tc| / step_c over channels with step > 0 (step: of the planes read)
  float e;      // max_t ||k_t - k^_t||_2
  float k_norm; // max_t ||k_t||_2
  float vbar;   // max_t || |base| + code step ||_2: bounds every intermediate of the value decode
};

// One per page, measured at sealing like the annotations.
struct PageNotes {
  // value_norms: norm_step code <= ||v^_t||_2 <= norm_step (code + 1) (1 + 2^-20)
  float norm_step;
  float kbar_norm;  // ||kbar||_2, kbar_c = |base_c| + max_code step_c (method section 3), rounded up
  float kappa, e;   // largest of the page's blocks
};

inline constexpr int kTile = 16;      // tokens of a tile; a block is one or two tiles
inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxGroupHeads = 16;  // query heads of a KV head that one pass serves

// Offsets of one page: the record of one KV head's scale group (group_tokens tokens).
// UNITS: bytes from the page's start, every section 64-byte aligned.
//   annotations   [blocks] BlockAnnotations, then PageNotes
//   key_scale, key_offset      [head_dim] of key.metadata
//   key_base      [tiles][head_dim / 4][16 tokens][4 channels] u8
//   key_residual  [tiles][head_dim / 2][16 tokens] two 4-bit codes a byte: channel 2i | channel 2i + 1 << 4
//   value_base    8 bits: [head_dim / 16][group_tokens][16] u8
//                 4 bits: [head_dim / 32][group_tokens][16] element i | element i + 16 << 4
//   value_residual like a 4-bit value_base
//   value_scale, value_offset  [value_groups][group_tokens] of value.metadata
//   value_norms   [group_tokens] u16, see PageNotes
struct PageFormat {
  Layout layout;
  int head_dim = 0, block_tokens = 0, group_tokens = 0;
  int value_group = 0, value_groups = 0;  // elements a group, groups a token
  size_t key_base = 0, key_residual = 0, key_scale = 0, key_offset = 0;
  size_t value_base = 0, value_residual = 0, value_scale = 0, value_offset = 0;
  size_t value_norms = 0, annotations = 0, notes = 0;
  size_t page_bytes = 0;      // all sections with their padding
  size_t payload_bytes = 0;   // without padding: what byte limits are counted in

  int blocks() const { return group_tokens / block_tokens; }
  int tiles() const { return group_tokens / kTile; }
  // Payload of one token's share: what scoring from codes reads, what weighing from them does, and
  // what is read whatever is used.
  double key_code_bytes() const { return double(head_dim) * (layout.key.code_bits / 8.0); }
  double key_metadata_bytes() const {
    return 2.0 * head_dim * double(dtype_bytes(layout.key.metadata)) / group_tokens;
  }
  double value_bytes() const {
    return double(head_dim) * (layout.value.code_bits / 8.0) +
           2.0 * value_groups * double(dtype_bytes(layout.value.metadata)) + sizeof(uint16_t);
  }
  double note_bytes() const {
    return bytes_per_token() - key_code_bytes() - key_metadata_bytes() - value_bytes();
  }
  double bytes_per_token() const { return double(payload_bytes) / group_tokens; }
};

// REQUIRES head_dim in {64, 96, 128, 256}, block_tokens in {16, 32}; throws InvalidArgument.
// A scale group never is smaller than a block: `paper` with blocks of 32 shares scales over 32.
PageFormat make_page_format(const Layout& layout, int head_dim, int block_tokens);

}  // namespace certkv
