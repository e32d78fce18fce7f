// The arithmetic that bounds stand on, against float64 and brute force.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/arith/exp.h"
#include "kernels/arith/rounding.h"
#include "kernels/arith/chains.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

#if defined(CERTKV_LONG_ARITH)
constexpr uint32_t kStride = 1;  // every float of [-150, 0]
#else
constexpr uint32_t kStride = 997;
#endif

TEST(Exponential, KeepsItsErrorOverItsWholeRange) {
  const uint32_t last = std::bit_cast<uint32_t>(-150.0f);
  double worst = 0, worst_flushed = 0;
  for (uint64_t bits = 0x80000000u; bits <= last; bits += kStride) {
    const float x = std::bit_cast<float>(uint32_t(bits));
    const double exact = std::exp(double(x)), got = exp_nonpositive(x);
    if (x >= kExpFlush)
      worst = std::max(worst, std::abs(got / exact - 1));
    else
      worst_flushed = std::max(worst_flushed, std::abs(got - exact));
  }
  EXPECT_LE(worst, double(kExpError));
  EXPECT_GT(worst, 0);
  EXPECT_LE(worst_flushed, double(kExpAbsolute));
  EXPECT_EQ(exp_nonpositive(0.0f), 1.0f);
  EXPECT_EQ(exp_nonpositive(-std::numeric_limits<float>::infinity()), 0.0f);
}

// The form that kernels use, on as many lanes as it is given.
TEST(Exponential, OfLanesIsThatOfEachLane) {
  typedef float Lanes __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  uint32_t bits = 0x80000000u;
  const uint32_t last = std::bit_cast<uint32_t>(-150.0f);
  while (bits <= last) {
    Lanes x;
    for (int i = 0; i < 8; ++i) x[i] = std::bit_cast<float>(std::min(bits += 1997, last));
    const Lanes y = exp_nonpositive<Lanes, Ints>(x);
    for (int i = 0; i < 8; ++i) {
      const double exact = std::exp(double(x[i]));
      ASSERT_LE(std::abs(double(y[i]) - exact),
                x[i] >= kExpFlush ? double(kExpError) * exact : double(kExpAbsolute))
          << x[i];
    }
  }
  const float nan = std::nanf(""), far = -std::numeric_limits<float>::infinity();
  const Lanes y = exp_nonpositive<Lanes, Ints>(Lanes{nan, 0, far, -nan, -87, -88, 0, 0});
  EXPECT_TRUE(std::isnan(y[0]) && std::isnan(y[3]));
  EXPECT_EQ(y[1], 1.0f);
  EXPECT_EQ(y[2], 0.0f);
  EXPECT_GT(y[4], 0.0f);
  EXPECT_EQ(y[5], 0.0f);
}

TEST(Exponential, NaNStaysNaN) {
  EXPECT_TRUE(std::isnan(exp_nonpositive(std::nanf(""))));
  EXPECT_TRUE(std::isnan(exp_nonpositive(-std::nanf(""))));
}

TEST(Rounding, HalvesAreRoundedOutward) {
  uint64_t state = 1;
  const auto next = [&] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 11) * 0x1p-53;
  };
  for (int i = 0; i < 200000; ++i) {
    const double x = (next() - 0.5) * std::ldexp(1.0, int(next() * 48) - 28);
    const double up = oracle::decode(DType::F16, f16_up(x));
    const double down = oracle::decode(DType::F16, f16_down(x));
    // Outward, and no half lies between: the nearest one is one of the two.
    const double nearest = oracle::decode(DType::F16, oracle::encode(DType::F16, x));
    ASSERT_TRUE(down <= x && x <= up) << x;
    ASSERT_TRUE(nearest == up || nearest == down) << x;
    if (nearest == x) {
      ASSERT_TRUE(up == x && down == x) << x;
    }
  }
}

TEST(Rounding, TheHalfAboveEitherZeroIsTheSmallest) {
  EXPECT_EQ(f16_next_up(0x0000), 0x0001);
  EXPECT_EQ(f16_next_up(0x8000), 0x0001);
  EXPECT_EQ(f16_next_up(0x8001), 0x8000);
}

