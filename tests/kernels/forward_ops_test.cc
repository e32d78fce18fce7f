// The transformer's operations, each against a float64 computation written from its definition.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kernels/linear.h"
#include "kernels/norm.h"
#include "kernels/prefill_attention.h"
#include "kernels/rope.h"

namespace certkv {
namespace {

constexpr double kUnit = 0x1p-24;  // half a unit in the last place of float, relative
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> normal(size_t n, uint64_t seed, float scale = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = draw(engine);
  return x;
}

// ---- products -----------------------------------------------------------------------------------

// Any order of n products and sums is within gamma_n of sum |a b|.
double product_bound(const float* a, const float* b, size_t n, double bias) {
  double sum = std::abs(bias);
  for (size_t i = 0; i < n; ++i) sum += std::abs(double(a[i]) * double(b[i]));
  return 1.01 * kUnit * double(n + 2) * sum;
}

double exact_product(const float* a, const float* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
}

TEST(Linear, BothFormsEqualTheExactProductWithinRounding) {
  ThreadPool pool(2);
  for (size_t in : {0u, 1u, 7u, 32u, 33u, 100u, 515u}) {
    for (bool with_bias : {false, true}) {
      const size_t out = 45, rows = 3, x_stride = in + 5, y_stride = out + 3;
      const auto weight = normal(out * in, 1), bias = normal(out, 2),
                 x = normal(rows * x_stride, 3);
      const LinearWeight w{weight.data(), with_bias ? bias.data() : nullptr, out, in};
      std::vector<float> tile(rows * y_stride, -7), single(tile);
      linear_tile(w, x.data(), x_stride, rows, tile.data(), y_stride);
      const LinearRows product{w, x.data(), x_stride, single.data(), y_stride};
      linear_rows({&product, 1}, rows, pool);
      for (size_t r = 0; r < rows; ++r) {
        for (size_t o = 0; o < out; ++o) {
          const float *a = x.data() + r * x_stride, *b = weight.data() + o * in;
          const double b0 = with_bias ? double(bias[o]) : 0;
          const double exact = exact_product(a, b, in) + b0, bound = product_bound(a, b, in, b0);
          EXPECT_NEAR(tile[r * y_stride + o], exact, bound) << in;
          EXPECT_NEAR(single[r * y_stride + o], exact, bound) << in;
        }
        for (size_t o = out; o < y_stride; ++o) {  // what lies between rows is not touched
          EXPECT_EQ(tile[r * y_stride + o], -7);
          EXPECT_EQ(single[r * y_stride + o], -7);
        }
      }
    }
  }
}

TEST(Linear, ARowOfADecodeStepHasTheSameBitsInAnyBatchAndForAnyThreads) {
  const size_t in = 517, out = 1100, rows = 5;  // enough work to be shared between threads
  const auto weight = normal(out * in, 1), x = normal(rows * in, 2);
  const LinearWeight w{weight.data(), nullptr, out, in};
  ThreadPool one(1), three(3);
  std::vector<float> batch(rows * out), alone(out);
  const LinearRows all{w, x.data(), in, batch.data(), out};
  linear_rows({&all, 1}, rows, three);
  for (size_t r = 0; r < rows; ++r) {
    const LinearRows single{w, x.data() + r * in, in, alone.data(), out};
    linear_rows({&single, 1}, 1, one);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), batch.begin() + ptrdiff_t(r * out)));
  }
}

TEST(Linear, ASizeBeyondOpenBlasIsRefused) {
  const float x = 1;
  float y = 0;
  const LinearWeight w{&x, nullptr, size_t(1) << 31, 1};
  EXPECT_THROW(linear_tile(w, &x, 1, 1, &y, 1), Error);
}

// ---- norms and gate -----------------------------------------------------------------------------

TEST(RmsNorm, EqualsItsDefinitionWithinRounding) {
  for (size_t n : {1u, 8u, 64u, 75u, 4096u}) {
    const auto x = normal(2 * n, 4, 30), weight = normal(n, 5);
    std::vector<float> y(2 * n);
    rms_norm(x.data(), n, 2, n, weight.data(), 1e-5f, y.data(), n);
    for (size_t r = 0; r < 2; ++r) {
      double square = 0;
      for (size_t i = 0; i < n; ++i) square += std::pow(double(x[r * n + i]), 2);
      const double factor = 1 / std::sqrt(square / double(n) + double(1e-5f));
      // A sum of n squares costs gamma_n, halved by the root; five more roundings.
      const double relative = kUnit * (double(n) / 2 + 6);
      for (size_t i = 0; i < n; ++i) {
        const double exact = double(x[r * n + i]) * factor * double(weight[i]);
        EXPECT_NEAR(y[r * n + i], exact, relative * std::abs(exact) + 1e-30);
      }
    }
  }
}

