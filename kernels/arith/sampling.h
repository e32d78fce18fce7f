// What a token's chance is and how one is drawn, in whole numbers, for every backend: sums of
// weights have any order, so a device, its ranks and the host choose the same token from the same
// logits and the same number.
//
// A weight is exp((logit - largest) / temperature) times 2^bits, rounded to the nearest integer.
// ENSURES with n logits, weight_bits(n) = min(48, 63 - bit width of n): the weights' sum is below
// 2^63; a weight errs by 0.5 and by kWeightError of itself, so a chance by at most twice that and n
// 2^-(bits + 1), which is 2^-30 for 128K tokens.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr int kMostWeightBits = 48;
// Of a weight: two roundings of an exponent up to 34 and the exponential itself.
inline constexpr double kWeightError = 0x1p-46;
inline constexpr int kShareBits = 53;  // of a share of a sum: all that a double below 1 has
inline constexpr uint64_t kWholeShare = uint64_t(1) << kShareBits;

// How a row's token is drawn: see kernels/sample.h, whose draw_of() makes it.
struct SampleDraw {
  double temperature = 0;        // 0: the likeliest token, whatever the rest says
  uint64_t top_k = 0;            // 0: off
  uint64_t top_p = kWholeShare;  // in 2^-53
  uint64_t uniform = 0;          // in 2^-53, below kWholeShare
};

CERTKV_HD inline int weight_bits(uint64_t n) {
  const int width = int(std::bit_width(n));
  return 63 - width < kMostWeightBits ? 63 - width : kMostWeightBits;
}

// 0 for -infinity, and where `largest` is no finite number. Every operation is correctly rounded
// and none fused, so all compilers give the same.
// REQUIRES logit <= largest, temperature > 0.
CERTKV_HD inline uint64_t sample_weight(float logit, float largest, double temperature, int bits) {
  const double x = (double(logit) - double(largest)) / temperature;
  if (!(x > -34.0)) return 0;  // exp(-34) is below 2^-49
  // 2^n exp(r) with |r| <= ln 2 / 2; adding 1.5 * 2^52 rounds to the nearest integer.
  const double magic = 6755399441055744.0;
  const double n = (x * 1.44269504088896340736 + magic) - magic;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;  // Taylor's: what is left out is below 2^-57
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const double scale = std::bit_cast<double>(uint64_t(1023 + bits + int(n)) << 52);
  return uint64_t(p * scale + 0.5);
}

// floor((total * share + extra) / 2^53) for total < 2^63, share <= 2^53, extra < 2^53.
CERTKV_HD inline uint64_t share_of(uint64_t total, uint64_t share, uint64_t extra) {
  constexpr uint64_t kLow = 0xffffffffu;
  const uint64_t a0 = total & kLow, a1 = total >> 32, b0 = share & kLow, b1 = share >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  const uint64_t cross = a0 * b1 + (middle & kLow);
  const uint64_t high = a1 * b1 + (middle >> 32) + (cross >> 32), low = total * share;
  const uint64_t sum = low + extra;
  return (high + (sum < low ? 1 : 0)) << (64 - kShareBits) | sum >> kShareBits;
}

// The least mass that reaches the share top_p of `total`; at least 1.
CERTKV_HD inline uint64_t mass_to_reach(uint64_t total, uint64_t top_p) {
  const uint64_t mass = share_of(total, top_p, kWholeShare - 1);
  return mass == 0 ? 1 : mass;
}
// Where in a mass the draw falls; below it, if it is not 0.
CERTKV_HD inline uint64_t place_in_mass(uint64_t mass, uint64_t uniform) {
  return share_of(mass, uniform, 0);
}

// How many of some equals of this weight a mass takes. REQUIRES weight > 0.
CERTKV_HD inline uint64_t equals_to_reach(uint64_t mass, uint64_t weight) {
  return mass / weight + (mass % weight != 0 ? 1 : 0);
}

}  // namespace certkv
