// Certified skipping of values: what is not read is charged, and a wrong guess costs a second pass,
// never a certificate.
#include <gtest/gtest.h>

#include <cmath>

#include "runtime/certify/certificate.h"
#include "tests/support/attention_cases.h"

namespace certkv {
namespace {

// One sharp head over a few thousand tokens, step after step: nearly all mass is on the first.
struct Sharp {
  AttentionCase c;
  oracle::Originals x{.dtype = DType::BF16, .head_dim = 128, .k = {}, .v = {}};
  std::shared_ptr<const PageFormat> format =
      std::make_shared<const PageFormat>(make_page_format(layout_by_name("compact"), 128, 16));
  HeadState state;
  MemoryOriginals originals{x, 16};
  std::vector<float> q, out = std::vector<float>(128);
  StepRules rules;
  GroupReport report;
  explicit Sharp(size_t quota = 4096)
      : state(DeviceTier(format, DType::BF16, std::make_shared<TierAccount>()), quota, quota) {
    c.seed = 11;
    c.shape = Shape::Sink;
    c.head_dim = 128;
    c.heads = 1;
    RowMaker rows(c);
    rows.append(4096, &x);
    q = rows.query();
    state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
    rules.skip.share = 0.1;
  }
  const HeadReport& head() const { return report.heads[0]; }
  void step() {
    head_step(rules, {}, 1, q.data(), &state, originals, out.data(), nullptr, &report);
    ASSERT_FALSE(report.broken);
    const auto v =
        oracle::check(oracle::attention(x, x.tokens(), q.data()), out, claim_of(rules, head()));
    EXPECT_TRUE(v.holds) << v.why;
  }
};

TEST(Skipping, LeavesNegligibleValuesUnreadAndCertifiesAllTheSame) {
  Sharp s;
  s.rules.tolerance = {true, 0.2};
  s.step();
  EXPECT_EQ(s.report.skipped_blocks, 0u);  // nothing to guess from
  const double before = s.head().returned.bound;
  for (int i = 0; i < 12; ++i) s.step();
  EXPECT_GT(s.report.skipped_blocks, s.state.tier.sealed_blocks() / 2);
  EXPECT_EQ(s.head().outcome, Outcome::Certified);
  EXPECT_EQ(s.head().rung, 0);
  EXPECT_GE(s.head().returned.bound, before);  // what was not read is charged, little as it is
}

TEST(Skipping, IsOffByDefaultAndUnderOtherPolicies) {
  for (Policy policy : {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense}) {
    Sharp s;
    s.rules.tolerance = {true, 0.2};
    s.rules.policy = policy;
    s.rules.skip.share = policy == Policy::Budget ? 0 : 0.5;
    for (int i = 0; i < 3; ++i) s.step();
    EXPECT_EQ(s.report.skipped_blocks, 0u);
  }
}

TEST(Skipping, AWrongGuessCostsASecondPassAndNoCertificate) {
  Sharp s;
  s.rules.tolerance = {true, 0.2};
  for (int i = 0; i < 4; ++i) s.step();
  ASSERT_GT(s.report.skipped_blocks, 0u);
  // As if the last step had seen far more mass: everything would be skipped.
  for (double& z : s.state.last_log_z) z += 30;
  s.state.skip_boost = 0x1p20;
  s.step();
  EXPECT_EQ(s.report.skipped_blocks, 0u);
  EXPECT_EQ(s.head().outcome, Outcome::Certified);
  EXPECT_EQ(s.head().rung, 0);
  EXPECT_LT(s.state.skip_boost, 0x1p20);
  // NaN or infinity in what is remembered skips nothing, or everything and is judged.
  for (double bad : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
    for (int i = 0; i < 2; ++i) s.step();
    for (double& z : s.state.last_log_z) z = bad;
    s.step();
  }
}

TEST(Skipping, AHeadThatClimbedReadsEverythingAtTheNextStep) {
  Sharp s(0);                        // no originals near the compute: every step must climb
  s.rules.tolerance = {true, 1e-3};  // no quantised pass holds it
  for (int i = 0; i < 3; ++i) {
    s.step();
    EXPECT_EQ(s.head().rung, 3);
    EXPECT_EQ(s.report.skipped_blocks, 0u);
    EXPECT_TRUE(s.state.last_log_z.empty());
  }
}

// Everything skipped: the output holds nothing of the values, and the bound must say so.
TEST(Skipping, ValuesThatCountAreCoveredByTheBoundWhenSkipped) {
  Sharp s;
  const AttendContext context{s.format.get(), DType::BF16};
  const QueryGroup q = make_query_group(1, 128, s.q.data());
  const double everything = 1e9;
  PassState pass;
  attend_pass(context, q, s.state.tier.blocks(), &pass, {.skip = &everything});
  std::vector<float> o(128);
  finish_output(pass, 0, o.data());
  const Certificate got = certify(pass, 0, {}, o.data());
  const oracle::Claim claim{
      .kind = oracle::Claim::Kind::Over, .bound = got.bound, .s = got.s, .enforces = false};
  const auto v = oracle::check(oracle::attention(s.x, s.x.tokens(), s.q.data()), o, claim);
  EXPECT_TRUE(v.holds) << v.why;
  ASSERT_TRUE(std::isfinite(got.bound));
  EXPECT_GE(v.error, 0.5 * got.bound);  // what is charged is what is missing
  // Charged as if they had been read, the same output breaks its bound.
  for (uint8_t& used : pass.used) used &= uint8_t(~kSkippedValue);
  EXPECT_GT(v.error, certify(pass, 0, {}, o.data()).bound);
}

}  // namespace
}  // namespace certkv