TEST(RmsNorm, ARowThatOverflowsComesOutAsNanAndNotAsZeros) {
  for (float bad : {kNan, kInf, 1e25f}) {
    auto x = normal(2 * 40, 6);
    x[3] = bad;
    const std::vector<float> weight(40, 1.0f);
    rms_norm(x.data(), 40, 2, 40, weight.data(), 1e-5f, x.data(), 40);
    for (size_t i = 0; i < 40; ++i) {
      EXPECT_TRUE(std::isnan(x[i])) << bad;
      EXPECT_FALSE(std::isnan(x[40 + i]));
    }
  }
}

TEST(Silu, EqualsItsDefinitionWithinRoundingAndKeepsNan) {
  const size_t n = 77;
  std::vector<float> gate_up(2 * n), y(n);
  for (size_t i = 0; i < n; ++i) {
    gate_up[i] = (float(i) - 38) * (i % 3 == 0 ? 10.0f : 0.37f);  // to -380 and 380
    gate_up[n + i] = float(i) - 20.5f;
  }
  silu_and_multiply(gate_up.data(), 1, n, y.data(), n);
  for (size_t i = 0; i < n; ++i) {
    const double x = double(gate_up[i]), exact = x / (1 + std::exp(-x)) * double(gate_up[n + i]);
    // The exponential is right to 2^-22 (kernels/arith/exp.h), or flushed to 0 below exp(-87).
    EXPECT_NEAR(y[i], exact, 0x1p-20 * std::abs(exact) + 400 * 60 * 0x1p-125);
  }
  gate_up[5] = kNan;
  silu_and_multiply(gate_up.data(), 1, n, y.data(), n);
  EXPECT_TRUE(std::isnan(y[5]));
}

TEST(AllFinite, SeesANanOrInfinityInAnyPlace) {
  for (size_t n : {1u, 8u, 19u}) {
    std::vector<float> x(n, 3e38f);
    EXPECT_TRUE(all_finite(x.data(), n));
    for (size_t i = 0; i < n; ++i) {
      for (float bad : {kNan, kInf, -kInf}) {
        x[i] = bad;
        EXPECT_FALSE(all_finite(x.data(), n)) << n << " " << i;
        x[i] = -3e38f;
      }
    }
  }
}

// ---- rotary embedding ---------------------------------------------------------------------------

// Oracle: long double (64-bit mantissa) from the definition of theta^(-2m/d).
TEST(Rope, TablesAreRightToFloatRoundingUpToPosition131071AndTheta1e16) {
  for (double theta : {1e4, 5e5, 2e6, 1e16}) {
    const size_t d = 128;
    const std::vector<double> f = rope_frequencies(theta, d);
    RopeTable table;
    for (int64_t first : {int64_t(0), int64_t(4095), int64_t(99991), int64_t(131064)}) {
      table.fill(f, 1.0, first, 8);
      for (size_t p = 0; p < 8; ++p) {
        for (size_t m = 0; m < d / 2; ++m) {
          const long double angle = (long double)(first + int64_t(p)) *
                                    std::pow((long double)theta, -2.0L * m / (long double)d);
          const double c = double(std::cos(angle)), s = double(std::sin(angle));
          // Half a unit in the last place of the result, and 1e-10 rad of the angle.
          EXPECT_NEAR(table.cos[p * d / 2 + m], c, kUnit * std::abs(c) + 1e-10);
          EXPECT_NEAR(table.sin[p * d / 2 + m], s, kUnit * std::abs(s) + 1e-10);
        }
      }
    }
  }
}

TEST(Rope, RotationTurnsPairsOfTheTwoHalves) {
  const size_t d = 8;
  const std::vector<double> f = rope_frequencies(100, d);
  RopeTable table;
  table.fill(f, 2.0, 5, 2);
  auto x = normal(2 * d, 9);
  const auto before = x;
  rope_rotate(table, 1, x.data(), 2);  // position 6
  for (size_t h = 0; h < 2; ++h) {
    for (size_t m = 0; m < d / 2; ++m) {
      const double a = double(before[h * d + m]), b = double(before[h * d + m + d / 2]);
      const double angle = 6 * std::pow(100.0, -double(m) / 4);
      EXPECT_NEAR(x[h * d + m], 2 * (a * std::cos(angle) - b * std::sin(angle)), 1e-6);
      EXPECT_NEAR(x[h * d + m + d / 2], 2 * (b * std::cos(angle) + a * std::sin(angle)), 1e-6);
    }
  }
}

