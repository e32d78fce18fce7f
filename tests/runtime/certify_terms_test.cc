// Each term of a certificate against its definition, on a snapshot in which blocks differ in all
// that a term could take from the wrong place: scales, errors, masses, and what was read of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/quantize.h"
#include "runtime/certify/canary.h"
#include "tests/support/certificate_terms.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;
constexpr int kDim = 64;

// Sums of at most 2^10 FP32 weights and norms: gamma_128 is 8e-6.
constexpr double kSums = 1e-4;
// eta holds the rounding of the value decode beside what the oracle measures.
constexpr double kEta = 0.02;
// The chain of sums that the pass says it has, and one that no plan comes near.
constexpr double kLeastChain = kChainOutput, kMostChain = 8 * kChainOutput;

struct Mixed {
  SealedHead head;
  Floats q, centre;
  explicit Mixed(std::string_view layout, DType dtype = DType::F16, float centre_at = 2.75f)
      : head(layout, dtype, kDim), centre(kDim, centre_at) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    for (int c = 0; c < kDim; ++c) q.push_back(float(0.4 * normal(random)));
    // Seven groups of 64 with keys of growing size, and 21 tokens that stay open or seal otherwise.
    head.add(7 * 64 + 21, [&](size_t t, size_t) {
      const double value_size = std::ldexp(0.1, int(t / 16 % 5));
      return std::pair{(0.3 + 0.2 * double(t / 64)) * normal(random),
                       3 + value_size * normal(random)};
    });
    head.seal();
  }
  bool quantised(size_t b) const { return head.blocks[b].page != nullptr; }
  // Some keys and some values from originals.
  void promote_some() {
    for (size_t b = 0; b < head.blocks.size(); ++b)
      if (quantised(b)) head.blocks[b] = head.promoted(b, b % 4 == 1 || b % 4 == 3, b % 4 >= 2);
  }
  JudgedPass judge() const { return JudgedPass(head, head.blocks, 1, q.data(), centre); }
  oracle::Terms terms(const JudgedPass& j) const {
    return oracle::terms(head, head.blocks, q.data(), j.pass.delta, j.out[0], centre);
  }
};

// What corrections have let through: all relative to the largest score of the first pass.
struct Passed {
  int corrections = 0;
  double weights = 0, spread = 0, sizes = 0;  // G_l, G_o, and the same of S
  double s = 0;                               // c_b times weights
  double m2 = 0;  // c_b times weights times ||v^ - r||^2, of the first pass alone
  double final_weight = 0;
};

