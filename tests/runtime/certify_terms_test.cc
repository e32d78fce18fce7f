// Each term of a certificate against its definition, on a snapshot in which blocks differ in all
// that a term could take from the wrong place: scales, errors, masses, and what was read of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "kernels/quantize.h"
#include "runtime/certify/canary.h"
#include "tests/support/mixed_head.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;
constexpr int kDim = kMixedDim;

// Chains of sums: of the plan in method section 12, 64 tokens of a run, 64 runs of a split and what
// is around them; and one that no plan comes near.
constexpr double kLeastChain = 64 + 64 + 8, kMostChain = 8 * kLeastChain;

// What corrections have let through: all relative to the largest score of the first pass.
struct Passed {
  int corrections = 0;
  double weights = 0, bars = 0, sizes = 0;  // G_l, G_o, and the same of S
  double s = 0, a_bar = 0;                  // over T: c_b times weights, and times vbar_b
  double m2 = 0;  // c_b times weights times ||v^||^2, of the first pass alone
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
  near(c.h_term, want.h, kSums, kSums, "H");
  near(c.key_sum, want.key_sum, kSums, kSums, "sum c rho (nu + ||O||)");
  near(c.den, want.den, kSums, kSums, "den");
  near(c.e_val * c.den, want.e_val, kSums, kSums, "E_val");
  near(c.out_norm, want.out_norm, 1e-9, 1e-9, "||O||");
  near(c.s, want.big_s, kSums, kSums, "S");

  // Rounding: at least what the shortest thinkable chains need, and no more than the longest.
  const double l = passed != nullptr ? passed->final_weight : 1;
  const double g_o = passed != nullptr ? passed->bars : want.g_o;
  const double g_l = passed != nullptr ? passed->weights : 1;
  const auto e_acc = [&](double chain) {
    return oracle::gamma(chain + 2 * k) * (g_o + want.out_norm * g_l) / l +
           3 * oracle::kUnitRoundoff * want.out_norm;
  };
  EXPECT_GE(c.e_acc, e_acc(kLeastChain) * (1 - kSums));
  EXPECT_LE(c.e_acc, e_acc(kMostChain));
  const double s_passed = passed != nullptr ? passed->s / l : want.s;
  const double m2_passed = passed != nullptr ? passed->m2 / l : want.m2;
  const double a_passed = passed != nullptr ? passed->a_bar / l : want.a_bar;
  const double r_fp =
      oracle::gamma(kLeastChain + kDim + 8 + 2 * k) *
      (m2_passed + 2 * want.out_norm * a_passed + s_passed * want.out_norm * want.out_norm);
  // The rest of r_fp is what the quadratic form itself may have lost.
  EXPECT_GE(c.r_term * c.r_term, want.r * want.r + 0.8 * r_fp) << "what r_fp adds";
  const double r_most = std::sqrt(want.r * want.r * (1 + kSums) + 8 * r_fp + kNorms * want.m2);
  EXPECT_LE(c.r_term, r_most) << "R";
  const double originals = want.key_sqrt - std::sqrt(want.s) * (want.r + want.h);
  near(c.key_sqrt, std::sqrt(c.s_term) * (c.r_term + c.h_term) + originals, kSums, kSums,
       "sqrt(s) (R + H) and the sum over F");
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

// The largest D_b and g_b of the blocks around b that come from the same page and sources.
double most_of_run(const Mixed& x, size_t b, bool codes) {
  const std::vector<BlockRef>& blocks = x.head.blocks;
  const auto same = [&](size_t i) {
    return blocks[i].page == blocks[b].page &&
           (blocks[i].k == nullptr) == (blocks[b].k == nullptr) &&
           (blocks[i].v == nullptr) == (blocks[b].v == nullptr);
  };
  size_t first = b, last = b + 1;
  if (blocks[b].page != nullptr) {
    while (first > 0 && same(first - 1)) --first;
    while (last < blocks.size() && same(last)) ++last;
  }
  double d = 0, rounding = 0;
  for (size_t i = first; i < last; ++i) {
    BlockRef ref = blocks[i];
    if (codes) ref.k = nullptr;
    const oracle::ScoreError e = oracle::score_error(x.head, ref, i, x.q.data());
    d = std::max(d, e.d);
    rounding = std::max(rounding, oracle::gamma(kDim + 16) * e.most + e.query);
  }
  return (d + rounding) * (1 + 1e-5);
}

// Delta_b is at least the block's own D_b, g_b and eps_w, and no more than the largest of its run.
TEST_P(Terms, DeltaIsTheLargestOfItsRunAndNoOther) {
  Mixed x(layout());
  x.promote_some();
  const JudgedPass j = x.judge();
  for (size_t b = 0; b < x.head.blocks.size(); ++b) {
    const oracle::ScoreError e = oracle::score_error(x.head, x.head.blocks[b], b, x.q.data());
    const double least = e.d + oracle::gamma(kDim / 16 + 4) * e.least + oracle::kLeastEpsW;
    const double most = most_of_run(x, b, false) + 1.5 * oracle::kLeastEpsW;
    EXPECT_GE(double(j.pass.delta[b]), least * (1 - 1e-9)) << b;
    EXPECT_LE(double(j.pass.delta[b]), most) << b;
    EXPECT_GE(double(j.pass.c[b]), std::expm1(double(j.pass.delta[b]))) << b;
    EXPECT_LE(double(j.pass.keep[b]), std::exp(-double(j.pass.delta[b]))) << b;
    if (!x.quantised(b)) continue;
    BlockRef codes = x.head.blocks[b];
    codes.k = nullptr;
    const oracle::ScoreError of_codes = oracle::score_error(x.head, codes, b, x.q.data());
    EXPECT_GE(double(j.pass.score_bound[b]), of_codes.d) << b << ": wanted to learn and to look";
    EXPECT_LE(double(j.pass.score_bound[b]), most_of_run(x, b, true));
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
      EXPECT_LE(double(j.pass.delta[b]), most_of_run(*x, b, false) + 1.5 * oracle::kLeastEpsW);
    }
  }
}

