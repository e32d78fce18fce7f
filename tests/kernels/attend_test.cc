// The builds of the inner loops, one per instruction set: each serves the numbers that the page's
// bytes stand for within the rounding that is charged, and those with fused products give the same
// bits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/attend.h"
#include "kernels/cpu/attend_tiles.h"
#include "kernels/quantize.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

std::vector<const cpu::TileKernels*> builds() {
  std::vector<const cpu::TileKernels*> out = {&cpu::tile_kernels_baseline()};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    out.push_back(cpu::tile_kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    out.push_back(cpu::tile_kernels_avx512());
  if (__builtin_cpu_supports("avx512vnni")) out.push_back(cpu::tile_kernels_avx512vnni());
#endif
  return out;
}

TEST(Tiles, SaysWhichInstructionSetsThisMachineTests) {
  for (const cpu::TileKernels* k : builds()) std::printf("tested: %s\n", k->isa);
  std::printf("chosen: %s\n", cpu::tile_kernels().isa);
  EXPECT_EQ(builds().back(), &cpu::tile_kernels());
}

struct Page {
  PageFormat format;
  oracle::Originals x;
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, &std::free};
  oracle::Served served;
  Page(const char* layout, int d, uint64_t seed)
      : format(make_page_format(layout_by_name(layout), d, 16)),
        x{.dtype = DType::BF16, .head_dim = d, .k = {}, .v = {}} {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (int i = 0; i < format.group_tokens * d; ++i) {
      x.k.push_back(oracle::encode(x.dtype, normal(random)));
      x.v.push_back(oracle::encode(x.dtype, normal(random)));
    }
    memory.reset(std::aligned_alloc(64, format.page_bytes));
    EXPECT_EQ(seal_page(format, x.dtype, x.k.data(), x.v.data(), bytes()), SealStatus::Sealed);
    served = oracle::decode_page(format, bytes());
  }
  std::byte* bytes() const { return static_cast<std::byte*>(memory.get()); }
};

constexpr int kHeads = 7;  // one four, one two and one single
constexpr int kStride = 64;
constexpr cpu::Ahead kNothing[2] = {};

struct Problem {
  std::vector<float> q;  // [kHeads, d]
  float norm[16] = {};   // of the queries, rounded up
  alignas(64) float p[kHeads * kStride];
  Problem(int d, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (int i = 0; i < kHeads * d; ++i) q.push_back(float(normal(random)));
    for (int h = 0; h < kHeads; ++h) {
      double n2 = 0;
      for (int c = 0; c < d; ++c) n2 += double(q[size_t(h * d + c)]) * q[size_t(h * d + c)];
      norm[h] = float_up(std::sqrt(n2));
    }
    for (int i = 0; i < kHeads * kStride; ++i) p[i] = float(std::ldexp(1.0, -(i % 16)));
  }
};

constexpr const char* kLayoutNames[] = {"compact", "balanced", "paper", "k12v8", "k12v8split"};

TEST(Tiles, CodesScoreWithinTheChargedRounding) {
  for (const char* layout : kLayoutNames)
    for (int d : {64, 96, 128, 256}) {
      const Page page(layout, d, 11);
      const Problem x(d, 12);
      const int tiles = page.format.tiles();
      for (const cpu::TileKernels* k : builds()) {
        const auto pq = std::make_unique<cpu::PageQuery>();
        k->prepare_page(page.format, kHeads, x.q.data(), x.norm, page.bytes(), pq.get());
        for (int at_once = 1; at_once <= tiles; ++at_once)
          for (int tile = 0; tile + at_once <= tiles; ++tile) {
            float scores[kHeads * kStride];
            k->score_codes(page.format, page.bytes(), tile, at_once, kHeads, *pq, {}, scores,
                           kStride);
            for (int h = 0; h < kHeads; ++h) {
              double step = 0;
              for (int c = 0; c < d; ++c)
                step += std::abs(double(x.q[size_t(h * d + c)])) * page.served.key_step[size_t(c)];
              EXPECT_LE(step, double(pq->sum_step[h]));
              EXPECT_LE(double(pq->sum_step[h]), step * (1 + 1e-5));
              const double charged = pq->rounding[h];
              // Small beside the keys' own error, or the bound would be loose.
              EXPECT_LE(charged,
                        0.05 * 0.5 * step * (page.format.layout.key.read_residual ? 4 : 1));
              for (int t = 0; t < 16 * at_once; ++t) {
                double exact = 0;
                for (int c = 0; c < d; ++c)
                  exact += double(x.q[size_t(h * d + c)]) *
                           page.served.k[size_t((tile * 16 + t) * d + c)];
                ASSERT_LE(std::abs(exact - double(scores[h * kStride + t])), charged)
                    << layout << " d " << d << " " << k->isa;
              }
            }
          }
      }
    }
}