void expect_terms(const Mixed& x, const JudgedPass& j, const Passed* passed = nullptr) {
  const Certificate& c = j.certificate[0];
  const oracle::Terms want = x.terms(j);
  const int k = passed != nullptr ? passed->corrections : 0;
  const auto near = [](double got, double wanted, double below, double above, const char* what) {
    EXPECT_GE(got, wanted * (1 - below)) << what;
    EXPECT_LE(got, wanted * (1 + above)) << what;
  };
  near(c.s_term, want.s, kSums, kSums, "s");
  near(c.h_term, want.h, kSums, kEta, "H");
  near(c.r_term, want.r, kSums, 0.1, "R");
  near(c.key_sqrt, want.key_sqrt, kSums, 0.1, "sqrt(s) (R + H)");
  near(c.key_sum, want.key_sum, kSums, kSums, "sum c rho (nu + ||O||)");
  near(c.den, want.den, kSums, kSums, "den");
  near(c.e_val * c.den, want.e_val, kSums, kEta, "E_val");
  near(c.out_norm, want.out_norm, 1e-9, 1e-9, "||O||");
  near(c.s, want.big_s, kSums, kSums, "S");

  // Rounding: at least what the shortest thinkable chains need, and no more than the longest.
  const double l = passed != nullptr ? passed->final_weight : 1;
  const double g_o = passed != nullptr ? passed->spread : want.big_a;
  const double g_l = passed != nullptr ? passed->weights : 1;
  const auto e_acc = [&](double chain) {
    return oracle::gamma(chain + 2 * k) * (g_o + want.off_centre * g_l) / l +
           3 * oracle::kUnitRoundoff * want.out_norm;
  };
  EXPECT_GE(c.e_acc, e_acc(kLeastChain));
  EXPECT_LE(c.e_acc, e_acc(kMostChain));
  const double s_passed = passed != nullptr ? passed->s / l : want.s;
  const double m2_passed = passed != nullptr ? passed->m2 / l : want.m2;
  const double r_fp = oracle::gamma(kLeastChain + kDim + 8 + 2 * k) *
                      (m2_passed + 2 * want.off_centre * std::sqrt(s_passed * m2_passed) +
                       s_passed * want.off_centre * want.off_centre);
  // The rest of r_fp is what the quadratic form itself may have lost.
  EXPECT_GE(c.r_term * c.r_term, want.r * want.r + 0.8 * r_fp) << "what r_fp adds";
  const double sizes = passed != nullptr ? passed->sizes / l : want.big_s;
  EXPECT_LE(c.s_lo, want.big_s - oracle::gamma(kLeastChain + 2 * k) * sizes);
  EXPECT_GE(c.s_lo, 0.99 * want.big_s);

  // The closing formula, from the terms above.
  const double key = std::min(c.key_sqrt, c.key_sum);
  EXPECT_NEAR(c.e_key * c.den, key, 1e-12 * key);
  EXPECT_NEAR(c.bound, (1 + 0x1p-10) * (key + c.e_val * c.den + c.e_acc) / c.den, 1e-12 * c.bound);
  EXPECT_NEAR(c.e_fp, c.bound - c.e_key - c.e_val, 1e-12 * c.bound);
  EXPECT_NEAR(c.relative, c.bound / c.s, 1e-12 * c.relative);
}

class Terms : public testing::TestWithParam<int> {
 protected:
  std::string_view layout() const { return layouts()[size_t(GetParam())].name; }
};

TEST_P(Terms, OfCodesAloneAreThoseOfTheText) {
  for (DType dtype : {DType::F16, DType::BF16}) {
    const Mixed x(layout(), dtype);
    expect_terms(x, x.judge());
  }
}

TEST_P(Terms, FollowWhatWasReadOfEachBlock) {
  Mixed x(layout());
  x.promote_some();
  const JudgedPass j = x.judge();
  expect_terms(x, j);
  for (size_t b = 0; b < x.head.blocks.size(); ++b) {
    const BlockRef& ref = x.head.blocks[b];
    EXPECT_EQ(j.pass.used[b] & kUsedKey, ref.k != nullptr ? kUsedKey : 0);
    EXPECT_EQ(j.pass.used[b] & kUsedValue, ref.v != nullptr ? kUsedValue : 0);
  }
}

// Delta_b is the block's own D_b and g_b, and eps_w.
TEST_P(Terms, DeltaIsEachBlocksOwn) {
  Mixed x(layout());
  x.promote_some();
  const JudgedPass j = x.judge();
  for (size_t b = 0; b < x.head.blocks.size(); ++b) {
    const oracle::ScoreError e = oracle::score_error(x.head, x.head.blocks[b], b, x.q.data());
    const double least = e.d + oracle::gamma(kDim / 16 + 4) * e.charged + oracle::kLeastEpsW;
    const double most = e.d + oracle::gamma(kDim + 16) * e.charged + 1.5 * oracle::kLeastEpsW;
    EXPECT_GE(double(j.pass.delta[b]), least * (1 - 1e-9)) << b;
    EXPECT_LE(double(j.pass.delta[b]), most * (1 + 1e-6)) << b;
    if (!x.quantised(b)) continue;
    BlockRef codes = x.head.blocks[b];
    codes.k = nullptr;
    const oracle::ScoreError of_codes = oracle::score_error(x.head, codes, b, x.q.data());
    EXPECT_GE(double(j.pass.score_bound[b]), of_codes.d) << b << ": wanted to learn and to look";
    EXPECT_LE(double(j.pass.score_bound[b]),
              (of_codes.d + oracle::gamma(kDim + 16) * of_codes.charged) * (1 + 1e-6));
  }
}

