// The rounding term is honest: FP32 accumulation over up to 128K tokens and large norms against
// float64, in the pass and after up to 88 corrections in a row.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/base/log.h"
#include "tests/support/attention_cases.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

constexpr size_t kLong = 131072;
using Floats = std::vector<float>;

// A query of zeros weighs every token by exactly 1, whatever its key: the whole error is that of
// sums, and E_acc alone (method 4b, before den, which is 1 here) must hold it. Returns error /
// E_acc.
template <typename Value>
double sums_alone(DType dtype, size_t tokens, Value value) {
  SealedHead head("compact", dtype, 64);
  head.add(tokens, [&](size_t t, size_t) { return std::pair{0.0, value(t)}; });
  head.seal();
  const std::vector<BlockRef> blocks = head.originals();
  const Floats q(64, 0.0f);
  const JudgedPass judged(head, blocks, 1, q.data());
  const double error = distance(oracle::attention(head.x, tokens, q.data()).out, judged.out[0]);
  EXPECT_LE(error, judged.certificate[0].e_acc) << tokens << " tokens";
  return error / judged.certificate[0].e_acc;
}

TEST(Rounding, OfTheSumsIsCoveredByEAccAlone) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform;
  double largest = 0;
  for (size_t tokens : {size_t(1), size_t(1000), size_t(1024), size_t(5000), kLong})
    for (double common : {0.0, 1.0, 100.0}) {
      if (tokens == kLong && common != 1) continue;
      const auto value = [&](double size) {
        return [&, size](size_t) { return size * (common + uniform(random)); };
      };
      for (double ratio : {sums_alone(DType::F16, tokens, value(600)),
                           sums_alone(DType::BF16, tokens, value(1e34)),
                           sums_alone(DType::BF16, tokens, value(1e-34))})
        largest = std::max(largest, ratio);
    }
  fmt::print("random values: error / E_acc {:.3f} at most\n", largest);
}

// Sums of 16 values are 15 + 2^-7 + 2^-15 - 2^-17; of them 64 are added up, and from 512 on each sum
// loses 2^-15 - 2^-17: 30 times that of 960, 12 u, of the 2 (64 + 64 + 8 + 3) u + 3 u charged.
TEST(Rounding, ThatGoesOneWayIsCoveredByEAccAlone) {
  constexpr double kLost = 0.02;  // half of 12 / 281, for plans that add up otherwise
  for (size_t tokens : {size_t(1024), kLong}) {
    const double used = sums_alone(DType::F16, tokens, [](size_t t) {
      return t % 16 == 15 ? 0x1p-7 + 0x1p-15 - 0x1p-17 : 1.0;
    });
    EXPECT_GE(used, kLost) << "little was rounded: the test tries little";
    fmt::print("biased values, {} tokens: error / E_acc {:.3f}\n", tokens, used);
  }
}

// Scores, exponentials and sums together, from originals: dense attention's bound.
TEST(Rounding, OfDenseAttentionIsCovered) {
  for (DType dtype : {DType::F16, DType::BF16})
    for (double key_size : {1.0, 300.0})
      for (double value_size : {1.0, 6000.0}) {
        SealedHead head("compact", dtype, 64);
        std::mt19937_64 random(3);
        std::normal_distribution<double> normal;
        const bool largest = key_size * value_size > 1e6 && dtype == DType::F16;
        head.add(largest ? kLong : 8192, [&](size_t, size_t) {
          return std::pair{key_size * normal(random), value_size * normal(random)};
        });
        head.seal();
        Floats q;
        for (int c = 0; c < 64; ++c) q.push_back(float(normal(random) * 2 / key_size));
        const std::vector<BlockRef> blocks = head.originals();
        const JudgedPass judged(head, blocks, 1, q.data());
        const double error =
            distance(oracle::attention(head.x, head.x.tokens(), q.data()).out, judged.out[0]);
        EXPECT_LE(error, judged.certificate[0].bound);
        fmt::print("dense, {} tokens, keys of {}, values of {}: error / bound {:.4f}\n",
                   head.x.tokens(), key_size, value_size, error / judged.certificate[0].bound);
      }
}

constexpr int kDim = 64;
constexpr double kStep = 0x1p-4, kOff = 7.0 / 16;  // of every key channel; of a step

// 66 blocks whose codes score 16 above their originals and whose values are giants, beside blocks
// whose codes are exact: once the former are promoted nothing but rounding is left of them, and
// what the giants' sums left behind when they were taken away is all the error there is.
struct Giants {
  SealedHead head{"compact", DType::F16, kDim};
  Floats q;
  std::vector<CorrectionLog> logs{1};
  explicit Giants(size_t tokens) {
    const auto size = float(16 * 8 / (kOff * kStep * kDim));
    for (int c = 0; c < kDim; ++c) q.push_back(c % 2 == 0 ? size : -size);
    std::mt19937_64 random(tokens);
    head.add(tokens, [&](size_t t, size_t c) {
      const bool wrong = is_wrong(t / 16);
      const double sign = c % 2 == 0 ? 1 : -1;
      double code = t % 64 == 0 ? 0 : t % 64 == 1 ? 255 : 8 - (wrong ? sign * kOff : 0);
      if (c == 0 && t % 64 > 1) code += double(t % 7);  // so that weights are not 1
      // 0 and 15 in every group: the codes of values are exact.
      const double v = c % 16 == 0 ? 0 : c % 16 == 1 ? 15 : double(random() % 16);
      return std::pair{code * kStep, v * (wrong ? 4096 : 0x1p-8)};
    });
    head.seal();
  }
  // A group's first block holds the two tokens at the ends of its keys' range.
  static bool is_wrong(size_t block) { return block < kPromoted && block % 4 != 0; }
  // With the first blocks: those of a group share one Delta as long as they are read as codes.
  static constexpr size_t kPromoted = 88;
};
constexpr size_t kFew = (Giants::kPromoted + 16) * 16;