// Corrects blocks in turn, and counts beside the product what has passed through the sums.
void expect_terms_after(Mixed* x, size_t corrections) {
  JudgedPass j = x->judge();
  oracle::Terms now = x->terms(j);
  const double m0 = now.m;
  Passed passed{.weights = now.z,
                .bars = now.g_o * now.z,
                .sizes = now.big_s * now.z,
                .s = now.s * now.z,
                .a_bar = now.a_bar * now.z,
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
    const auto pass_through = [&](const oracle::Terms& t, double delta, bool codes) {
      const double scale = std::exp(t.m - m0);
      passed.weights += scale * t.mass[b];
      passed.bars += scale * t.bar[b];
      passed.sizes += scale * t.size[b];
      if (!codes) return;
      passed.s += scale * t.mass[b] * std::expm1(delta);
      passed.a_bar += scale * t.bar[b] * std::expm1(delta);
    };
    pass_through(now, double(j.pass.delta[b]), was.k == nullptr);
    ASSERT_TRUE(
        correct_block(x->head.context(), j.q, b, was, then, 1, &j.pass, logs, &before, &after));
    x->head.blocks[b] = then;
    now = x->terms(j);
    pass_through(now, double(j.pass.delta[b]), then.k == nullptr);
  }
  passed.corrections = int(corrections);
  passed.final_weight = now.z * std::exp(now.m - m0);
  j.judge(0, logs[0]);
  expect_terms(*x, j, &passed);
  EXPECT_FALSE(must_rerun(j.pass, 0, logs[0]));
  // A fresh pass over the same blocks says the same, but for its runs: codes left alone by their
  // neighbours are charged less, and originals beside each other the larger norm.
  const JudgedPass fresh = x->judge();
  for (size_t b = 0; b < x->head.blocks.size(); ++b) {
    if (x->head.blocks[b].k == nullptr)
      EXPECT_LE(fresh.pass.delta[b], j.pass.delta[b]);
    else
      EXPECT_GE(fresh.pass.delta[b], j.pass.delta[b]);
    EXPECT_EQ(j.pass.used[b], fresh.pass.used[b]);
  }
  const Certificate &a = j.certificate[0], &c = fresh.certificate[0];
  EXPECT_NEAR(a.e_val * a.den, c.e_val * c.den, kSums * c.e_val);
  EXPECT_GE(a.s_term, c.s_term * (1 - kSums));
}