// D_b has two forms, and the smaller one counts: by channels, and by norms.
TEST_P(Terms, DeltaTakesTheSmallerOfItsTwoForms) {
  Mixed spread(layout()), single(layout());
  std::fill(single.q.begin(), single.q.end(), 0.0f);
  single.q[5] = 3;  // one channel: kappa |q| scale is about |q| times that channel's error alone
  for (Mixed* x : {&spread, &single}) {
    const JudgedPass j = x->judge();
    for (size_t b = 0; b < x->head.blocks.size(); ++b) {
      const oracle::ScoreError e = oracle::score_error(x->head, x->head.blocks[b], b, x->q.data());
      EXPECT_LE(double(j.pass.delta[b]),
                e.d * (1 + 1e-6) + oracle::gamma(kDim + 16) * e.charged + 1.5 * oracle::kLeastEpsW);
    }
  }
}

// Corrects blocks in turn, and counts beside the product what has passed through the sums.
void expect_terms_after(Mixed* x, size_t corrections) {
  JudgedPass j = x->judge();
  oracle::Terms now = x->terms(j);
  const double m0 = now.m;
  Passed passed{.weights = now.z,
                .spread = now.big_a * now.z,
                .sizes = now.big_s * now.z,
                .s = now.s * now.z,
                .m2 = now.m2 * now.z};
  std::vector<CorrectionLog> logs(1);
  BlockTerms before, after;
  for (size_t i = 0; i < corrections; ++i) {
    const size_t b = i * 5 % 28;  // some blocks twice: keys first, values later
    const bool key = i < 28, value = i >= 14;
    const BlockRef was = x->head.blocks[b];
    BlockRef then = x->head.promoted(b, key, value);
    if (was.k != nullptr) then.k = was.k;
    if (was.v != nullptr) then.v = was.v;
    const auto pass_through = [&](const oracle::Terms& t, double delta) {
      const double scale = std::exp(t.m - m0);
      passed.weights += scale * t.mass[b];
      passed.spread += scale * t.spread[b];
      passed.sizes += scale * t.size[b];
      passed.s += scale * t.mass[b] * std::expm1(delta);
    };
    pass_through(now, double(j.pass.delta[b]));
    ASSERT_TRUE(
        correct_block(x->head.context(), j.q, b, was, then, 1, &j.pass, logs, &before, &after));
    x->head.blocks[b] = then;
    now = x->terms(j);
    pass_through(now, double(j.pass.delta[b]));
  }
  passed.corrections = int(corrections);
  passed.final_weight = now.z * std::exp(now.m - m0);
  j.judge(x->head, x->head.blocks, 0, logs[0]);
  expect_terms(*x, j, &passed);
  EXPECT_FALSE(must_rerun(j.pass, 0, logs[0]));
  // A fresh pass over the same blocks says the same.
  const JudgedPass fresh = x->judge();
  for (size_t b = 0; b < x->head.blocks.size(); ++b) {
    EXPECT_EQ(j.pass.delta[b], fresh.pass.delta[b]);
    EXPECT_EQ(j.pass.used[b], fresh.pass.used[b]);
  }
  const Certificate &a = j.certificate[0], &c = fresh.certificate[0];
  EXPECT_NEAR(a.e_val, c.e_val, kSums * c.e_val);
  EXPECT_NEAR(a.s_term, c.s_term, kSums * c.s_term);
}

TEST_P(Terms, HoldAfterFortyCorrections) {
  Mixed x(layout());
  expect_terms_after(&x, 40);
}

// About a centre far from the output everything counts: the pass's own sums, and of 1 correction.
TEST_P(Terms, HoldAboutADistantCentreAndAfterOneCorrection) {
  Mixed x(layout(), DType::F16, 20);
  expect_terms(x, x.judge());
  expect_terms_after(&x, 1);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Terms, testing::Range(0, int(layouts().size())),
                         [](const auto& i) {
                           return std::string(layouts()[size_t(i.param)].name);
                         });

