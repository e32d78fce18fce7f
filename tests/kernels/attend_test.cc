// The two builds of the inner loops serve the same numbers within the rounding that is charged.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>

#include "kernels/attend.h"
#include "kernels/cpu/attend_tiles.h"
#include "kernels/quantize.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

TEST(Tiles, BothInstructionSetsScoreWithinTheChargedRounding) {
  const cpu::TileKernels* fast = cpu::tile_kernels_avx2();
  if (fast == nullptr || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c"))
    GTEST_SKIP() << "this machine runs the baseline alone";
  const cpu::TileKernels& plain = cpu::tile_kernels_baseline();
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  for (const char* layout : {"compact", "balanced", "paper", "k12v8"})
    for (int d : {64, 96, 128, 256}) {
      const PageFormat format = make_page_format(layout_by_name(layout), d, 16);
      oracle::Originals x{.dtype = DType::BF16, .head_dim = d, .k = {}, .v = {}};
      for (int i = 0; i < format.group_tokens * d; ++i) {
        x.k.push_back(oracle::encode(x.dtype, normal(random)));
        x.v.push_back(oracle::encode(x.dtype, normal(random)));
      }
      const std::unique_ptr<void, void (*)(void*)> memory(
          std::aligned_alloc(64, format.page_bytes), &std::free);
      auto* page = static_cast<std::byte*>(memory.get());
      ASSERT_EQ(seal_page(format, x.dtype, x.k.data(), x.v.data(), page), SealStatus::Sealed);
      const oracle::Served served = oracle::decode_page(format, page);

      constexpr int kHeads = 3;
      std::vector<float> scaled, step;
      float base[kHeads];
      double charged[kHeads];
      for (int h = 0; h < kHeads; ++h) {
        double sum = 0;
        charged[h] = 0;
        for (int c = 0; c < d; ++c) {
          const ServedAffine a = served_key_affine(format, page, c);
          scaled.push_back(float(normal(random)));
          step.push_back(scaled.back() * a.step);
          sum += double(scaled.back()) * a.base;
          charged[h] += std::abs(double(scaled.back())) *
                        (std::abs(double(a.base)) + double(a.max_code) * a.step);
        }
        base[h] = float(sum);
        charged[h] *= gamma_n(chain_codes(d));
      }
      for (int tile = 0; tile < format.tiles(); ++tile)
        for (const cpu::TileKernels* k : {&plain, fast}) {
          float scores[kHeads * 16];
          k->score_codes(format, page, tile, kHeads, step.data(), base, scores, 16);
          for (int h = 0; h < kHeads; ++h)
            for (int t = 0; t < 16; ++t) {
              double exact = 0;
              for (int c = 0; c < d; ++c)
                exact += double(scaled[size_t(h * d + c)]) *
                         served.k[size_t((tile * 16 + t) * d + c)];
              ASSERT_LE(std::abs(exact - double(scores[h * 16 + t])), charged[h])
                  << layout << " d " << d << " " << k->isa;
            }

          // Values, weighed by 1, 1/2, 1/4 ... about r = 0.
          float p[kHeads * 16];
          for (int i = 0; i < kHeads * 16; ++i) p[i] = float(std::ldexp(1.0, -(i % 16)));
          std::vector<float> r(size_t(d), 0.0f), o(size_t(kHeads * d), 0.0f);
          float m2[kHeads] = {}, big_a[kHeads] = {}, s1[kHeads] = {};
          k->weigh_values(format, x.dtype, page, tile, nullptr, 1, 16, kHeads, p, r.data(), o.data(),
                          d, m2, big_a, s1);
          for (int c = 0; c < d; ++c) {
            double exact = 0, size = 0;
            for (int t = 0; t < 16; ++t) {
              const double v = served.v[size_t((tile * 16 + t) * d + c)];
              exact += std::ldexp(v, -t);
              size += std::ldexp(std::abs(v), -t);
            }
            // 16 sums, and the decode's two roundings of |offset| + code step <= 16 here.
            ASSERT_LE(std::abs(exact - double(o[size_t(2 * d + c)])),
                      gamma_n(20) * size + 4 * kUnit * 16)
                << layout << " d " << d << " " << k->isa;
          }
          double norms = 0;
          for (int t = 0; t < 16; ++t) {
            double n = 0;
            for (int c = 0; c < d; ++c)
              n += served.v[size_t((tile * 16 + t) * d + c)] *
                   served.v[size_t((tile * 16 + t) * d + c)];
            norms += std::ldexp(n, -t);
          }
          ASSERT_NEAR(m2[0], norms, 1e-4 * norms);
          ASSERT_EQ(m2[0], m2[2]);
        }
    }
}

}  // namespace
}  // namespace certkv
