// The device's pass against float64: what it returns, what it says of every block, and what its
// state certifies. In emulation where there is no GPU; tests/gpu runs the same on one.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/support/certificate_terms.h"
#include "tests/support/device_pass.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;

struct Drawn {
  SealedHead head;
  Floats q;
  int heads;
  Drawn(const char* layout, int d, int n_heads, size_t tokens, uint64_t seed,
        DType dtype = DType::BF16, double q_scale = 1, double v_scale = 1)
      : head(layout, dtype, d), heads(n_heads) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    head.add(tokens, [&](size_t, size_t c) {
      const double k = normal(random) * (c % 13 == 3 ? 8 : 1);
      return std::pair{k, v_scale * normal(random)};
    });
    head.seal();
    for (int i = 0; i < n_heads * d; ++i) q.push_back(float(q_scale * normal(random)));
  }
  QueryGroup group() const { return make_query_group(heads, head.x.head_dim, q.data()); }
  const float* query(int h) const { return q.data() + h * head.x.head_dim; }
};

// Attention over what the device serves, in float64: which rows, the block table says.
struct Served {
  std::vector<double> score, norm;               // [tokens]
  std::vector<double> out, mass;                 // [d]; [blocks] about m
  double m = -INFINITY, z = 0, s = 0, size = 0;  // size: sum w max(||v||, vbar)
  // Over T, with the factors c_b that the pass says it used: sum c w v, of w ||v||^2, of w size.
  std::vector<double> a;
  double m2 = 0, a_size = 0;
};
Served attend_served(const SealedHead& head, std::span<const BlockRef> blocks, const float* q,
                     const float* c_of) {
  const size_t d = head.dim();
  const std::vector<double>& decoded = oracle::decoded(head.x.dtype);
  const cuda::PageKind kind = cuda::page_kind_of(*head.format);
  std::vector<std::byte> page(cuda::page_layout(int(d), kind).page_bytes());
  std::vector<double> pk(64 * d), pv(64 * d);
  Served x;
  std::vector<std::vector<double>> v;
  std::vector<double> bar;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const BlockRef& block = blocks[b];
    if (block.page != nullptr) {
      cuda::convert_page(*head.format, block.page, page.data());
      cuda::decode_device_page(int(d), kind, page.data(), pk.data(), pv.data());
    }
    for (int t = 0; t < block.tokens; ++t) {
      const size_t row = size_t(block.index * 16 + t) * d, own = size_t(t) * d;
      double score = 0, norm = 0;
      std::vector<double> value(d);
      for (size_t c = 0; c < d; ++c) {
        score += q[c] * (block.k != nullptr ? decoded[block.k[own + c]] : pk[row + c]);
        value[c] = block.v != nullptr ? decoded[block.v[own + c]] : pv[row + c];
        norm += value[c] * value[c];
      }
      x.score.push_back(score / std::sqrt(double(d)));
      x.m = std::max(x.m, x.score.back());
      x.norm.push_back(std::sqrt(norm));
      v.push_back(value);
      bar.push_back(block.v == nullptr
                        ? cuda::device_notes(int(d), page.data()).block[block.index].vbar
                        : block.nu);
    }
  }
  x.out.assign(d, 0.0);
  x.a.assign(d, 0.0);
  for (size_t t = 0; t < x.score.size(); ++t) {
    const double w = std::exp(x.score[t] - x.m);
    if (t % 16 == 0) x.mass.push_back(0);
    x.mass.back() += w;
    x.z += w;
    x.s += w * x.norm[t];
    x.size += w * bar[t];
    const bool quantised = blocks[t / 16].page != nullptr && blocks[t / 16].k == nullptr;
    const double cw = quantised ? double(c_of[t / 16]) * w : 0;
    x.m2 += cw * x.norm[t] * x.norm[t];
    x.a_size += cw * bar[t];
    for (size_t i = 0; i < d; ++i) {
      x.out[i] += w * v[t][i];
      x.a[i] += cw * v[t][i];
    }
  }
  for (double& a : x.a) a /= x.z;
  x.m2 /= x.z;
  x.a_size /= x.z;
  for (double& o : x.out) o /= x.z;
  x.s /= x.z;
  x.size /= x.z;
  return x;
}