// ---- closing ------------------------------------------------------------------------------------

TEST(Closing, ACastOfTheOutputIsCharged) {
  const Mixed x("compact");
  JudgedPass j = x.judge();
  const double before = j.certificate[0].e_acc;
  Floats cast = j.out[0];
  double moved = 0;
  for (float& c : cast) {
    const auto rounded = float(oracle::decode(DType::BF16, oracle::encode(DType::BF16, c)));
    moved += (double(rounded) - c) * (double(rounded) - c);
    c = rounded;
  }
  const Certificate c = certify(x.head.context(), j.pass, 0, x.head.blocks, {}, cast.data());
  EXPECT_GE(c.e_acc, std::sqrt(moved));
  EXPECT_LE(c.e_acc, 1.01 * (std::sqrt(moved) + before));
}

// v^ - r rounds once, u ||O|| in all: where values lie far from 0 but close to r nothing else is
// left.
TEST(Closing, TheSubtractionOfTheCentreIsCharged) {
  SealedHead head("compact", DType::F16, kDim);
  head.add(64, [](size_t t, size_t) { return std::pair{0.0, 1000 + 0.5 * double(t % 2)}; });
  head.seal();
  const JudgedPass j(head, head.blocks, 1, Floats(kDim, 0.1f).data(), Floats(kDim, 1000.25f));
  EXPECT_GE(j.certificate[0].e_acc, 3 * oracle::kUnitRoundoff * j.certificate[0].out_norm);
}

// Flushed weights, as the text has them: N tau, times what each may be in truth.
TEST(Closing, FlushedWeightsAreChargedByWhatTheyMayBe) {
  Mixed x("compact");
  JudgedPass j = x.judge();
  const double nu = x.terms(j).nu_max;
  for (float delta : {20.0f, 60.0f, 80.0f}) {
    j.pass.delta[3] = delta;
    j.pass.block_sum[3] = 0;
    const Certificate c = certify(x.head.context(), j.pass, 0, x.head.blocks, {}, j.out[0].data());
    const double least = 16 * std::exp(double(delta)) * 0x1p-126 * nu / j.pass.head[0].l;
    EXPECT_GE(c.bound, least);
    j.pass.block_ref[3] = float(j.pass.head[0].m) + 30;  // a corrected block has its own reference
    const Certificate raised =
        certify(x.head.context(), j.pass, 0, x.head.blocks, {}, j.out[0].data());
    EXPECT_GE(raised.bound, least * std::exp(30.0) / 2);
    j.pass.block_ref[3] = j.pass.block_ref[4];
  }
}

TEST(Closing, ARelativeToleranceGoesWithTheLowerEndOfS) {
  Certificate c;
  c.bound = 1;
  c.s = 10;
  c.s_lo = 9;
  EXPECT_TRUE(within_tolerance(c, true, 1.0 / 8.9));
  EXPECT_FALSE(within_tolerance(c, true, 1.0 / 9.5));
  EXPECT_TRUE(within_tolerance(c, false, 1));
  EXPECT_FALSE(within_tolerance(c, false, std::nextafter(1.0, 0.0)));
  const double nan = std::nan("");
  EXPECT_FALSE(within_tolerance(c, false, nan));
  EXPECT_FALSE(within_tolerance(c, true, nan));
  c.s_lo = nan;
  EXPECT_FALSE(within_tolerance(c, true, 1));
  c.s_lo = 9;
  c.bound = nan;
  EXPECT_FALSE(within_tolerance(c, true, 1));
  EXPECT_FALSE(within_tolerance(c, false, 1));
}

