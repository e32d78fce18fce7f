// Element types of tensors and the conversions between 16-bit floats and float.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define CERTKV_HD __host__ __device__
#else
#define CERTKV_HD
#endif
#define CERTKV_INLINE CERTKV_HD inline __attribute__((always_inline))

namespace certkv {

enum class DType : uint8_t { F32, F16, BF16, F64, U8, I8, I32, I64, U64 };

constexpr size_t dtype_bytes(DType t) {
  switch (t) {
    case DType::U8:
    case DType::I8: return 1;
    case DType::F16:
    case DType::BF16: return 2;
    case DType::F32:
    case DType::I32: return 4;
    case DType::F64:
    case DType::I64:
    case DType::U64: return 8;
  }
  return 0;
}

const char* dtype_name(DType t);  // "F32", "BF16", ... as safetensors writes them

// 16-bit floats travel as their bits; these are the only conversions in the project.
CERTKV_INLINE float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

CERTKV_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Normal and subnormal halves alike: place the bits, then repair the exponent by a multiplication
  // by 2^112, which is exact.
  const float magnitude = std::bit_cast<float>(rest << 13) * std::bit_cast<float>(0x77800000u);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

// Round to nearest, ties to even; NaN stays NaN; overflow becomes infinity.
CERTKV_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

CERTKV_INLINE uint16_t float_to_f16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00u;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 2^16 or above
  if (a < 0x38800000u) {                        // subnormal half: let the adder round
    const float shifted = std::bit_cast<float>(a) + 0.5f;  // 0.5f has an ulp of 2^-24 below 1
    return sign | uint16_t(std::bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  return sign | uint16_t((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13);
}

CERTKV_INLINE float float_from_16(DType t, uint16_t bits) {
  return t == DType::BF16 ? bf16_to_float(bits) : f16_to_float(bits);
}
CERTKV_INLINE uint16_t float_to_16(DType t, float value) {
  return t == DType::BF16 ? float_to_bf16(value) : float_to_f16(value);
}

}  // namespace certkv