TEST(Rope, Llama3KeepsFastPairsSlowsSlowOnesAndJoinsThemWithoutAStep) {
  const double factor = 8, low = 1, high = 4, original = 8192;
  std::vector<double> f = rope_frequencies(5e5, 128);
  const std::vector<double> plain = f;
  rope_scale_llama3(f, factor, low, high, original);
  int kept = 0, divided = 0, between = 0;
  for (size_t m = 0; m < f.size(); ++m) {
    const double turns = original * plain[m] / (2 * M_PI);
    if (turns > high) {
      EXPECT_EQ(f[m], plain[m]);
      ++kept;
    } else if (turns < low) {
      EXPECT_EQ(f[m], plain[m] / factor);
      ++divided;
    } else {
      EXPECT_GT(f[m], plain[m] / factor);
      EXPECT_LT(f[m], plain[m]);
      ++between;
    }
    EXPECT_TRUE(m == 0 || f[m] < f[m - 1]);
  }
  EXPECT_GT(kept, 10);
  EXPECT_GT(divided, 10);
  EXPECT_GT(between, 2);
}

TEST(Rope, YarnRampsFromKeptToInterpolatedPairs) {
  std::vector<double> f = rope_frequencies(1e4, 128);
  const std::vector<double> plain = f;
  rope_scale_yarn(f, 1e4, 16, 32, 1, true, 4096);
  // By the paper's formula: pair(turns) = 64 ln(4096 / (2 pi turns)) / ln 1e4.
  const double low = std::floor(64 * std::log(4096 / (2 * M_PI * 32)) / std::log(1e4));
  const double high = std::ceil(64 * std::log(4096 / (2 * M_PI)) / std::log(1e4));
  for (size_t m = 0; m < 64; ++m) {
    const double share = std::min(1.0, std::max(0.0, (double(m) - low) / (high - low)));
    EXPECT_NEAR(f[m] / plain[m], 1 - share + share / 16, 1e-12) << m;
  }
  EXPECT_EQ(f[0], plain[0]);
  EXPECT_EQ(f[63], plain[63] / 16);
}

// ---- prefill attention --------------------------------------------------------------------------

struct AttentionCase {
  size_t tokens = 0, kv_heads = 2, heads_per_group = 2, head_dim = 64;
  DType dtype = DType::BF16;
  float q_scale = 1, k_scale = 1;
  std::vector<float> q{};          // [kv_heads, tokens, heads_per_group, head_dim]
  std::vector<uint16_t> k{}, v{};  // [kv_heads, tokens, head_dim]

  void draw(uint64_t seed) {
    q = normal(kv_heads * tokens * heads_per_group * head_dim, seed, q_scale);
    for (auto* to : {&k, &v}) {
      const auto x = normal(kv_heads * tokens * head_dim, ++seed, to == &k ? k_scale : 1);
      to->clear();
      for (float f : x) to->push_back(float_to_16(dtype, f));
    }
  }

  std::vector<float> run(size_t first, int threads) const {
    std::vector<float> out(q.size(), -1);
    PrefillAttention a;
    const size_t row = heads_per_group * head_dim;
    a.q = q.data() + first * row;
    a.out = out.data() + first * row;
    a.q_group_stride = a.out_group_stride = tokens * row;
    a.q_row_stride = a.out_row_stride = row;
    a.k = k.data();
    a.v = v.data();
    a.kv_head_stride = tokens * head_dim;
    a.dtype = dtype;
    a.first = first;
    a.rows = tokens - first;
    a.kv_heads = kv_heads;
    a.heads_per_group = heads_per_group;
    a.head_dim = head_dim;
    ThreadPool pool(threads);
    prefill_attention(a, pool);
    return out;
  }

  // Exact attention of one query; returns sum p |v| per channel beside it, for the tolerance.
  void exact(size_t g, size_t t, size_t h, std::vector<double>& o, std::vector<double>& size,
             double& largest_score) const {
    const float* query = q.data() + ((g * tokens + t) * heads_per_group + h) * head_dim;
    std::vector<double> s(t + 1);
    double top = -1e300;
    largest_score = 0;
    for (size_t i = 0; i <= t; ++i) {
      double absolute = 0;
      for (size_t c = 0; c < head_dim; ++c) {
        const double term =
            double(query[c]) * double(float_from_16(dtype, k[(g * tokens + i) * head_dim + c]));
        s[i] += term;
        absolute += std::abs(term);
      }
      s[i] /= std::sqrt(double(head_dim));
      largest_score = std::max(largest_score, absolute / std::sqrt(double(head_dim)));
      top = std::max(top, s[i]);
    }
    o.assign(head_dim, 0);
    size.assign(head_dim, 0);
    double mass = 0;
    for (size_t i = 0; i <= t; ++i) mass += s[i] = std::exp(s[i] - top);
    for (size_t i = 0; i <= t; ++i) {
      for (size_t c = 0; c < head_dim; ++c) {
        const double v0 = double(float_from_16(dtype, v[(g * tokens + i) * head_dim + c]));
        o[c] += s[i] / mass * v0;
        size[c] += s[i] / mass * std::abs(v0);
      }
    }
  }

