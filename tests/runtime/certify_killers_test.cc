// Inputs that are known to break such certificates, each by name.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/arith/verdict.h"
#include "kernels/base/log.h"
#include "kernels/quantize.h"
#include "tests/support/attention_cases.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

AttentionCase base_case(Shape shape) {
  AttentionCase c;
  c.seed = 5;
  c.shape = shape;
  c.head_dim = 128;
  c.heads = 4;
  c.tokens = 300;
  c.steps = 3;
  c.key_quota = c.value_quota = 4096;
  return c;
}

CaseResult expect_sound(const AttentionCase& c) {
  const CaseResult r = run_case(c);
  for (const std::string& v : r.violations) ADD_FAILURE() << v;
  EXPECT_EQ(r.failed, 0);
  return r;
}

TEST(Killers, ACommonMeanOfAThousandSpreads) {
  for (const char* layout : {"compact", "balanced", "paper", "k12v8", "k12v8split"}) {
    AttentionCase c = base_case(Shape::CommonMean);
    c.dtype = DType::F16;
    c.layout = layout;
    EXPECT_EQ(expect_sound(c).over, 0);
  }
}

TEST(Killers, ADeltaOfEighteenEverywhere) {
  AttentionCase c = base_case(Shape::Random);
  c.q_scale = 1000;  // D_b of about 18 and more on every block
  EXPECT_EQ(expect_sound(c).over, 0);
  c.rules.policy = Policy::Naive;
  expect_sound(c);
}

TEST(Killers, ASinkAboveAHundredThousandFlatTokens) {
  AttentionCase c = base_case(Shape::Sink);
  c.head_dim = 64;
  c.heads = 1;
  c.tokens = 131072 + 5;
  c.steps = 1;
  expect_sound(c);
}

// Sealed keys whose codes score `gap` below the open token, which is enough for the exponential to
// flush their weights, while their originals score up to 88.2 more: above it.
TEST(Killers, AFlushedWeightThatInTruthIsTheLargest) {
  constexpr int d = 64;
  constexpr double kStep = 0x1p-4, kCellError = 7.0 / 16, kScoreError = 88.2;
  for (double gap : {87.1, 87.5, 88.0})
    for (Policy policy : {Policy::Budget, Policy::Naive, Policy::Paper}) {
      log_set_level(LogLevel::Error);
      oracle::Originals x{.dtype = DType::F16, .head_dim = d, .k = {}, .v = {}};
      const auto size = float(kScoreError * 8 / (kCellError * kStep * d));
      std::vector<float> q(d), out(d);
      for (size_t c = 0; c < d; ++c) q[c] = c % 2 == 0 ? size : -size;
      for (int t = 0; t <= 64; ++t)
        for (size_t c = 0; c < d; ++c) {
          const double sign = c % 2 == 0 ? 1 : -1;
          const double code = t == 0 ? 0 : t == 1 ? 255 : 8 + sign * kCellError;
          const double k = t < 64 ? code * kStep : sign * gap * 8 / (double(size) * d);
          x.k.push_back(oracle::encode(x.dtype, k));
          x.v.push_back(oracle::encode(x.dtype, t < 64 ? 1 : -1));
        }
      HeadState state(DeviceTier(std::make_shared<const PageFormat>(
                                     make_page_format(layout_by_name("compact"), d, 16)),
                                 x.dtype, std::make_shared<TierAccount>()),
                      64, 64);
      state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
      MemoryOriginals originals(x, 16);
      StepRules rules;
      rules.policy = policy;
      GroupReport report;
      head_step(rules, {}, 1, q.data(), &state, originals, out.data(), nullptr, &report);
      ASSERT_FALSE(report.broken);
      const oracle::Verdict v = oracle::check(oracle::attention(x, x.tokens(), q.data()), out,
                                              claim_of(rules, report.heads[0]));
      EXPECT_TRUE(v.holds) << "gap " << gap << ": " << v.why;
      if (policy == Policy::Naive) {
        EXPECT_GT(v.error, 15) << "the weights were not flushed: nothing was tried";
      }
    }
}

