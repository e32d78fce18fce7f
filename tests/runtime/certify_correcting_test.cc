// Corrections of a pass: what is subtracted is what was added, what is refused changes nothing, and
// the canary looks at both sides.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/quantize.h"
#include "runtime/certify/canary.h"
#include "tests/support/mixed_head.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;
constexpr int kDim = kMixedDim;

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
  refused([](Corrected* c) { c->j.pass.delta[5] *= 0.5f; });
  refused([](Corrected* c) { c->j.pass.block_sum[5] = std::nanf(""); });
  refused([](Corrected* c) { c->j.pass.used[5] = kUsedValue; });
  refused(
      [](Corrected* c) { c->j.pass.head[0].m -= 400; });  // e^400 and its squares are no doubles
  Corrected good;
  EXPECT_TRUE(good.correct(5));
  EXPECT_EQ(good.logs[0].count, 1);
}

// A run is charged the largest Delta of its blocks, so that is what its sums were built with and
// what a promoted block takes away, however exact it was: what is left are the sums of the other
// three.
TEST(Correcting, ABlockLeavesWithTheDeltaOfItsRun) {
  constexpr double kStep = 0x1p-4, kOff = 0.45;
  SealedHead head("compact", DType::F16, kDim);
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  head.add(64, [&](size_t t, size_t c) {
    const double off = t < 16 ? (c % 2 == 0 ? kOff : -kOff) : 0;
    const double code = t == 0 ? 0 : t == 1 ? 255 : 8 + off;
    return std::pair{code * kStep, normal(random)};
  });
  head.seal();
  Floats q;
  for (int c = 0; c < kDim; ++c) q.push_back(c % 2 == 0 ? 2 : -2);
  JudgedPass j(head, head.blocks, 1, q.data());
  const float c_run = j.pass.c[0];
  ASSERT_EQ(c_run, j.pass.c[1]);
  std::vector<CorrectionLog> logs{1};
  BlockTerms before, after;
  ASSERT_TRUE(correct_block(head.context(), j.q, 1, head.blocks[1], head.promoted(1, true, false),
                            1, &j.pass, logs, &before, &after));
  ASSERT_LT(double(before.delta[0]), 0.1 * double(c_run));
  const oracle::Served served = head.served(0);
  double m2 = 0;
  for (size_t t = 0; t < 64; ++t) {
    if (t / 16 == 1) continue;
    double score = 0, v2 = 0;
    for (size_t c = 0; c < kDim; ++c) {
      score += double(q[c]) * served.k[t * kDim + c] / std::sqrt(double(kDim));
      v2 += served.v[t * kDim + c] * served.v[t * kDim + c];
    }
    m2 += double(c_run) * std::exp(score - j.pass.head[0].m) * v2;
  }
  EXPECT_NEAR(j.pass.head[0].m2, m2, (kSums + kNorms) * m2);
}

TEST(Correcting, APassThatTakesOverLeavesNothingOfTheOneBefore) {
  Mixed x("compact");
  Floats two = x.q;
  for (float c : x.q) two.push_back(-c);
  JudgedPass old(x.head, x.head.blocks, 2, two.data());
  const PassState before = old.pass;
  x.promote_some();
  const JudgedPass fresh(x.head, x.head.blocks, 2, two.data());
  take_over(fresh.pass, 1, &old.pass);
  const auto expect_row = [&](auto member) {
    const auto &now = old.pass.*member, &then = before.*member, &other = fresh.pass.*member;
    const auto blocks = std::ptrdiff_t(before.blocks);
    EXPECT_TRUE(std::equal(now.begin(), now.begin() + blocks, then.begin()));
    EXPECT_TRUE(std::equal(now.begin() + blocks, now.end(), other.begin() + blocks));
    EXPECT_NE(then, other);
  };
  for (auto member : {&PassState::block_sum, &PassState::block_ref, &PassState::delta,
                      &PassState::c, &PassState::keep})
    expect_row(member);
  expect_row(&PassState::used);
  EXPECT_EQ(old.pass.head[1].o, fresh.pass.head[1].o);
  EXPECT_EQ(old.pass.head[1].m2, fresh.pass.head[1].m2);
  EXPECT_EQ(old.pass.head[0].o, before.head[0].o);
}

TEST(Correcting, HeadsOutsideTheMaskKeepTheirSums) {
  Mixed x("compact");
  Floats two = x.q;
  for (float c : x.q) two.push_back(-c);
  JudgedPass j(x.head, x.head.blocks, 2, two.data());
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

// Of one block whose values' vbar is `bar`: l times bar is what is left of G_o.
TEST(Correcting, ThePassIsRunAgainOnceCancellationHasEatenAnEighth) {
  Mixed x("compact");
  x.head.blocks.resize(1);
  JudgedPass j = x.judge();
  PassState& state = j.pass;
  state.block_ref[0] = float(state.head[0].m);
  const auto rerun = [&](double l, double bar, double g_l, double g_o, int count = 1) {
    state.head[0].l = l;
    state.block_sum[0] = 1;
    state.vbar[0] = float(bar);
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