double norm_of(std::span<const float> x) {
  double sum = 0;
  for (float v : x) sum += double(v) * v;
  return std::sqrt(sum);
}

// What rounding of the sums may cost, as E_acc charges it. SOURCE: method 4b.
double sum_slack(const Served& x, double out_norm) {
  return oracle::gamma(kChainOutput + 3) * (x.size + out_norm) + 4 * kUnit * out_norm;
}

// The sharpest part of g_b that the oracle can state: rounding of the query to 16 bits, and sums.
double score_slack(const Drawn& x, const BlockRef& block, size_t b, int h) {
  const oracle::ScoreError e = oracle::score_error(x.head, block, b, x.query(h));
  return e.any_query * (1 + 1e-3) + oracle::gamma(double(x.head.dim())) * e.most;
}

// off: [heads, blocks] how far a score of a block may be from q k^ / sqrt(d).
void expect_as_served(const Drawn& x, std::span<const BlockRef> blocks, const DevicePass& pass,
                      std::span<const double> off) {
  const size_t d = x.head.dim();
  for (int h = 0; h < x.heads; ++h) {
    const Served served =
        attend_served(x.head, blocks, x.query(h), pass.state.c.data() + pass.state.at(h, 0));
    const HeadSums& sums = pass.state.head[size_t(h)];
    double most_off = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      const size_t i = pass.state.at(h, b);
      const double got =
          pass.state.block_sum[i] * std::exp(double(pass.state.block_ref[i]) - served.m);
      most_off = std::max(most_off, off[i]);
      EXPECT_NEAR(got, served.mass[b], std::expm1(off[i]) * served.mass[b] + 16 * 0x1p-125)
          << "head " << h << " block " << b;
    }
    EXPECT_NEAR(sums.l * std::exp(sums.m - served.m), served.z, std::expm1(most_off) * served.z);
    std::span<const float> out(pass.out.data() + size_t(h) * d, d);
    // Weights off by expm1(most_off) each move the mean by at most twice that, of what they weigh.
    const double slack =
        sum_slack(served, norm_of(out)) + 2.1 * std::expm1(most_off) * (served.s + norm_of(out));
    EXPECT_LE(distance(served.out, out), slack) << "head " << h;
    const double s = sums.s1 / sums.l;
    EXPECT_LE(s, served.s * (1 + 2 * std::expm1(most_off) + oracle::gamma(160)));
    // Norms lie in the page as 16 bits of its largest: below by 2^-15 of that at most.
    EXPECT_GE(s, served.s * (1 - 2 * std::expm1(most_off) - oracle::gamma(160)) -
                     0x1p-15 * pass.state.vbar_max);
    // m2 from above, by the norms' last place, twice; a as the output.
    const double moved = 2.1 * std::expm1(most_off) + oracle::gamma(160);
    const double m2 = sums.m2 / sums.l, place = 0x1p-15 * pass.state.vbar_max;
    EXPECT_GE(m2, served.m2 * (1 - moved));
    EXPECT_LE(m2, served.m2 * (1 + moved + 0x1p-17) + 3 * place * served.a_size +
                      place * place * double(sums.c_tokens));
    double a2 = 0;
    for (size_t c = 0; c < d; ++c) a2 += std::pow(sums.a[c] / sums.l - served.a[c], 2);
    EXPECT_LE(std::sqrt(a2), moved * 2 * served.a_size);
    double c_tokens = 0;
    float score_max = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      if (blocks[b].page == nullptr || blocks[b].k != nullptr) continue;
      c_tokens += pass.state.c[pass.state.at(h, b)] * 16;
      score_max = std::max(score_max, pass.state.score_bound[pass.state.at(h, b)]);
    }
    EXPECT_NEAR(sums.c_tokens, c_tokens, c_tokens * oracle::gamma(512));
    EXPECT_EQ(sums.score_max, score_max);
  }
}
void expect_as_served(const Drawn& x, std::span<const BlockRef> blocks, const DevicePass& pass) {
  std::vector<double> off;
  for (int h = 0; h < x.heads; ++h)
    for (size_t b = 0; b < blocks.size(); ++b)
      off.push_back(score_slack(x, blocks[b], b, h) + cuda::kEpsWDevice);
  expect_as_served(x, blocks, pass, off);
}

