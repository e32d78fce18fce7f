// How codes and their metadata lie in a page, for what seals and decodes. Attention has kernels of
// its own. SOURCE: method section 2; the order of bytes is PageFormat's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/layout.h"
#include "kernels/simd.h"

namespace certkv::cpu {

// Scale and offset of the full code to those of the planes that are read. T is float or Float8.
struct ServedPlanes {
  explicit ServedPlanes(const TensorPlanes& planes)
      : shift(planes.read_residual ? 0 : planes.residual_bits),
        factor(float(1 << shift)),
        middle(float((1 << shift) - 1) / 2) {}
  int shift;             // of the full code
  float factor, middle;  // the base plane alone decodes at the middle of the codes that share it

  template <typename T>
  CERTKV_SIMD T step(const T& scale) const {
    return scale * factor;
  }
  template <typename T>
  CERTKV_SIMD T base(const T& scale, const T& offset) const {
    return shift == 0 ? offset : offset + middle * scale;
  }
};

CERTKV_SIMD float load_metadata(DType type, const std::byte* section, size_t index) {
  if (type == DType::F32) {
    float value;
    std::memcpy(&value, section + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, section + index * 2, 2);
  return f16_to_float(bits);
}
CERTKV_SIMD Float8 load_metadata8(DType type, const std::byte* section, size_t index) {
  if (type == DType::F32) return load8(reinterpret_cast<const float*>(section) + index);
  return widen8<DType::F16>(reinterpret_cast<const uint16_t*>(section) + index);
}

// Byte of key code (t, c), and of the pair of 4-bit codes that holds the rest of it.
CERTKV_SIMD size_t key_cell(const PageFormat& format, size_t t, size_t c) {
  return ((t / kTile * (size_t(format.head_dim) / 4) + c / 4) * kTile + t % kTile) * 4 + c % 4;
}
CERTKV_SIMD size_t key_residual_cell(const PageFormat& format, size_t t, size_t c) {
  return (t / kTile * (size_t(format.head_dim) / 2) + c / 2) * kTile + t % kTile;
}
// Where element c of token t lies in a plane of value codes, whose cells of 16 bytes cover `elements`
// elements each: 16 or, of 4 bits, 32.
CERTKV_SIMD size_t value_cell(const PageFormat& format, size_t t, size_t c, size_t elements) {
  return (c / elements * size_t(format.group_tokens) + t) * 16 + c % 16;
}

CERTKV_SIMD Byte16 load_bytes(const void* p) {
  Byte16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The codes of one token's values as they are served, [head_dim]. Values have at most 8 bits.
CERTKV_SIMD void unpack_value_codes(const PageFormat& format, const std::byte* page, size_t t,
                                    uint8_t* codes) {
  const TensorPlanes& vp = format.layout.value;
  const std::byte *base = page + format.value_base, *residual = page + format.value_residual;
  const size_t d = size_t(format.head_dim);
  if (vp.base_bits() == 8) {
    for (size_t c = 0; c < d; c += 16) std::memcpy(codes + c, base + value_cell(format, t, c, 16), 16);
    return;
  }
  for (size_t c = 0; c < d; c += 32) {
    const size_t at = value_cell(format, t, c, 32);
    const Byte16 cell = load_bytes(base + at);
    Byte16 low = cell & 15, high = cell >> 4;
    if (vp.read_residual) {
      const Byte16 rest = load_bytes(residual + at);
      low = low << 4 | (rest & 15);
      high = high << 4 | rest >> 4;
    }
    std::memcpy(codes + c, &low, 16);
    std::memcpy(codes + c + 16, &high, 16);
  }
}

// The full codes of one token's values, [head_dim], into the planes.
CERTKV_SIMD void pack_value_codes(const PageFormat& format, std::byte* page, size_t t,
                                  const uint8_t* codes) {
  const TensorPlanes& vp = format.layout.value;
  std::byte *base = page + format.value_base, *residual = page + format.value_residual;
  const size_t d = size_t(format.head_dim);
  if (vp.base_bits() == 8) {
    for (size_t c = 0; c < d; c += 16)
      std::memcpy(base + value_cell(format, t, c, 16), codes + c, 16);
    return;
  }
  const auto shift = uint8_t(vp.residual_bits);
  for (size_t c = 0; c < d; c += 32) {
    const size_t at = value_cell(format, t, c, 32);
    const Byte16 low = load_bytes(codes + c), high = load_bytes(codes + c + 16);
    const Byte16 cell = low >> shift | high >> shift << 4;
    std::memcpy(base + at, &cell, 16);
    if (shift == 0) continue;
    const Byte16 rest = (low & 15) | high << 4;
    std::memcpy(residual + at, &rest, 16);
  }
}

}  // namespace certkv::cpu