TEST(Rounding, GammaCoversChainsOfItsLength) {
  // (1 + u)^n - 1 and 1 - (1 - u)^n are both below n u / (1 - n u).
  for (double n : {1.0, 16.0, 128.0, 4096.0, 1e6}) {
    EXPECT_GE(gamma_n(n), std::expm1(n * std::log1p(0x1p-24)));
    EXPECT_GE(gamma_n(n), n * 0x1p-24 * (1 + n * 0x1p-24));
    EXPECT_LE(gamma_n(n), n * 0x1p-24 * (1 + 2 * n * 0x1p-24));
  }
}

// eps_w of method 4b for J = 1 and any spread of scores: each weight's error but that of its score.
TEST(Rounding, EpsWHoldsItsThreeParts) {
  const double u = 0x1p-24;
  EXPECT_GE(kEpsW, 2 * (double(kExpError) + 2 * u) + 3 * u * 104);
  EXPECT_LE(kEpsW, 1.1 * (2 * (double(kExpError) + 2 * u) + 3 * u * 104));
}

// The longest chain of each sum and 4 (method section 3), as section 12 has them: quarters of a row
// of codes, sixteenths of one of originals with four steps of a tree over lanes.
TEST(Rounding, ChainsAreAsLongAsTheSumsAre) {
  for (int d : {64, 96, 128, 256}) {
    EXPECT_GE(chain_codes(d), d / 4.0 + 4 + 4);
    EXPECT_GE(chain_originals(d), d / 16.0 + 4 + 4);
    EXPECT_GE(chain_norm(d), d / 16.0 + 4);
  }
  EXPECT_GE(kChainOutput, 64 + 1024 / 16.0 + 4);
}

TEST(Rounding, EveryHalfIsItsOwnRounding) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double x = oracle::decode(DType::F16, uint16_t(bits));
    if (!std::isfinite(x)) continue;
    ASSERT_EQ(oracle::decode(DType::F16, f16_up(x)), x) << bits;
    ASSERT_EQ(oracle::decode(DType::F16, f16_down(x)), x) << bits;
    if (x < 65504) {
      const double above = x + 1e-9 * (std::abs(x) + 1e-9);
      ASSERT_GT(oracle::decode(DType::F16, f16_up(above)), x) << bits;
    }
  }
  EXPECT_TRUE(std::isinf(oracle::decode(DType::F16, f16_up(65505))));
  EXPECT_EQ(oracle::decode(DType::F16, f16_down(65519)), 65504);
}

TEST(Rounding, FloatsAreRoundedOutward) {
  for (double x : {0.0, 1.0, 0.1, -0.1, 1e-46, -1e-46, 3.5e38, 1e300, 1 + 0x1p-40, -1 - 0x1p-40}) {
    EXPECT_GE(double(float_up(x)), x);
    EXPECT_LE(double(float_down(x)), x);
    if (double(float(x)) == x) {
      EXPECT_EQ(double(float_up(x)), x);
      EXPECT_EQ(double(float_down(x)), x);
    }
    if (std::isfinite(float_up(x)) && std::isfinite(float_down(x))) {
      EXPECT_LE(float_up(x), std::nextafter(float_down(x), INFINITY));
    }
  }
  EXPECT_TRUE(std::isnan(float_up(std::nan(""))));
  EXPECT_TRUE(std::isnan(positive_part(std::nan(""))));
  EXPECT_EQ(positive_part(-1), 0);
}

TEST(Conversions, AgreeWithTheirDefinition) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits)
    for (DType t : {DType::F16, DType::BF16}) {
      const double want = oracle::decode(t, uint16_t(bits));
      const double got = float_from_16(t, uint16_t(bits));
      ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : want == got) << bits;
      if (!std::isnan(want)) {
        ASSERT_EQ(oracle::encode(t, want), bits);
      }
    }
}

TEST(Charge, IsAtLeastTheExponentialMinusOne) {
  for (float delta = 0; delta < 20; delta = delta * 1.01f + 1e-6f)
    ASSERT_GE(double(c_of_delta(delta)), std::expm1(double(delta))) << delta;
  EXPECT_TRUE(std::isnan(c_of_delta(std::nanf(""))));
  EXPECT_TRUE(std::isinf(c_of_delta(1000)));
}

}  // namespace
}  // namespace certkv