void expect_certificates_hold(const Drawn& x, const DevicePass& pass) {
  const std::vector<Certificate> judged = pass.judge();
  const size_t d = x.head.dim();
  for (int h = 0; h < x.heads; ++h) {
    const Certificate& c = judged[size_t(h)];
    ASSERT_TRUE(std::isfinite(c.bound)) << "head " << h;
    const oracle::Exact exact = oracle::attention(x.head.x, x.head.x.tokens(), x.query(h));
    EXPECT_LE(distance(exact.out, {pass.out.data() + size_t(h) * d, d}), c.bound) << "head " << h;
  }
}

// Blocks as sealed, some of them from originals.
std::vector<BlockRef> mixed(const Drawn& x, uint64_t seed, int one_in) {
  std::vector<BlockRef> blocks = x.head.blocks;
  std::mt19937_64 random(seed);
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].page == nullptr) continue;
    const bool key = random() % uint64_t(one_in) == 0, value = random() % uint64_t(one_in) == 0;
    if (key || value) blocks[b] = x.head.promoted(b, key, value);
  }
  return blocks;
}

TEST_P(OnDevice, ReturnsAttentionOverWhatItServes) {
  for (int d : {64, 128})
    for (int heads : {1, 3, 4, 5, 8}) {
      const Drawn x(layout(), d, heads, 64 * 9 + 21, uint64_t(d + heads));
      expect_as_served(x, x.head.blocks,
                       DevicePass(x.head.context(), x.group(), x.head.blocks, {.warps = warps()}));
    }
}

TEST_P(OnDevice, TakesOriginalsInPlaceOfCodes) {
  for (int d : {64, 128})
    for (DType dtype : {DType::F16, DType::BF16})
      for (int one_in : {1, 2, 5}) {
        const Drawn x(layout(), d, d == 64 ? 8 : 4, 64 * 4 + 33, uint64_t(7 * d + one_in), dtype);
        const std::vector<BlockRef> blocks = mixed(x, 5, one_in);
        const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
        EXPECT_TRUE(pass.judged_alike());
        EXPECT_EQ(pass.flags, 0u);
        expect_as_served(x, blocks, pass);
        for (size_t b = 0; b < blocks.size(); ++b)
          for (int h = 0; h < x.heads; ++h)
            EXPECT_EQ(pass.state.used[pass.state.at(h, b)],
                      (blocks[b].k != nullptr ? kUsedKey : 0) |
                          (blocks[b].v != nullptr ? kUsedValue : 0));
        expect_certificates_hold(x, pass);
      }
}

// More entries than lanes, more blocks of originals than warps, in one split; of a block of 5 warps
// as many as it can list.
TEST_P(OnDevice, DealsManyBlocksOfOriginalsToItsWarps) {
  for (size_t tokens : {64 * 40 + 5, 64 * 5 * cuda::kMaxPagesPerWarp})
    for (DType dtype : {DType::F16, DType::BF16}) {
      const Drawn x(layout(), 64, 2, tokens, 21, dtype);
      for (const auto& blocks : {mixed(x, 9, 3), mixed(x, 9, 1), x.head.originals()}) {
        const DevicePass pass(
            x.head.context(), x.group(), blocks,
            {.warps = warps(), .pages_per_split = warps() * cuda::kMaxPagesPerWarp});
        EXPECT_TRUE(pass.judged_alike());
        expect_as_served(x, blocks, pass);
        expect_certificates_hold(x, pass);
      }
    }
}

TEST_P(OnDevice, HoldsAtTheEdgesOfBlocksPagesAndSplits) {
  for (size_t tokens :
       {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 1100}) {
    const Drawn x(layout(), 64, 2, tokens, tokens);
    for (int pages_per_split : {1, 3, 8, 16}) {
      if (pages_per_split == 1 && tokens > 600) continue;
      const DevicePass pass(x.head.context(), x.group(), x.head.blocks,
                            {.warps = warps(), .pages_per_split = pages_per_split});
      EXPECT_TRUE(pass.judged_alike());
      expect_as_served(x, x.head.blocks, pass);
      expect_certificates_hold(x, pass);
      ASSERT_FALSE(testing::Test::HasFailure()) << tokens << " tokens, " << pages_per_split;
    }
  }
}