// Whatever of the state is not a number, the bound is none either.
TEST(Closing, ADamagedStateHasNoBound) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  const Mixed x("compact");
  const JudgedPass good = x.judge();
  const auto bound = [&](auto damage) {
    JudgedPass j = good;
    damage(&j);
    finish_output(j.pass, 0, j.out[0].data());
    return certify(x.head.context(), j.pass, 0, x.head.blocks, {}, j.out[0].data()).bound;
  };
  ASSERT_TRUE(std::isfinite(bound([](JudgedPass*) {})));
  for (double bad : {nan, inf, -inf}) {
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].o[3] = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].l = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].s1 = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.block_sum[2] = float(bad); })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.delta[2] = float(bad); })));
    // The key bound's own sums: the other member of the minimum counts.
    const double by_sum = bound([&](JudgedPass* j) { j->pass.head[0].m2 = std::abs(bad); });
    EXPECT_GE(by_sum, good.certificate[0].key_sum / good.certificate[0].den);
  }
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.head[0].l = 0; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.head[0].l *= -1; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.block_sum[2] = -1; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.delta[2] = -0.01f; })));
  EXPECT_TRUE(
      std::isnan(bound([](JudgedPass* j) { j->pass.delta[2] = 100; })));  // e^100 is no float
}

TEST(Closing, ANegativeOrMissingAnnotationHasNoBound) {
  Mixed x("compact");
  const JudgedPass j = x.judge();
  const auto bound = [&] {
    return certify(x.head.context(), j.pass, 0, x.head.blocks, {}, j.out[0].data()).bound;
  };
  for (float bad : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    auto* notes =
        reinterpret_cast<BlockAnnotations*>(x.head.page_bytes(0) + x.head.format->annotations);
    const float eta = notes[0].eta, nu = x.head.blocks[1].nu;
    notes[0].eta = bad;
    EXPECT_TRUE(std::isnan(bound())) << "eta " << bad;
    notes[0].eta = eta;
    x.head.blocks[1].nu = bad;
    EXPECT_TRUE(std::isnan(bound())) << "nu " << bad;
    x.head.blocks[1].nu = nu;
  }
  EXPECT_TRUE(std::isfinite(bound()));
}

// ---- corrections --------------------------------------------------------------------------------

struct Corrected {
  Mixed x{"compact"};
  JudgedPass j = x.judge();
  std::vector<CorrectionLog> logs{1};
  BlockTerms before, after;
  bool correct(size_t b) {
    return correct_block(x.head.context(), j.q, b, x.head.blocks[b], x.head.promoted(b, true, true),
                         1, &j.pass, logs, &before, &after);
  }
};

TEST(Correcting, WhatIsNotBitwiseWhatWasAddedIsRefusedAndLeavesAllAsItWas) {
  const auto refused = [](auto damage) {
    Corrected c;
    damage(&c);
    const HeadSums sums = c.j.pass.head[0];
    EXPECT_FALSE(c.correct(5));
    EXPECT_EQ(sums.l, c.j.pass.head[0].l);
    EXPECT_EQ(sums.o, c.j.pass.head[0].o);
    EXPECT_EQ(c.logs[0].count, 0);
  };
  refused([](Corrected* c) { c->j.pass.block_sum[5] *= 1 + 0x1p-22f; });
  refused([](Corrected* c) { c->j.pass.delta[5] *= 1 + 0x1p-22f; });
  refused([](Corrected* c) { c->j.pass.block_sum[5] = std::nanf(""); });
  refused([](Corrected* c) { c->j.pass.used[5] = kUsedValue; });
  refused(
      [](Corrected* c) { c->j.pass.head[0].m -= 400; });  // e^400 and its squares are no doubles
  Corrected good;
  EXPECT_TRUE(good.correct(5));
  EXPECT_EQ(good.logs[0].count, 1);
}

