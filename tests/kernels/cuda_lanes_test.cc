// The emulation of a warp's lanes: fragments lie as the PTX manual says, and a rule of the device
// that is broken is an error.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/cuda/chains.h"
#include "kernels/cuda/lanes_emulated.h"

namespace certkv::emulated {
namespace {

// PTX ISA, "Matrix fragments for mma.m16n8k32" and ".m16n8k16": element i of a lane's A fragment.
struct Place {
  int row, column;
};
Place place_a32(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {(i < 4 || (i >= 8 && i < 12)) ? group : group + 8,
          in_group * 4 + (i & 3) + (i < 8 ? 0 : 16)};
}
Place place_b32(int lane, int i) {
  return {lane % 4 * 4 + (i & 3) + (i < 4 ? 0 : 16), lane >> 2};
}
Place place_a16(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {(i < 2 || (i >= 4 && i < 6)) ? group : group + 8,
          in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place place_b16(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane >> 2};
}
Place place_c(int lane, int i) {
  return {(lane >> 2) + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)};
}

TEST(Lanes, TheIntegerProductTakesFragmentsAsTheManualSays) {
  std::mt19937 random(1);
  int a[16][32], b[32][8];
  for (auto& row : a)
    for (int& x : row) x = int(random() % 256);
  for (auto& row : b)
    for (int& x : row) x = int(random() % 256) - 128;
  U fa[4] = {}, fb[2] = {};
  I sum[4];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 16; ++i) {
      const Place p = place_a32(lane, i);
      fa[i / 4][lane] |= uint32_t(a[p.row][p.column]) << i % 4 * 8;
    }
    for (int i = 0; i < 8; ++i) {
      const Place p = place_b32(lane, i);
      fb[i / 4][lane] |= uint32_t(uint8_t(b[p.row][p.column])) << i % 4 * 8;
    }
    for (int i = 0; i < 4; ++i) sum[i][lane] = lane - i;
  }
  mma_bytes(sum, fa, fb[0], fb[1]);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Place p = place_c(lane, i);
      int want = lane - i;
      for (int k = 0; k < 32; ++k) want += a[p.row][k] * b[k][p.column];
      EXPECT_EQ(sum[i][lane], want);
    }
}

TEST(Lanes, TheProductOfHalvesTakesFragmentsAsTheManualSays) {
  std::mt19937 random(2);
  for (bool brains : {false, true}) {
    const DType type = brains ? DType::BF16 : DType::F16;
    float a[16][16], b[16][8];
    for (auto& row : a)
      for (float& x : row) x = float(int(random() % 255) - 127);
    for (auto& row : b)
      for (float& x : row) x = float(int(random() % 255) - 127) / 64;
    U fa[4] = {}, fb[2] = {};
    F sum[4] = {};
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const Place p = place_a16(lane, i);
        fa[i / 2][lane] |= uint32_t(float_to_16(type, a[p.row][p.column])) << i % 2 * 16;
      }
      for (int i = 0; i < 4; ++i) {
        const Place p = place_b16(lane, i);
        fb[i / 2][lane] |= uint32_t(float_to_16(type, b[p.row][p.column])) << i % 2 * 16;
      }
    }
    brains ? mma_brains(sum, fa, fb[0], fb[1]) : mma_halves(sum, fa, fb[0], fb[1]);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const Place p = place_c(lane, i);
        double want = 0;  // multiples of 1/64 below 2^20: exact in FP32 too
        for (int k = 0; k < 16; ++k) want += double(a[p.row][k]) * b[k][p.column];
        EXPECT_EQ(double(sum[i][lane]), want);
      }
  }
}

TEST(Lanes, TransposingTwiceChangesNothingAndOnceSwapsRowsAndColumns) {
  U x;
  for (int lane = 0; lane < 32; ++lane)  // element (r, c) is 8 r + c
    x[lane] = uint32_t(lane * 2) | uint32_t(lane * 2 + 1) << 16;
  const U once = transpose_8x8(x), twice = transpose_8x8(once);
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t row = uint32_t(lane) / 4, column = uint32_t(lane) % 4 * 2;
    EXPECT_EQ(once[lane], (column * 8 + row) | (column * 8 + 8 + row) << 16);
    EXPECT_EQ(twice[lane], x[lane]);
  }
}