// D_b, and what the rounding may add to it, stated by the oracle.
TEST_P(OnDevice, ChargesEveryBlockItsScoreError) {
  for (int d : {64, 128}) {
    const Drawn x(layout(), d, 4, 64 * 3 + 10, uint64_t(d), DType::F16);
    const std::vector<BlockRef> blocks = mixed(x, 3, 4);
    const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
    EXPECT_TRUE(pass.judged_alike());
    for (size_t b = 0; b < blocks.size(); ++b)
      for (int h = 0; h < x.heads; ++h) {
        const size_t i = pass.state.at(h, b);
        const oracle::ScoreError e = oracle::score_error(x.head, blocks[b], b, x.query(h));
        EXPECT_GE(pass.state.delta[i], e.d + e.least * oracle::gamma(8) + oracle::kLeastEpsW);
        if (blocks[b].page == nullptr || blocks[b].k != nullptr) {
          EXPECT_LE(pass.state.delta[i], e.most * oracle::gamma(128) + 2 * cuda::kEpsWDevice);
        } else {
          // The page is charged the largest of its blocks; those of one page are much alike.
          EXPECT_LE(pass.state.delta[i],
                    1.3 * e.d + e.any_query + e.most * oracle::gamma(128) + 2 * cuda::kEpsWDevice);
          // The factor in a and m2, from above.
          EXPECT_GE(double(pass.state.c[i]), std::expm1(double(pass.state.delta[i])));
          EXPECT_LE(double(pass.state.c[i]), std::expm1(double(pass.state.delta[i])) * (1 + 1e-3));
        }
      }
  }
}

// Nothing but the exponential, its argument's rounding and the rescales is left of a zero query.
TEST_P(OnDevice, ChargesTheExponentialWhereTheScoresAreZero) {
  Drawn x(layout(), 64, 1, 64 * 2 + 7, 3);
  std::fill(x.q.begin(), x.q.end(), 0.0f);
  for (const auto& blocks : {x.head.blocks, x.head.originals()}) {
    const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
    EXPECT_TRUE(pass.judged_alike());
    for (float delta : pass.state.delta) EXPECT_GE(double(delta), oracle::kLeastEpsW);
    expect_as_served(x, blocks, pass);
    expect_certificates_hold(x, pass);
  }
}

// Large factors too: Delta_b of 0.5 to 30.
TEST_P(OnDevice, BoundsTheFactorOfLargeErrors) {
  for (double q_scale : {5.0, 30.0, 300.0}) {
    Drawn x(layout(), 64, 2, 64 * 3, 5, DType::BF16, q_scale);
    if (x.head.format->layout.key.code_bits == 12)  // errors are a sixteenth
      for (float& q : x.q) q *= 16;
    const DevicePass pass(x.head.context(), x.group(), x.head.blocks, {.warps = warps()});
    EXPECT_TRUE(pass.judged_alike());
    for (size_t i = 0; i < pass.state.delta.size(); ++i) {
      EXPECT_GE(double(pass.state.c[i]), std::expm1(double(pass.state.delta[i])));
      EXPECT_LE(double(pass.state.c[i]), std::expm1(double(pass.state.delta[i])) * (1 + 1e-4));
    }
    EXPECT_GT(pass.state.delta[0], 0.25f) << "the other formula was meant";
    expect_certificates_hold(x, pass);
  }
}

// Keys that codes hold exactly, so that D_b is 0 and what is charged is rounding alone. Codes of 12
// bits hold 16 times the keys, and the query is a sixteenth, so that scores are the same.
struct ExactKeys : Drawn {
  // q: head, channel -> query; key: token, channel -> 0 .. 255, both ends met in every group.
  template <typename Query, typename Key, typename Value>
  ExactKeys(const char* layout, int d, int n_heads, size_t tokens, Query query_of, Key key,
            Value value)
      : Drawn(layout, d, n_heads, 0, 1, DType::F16) {
    const bool fine = head.format->layout.key.code_bits == 12;
    const double times = fine ? 16 : 1;
    // 4094 is a half, and the step that brings it to 4095 is 1.
    const double most = fine ? 4094 : 255;
    head.add(tokens, [&](size_t t, size_t c) {
      const double k = t % 64 == 62 ? 0 : t % 64 == 63 ? most : times * key(t, c);
      return std::pair{k, value(t, c)};
    });
    head.seal();
    for (int h = 0; h < n_heads; ++h)
      for (int c = 0; c < d; ++c) q[size_t(h * d + c)] = query_of(h, c) / float(times);
  }
  // What the pass itself charges, and nothing else, is what scores may be off.
  void expect_within_charge(int warps) const {
    const DevicePass pass(head.context(), group(), head.blocks, {.warps = warps});
    EXPECT_TRUE(pass.judged_alike());
    std::vector<double> off;
    for (float bound : pass.state.score_bound) off.push_back(double(bound) + cuda::kEpsWDevice);
    expect_as_served(*this, head.blocks, pass, off);
  }
};