TEST_P(Terms, HoldAfterFortyCorrections) {
  Mixed x(layout());
  expect_terms_after(&x, 40);
}

// Values on both sides of 0: |base| + code step is far above what it stands for.
TEST_P(Terms, HoldAboutZero) {
  Mixed x(layout(), DType::F16, 0);
  x.promote_some();
  expect_terms(x, x.judge());
}

// Values far from 0 leave nothing but rounding of R: the pass's own sums, and of 1 correction.
TEST_P(Terms, HoldFarFromZeroAndAfterOneCorrection) {
  Mixed x(layout(), DType::F16, 300);
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
  const Certificate c = certify(j.pass, 0, {}, cast.data());
  EXPECT_GE(c.e_acc, std::sqrt(moved));
  EXPECT_LE(c.e_acc, 1.01 * (std::sqrt(moved) + before));
}

// Changes what one block is charged, as a pass would have written it.
void charge(PassState* pass, size_t b, float delta) {
  pass->delta[b] = delta;
  pass->c[b] = float(std::expm1(double(delta)));
  pass->keep[b] = float(std::exp(-double(delta)));
}

// S is summed from norms in the pass's unit. Beside a giant of no weight their squares are
// subnormal, and rounding to nearest makes each of these a third larger.
TEST(Closing, TheLowerEndOfSHoldsWhereSquaresVanish) {
  SealedHead head("compact", DType::BF16, kDim);
  constexpr double kGiant = 0x1p100, kUnit = 0x1p-104;  // 2^100 in 64 channels has norm 2^103
  const double size = std::sqrt(1.55 * 0x1p-149) / kUnit;
  head.add(16, [&](size_t t, size_t c) {
    return std::pair{t == 0 && c == 0 ? -2000.0 : 0.0, t == 0 ? kGiant : size};
  });
  head.seal();
  Floats q(kDim, 0.0f);
  q[0] = 1;  // the giant's score is -250: its weight is flushed
  for (bool originals : {true, false}) {
    if (!originals) {
      head.add(48, [&](size_t, size_t) { return std::pair{0.0, size}; });
      head = [&] {
        SealedHead sealed("compact", DType::BF16, kDim);
        sealed.x = head.x;
        sealed.seal();
        return sealed;
      }();
    }
    const JudgedPass j(head, head.blocks, 1, q.data());
    const double value = oracle::decode(DType::BF16, oracle::encode(DType::BF16, size));
    const double most =
        value * std::sqrt(double(kDim)) * (1 + 0x1p-8);  // codes of 8 bits and fewer
    EXPECT_EQ(j.pass.unit, kUnit);
    EXPECT_LE(j.certificate[0].s_lo, originals ? value * std::sqrt(double(kDim)) : most);
  }
}

// Flushed weights, as the text has them: N tau, times what each may be in truth.
TEST(Closing, FlushedWeightsAreChargedByWhatTheyMayBe) {
  Mixed x("compact");
  JudgedPass j = x.judge();
  const double nu = x.terms(j).nu_max;
  for (float delta : {20.0f, 60.0f, 80.0f}) {
    charge(&j.pass, 3, delta);
    j.pass.block_sum[3] = 0;
    const Certificate c = certify(j.pass, 0, {}, j.out[0].data());
    const double least = 16 * std::exp(double(delta)) * 0x1p-126 * nu / j.pass.head[0].l;
    EXPECT_GE(c.bound, least);
    j.pass.block_ref[3] = float(j.pass.head[0].m) + 30;  // a corrected block has its own reference
    const Certificate raised = certify(j.pass, 0, {}, j.out[0].data());
    EXPECT_GE(raised.bound, least * std::exp(30.0) / 2);
    j.pass.block_ref[3] = j.pass.block_ref[4];
  }
}

