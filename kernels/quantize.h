// Sealing: turns the originals of one scale group into a tier-1 page, and back.
//
// SOURCE: method sections 2 and 3. Metadata is rounded outward and codes are computed with the
// stored metadata: offset = round_down(min), scale = round_up((max - offset) / levels),
// code = clamp(rint((x - offset) / scale), 0, levels).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/layout.h"

namespace certkv {

enum class SealStatus : uint8_t {
  Sealed,
  Unquantisable,  // finite, but a scale or offset over- or underflows: serve from originals
  NonFinite,      // an original is NaN or infinite: the request must fail
};

// k, v: [group_tokens][head_dim] in `dtype` (F16 or BF16). page: page_bytes, 64-byte aligned;
// padding is zeroed. On anything but Sealed the page's contents are meaningless. Throws nothing.
// ENSURES the same bytes on every machine.
SealStatus seal_page(const PageFormat& format, DType dtype, const uint16_t* k, const uint16_t* v,
                     std::byte* page);

// The annotations that hold for originals alone, of `tokens` >= 1 rows; for the open block. k, v:
// [tokens][head_dim]. eta, kappa and e are 0, vbar is nu. Returns NonFinite or Sealed.
SealStatus annotate_originals(const PageFormat& format, DType dtype, const uint16_t* k,
                              const uint16_t* v, int tokens, BlockAnnotations* out);

// Of a sealed page; block: within the page.
inline const BlockAnnotations& page_annotations(const PageFormat& format, const std::byte* page,
                                                int block) {
  return reinterpret_cast<const BlockAnnotations*>(page + format.annotations)[block];
}
inline const PageNotes& page_notes(const PageFormat& format, const std::byte* page) {
  return *reinterpret_cast<const PageNotes*>(page + format.notes);
}

// Scale and offset of one channel as the kernels serve it, planes that are read considered:
// k^ = code * step + base, code in [0, max_code]. channel: in [0, head_dim).
struct ServedAffine {
  float step, base;
  int max_code;
};
ServedAffine served_key_affine(const PageFormat& format, const std::byte* page, int channel);

// How far one block's served values lie from given originals [block_tokens, head_dim], and how
// large the originals are: max_t ||v^_t - v_t||, max_t ||v_t||, as computed in double (not rounded
// up). For the canary. NaN where one of its terms is. SOURCE: method section 7.
struct ValueErrors {
  double error, norm;
};
ValueErrors value_errors(const PageFormat& format, const std::byte* page, int block, DType dtype,
                         const uint16_t* v);

// The served values as real numbers, exact in double for every layout.
// k_out, v_out: [group_tokens][head_dim]. For audits and tests.
void decode_page(const PageFormat& format, const std::byte* page, double* k_out, double* v_out);

}  // namespace certkv