// A token of no value holds nearly all mass and a giant holds none; what the output is made of has
// weights of e^-gap and is 2^87 times smaller than the giant, for which the pass scales by 2^-103:
// neither may weights vanish beside that factor, nor what they lose go without a charge.
TEST(Killers, FaintWeightsBesideAGiant) {
  constexpr int d = 64, kCoded = 128;
  constexpr double kGiant = 1e30, kValue = 50000;
  log_set_level(LogLevel::Error);
  for (const char* layout : {"compact", "balanced", "paper", "k12v8"})
    for (double gap : {5.0, 30.0, 31.4, 33.0, 50.0, 70.0})
      for (Policy policy : {Policy::Budget, Policy::Naive, Policy::Paper, Policy::Dense}) {
        std::mt19937_64 random(3);
        std::uniform_real_distribution<double> uniform;
        oracle::Originals x{.dtype = DType::BF16, .head_dim = d, .k = {}, .v = {}};
        for (int t = 0; t < kCoded + 2; ++t)
          for (int c = 0; c < d; ++c) {
            const bool coded = t < kCoded, giant = t == kCoded;
            const double k = coded ? 0.001 * uniform(random) : giant ? -20 * gap : gap;
            const double v = coded ? kValue * (1 - 0.1 * uniform(random)) : giant ? kGiant : 0;
            x.k.push_back(oracle::encode(x.dtype, k));
            x.v.push_back(oracle::encode(x.dtype, v));
          }
        std::vector<float> q(d, 8.0f / d), out(d);  // scores: about 0, -20 gap, gap
        HeadState state(DeviceTier(std::make_shared<const PageFormat>(
                                       make_page_format(layout_by_name(layout), d, 16)),
                                   x.dtype, std::make_shared<TierAccount>()),
                        64, 64);
        state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
        ASSERT_NE(state.tier.blocks()[0].page, nullptr);
        MemoryOriginals originals(x, 16);
        StepRules rules;
        rules.policy = policy;
        GroupReport report;
        head_step(rules, {}, 1, q.data(), &state, originals, out.data(), nullptr, &report);
        ASSERT_FALSE(report.broken);
        const oracle::Verdict v = oracle::check(oracle::attention(x, x.tokens(), q.data()), out,
                                                claim_of(rules, report.heads[0]));
        EXPECT_TRUE(v.holds) << layout << " gap " << gap << " policy " << int(policy) << ": "
                             << v.why;
      }
}

TEST(Killers, ValuesOfTenToTheTwenty) {
  AttentionCase c = base_case(Shape::Huge);
  EXPECT_EQ(expect_sound(c).over, 0);
}

TEST(Killers, ValuesThatAreAllZero) {
  const CaseResult r = expect_sound(base_case(Shape::ZeroValues));
  EXPECT_EQ(r.certified, r.head_steps);
}

TEST(Killers, AGiantWithoutWeightBesideExactCodes) {
  AttentionCase c = base_case(Shape::UnweightedGiant);
  c.q_scale = 0.5f;
  for (Policy policy : {Policy::Budget, Policy::Naive}) {
    c.rules.policy = policy;
    expect_sound(c);
  }
}

// Values of +-1 whose squares are nothing beside a giant of 2^90 without weight: the sums of E2 say
// that R is 0, while errors of the keys move the output by almost half of S.
TEST(Killers, SquaresThatVanishBesideAGiant) {
  constexpr int d = 64;
  constexpr double kStep = 0x1p-4, kOff = 0.45;
  SealedHead head("compact", DType::BF16, d);
  head.add(64, [&](size_t t, size_t c) {
    const double towards = (c % 2 == 0 ? 1 : -1) * (t % 2 == 0 ? kOff : -kOff);
    const double code = t == 0 ? 0 : t == 1 ? 255 : 8 + towards;
    return std::pair{code * kStep, t % 2 == 0 ? 1.0 : -1.0};
  });
  head.add(1, [&](size_t, size_t c) { return std::pair{c % 2 == 0 ? -5.0 : 5.0, 0x1p90}; });
  head.seal();
  std::vector<float> q;
  for (int c = 0; c < d; ++c) q.push_back(c % 2 == 0 ? 2 : -2);
  const JudgedPass judged(head, head.blocks, 1, q.data());
  ASSERT_EQ(judged.pass.head[0].m2, 0);
  const double error = distance(oracle::attention(head.x, 65, q.data()).out, judged.out[0]);
  EXPECT_GT(error, 0.3 * std::sqrt(d));
  EXPECT_LE(error, judged.certificate[0].bound);
}