TEST(Rounding, IsCoveredAfterEachOfEightyEightCorrections) {
  for (size_t tokens : {kFew, kLong}) {
    Giants g(tokens);
    const oracle::Exact exact = oracle::attention(g.head.x, tokens, g.q.data());
    JudgedPass judged(g.head, g.head.blocks, 1, g.q.data());
    BlockTerms before, after;
    double largest = 0;
    for (size_t b = 0; b < Giants::kPromoted; ++b) {
      const BlockRef now = g.head.promoted(b, true, false);
      ASSERT_TRUE(correct_block(g.head.context(), judged.q, b, g.head.blocks[b], now, 1,
                                &judged.pass, g.logs, &before, &after));
      g.head.blocks[b] = now;
      judged.judge(0, g.logs[0]);
      const double error = distance(exact.out, judged.out[0]);
      ASSERT_LE(error, judged.certificate[0].bound) << "correction " << b + 1;
      largest = std::max(largest, error / judged.certificate[0].bound);
    }
    ASSERT_EQ(g.logs[0].count, int(Giants::kPromoted));
    // Nothing but rounding is left to be charged, and it is needed: a bound that has forgotten the
    // corrections does not hold.
    const double error = distance(exact.out, judged.out[0]);
    const Certificate forgetful =
        certify(judged.pass, 0, {}, judged.out[0].data());
    EXPECT_LT(judged.certificate[0].e_val, 1e-3 * judged.certificate[0].bound);
    if (tokens == kFew) {
      EXPECT_GT(error, forgetful.bound);
    }
    fmt::print(
        "88 corrections, {} tokens: error / bound {:.3f} at most, {:.3f} at the end, {:.3f} of "
        "a bound that forgets them\n",
        tokens, largest, error / judged.certificate[0].bound, error / forgetful.bound);
  }
}

// Values alone, q = 0: as many corrections, and again the sums alone are to blame.
TEST(Rounding, OfCorrectedValuesIsCoveredByEAccAlone) {
  SealedHead head("compact", DType::F16, kDim);
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  head.add(1024, [&](size_t, size_t) { return std::pair{0.0, 10000 * (1 + normal(random))}; });
  head.seal();
  const Floats q(kDim, 0.0f);
  const oracle::Exact exact = oracle::attention(head.x, 1024, q.data());
  JudgedPass judged(head, head.blocks, 1, q.data());
  std::vector<CorrectionLog> logs(1);
  BlockTerms before, after;
  for (size_t b = 0; b < 64; ++b) {
    const BlockRef now = head.promoted(b, false, true);
    ASSERT_TRUE(correct_block(head.context(), judged.q, b, head.blocks[b], now, 1, &judged.pass,
                              logs, &before, &after));
    head.blocks[b] = now;
    judged.judge(0, logs[0]);
    ASSERT_LE(distance(exact.out, judged.out[0]), judged.certificate[0].bound);
  }
  EXPECT_EQ(judged.certificate[0].e_val, 0);
  EXPECT_LE(distance(exact.out, judged.out[0]), judged.certificate[0].e_acc);
}

// The same through the ladder, which must notice what cancellation has done and pass again.
TEST(Rounding, IsCoveredWhenTheLadderCorrects) {
  log_set_level(LogLevel::Error);
  Giants g(kFew);
  const oracle::Exact exact = oracle::attention(g.head.x, g.head.x.tokens(), g.q.data());
  HeadState state(DeviceTier(g.head.format, DType::F16, std::make_shared<TierAccount>()), 128, 128);
  state.tier.append(g.head.x.k.data(), g.head.x.v.data(), g.head.x.tokens(), {});
  MemoryOriginals originals(g.head.x, 16);
  StepRules rules;
  rules.tolerance = {true, 0.1};
  rules.ladder.max_share = 1;
  GroupReport report;
  Floats out(kDim);
  head_step(rules, {}, 1, g.q.data(), &state, originals, out.data(), nullptr, &report);
  ASSERT_FALSE(report.broken);
  EXPECT_EQ(report.heads[0].outcome, Outcome::Certified);
  EXPECT_GE(report.heads[0].promoted_keys, 64);
  const oracle::Verdict v = oracle::check(exact, out, claim_of(rules, report.heads[0]));
  EXPECT_TRUE(v.holds) << v.why;
}

}  // namespace
}  // namespace certkv