// Each sum that corrections passed through is charged by itself, on the chain of the text.
TEST(Closing, WhatPassedThroughEachSumIsCharged) {
  const Mixed x("compact");
  const JudgedPass j = x.judge();
  const double l = j.pass.head[0].l, passed = 1e3 * l;
  CorrectionLog none;
  none.count = 1;
  const auto judged = [&](double CorrectionLog::*sum) {
    CorrectionLog log = none;
    if (sum != nullptr) log.*sum = passed;
    return certify(j.pass, 0, log, j.out[0].data());
  };
  const Certificate base = judged(nullptr);
  const double o = base.out_norm;
  const auto charged = [&](double got, double wanted, const char* what) {
    EXPECT_GE(got, wanted * (1 - 1e-6)) << what;
    EXPECT_LE(got, 4 * wanted) << what;
  };
  const double out_chain = oracle::gamma(kLeastChain + 2),
               r_chain = oracle::gamma(kLeastChain + kDim + 10);
  charged(judged(&CorrectionLog::g_l).e_acc - base.e_acc, out_chain * 1e3 * o, "G_l");
  charged(judged(&CorrectionLog::g_o).e_acc - base.e_acc, out_chain * 1e3, "G_o");
  const auto r2 = [&](double CorrectionLog::*sum) {
    const Certificate c = judged(sum);
    return c.r_term * c.r_term - base.r_term * base.r_term;
  };
  charged(r2(&CorrectionLog::g_m2), r_chain * 1e3, "m2");
  charged(r2(&CorrectionLog::g_a), r_chain * 1e3 * 2 * o, "a");
  charged(r2(&CorrectionLog::g_s), r_chain * 1e3 * o * o, "s");
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
    return certify(j.pass, 0, {}, j.out[0].data()).bound;
  };
  ASSERT_TRUE(std::isfinite(bound([](JudgedPass*) {})));
  for (double bad : {nan, inf, -inf}) {
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].o[3] = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].l = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.head[0].s1 = bad; })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.block_sum[2] = float(bad); })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.c[2] = float(bad); })));
    EXPECT_TRUE(std::isnan(bound([&](JudgedPass* j) { j->pass.keep[2] = float(bad); })));
    // The key bound's own sums: the other member of the minimum counts.
    const double by_sum = bound([&](JudgedPass* j) { j->pass.head[0].m2 = std::abs(bad); });
    EXPECT_GE(by_sum, good.certificate[0].key_sum / good.certificate[0].den);
  }
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.head[0].l = 0; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.head[0].l *= -1; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { j->pass.block_sum[2] = -1; })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { charge(&j->pass, 2, -0.01f); })));
  EXPECT_TRUE(std::isnan(bound([](JudgedPass* j) { charge(&j->pass, 2, 100); })));  // no float
}

TEST(Closing, ANegativeOrMissingAnnotationHasNoBound) {
  Mixed x("compact");
  const auto bound = [&] { return x.judge().certificate[0].bound; };
  const float inf = std::numeric_limits<float>::infinity();
  const auto damage = [&](float* promise, const char* what) {
    const float was = *promise;
    for (float bad : {-1.0f, std::nanf(""), inf}) {
      *promise = bad;
      EXPECT_TRUE(std::isnan(bound())) << what << " " << bad;
    }
    *promise = was;
  };
  // D_b is a minimum of two: an infinite kappa or e alone leaves the other.
  const auto damage_error = [&](float* promise, const char* what) {
    const float was = *promise;
    for (float bad : {-1.0f, std::nanf("")}) {
      *promise = bad;
      EXPECT_TRUE(std::isnan(bound())) << what << " " << bad;
    }
    *promise = was;
  };
  const auto all = [&](const char* how) {
    SCOPED_TRACE(how);
    for (size_t b : {size_t(0), size_t(2)}) {
      damage(&x.head.annotations(b).eta, "eta");
      damage(&x.head.annotations(b).vbar, "vbar");
      damage(&x.head.page_notes(b).kbar_norm, "kbar");
      damage(&x.head.page_notes(b).norm_step, "norms");
      damage(&x.head.blocks[b].nu, "nu");
    }
  };
  all("whole pages");
  damage_error(&x.head.page_notes(0).kappa, "kappa of the page");
  damage_error(&x.head.page_notes(0).e, "e of the page");
  x.head.blocks[1] = x.head.promoted(1, true, false);  // the page's other blocks stand alone now
  all("parts of pages");
  damage_error(&x.head.annotations(2).kappa, "kappa");
  damage_error(&x.head.annotations(2).e, "e");
  damage(&x.head.blocks[1].k_norm, "K_b");
  EXPECT_TRUE(std::isfinite(bound()));
}

}  // namespace
}  // namespace certkv