TEST_P(OnDevice, WeighsWithTwentyTwoBits) {
  std::mt19937_64 random(8);
  std::normal_distribution<double> normal;
  for (int d : {64, 128}) {
    // The query is whole in its unit but for rounding: nothing is lost of it.
    std::vector<float> q;
    for (int i = 0; i < 8 * d; ++i)
      q.push_back(float(i % d == 5 ? 32600 : int(random() % 65201) - 32600) * 0x1p-22f);
    for (int weighty : {2, 62}) {  // tokens that count
      std::vector<int> keys;
      for (int i = 0; i < 128 * d; ++i) keys.push_back(int(random() % 256));
      const ExactKeys x(
          layout(), d, 8, 128, [&](int h, int c) { return q[size_t(h * d + c)]; },
          [&](size_t t, size_t c) {
            // All others score as the zeros at a group's end do or lower.
            return int(t % 64) < weighty ? keys[t * size_t(d) + c] : 0;
          },
          [&](size_t t, size_t) { return (t % 2 == 0 ? 10 : -10) + normal(random); });
      x.expect_within_charge(warps());
    }
  }
}

// All tokens have the same values, so that the output is those whatever the weights are: what is
// left is how far the weights that are summed differ from those that weigh values, and rounding.
// Halves alone would differ by up to 2^-12, 4096 u.
TEST_P(OnDevice, SumsTheWeightsThatWeighValues) {
  std::mt19937_64 random(9);
  for (int d : {64, 128}) {
    std::vector<float> q;
    for (int i = 0; i < 8 * d; ++i) q.push_back(float(int(random() % 4097) - 2048) * 0x1p-18f);
    std::vector<int> keys;
    for (int i = 0; i < 4 * d; ++i) keys.push_back(int(random() % 256));
    const ExactKeys x(
        layout(), d, 8, 128, [&](int h, int c) { return q[size_t(h * d + c)]; },
        // A few kinds of tokens: rounding of many weights would cancel.
        [&](size_t t, size_t c) { return t % 16 < 2 ? keys[t / 64 * 2 * size_t(d) + c] : 0; },
        [](size_t, size_t c) { return 1 + double(c % 7); });
    for (const auto& blocks : {x.head.blocks, x.head.originals()}) {
      const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
      EXPECT_TRUE(pass.judged_alike());
      for (int h = 0; h < x.heads; ++h) {
        const Served served =
            attend_served(x.head, blocks, x.query(h), pass.state.c.data() + pass.state.at(h, 0));
        const std::span<const float> out(pass.out.data() + size_t(h * d), size_t(d));
        EXPECT_LE(distance(served.out, out), sum_slack(served, norm_of(out))) << "head " << h;
      }
    }
  }
}

// Every channel but one loses 0.45 of the query's last place, all in one direction; the keys of a
// block are all 255, or all 0: 128 (to 127) times the loss is the score's error, once 128 times it
// is in the base.
TEST_P(OnDevice, ChargesWhatAQueryOfSixteenBitsLoses) {
  constexpr float kPlace = 0x1p-20f;
  for (int d : {64, 128})
    for (float sign : {1.0f, -1.0f}) {
      const ExactKeys x(
          layout(), d, 4, 64,
          [&](int h, int c) {
            return c == 0 ? 32600 * kPlace : sign * (float(3 + h + c % 5) + 0.45f) * kPlace;
          },
          [&](size_t t, size_t) { return t / 16 % 2 == 0 ? 255 : 0; },
          [](size_t, size_t c) { return double(c % 7); });
      x.expect_within_charge(warps());
      const DevicePass pass(x.head.context(), x.group(), x.head.blocks, {.warps = warps()});
      EXPECT_TRUE(pass.judged_alike());
      for (int h = 0; h < 4; ++h) {
        const double lost = 0.45 * kPlace * 128 * (d - 1) / std::sqrt(double(d));
        EXPECT_GE(double(pass.state.score_bound[pass.state.at(h, 0)]), lost * 0.98);
        EXPECT_LE(double(pass.state.score_bound[pass.state.at(h, 0)]), lost * 1.2);
      }
    }
}