  void expect_exact(const std::vector<float>& out, size_t first) const {
    std::vector<double> o, size;
    double score = 0;
    for (size_t g = 0; g < kv_heads; ++g) {
      for (size_t t = first; t < tokens; t += t % 61 == 0 ? 1 : 7) {
        for (size_t h = 0; h < heads_per_group; ++h) {
          exact(g, t, h, o, size, score);
          // Scores: head_dim + 3 roundings of sum |q k|; the exponential 2^-22 and its argument's
          // rounding; sums of t + 1 weights and products; once for the numerator, once for the sum.
          const double relative =
              2 * (kUnit * (double(head_dim + 3) * score + 2 * score + double(t + 1)) + 0x1p-22 +
                   10 * kUnit);
          const float* got = out.data() + ((g * tokens + t) * heads_per_group + h) * head_dim;
          for (size_t c = 0; c < head_dim; ++c)
            ASSERT_NEAR(got[c], o[c], relative * size[c]) << g << " " << t << " " << h << " " << c;
        }
      }
    }
  }
};

TEST(PrefillAttention, EqualsExactAttentionAroundTileEdges) {
  for (size_t tokens : {1u, 2u, 127u, 128u, 129u, 256u, 257u, 600u}) {
    AttentionCase c{.tokens = tokens};
    c.draw(tokens);
    c.expect_exact(c.run(0, 1), 0);
  }
}

TEST(PrefillAttention, EqualsExactAttentionForEveryHeadShapeAndType) {
  for (size_t head_dim : {64u, 96u, 128u, 256u}) {
    for (size_t heads : {1u, 3u, 8u, 20u}) {
      AttentionCase c{.tokens = 150,
                      .kv_heads = 1,
                      .heads_per_group = heads,
                      .head_dim = head_dim,
                      .dtype = heads % 2 ? DType::F16 : DType::BF16};
      c.draw(head_dim + heads);
      c.expect_exact(c.run(0, 2), 0);
    }
  }
}

TEST(PrefillAttention, SharpAndHugeScoresStayExact) {
  // Scores to some hundreds: weights underflow, the running maximum moves by more than exp's range.
  AttentionCase c{.tokens = 400, .q_scale = 12, .k_scale = 10};
  c.draw(77);
  c.expect_exact(c.run(0, 1), 0);
}

TEST(PrefillAttention, ChunksGiveTheSameBitsAsTheWholeForAnyThreads) {
  AttentionCase c{.tokens = 700};
  c.draw(5);
  const std::vector<float> whole = c.run(0, 1);
  EXPECT_EQ(c.run(0, 3), whole);
  const size_t first = 512, row = c.heads_per_group * c.head_dim;
  const std::vector<float> part = c.run(first, 2);
  for (size_t g = 0; g < c.kv_heads; ++g)
    for (size_t i = first * row; i < c.tokens * row; ++i)
      ASSERT_EQ(part[g * c.tokens * row + i], whole[g * c.tokens * row + i]);
  EXPECT_THROW(c.run(100, 1), Error);  // not on a tile's edge
}

TEST(PrefillAttention, ANanOrInfinityIsSeenByEveryQueryThatSeesIt) {
  for (uint16_t bad : {uint16_t(0x7fc0), uint16_t(0x7f80), uint16_t(0xff80)}) {
    for (bool in_value : {false, true}) {
      AttentionCase c{.tokens = 600, .kv_heads = 1, .heads_per_group = 1};
      c.draw(6);
      for (float& q : c.q) q = std::abs(q);  // an infinite key of either sign meets the same sign
      if (!in_value && bad == 0xff80) continue;  // weight 0 for all: nothing of it is left to see
      (in_value ? c.v : c.k)[300 * 64 + 3] = bad;
      const std::vector<float> out = c.run(0, 1);
      for (size_t t = 0; t < 600; ++t) {
        const bool finite = std::isfinite(out[t * 64 + 3]);
        EXPECT_TRUE(finite || t >= 256) << t;  // an earlier tile
        EXPECT_TRUE(!finite || t < 300) << t;
      }
    }
  }
}

}  // namespace
}  // namespace certkv
