// Directed rounding and the constants of the rounding analysis. SOURCE: method sections 3 and 4b.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr double kUnit = 0x1p-24;  // u of FP32

// gamma_n = n u / (1 - n u), as a double. REQUIRES n u < 1/2.
CERTKV_INLINE double gamma_n(double n) { return n * kUnit / (1.0 - n * kUnit); }

// max(x, 0) that keeps NaN: fmax(0, NaN) is 0, and would certify.
CERTKV_INLINE double positive_part(double x) {
  return x > 0 ? x : (x <= 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN());
}

// The smallest float >= x (inf on overflow) and the largest float <= x. NaN stays NaN.
inline float float_up(double x) {
  const float f = float(x);
  return double(f) < x ? std::nextafter(f, std::numeric_limits<float>::infinity()) : f;
}
inline float float_down(double x) {
  const float f = float(x);
  return double(f) > x ? std::nextafter(f, -std::numeric_limits<float>::infinity()) : f;
}

// The same on halves; the result is given as bits.
inline uint16_t f16_next_up(uint16_t h) {  // REQUIRES not NaN, not +inf
  if (h == 0x8000u) return 0x0001u;
  return (h & 0x8000u) != 0 ? uint16_t(h - 1) : uint16_t(h + 1);
}
inline uint16_t f16_up(double x) {
  uint16_t h = float_to_f16(float(x));  // one or two roundings: within one step of the answer
  if (double(f16_to_float(h)) < x) h = f16_next_up(h);
  return h;
}
inline uint16_t f16_down(double x) { return f16_up(-x) ^ 0x8000u; }

}  // namespace certkv