TEST(Correcting, HeadsOutsideTheMaskKeepTheirSums) {
  Mixed x("compact");
  Floats two = x.q;
  for (float c : x.q) two.push_back(-c);
  JudgedPass j(x.head, x.head.blocks, 2, two.data(), x.centre);
  const PassState before = j.pass;
  std::vector<CorrectionLog> logs(2);
  BlockTerms old_terms, new_terms;
  ASSERT_TRUE(correct_block(x.head.context(), j.q, 4, x.head.blocks[4],
                            x.head.promoted(4, true, true), 2, &j.pass, logs, &old_terms,
                            &new_terms));
  EXPECT_EQ(before.head[0].o, j.pass.head[0].o);
  EXPECT_EQ(before.head[0].l, j.pass.head[0].l);
  EXPECT_EQ(before.used[before.at(0, 4)], j.pass.used[j.pass.at(0, 4)]);
  EXPECT_EQ(before.delta[before.at(0, 4)], j.pass.delta[j.pass.at(0, 4)]);
  EXPECT_EQ(logs[0].count, 0);
  EXPECT_NE(before.head[1].o, j.pass.head[1].o);
  EXPECT_EQ(j.pass.used[j.pass.at(1, 4)], kUsedKey | kUsedValue);
  EXPECT_EQ(logs[1].count, 1);
}

TEST(Correcting, ThePassIsRunAgainOnceCancellationHasEatenAnEighth) {
  PassState state;
  state.head.resize(1);
  const auto rerun = [&](double l, double big_a, double g_l, double g_o, int count = 1) {
    state.head[0].l = l;
    state.head[0].big_a = big_a;
    CorrectionLog log;
    log.count = count;
    log.g_l = g_l;
    log.g_o = g_o;
    return must_rerun(state, 0, log);
  };
  const double nan = std::nan("");
  EXPECT_FALSE(rerun(1, 1, 8, 8));
  EXPECT_TRUE(rerun(1, 1, 8.01, 8));
  EXPECT_TRUE(rerun(1, 1, 8, 8.01));
  EXPECT_TRUE(rerun(0, 1, 0, 1));
  EXPECT_TRUE(rerun(-1, 1, -8, 1));
  EXPECT_TRUE(rerun(nan, 1, 1, 1));
  EXPECT_TRUE(rerun(1, nan, 1, 1));
  EXPECT_TRUE(rerun(1, 1, nan, 1));
  EXPECT_TRUE(rerun(1, 1, 1, nan));
  EXPECT_FALSE(rerun(nan, nan, nan, nan, 0));  // nothing was corrected: the certificate judges it
}

// ---- canary -------------------------------------------------------------------------------------

TEST(Canary, LooksAtScoresAndValuesWhereBothFormsWereRead) {
  Corrected c;
  ASSERT_TRUE(c.correct(5));
  const SealedHead& head = c.x.head;
  const BlockRef codes = head.blocks[5], keys = head.promoted(5, true, false),
                 values = head.promoted(5, false, true);
  const auto ok = [&](const BlockTerms& before, const BlockTerms& after, const BlockRef& now) {
    return canary(head.context(), 1, before, after, codes, now).ok;
  };
  EXPECT_TRUE(ok(c.before, c.after, keys));
  EXPECT_TRUE(ok(c.before, c.after, values));
  const float promised = c.before.delta[0] + c.after.delta[0];
  for (float moved : {1.5f * promised, -1.5f * promised, std::nanf("")}) {
    BlockTerms before = c.before;
    before.score[0][7] = c.after.score[0][7] + moved;
    EXPECT_FALSE(ok(before, c.after, keys)) << moved;
    EXPECT_TRUE(ok(before, c.after, values)) << "no key was promoted: there is nothing to compare";
  }
  auto* note = reinterpret_cast<BlockAnnotations*>(head.page_bytes(5) + head.format->annotations) +
               codes.index;
  for (float BlockAnnotations::*promise : {&BlockAnnotations::eta, &BlockAnnotations::nu}) {
    const float was = note->*promise;
    for (float less : {0.9f * was, 0.0f, std::nanf("")}) {
      note->*promise = less;
      EXPECT_FALSE(ok(c.before, c.after, values)) << less;
      EXPECT_TRUE(ok(c.before, c.after, keys));
    }
    note->*promise = was;
  }
}

}  // namespace
}  // namespace certkv
