// The emulation of kernels/cuda/lanes.h against a device.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/cuda/chains.h"
#include "tests/gpu/lanes_probe.h"

namespace certkv {

void probe_lanes_emulated(const uint32_t* in, int warps, uint32_t* exact, float* sums) {
  for (int w = 0; w < warps; ++w)
    emulated::probe_lanes(in + w * kProbeWords * 32, exact + w * kProbeExact * 32,
                          sums + w * kProbeSums * 32);
}

namespace {

constexpr int kWarps = 4000;

// Elements of a fragment word as the probe takes them.
double half(uint32_t word, int high) {
  return f16_to_float(uint16_t((word & 0xcbffcbffu) >> 16 * high));
}
double brain(uint32_t word, int high) {
  return bf16_to_float(uint16_t(((word & 0x81ff81ffu) | 0x3e003e00u) >> 16 * high));
}

struct Probe {
  std::vector<uint32_t> in, exact;
  std::vector<float> sums;
  explicit Probe(int words)
      : in(size_t(words) * kProbeWords * 32),
        exact(size_t(words) * kProbeExact * 32),
        sums(size_t(words) * kProbeSums * 32) {}
};

TEST(LanesOnDevice, AreWhatTheEmulationSays) {
  Probe got(kWarps);
  std::mt19937 random(3);
  for (uint32_t& w : got.in) w = uint32_t(random());
  Probe want = got;
  if (!probe_lanes_on_device(got.in.data(), kWarps, got.exact.data(), got.sums.data()))
    GTEST_SKIP() << "no device answers";
  probe_lanes_emulated(want.in.data(), kWarps, want.exact.data(), want.sums.data());
  int different[kProbeExact] = {};
  for (size_t i = 0; i < got.exact.size(); ++i)
    different[i / 32 % kProbeExact] += got.exact[i] != want.exact[i];
  for (int i = 0; i < kProbeExact; ++i) EXPECT_EQ(different[i], 0) << "operation " << i;

  // Sums of products: the device is within kMatrixUnits u of the sum of magnitudes, the emulation
  // within 2 u.
  double worst[2] = {0, 0};
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t* in = want.in.data() + size_t(w) * kProbeWords * 32;
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < kProbeSums; ++i) {
        const int row = lane / 4 + i % 4 / 2 * 8, n = lane % 4 * 2 + i % 2;
        double size = 0;
        for (int k = 0; k < 16; ++k) {
          const uint32_t a = in[(row / 8 + k / 8 * 2) * 32 + row % 8 * 4 + k % 8 / 2];
          const uint32_t b = in[(6 + k / 8) * 32 + n * 4 + k % 8 / 2];
          size += std::fabs(i < 4 ? half(a, k % 2) * half(b, k % 2)
                                  : brain(a, k % 2) * brain(b, k % 2));
        }
        const size_t at = size_t(w * kProbeSums + i) * 32 + size_t(lane);
        const double x = (in[3 * 32 + lane] & 0xffffu) * 0x1p-12,
                     y = (in[4 * 32 + lane] >> 16) * 0x1p-30;
        const double before[kProbeSums] = {x, y, x, 0, 0, x, y, x};
        size += before[i];
        const double off = std::fabs(double(got.sums[at]) - want.sums[at]);
        EXPECT_LE(off, (cuda::kMatrixUnits + 2) * kUnit * size);
        if (size > 0) worst[i / 4] = std::max(worst[i / 4], off / (kUnit * size));
      }
  }
  std::printf(
      "m16n8k16: halves %.2f, bfloat16 %.2f u of the sum of magnitudes at most, %d charged\n",
      worst[0], worst[1], cuda::kMatrixUnits);
}

TEST(LanesOnDevice, TheExponentialIsWithinWhatIsChargedOnEveryFloat) {
  double worst = INFINITY;
  float below = INFINITY;
  if (!probe_exponential_on_device(&worst, &below)) GTEST_SKIP() << "no device answers";
  EXPECT_LE(worst, double(kExpError));
  EXPECT_EQ(below, 0.0f);
  std::printf("exponential: at most 2^%.3f, 2^%.3f charged\n", std::log2(worst),
              std::log2(double(kExpError)));
}

}  // namespace
}  // namespace certkv