TEST(Tiles, OriginalsScoreWithinTheChargedRounding) {
  for (DType dtype : {DType::F16, DType::BF16})
    for (int d : {64, 96, 128, 256})
      for (int tokens : {1, 3, 15, 16}) {
        const Problem x(d, 21);
        std::vector<uint16_t> rows;
        std::mt19937_64 random(22);
        std::normal_distribution<double> normal;
        for (int i = 0; i < tokens * d; ++i) rows.push_back(oracle::encode(dtype, normal(random)));
        for (const cpu::TileKernels* k : builds()) {
          float scores[kHeads * kStride];
          k->score_originals(dtype, d, rows.data(), tokens, kHeads, x.q.data(), {}, scores,
                             kStride);
          for (int h = 0; h < kHeads; ++h)
            for (int t = 0; t < tokens; ++t) {
              double exact = 0, size_q = 0, size_k = 0;
              for (int c = 0; c < d; ++c) {
                const double a = x.q[size_t(h * d + c)];
                const double b = oracle::decode(dtype, rows[size_t(t * d + c)]);
                exact += a * b;
                size_q += a * a;
                size_k += b * b;
              }
              ASSERT_LE(std::abs(exact - double(scores[h * kStride + t])),
                        gamma_n(chain_originals(d)) * std::sqrt(size_q * size_k))
                  << k->isa;
            }
        }
      }
}

TEST(Tiles, ValuesAndNormsAreSummedWithinTheChargedRounding) {
  for (const char* layout : kLayoutNames)
    for (int d : {64, 96, 128, 256}) {
      const Page page(layout, d, 31);
      const Problem x(d, 32);
      const int tokens = page.format.group_tokens;
      for (const cpu::TileKernels* k : builds())
        for (bool originals : {false, true}) {
          SCOPED_TRACE(testing::Message() << layout << " d " << d << " " << k->isa << originals);
          std::vector<float> o(size_t(kHeads * d), 0.0f), a(o);
          float s1[kHeads] = {}, m2[kHeads] = {}, c[kHeads];
          std::fill_n(c, kHeads, 0.5f);
          for (int first = 0; first < tokens; first += originals ? 16 : tokens) {
            const cpu::ValueRun run{.format = &page.format,
                                    .dtype = page.x.dtype,
                                    .page = page.bytes(),
                                    .tile = first / 16,
                                    .tokens = originals ? 16 : tokens,
                                    .v = originals ? page.x.v.data() + first * d : nullptr,
                                    .unit = 1};
            k->values(run, kHeads, x.p + first, kStride, kNothing,
                      {o.data(), a.data(), c, size_t(d)});
            float s1_part[kHeads], m2_part[kHeads];
            k->norms(run, kHeads, x.p + first, kStride, s1_part, m2_part);
            for (int h = 0; h < kHeads; ++h) {
              s1[h] += s1_part[h];
              m2[h] += m2_part[h];
            }
          }
          double norms = 0, squares = 0, size = 0;
          std::vector<double> exact(static_cast<size_t>(d), 0.0);
          for (int t = 0; t < tokens; ++t) {
            double n2 = 0, bar2 = 0;
            for (int i = 0; i < d; ++i) {
              const size_t at = size_t(t * d + i);
              const double v =
                  originals ? oracle::decode(page.x.dtype, page.x.v[at]) : page.served.v[at];
              exact[size_t(i)] += std::ldexp(v, -(t % 16));
              n2 += v * v;
            }
            bar2 = originals ? n2 : page.served.bar2[size_t(t)];
            norms += std::ldexp(std::sqrt(n2), -(t % 16));
            squares += std::ldexp(n2, -(t % 16));
            size += std::ldexp(std::sqrt(bar2), -(t % 16));
          }
          for (int h = 0; h < kHeads; ++h) {
            double error2 = 0, a_error2 = 0;
            for (int i = 0; i < d; ++i) {
              const double e = exact[size_t(i)] - double(o[size_t(h * d + i)]);
              const double half = exact[size_t(i)] / 2 - double(a[size_t(h * d + i)]);
              error2 += e * e;
              a_error2 += half * half;
            }
            EXPECT_LE(std::sqrt(error2), gamma_n(kChainOutput) * size);
            EXPECT_LE(std::sqrt(a_error2), gamma_n(kChainOutput) * size / 2);
            // Below and above, and not by more than the norms' sixteen bits.
            EXPECT_LE(double(s1[h]), norms * (1 + gamma_n(80)));
            EXPECT_GE(double(s1[h]), norms * (1 - 1e-4));
            EXPECT_GE(double(m2[h]), squares);
            EXPECT_LE(double(m2[h]), squares * (1 + 2e-4));
          }
        }
    }
}

