// The exponential of the softmax, written so that it vectorises and so that NaN stays NaN.
//
// ENSURES for x in [kExpFlush, 0]: relative error <= kExpError (verified on every float of the
// range by tests/kernels/arith_test.cc); for x < kExpFlush: 0, an absolute error below
// kExpAbsolute. SOURCE: method section 4b (eps_e and tau). Range reduction by a two-part ln 2
// (Cody and Waite) and a polynomial of degree 6 in the remainder.
#pragma once

#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr float kExpFlush = -87.0f;           // exp(-87) > 2^-126: no subnormal ever appears
inline constexpr float kExpError = 0x1.4p-22f;       // seen, without fused operations: 2^-21.97
inline constexpr float kExpAbsolute = 0x1.0p-125f;   // exp(-87) = 2^-125.51

// T is float or a vector of floats of the compiler; I the matching integer type.
template <typename T, typename I>
CERTKV_INLINE T exp_nonpositive(T x) {
  const T magic = T{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const T shifted = x * 1.44269504088896341f + magic;
  const T n = shifted - magic;
  const T r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  T p = T{} + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n by its exponent bits; a multiplication, so that a NaN in p survives.
  // Only nine bits survive the shift; the others might overflow a signed sum.
  const I exponent = ((__builtin_bit_cast(I, shifted) & 511) + 127) << 23;
  const T scaled = p * __builtin_bit_cast(T, exponent);
  return x < kExpFlush ? T{} : scaled;
}

CERTKV_INLINE float exp_nonpositive(float x) {
  const float magic = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled =
      p * std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + (127u - 0x4b400000u)) << 23);
  return x < kExpFlush ? 0.0f : scaled;
}

}  // namespace certkv