TEST(Killers, AKeyOfMinusZeroDoesNotOutrankNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(bound_key(-0.0f), bound_key(0.0f));
  EXPECT_EQ(bound_key(-0.0f), 0u);
  for (float x : {-0.0f, 0.0f, 1e-45f, 1.0f, std::numeric_limits<float>::max(), inf}) {
    EXPECT_GT(bound_key(nan), bound_key(x)) << x;
    EXPECT_GT(bound_key(-nan), bound_key(x)) << x;
    EXPECT_GT(bound_key(-1.0f), bound_key(x)) << x;
  }
  EXPECT_LT(bound_key(1.0f), bound_key(std::nextafter(1.0f, 2.0f)));
}

// One head on fresh originals; whatever happens must not be called certified or exact.
struct Plain {
  AttentionCase c;
  oracle::Originals x{.dtype = DType::BF16, .head_dim = 128, .k = {}, .v = {}};
  std::shared_ptr<const PageFormat> format =
      std::make_shared<const PageFormat>(make_page_format(layout_by_name("compact"), 128, 16));
  HeadState state{DeviceTier(format, DType::BF16, std::make_shared<TierAccount>()), 64, 64};
  MemoryOriginals originals{x, 16};
  std::vector<float> q, out = std::vector<float>(4 * 128);
  GroupReport report;
  explicit Plain(Shape shape = Shape::Random, size_t tokens = 300) : c(base_case(shape)) {
    c.tokens = tokens;
    log_set_level(LogLevel::Error);
    RowMaker rows(c);
    rows.append(c.tokens, &x);
    q = rows.query();
    state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
  }
  void step(const StepRules& rules) {
    head_step(rules, {}, 4, q.data(), &state, originals, out.data(), nullptr, &report);
  }
  void dense() {
    dense_step({}, 4, 15, 4, q.data(), &state, originals, out.data(), nullptr, &report);
  }
  void expect_all(Outcome outcome) {
    for (const HeadReport& r : report.heads) EXPECT_EQ(r.outcome, outcome);
  }
  void expect_sound(const StepRules& rules) {
    for (size_t h = 0; h < 4; ++h) {
      const auto v = oracle::check(oracle::attention(x, x.tokens(), q.data() + h * 128),
                                   {out.data() + h * 128, 128}, claim_of(rules, report.heads[h]));
      EXPECT_TRUE(v.holds) << v.why;
    }
  }
};

TEST(FailingSafe, AToleranceOfNaNNeverCertifies) {
  for (bool relative : {true, false}) {
    Plain p;
    StepRules rules;
    rules.tolerance = {relative, std::nan("")};
    p.step(rules);
    ASSERT_FALSE(p.report.broken);
    p.expect_all(Outcome::Exact);
    p.expect_sound(rules);
  }
}

TEST(FailingSafe, AQueryOfNaNOrInfinityEndsFailedWithAZeroOutput) {
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity()})
    for (Policy policy : {Policy::Budget, Policy::Naive, Policy::Paper, Policy::Dense}) {
      Plain p;
      p.q[7] = bad;
      StepRules rules;
      rules.policy = policy;
      p.step(rules);
      if (p.report.broken) p.dense();
      EXPECT_NE(p.report.heads[0].outcome, Outcome::Certified);
      EXPECT_NE(p.report.heads[0].outcome, Outcome::Exact);
      if (p.report.heads[0].outcome == Outcome::Failed) {
        for (size_t c = 0; c < 128; ++c) EXPECT_EQ(p.out[c], 0);
      }
    }
}

TEST(Faults, OriginalsThatCannotBeHadBreakTheStepAndThenFailIt) {
  for (BlockStatus status : {BlockStatus::Absent, BlockStatus::Corrupt, BlockStatus::Lost}) {
    Plain p;
    p.originals.fail_all(status);
    StepRules rules;
    rules.tolerance = {true, 1e-5};  // promotions are needed
    rules.ladder.max_share = 10;
    p.step(rules);
    if (p.report.broken) p.dense();
    EXPECT_GT(p.report.digest, 0u);
    p.expect_all(Outcome::Failed);
    for (float x : p.out) EXPECT_EQ(x, 0);
  }
}

