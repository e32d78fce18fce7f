// The engine over the certified cache, as thread ranks with a store in this process.
#include "runtime/certified_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "runtime/certify/head_class.h"
#include "tests/support/engine_run.h"
#include "tests/support/random_model.h"

namespace certkv {
namespace {

using test::deterministic_options;
using test::expect_same;
using test::random_request;
using test::run;
using test::RunResult;

class CertifiedEngineTest : public ::testing::Test {
 protected:
  const int64_t vocab = test::random_model_config().vocab;
  const ModelConfig config = test::random_model_config();
};

TEST_F(CertifiedEngineTest, DeterministicRunsAreBitwiseEqualForAnyRanksThreadsAndNeighbours) {
  const JobOptions o = deterministic_options();
  const std::vector<Request> requests = {random_request(0, vocab, 150, 70),
                                         random_request(1, vocab, 40, 30)};
  const RunResult one = run(o, 1, 1, requests);
  ASSERT_EQ(one.completions.size(), 2u);
  expect_same(one, run(o, 1, 2, requests), "2 threads");
  expect_same(one, run(o, 2, 1, requests), "2 ranks");
  expect_same(one, run(o, 4, 1, requests), "4 ranks");
  RunResult first = run(o, 1, 1, {requests[0]});
  const RunResult second = run(o, 1, 1, {requests[1]});
  first.completions.insert(second.completions.begin(), second.completions.end());
  expect_same(one, first, "alone");
}

TEST_F(CertifiedEngineTest, TheScrubChangesNoBitOfTokensAndVerdicts) {
  JobOptions o = deterministic_options();
  const std::vector<Request> requests = {random_request(0, vocab, 150, 70),
                                         random_request(1, vocab, 200, 30)};
  o.cache.scrub_steps = 0;
  const RunResult off = run(o, 2, 2, requests);
  for (const int64_t steps : {1, 7, 256}) {
    o.cache.scrub_steps = steps;
    const RunResult on = run(o, 2, 2, requests);
    expect_same(off, on, "scrub_steps " + std::to_string(steps));
    for (const auto& [key, c] : on.completions) EXPECT_EQ(c.counts.digest, 0u);
    double seconds = 0;
    for (const StepRecord& s : on.steps) seconds += s.phase_seconds.scrub;
    EXPECT_GT(seconds, 0);
  }
}

// KV heads by class, in the steps of one run. Only the leader records them.
std::vector<std::array<uint64_t, kClasses>> classes_of(const RunResult& r) {
  std::vector<std::array<uint64_t, kClasses>> out;
  for (const StepRecord& s : r.steps) out.push_back(s.classes);
  return out;
}

TEST_F(CertifiedEngineTest, ClassesAreTheSameForAnyRanksThreadsAndNeighbours) {
  JobOptions o = deterministic_options();
  o.cache.layout = kClassesLayout;
  o.tolerance.value = 0.01;
  std::vector<Request> requests = {random_request(0, vocab, 700, 90),
                                   random_request(1, vocab, 40, 330)};
  for (Request& r : requests) r.tolerance = o.tolerance;
  const RunResult one = run(o, 1, 1, requests);
  ASSERT_EQ(one.completions.size(), 2u);
  const auto classes = classes_of(one);
  const uint64_t heads = uint64_t(config.layers * config.kv_heads);
  EXPECT_EQ(classes.front()[0] + classes.front()[1] + classes.front()[2] + classes.front()[3],
            2 * heads);
  EXPECT_LT(classes.front()[0], 2 * heads);  // the long prompt's heads were chosen for
  EXPECT_GE(classes.front()[0], heads);      // the short one has no page to choose by
  EXPECT_LT(classes.back()[0], heads);       // and is revised while it grows
  EXPECT_GT(one.completions.at({1, Policy::Budget}).counts.read_bytes, 0u);
  for (const auto& [key, c] : one.completions)
    EXPECT_EQ(c.counts.certified + c.counts.exact, c.counts.head_steps);
  const RunResult threads = run(o, 1, 2, requests);
  expect_same(one, threads, "2 threads");
  EXPECT_EQ(classes_of(threads), classes);
  for (const int ranks : {2, 4}) {
    const RunResult more = run(o, ranks, 1, requests);
    expect_same(one, more, std::to_string(ranks) + " ranks");
    EXPECT_EQ(classes_of(more), classes);
    for (const auto& [key, c] : one.completions)
      EXPECT_EQ(c.counts.read_bytes, more.completions.at(key).counts.read_bytes);
  }
  RunResult first = run(o, 1, 1, {requests[0]});
  const RunResult second = run(o, 1, 1, {requests[1]});
  first.completions.insert(second.completions.begin(), second.completions.end());
  expect_same(one, first, "alone");
}

TEST_F(CertifiedEngineTest, UnderOtherPoliciesHeadsKeepTheFirstClass) {
  JobOptions o = deterministic_options();
  o.cache.layout = kClassesLayout;
  Request r = random_request(5, vocab, 300, 80);
  r.tolerance.value = 0.01;
  r.compare = {Policy::Paper, Policy::Naive, Policy::Dense, Policy::Budget};
  const RunResult classes = run(o, 1, 2, {r});
  o.cache.layout = "k8v4";
  const RunResult fixed = run(o, 1, 2, {r});
  for (const Policy policy : {Policy::Paper, Policy::Naive, Policy::Dense}) {
    const Completion &a = classes.completions.at({5, policy}),
                     &b = fixed.completions.at({5, policy});
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.bound_max, b.bound_max);
    EXPECT_EQ(a.counts.read_bytes, b.counts.read_bytes);
  }
  EXPECT_GT(classes.completions.at({5, Policy::Budget}).tier1_bytes,
            fixed.completions.at({5, Policy::Budget}).tier1_bytes);
}

TEST_F(CertifiedEngineTest, EveryHeadStepIsCountedOnceWhateverThePolicy) {
  JobOptions o = deterministic_options();
  Request r = random_request(3, vocab, 200, 20);
  r.compare = {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense};
  const RunResult result = run(o, 2, 1, {r});
  ASSERT_EQ(result.completions.size(), 4u);
  for (const auto& [key, c] : result.completions) {
    SCOPED_TRACE(policy_name(key.second));
    ASSERT_FALSE(c.failed) << c.error;
    // The first token comes from the prefill, which is not a head-step.
    const uint64_t expected = (c.tokens.size() - (c.finish_reason == "length" ? 1 : 0)) *
                              uint64_t(config.layers * config.heads);
    EXPECT_EQ(c.counts.head_steps, expected);
    EXPECT_EQ(c.counts.certified + c.counts.exact + c.counts.over + c.counts.failed, expected);
    uint64_t rungs = 0;
    for (uint64_t n : c.counts.rungs) rungs += n;
    EXPECT_EQ(rungs, expected);
    EXPECT_EQ(c.returned.bound.count, expected);
    if (key.second == Policy::Dense) {
      EXPECT_EQ(c.counts.exact, expected);
      EXPECT_EQ(c.counts.rungs[3], expected);
    }
    if (key.second == Policy::Budget) {
      EXPECT_EQ(c.counts.over, 0u);
    }
    if (key.second == Policy::Naive) {
      EXPECT_EQ(c.counts.rungs[0], expected);
    }
  }
}

TEST_F(CertifiedEngineTest, PhasesOfAStepAddUpToItsTime) {
  constexpr double kRounding = 1e-9;  // seconds: sums of eleven doubles below a second
  JobOptions o = deterministic_options();
  Request r = random_request(3, vocab, 200, 20);
  r.compare = {Policy::Budget, Policy::Dense};
  for (int threads : {1, 2}) {
    const RunResult result = run(o, 1, threads, {r});
    ASSERT_FALSE(result.steps.empty());
    for (const StepRecord& s : result.steps) {
      const StepRecord::Phases& p = s.phase_seconds;
      double sum = 0;
      for (double x : {p.projections, p.append, p.attention, p.judge, p.ladder, p.balance,
                       p.communicate, p.sample, p.scrub, p.record, p.other}) {
        EXPECT_GE(x, 0);
        sum += x;
      }
      EXPECT_NEAR(sum, s.seconds, kRounding);
      EXPECT_GT(p.projections, 0);
      EXPECT_GT(p.attention, 0);
      EXPECT_GT(p.append, 0);
      if (s.policy == Policy::Budget) {
        EXPECT_GT(p.judge, 0);
      }
    }
  }
}

TEST_F(CertifiedEngineTest, TheLeaderTellsHowFarAPromptIsRead) {
  const RunResult r = run(deterministic_options(), 2, 1, {random_request(0, vocab, 600, 2)});
  ASSERT_EQ(r.prefilled.size(), size_t(2 * config.layers));  // 600 tokens are two chunks of 512
  EXPECT_TRUE(std::is_sorted(r.prefilled.begin(), r.prefilled.end()));
  EXPECT_GT(r.prefilled.front(), 0);
  EXPECT_LT(r.prefilled.front(), 1);
  EXPECT_EQ(r.prefilled.back(), 1);
}

TEST_F(CertifiedEngineTest, WhatFitsTheOpenBlockIsCertifiedAtRungZero) {
  const RunResult result = run(deterministic_options(), 2, 1, {random_request(4, vocab, 20, 20)});
  const Completion& c = result.completions.begin()->second;
  ASSERT_FALSE(c.failed) << c.error;
  EXPECT_EQ(c.counts.certified, c.counts.head_steps);
  EXPECT_EQ(c.counts.rungs[0], c.counts.head_steps);
}

TEST_F(CertifiedEngineTest, MoreRequestsThanRoomAreAllAnsweredOneAfterTheOther) {
  JobOptions o = deterministic_options();
  o.run.max_batch = 2;
  std::vector<Request> requests;
  for (uint64_t i = 0; i < 5; ++i) requests.push_back(random_request(i, vocab, 70, 4));
  const RunResult result = run(o, 2, 1, requests);
  EXPECT_EQ(result.completions.size(), 5u);
  for (const auto& [key, c] : result.completions) EXPECT_FALSE(c.failed) << c.error;
  for (const StepRecord& s : result.steps) EXPECT_LE(s.sequences, 2u);
}

TEST_F(CertifiedEngineTest, ARequestBeyondTheLimitIsRefusedByName) {
  JobOptions o = deterministic_options();
  o.model.max_len = 100;
  try {
    run(o, 1, 1, {random_request(0, vocab, 90, 20)});
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
    EXPECT_NE(std::string(e.what()).find("limit of 100 tokens"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace certkv