TEST(Tiles, FusedBuildsGiveTheSameBits) {
  const auto all = builds();  // the one that scores integers rounds elsewhere
  if (all.size() < 3) GTEST_SKIP() << "this machine runs only one build with fused products";
  for (const char* layout : kLayoutNames)
    for (int d : {64, 96, 128, 256}) {
      const Page page(layout, d, 41);
      const Problem x(d, 42);
      const int tiles = page.format.tiles(), tokens = 16 * tiles;
      std::vector<std::vector<float>> seen;
      for (const cpu::TileKernels* k : {all[1], all[2]}) {
        const auto pq = std::make_unique<cpu::PageQuery>();
        std::vector<float> out(kHeads * kStride + 2 * kHeads * size_t(d), 0.0f);
        float sums[kHeads * cpu::kRunTiles], ref[kHeads], s1[kHeads], m2[kHeads], c[kHeads];
        std::fill_n(c, kHeads, 0.25f);
        k->prepare_page(page.format, kHeads, x.q.data(), x.norm, page.bytes(), pq.get());
        k->score_codes(page.format, page.bytes(), 0, tiles, kHeads, *pq, {}, out.data(), kStride);
        k->largest(out.data(), kStride, tokens, kHeads, ref);
        k->weigh(out.data(), kStride, tokens, kHeads, ref, sums);
        const cpu::ValueRun run{.format = &page.format,
                                .dtype = page.x.dtype,
                                .page = page.bytes(),
                                .tile = 0,
                                .tokens = tokens,
                                .v = nullptr,
                                .unit = 0.5f};
        float* o = out.data() + kHeads * kStride;
        k->values(run, kHeads, out.data(), kStride, kNothing, {o, o + kHeads * d, c, size_t(d)});
        k->norms(run, kHeads, out.data(), kStride, s1, m2);
        for (const float* more :
             std::initializer_list<const float*>{pq->base, pq->sum_step, ref, s1, m2})
          out.insert(out.end(), more, more + kHeads);
        for (int h = 0; h < kHeads; ++h)
          out.insert(out.end(), sums + h * cpu::kRunTiles, sums + h * cpu::kRunTiles + tiles);
        seen.push_back(std::move(out));
      }
      EXPECT_EQ(seen[0], seen[1]) << layout << " d " << d;
    }
}

TEST(Tiles, OneNonFiniteScoreMakesTheReferenceNaN) {
  for (const cpu::TileKernels* k : builds())
    for (float bad : {std::nanf(""), float(INFINITY), -float(INFINITY)})
      for (int at : {0, 5, 16, 37}) {
        float scores[kStride], ref;
        for (int t = 0; t < kStride; ++t) scores[t] = float(t % 7);
        k->largest(scores, kStride, 38, 1, &ref);
        EXPECT_EQ(ref, 6) << k->isa;
        scores[at] = bad;
        k->largest(scores, kStride, 38, 1, &ref);
        EXPECT_TRUE(std::isnan(ref)) << k->isa << " " << at;
        scores[at] = 1;
        scores[38] = bad;  // beyond the last token
        k->largest(scores, kStride, 38, 1, &ref);
        EXPECT_EQ(ref, 6) << k->isa;
      }
}

}  // namespace
}  // namespace certkv