// Every code word and base against the sum in double, rounded by comparing neighbours.
TEST(Lanes, AFusedHalfIsRoundedOnce) {
  std::mt19937 random(3);
  for (int n = 0; n < 20000; ++n) {
    const auto code = uint16_t(n % 2 == 0 ? random() % 16 : random() % 16 << 4);
    const auto step = uint16_t(random() % 0x7bff);
    const auto base = uint16_t(random() % 0x4c00 | (random() % 2) << 15);  // below 16
    const double want = double(f16_to_float(code)) * f16_to_float(step) + f16_to_float(base);
    const double got = f16_to_float(fma_half(code, step, base));
    for (double way : {-INFINITY, INFINITY}) {
      const uint16_t bits = float_to_f16(float(got));
      const bool up = (way > 0) == (bits < 0x8000);
      const auto next = uint16_t(got == 0 ? (way > 0 ? 1 : 0x8001) : up ? bits + 1 : bits - 1);
      EXPECT_LE(std::abs(got - want), std::abs(double(f16_to_float(next)) - want))
          << code << " " << step << " " << base;
    }
  }
}

TEST(Lanes, ACopyIsPoisonUntilItsWait) {
  alignas(16) std::byte from[64], to[64];
  for (int i = 0; i < 64; ++i) from[i] = std::byte(i);
  CopyState state;
  copy_init(&state);
  EXPECT_THROW(copy_wait(&state, 0), std::logic_error) << "nothing was begun: a hang";
  copy_begin(&state, to, from, 64);
  EXPECT_TRUE(std::isnan(load1(to, lane_index() * 0)[0] == 0xffffffffu ? NAN : 0.0f));
  EXPECT_THROW(copy_begin(&state, to, from, 64), std::logic_error);
  EXPECT_THROW(copy_wait(&state, 1), std::logic_error) << "the wrong phase";
  copy_wait(&state, 0);
  EXPECT_EQ(std::memcmp(to, from, 64), 0);
  copy_begin(&state, to, from, 32);
  EXPECT_THROW(copy_wait(&state, 0), std::logic_error) << "the phase before";
  copy_wait(&state, 1);
  EXPECT_THROW(copy_begin(&state, to, from, 40), std::logic_error);
  EXPECT_THROW(copy_begin(&state, to + 8, from, 16), std::logic_error);
  U words[4];
  EXPECT_THROW(load4(from, lane_index() * 0 + 8, words), std::logic_error);
}

// What is charged for a matrix instruction covers the emulation's way of rounding it.
TEST(Lanes, SumsOfHalvesStayWithinWhatIsCharged) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int n = 0; n < 50; ++n) {
    U a[4], b0, b1;
    for (U& x : a)
      x = each_lane<U>([&](int) {
        return float_to_f16(normal(random)) | uint32_t(float_to_f16(normal(random))) << 16;
      });
    for (U* x : {&b0, &b1})
      *x = each_lane<U>([&](int) {
        return float_to_f16(normal(random)) | uint32_t(float_to_f16(normal(random))) << 16;
      });
    F sum[4] = {};
    mma_halves(sum, a, b0, b1);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const Place p = place_c(lane, i);
        double exact = 0, size = 0;
        for (int k = 0; k < 16; ++k) {
          const double x = double(f16_to_float(uint16_t(element_a<16>(a, p.row, k)))) *
                           f16_to_float(uint16_t(element_b<16>(b0, b1, k, p.column)));
          exact += x;
          size += std::abs(x);
        }
        EXPECT_LE(std::abs(sum[i][lane] - exact), cuda::kMatrixUnits * kUnit * size);
      }
  }
}

}  // namespace
}  // namespace certkv::emulated