// By their status alone: what a failed read left in the buffer is not looked at.
TEST(Faults, OriginalsThatThePromotionOfABlockDoesNotGetBreakTheStep) {
  for (BlockStatus status : {BlockStatus::Absent, BlockStatus::Corrupt, BlockStatus::Lost}) {
    Plain p(Shape::Sink, 600);
    p.originals.fail_all(status);
    StepRules rules;
    rules.tolerance = {true, 0.02};
    rules.ladder.max_share = 1;
    p.step(rules);
    EXPECT_TRUE(p.report.broken);
    EXPECT_GT(p.report.digest, 0u);
    EXPECT_EQ(p.report.canary, 0u);
  }
}

TEST(Faults, APageWhoseCodesChangedIsSeenByTheCanary) {
  Plain p;
  auto* page = const_cast<std::byte*>(p.state.tier.blocks()[0].page);
  for (size_t i = 0; i < 64 * 128; ++i) page[p.format->key_base + i] ^= std::byte(0x80);
  for (size_t i = 0; i < 64 * 64; ++i) page[p.format->value_base + i] ^= std::byte(0x88);
  StepRules rules;
  rules.ladder.exploration = 1;  // every block is looked at
  p.step(rules);
  EXPECT_TRUE(p.report.broken);
  EXPECT_GT(p.report.canary, 0u);
  p.dense();
  p.expect_all(Outcome::Exact);
  p.expect_sound(rules);
}

TEST(Faults, AnAnnotationOfNaNNeverCertifiesOnCodes) {
  Plain p;
  auto* page = const_cast<std::byte*>(p.state.tier.blocks()[0].page);
  auto* notes = reinterpret_cast<BlockAnnotations*>(page + p.format->annotations);
  for (int b = 0; b < 4; ++b) notes[b].eta = std::nanf("");
  StepRules rules;
  p.step(rules);
  if (p.report.broken) p.dense();
  p.expect_all(Outcome::Exact);
  p.expect_sound(rules);
}

TEST(Faults, ANegativeAnnotationCannotLowerABoundBelowZero) {
  Plain p;
  auto* page = const_cast<std::byte*>(p.state.tier.blocks()[0].page);
  auto* notes = reinterpret_cast<BlockAnnotations*>(page + p.format->annotations);
  for (int b = 0; b < 4; ++b) notes[b].eta = -1e6f;
  StepRules rules;
  p.step(rules);
  if (p.report.broken) p.dense();
  for (const HeadReport& r : p.report.heads) EXPECT_FALSE(r.outcome == Outcome::Certified);
  p.expect_sound(rules);
}

// Brought near the compute by exploration and of little use: after every step the next one's pass
// reads originals where they are, and codes elsewhere.
TEST(Learning, WhatLeavesTheScratchIsReadAsCodesAgain) {
  for (double tolerance : {20.0, 100.0}) {
    Plain p;
    StepRules rules;
    rules.tolerance = {true, tolerance};
    rules.ladder.exploration = 0.5;
    uint64_t left = 0;
    for (int i = 0; i < 30; ++i) {
      const size_t before = p.state.keys.resident() + p.state.values.resident();
      p.step(rules);
      ASSERT_FALSE(p.report.broken);
      left +=
          before + p.report.scratch_misses - p.state.keys.resident() - p.state.values.resident();
      const std::span<const BlockRef> blocks = p.state.tier.blocks();
      for (uint32_t b = 0; b < blocks.size(); ++b) {
        if (blocks[b].page == nullptr) continue;
        EXPECT_EQ(blocks[b].k, p.state.keys.find(b)) << b;
        EXPECT_EQ(blocks[b].v, p.state.values.find(b)) << b;
      }
      if (i == 3) rules.ladder.exploration = 0;
    }
    EXPECT_GT(left, 0u);
  }
}

TEST(Learning, TheSecondStepFindsWhatTheFirstPromoted) {
  AttentionCase c = base_case(Shape::Sink);
  c.tokens = 600;
  c.steps = 4;
  c.rules.tolerance.value = 0.02;
  c.rules.ladder.max_share = 1;
  const CaseResult r = expect_sound(c);
  EXPECT_GT(r.promoted, 0);
  EXPECT_GT(r.learned, 0u);
}

}  // namespace
}  // namespace certkv