// Queries whose mantissas are all ones beyond the bits of two bfloat16, along the keys: two terms
// would lose 2^-16 of every product, 256 u, all in one direction.
TEST_P(OnDevice, ScoresOriginalsWithAllBitsOfTheQuery) {
  // Matrix instructions of an sm_90 are within 11 u, of which head_dim / 32 follow each other.
  constexpr double kChain = 11 * 4 + 11;
  for (DType dtype : {DType::F16, DType::BF16})
    for (int d : {64, 128}) {
      Drawn x(layout(), d, 4, 0, 1, dtype);
      x.head.add(70, [&](size_t t, size_t c) {
        return std::pair{(c % 3 == 0 ? -1.0 : 1.0) * (t == 20 ? 4 : 3.96875), double(t)};
      });
      x.head.seal();
      for (int h = 0; h < 4; ++h)
        for (int c = 0; c < d; ++c)
          x.q[size_t(h * d + c)] = (c % 3 == 0 ? -0x1.fffefep+1f : 0x1.fffefep+1f) * float(h + 1);
      const std::vector<BlockRef> blocks = x.head.originals();
      const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
      EXPECT_TRUE(pass.judged_alike());
      std::vector<double> off;
      for (int h = 0; h < 4; ++h)
        for (size_t b = 0; b < blocks.size(); ++b)
          off.push_back(oracle::gamma(kChain) *
                            oracle::score_error(x.head, blocks[b], b, x.query(h)).most +
                        cuda::kEpsWDevice);
      expect_as_served(x, blocks, pass, off);
    }
}

// E1, E2 and E5 from the state against the same sums token by token in float64.
TEST_P(OnDevice, StatesTheCertificatesTerms) {
  const Drawn x(layout(), 128, 4, 64 * 5, 99);
  const DevicePass pass(x.head.context(), x.group(), x.head.blocks, {.warps = warps()});
  EXPECT_TRUE(pass.judged_alike());
  const std::vector<Certificate> judged = pass.judge();
  for (int h = 0; h < x.heads; ++h) {
    const Certificate& c = judged[size_t(h)];
    const size_t d = x.head.dim();
    const Floats delta(pass.state.delta.begin() + long(pass.state.at(h, 0)),
                       pass.state.delta.begin() + long(pass.state.at(h, 0) + pass.state.blocks));
    const oracle::Terms t = oracle::terms(x.head, x.head.blocks, x.query(h), delta,
                                          {pass.out.data() + size_t(h) * d, d});
    // The device's values are the page's, each rounded to 11 bits once more, and eta holds that
    // too; its weights are within the score slack of the page's (about 1e-3 here); r_fp is charged
    // on top of R.
    constexpr double kClose = 0.02;
    const double moved = 0x1p-11 * double(pass.state.vbar_max);
    EXPECT_NEAR(c.s_term, t.s, kClose * t.s);
    EXPECT_NEAR(c.r_term, t.r, kClose * t.r);
    EXPECT_NEAR(c.h_term, t.h, kClose * t.h + std::sqrt(t.s) * moved);
    EXPECT_NEAR(c.e_val * c.den, t.e_val, kClose * t.e_val + moved);
    EXPECT_NEAR(c.den, t.den, kClose * t.den);
    EXPECT_NEAR(c.s, t.big_s, kClose * t.big_s);
    EXPECT_GE(c.r_term, t.r * (1 - 1e-3));
  }
}

