// The record in which verdicts are agreed upon: orders that reductions by MAX rely on.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/arith/verdict.h"

namespace certkv {
namespace {

TEST(Verdict, OutcomesAreOrderedBySeverityAndComeBack) {
  const Outcome order[] = {Outcome::Certified, Outcome::Exact, Outcome::Over, Outcome::Failed};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(outcome_of_severity(severity(order[i])), order[i]);
    if (i > 0) {
      EXPECT_GT(severity(order[i]), severity(order[i - 1]));
    }
  }
  // What no outcome has counts as the worst.
  EXPECT_EQ(severity(Outcome(17)), severity(Outcome::Failed));
  EXPECT_EQ(outcome_of_severity(17), Outcome::Failed);
  EXPECT_STREQ(outcome_name(Outcome::Over), "over");
  EXPECT_STREQ(outcome_name(Outcome::Certified), "certified");
  EXPECT_STREQ(outcome_name(Outcome::Exact), "exact");
  EXPECT_STREQ(outcome_name(Outcome::Failed), "failed");
}

TEST(Verdict, KeysOfBoundsAreOrderedAsBoundsAndNaNIsAboveAll) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  float below = 0;
  for (float x : {0x1p-149f, 0x1p-126f, 1e-3f, 1.0f, std::nextafter(1.0f, 2.0f), 3e38f, inf}) {
    EXPECT_GT(bound_key(x), bound_key(below)) << x;
    below = x;
  }
  for (float bad : {nan, -nan, -1.0f, -0x1p-149f, -inf}) EXPECT_GT(bound_key(bad), bound_key(inf));
  EXPECT_EQ(bound_key(-0.0f), bound_key(0.0f));
}

TEST(Verdict, IsAgreedOnlyIfEveryRankVotedAtTheSameStep) {
  constexpr uint64_t kWorld = 4, kStep = 77;
  VerdictRecord good;
  good.sum.votes = kWorld;
  set_step(good, kStep);
  EXPECT_TRUE(verdict_agreed(good, kWorld, kStep));
  for (uint64_t votes : {0, 3, 5, 8}) {
    VerdictRecord r = good;
    r.sum.votes = votes;
    EXPECT_FALSE(verdict_agreed(r, kWorld, kStep));
  }
  EXPECT_FALSE(verdict_agreed(good, kWorld, kStep + 1));
  EXPECT_FALSE(verdict_agreed(good, kWorld, kStep - 1));
  // One rank a step ahead, or behind: the maxima of step and of its complement tell.
  for (uint64_t other : {kStep - 1, kStep + 1}) {
    VerdictRecord r = good, ahead;
    set_step(ahead, other);
    r.max.step = std::max(r.max.step, ahead.max.step);
    r.max.step_complement = std::max(r.max.step_complement, ahead.max.step_complement);
    EXPECT_FALSE(verdict_agreed(r, kWorld, kStep));
    EXPECT_FALSE(verdict_agreed(r, kWorld, other));
  }
}

TEST(Verdict, WhatNoReductionHasWrittenIsAFailure) {
  const VerdictRecord r = failed_verdict();
  EXPECT_EQ(outcome_of_severity(r.max.severity), Outcome::Failed);
  for (uint64_t key : {r.max.bound, r.max.relative, r.max.candidate, r.max.candidate_relative})
    EXPECT_GT(key, bound_key(std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(verdict_agreed(r, 1, 0));
}

}  // namespace
}  // namespace certkv
