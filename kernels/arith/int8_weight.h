// Weights in 8 bits, symmetric, with one scale for each row of a matrix as the model has it: an
// output's weights. Every backend, on any number of ranks, has the same numbers code * scale.
//
// scale = (largest magnitude of the row) / 127, rounded up to 17 significant bits and at least
// 2^-126; code = weight / scale, rounded to the nearest integer, ties to even, in [-127, 127].
// ENSURES code * scale is a float exactly; it differs from the weight by at most scale / 2 (1 +
// 2^-52).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace certkv {

inline constexpr int kInt8Largest = 127;

// REQUIRES largest is finite and not negative.
inline float int8_scale(float largest) {
  constexpr uint32_t kDropped = 7;  // of a float's 24 bits
  constexpr uint32_t kLow = (1u << kDropped) - 1;
  const float quotient = largest / float(kInt8Largest);
  uint32_t bits = std::bit_cast<uint32_t>(quotient);
  // The division may have rounded down; a unit more is at most one in 2^16.
  if (double(quotient) * kInt8Largest < double(largest)) ++bits;
  bits = (bits + kLow) & ~kLow;
  const float scale = std::bit_cast<float>(bits);
  return scale >= 0x1p-126f ? scale : 0x1p-126f;
}

// REQUIRES |weight| <= the row's largest.
inline int8_t int8_code(float weight, float scale) {
  return int8_t(std::nearbyint(double(weight) / double(scale)));
}

}  // namespace certkv