TEST_P(OnDevice, WithoutTheCertificateReturnsTheSameOutput) {
  const Drawn x(layout(), 128, 5, 64 * 9 + 40, 4);
  const std::vector<BlockRef> blocks = mixed(x, 6, 6);
  const DevicePass with(x.head.context(), x.group(), blocks, {.warps = warps()});
  const DevicePass without(x.head.context(), x.group(), blocks,
                           {.warps = warps(), .certificate = false});
  EXPECT_EQ(with.out, without.out);
}

TEST_P(OnDevice, AMissingSlotRaisesTheFlagAndIsNeverReadAsAnother) {
  const Drawn x(layout(), 64, 4, 64 * 2 + 20, 11);
  std::vector<BlockRef> blocks = x.head.blocks;
  for (size_t b : {1, 5}) blocks[b] = x.head.promoted(b, true, true);
  const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps(), .missing_slot = 5});
  EXPECT_TRUE(pass.judged_alike());
  EXPECT_EQ(pass.flags, cuda::kFlagMissing);
  // The codes stood in, and are charged as what they are.
  blocks[5] = x.head.blocks[5];
  EXPECT_EQ(pass.state.used[pass.state.at(0, 5)], 0);
  EXPECT_EQ(pass.state.used[pass.state.at(0, 1)], kUsedKey | kUsedValue);
  expect_as_served(x, blocks, pass);
  expect_certificates_hold(x, pass);
  // Where there are no codes either, nothing is known.
  const DevicePass open(x.head.context(), x.group(), x.head.blocks,
                        {.warps = warps(), .missing_slot = 8});
  EXPECT_EQ(open.flags, cuda::kFlagMissing);
  for (const Certificate& c : open.judge()) EXPECT_TRUE(std::isnan(c.bound));
}

TEST_P(OnDevice, CertifiesNothingOnANonFiniteQuery) {
  for (float bad : {std::nanf(""), float(INFINITY), -float(INFINITY), 3e38f})
    for (bool originals : {false, true}) {
      Drawn x(layout(), 64, 4, 64 * 2 + 5, 12);
      x.q[64 + 9] = bad;
      const std::vector<BlockRef> blocks = originals ? x.head.originals() : x.head.blocks;
      const DevicePass pass(x.head.context(), x.group(), blocks, {.warps = warps()});
      EXPECT_TRUE(pass.judged_alike());
      const std::vector<Certificate> judged = pass.judge();
      EXPECT_FALSE(within_tolerance(judged[1], true, 1e6)) << bad;
      EXPECT_FALSE(within_tolerance(judged[1], false, 1e30)) << bad;
      EXPECT_TRUE(within_tolerance(judged[0], true, 1)) << "its neighbour is sound";
    }
}

TEST_P(OnDevice, CertifiesNothingOnDamagedNotes) {
  const Drawn x(layout(), 64, 2, 64 * 3, 13);
  using Notes = cuda::PageNotesDevice;
  const std::vector<std::function<void(Notes&, float)>> places = {
      [](Notes& n, float v) { n.kbar_norm = v; },
      [](Notes& n, float v) { n.kappa = v; },
      [](Notes& n, float v) { n.e = v; },
      [](Notes& n, float v) { n.norm_step = v; },
      [](Notes& n, float v) { n.value_factor = v; },
      [](Notes& n, float v) { n.block[2].eta = v; },
      [](Notes& n, float v) { n.block[1].vbar = v; },
      [](Notes& n, float v) { n.block[3].nu = v; }};
  for (size_t i = 0; i < places.size(); ++i)
    for (float bad : {std::nanf(""), -1e-5f, -1.0f, -float(INFINITY)}) {
      const DevicePass pass(x.head.context(), x.group(), x.head.blocks,
                            {.warps = warps(), .damage = [&](std::byte* page) {
                               const size_t at = cuda::notes_offset(64);
                               Notes notes;
                               std::memcpy(&notes, page + at, sizeof notes);
                               places[i](notes, bad);
                               std::memcpy(page + at, &notes, sizeof notes);
                             }});
      for (const Certificate& c : pass.judge()) {
        EXPECT_FALSE(within_tolerance(c, true, 1e6)) << i << " " << bad;
        EXPECT_FALSE(within_tolerance(c, false, 1e30)) << i << " " << bad;
      }
    }
}

INSTANTIATE_TEST_SUITE_P(Blocks, OnDevice, kEveryVariant, variant_name);

}  // namespace
}  // namespace certkv
