// Certified skipping of values: what is not read is charged, and a wrong guess costs a second pass,
// never a certificate.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "runtime/certify/certificate.h"
#include "runtime/certify/skipping.h"
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
  s.step();
  EXPECT_GT(s.report.skipped_blocks, s.state.tier.sealed_blocks() / 2);
  EXPECT_EQ(s.head().outcome, Outcome::Certified);
  EXPECT_EQ(s.head().rung, 0);
  EXPECT_GE(s.head().returned.bound, before);  // what was not read is charged, little as it is
}

// Two heads whose runs weigh less and less: what a pass that sees the same masses would skip under
// the limits costs each head at most what it may spend, and the cheapest of the runs that are read
// would have been too much.
TEST(Skipping, SpendsWhatItMayAtTheNextStep) {
  constexpr size_t kPages = 200, kPageBlocks = 4, kBlocks = kPages * kPageBlocks;
  std::vector<std::byte> pages(kPages);
  std::vector<BlockRef> blocks(kBlocks);
  PassState pass;
  pass.heads = 2;
  pass.blocks = kBlocks;
  pass.block_sum.resize(2 * kBlocks);
  pass.block_ref.resize(2 * kBlocks);
  pass.nu.resize(kBlocks);
  pass.head.resize(2);
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> uniform;
  double cost[2][kPages] = {};
  for (size_t h = 0; h < 2; ++h) {
    pass.head[h].m = h == 0 ? 5 : -2;
    pass.head[h].l = h == 0 ? 3 : 40;
  }
  // Pages with values near the compute, and with a NaN in both heads, in the first, in nu_b.
  const size_t original = 7, damaged = 9, half = 150, noted = 170;
  const auto counts = [&](size_t page) {
    return page != original && page != damaged && page != half && page != noted;
  };
  for (size_t b = 0; b < kBlocks; ++b) {
    const size_t page = b / kPageBlocks;
    blocks[b].page = &pages[page];
    blocks[b].tokens = 16;
    static const uint16_t row = 0;
    if (page == original) blocks[b].v = &row;
    pass.nu[b] = page == noted && b % kPageBlocks == 1 ? std::nanf("") : float(1 + page % 3);
    for (size_t h = 0; h < 2; ++h) {
      const double mass = std::pow(h == 0 ? 0.95 : 0.93, double(page)) * uniform(random);
      const float ref = float(pass.head[h].m) - float(page % 5);
      pass.block_ref[pass.at(int(h), b)] = ref;
      const auto sum = float(mass * std::exp(pass.head[h].m - double(ref)));
      pass.block_sum[pass.at(int(h), b)] =
          page == damaged || (page == half && h == 0) ? std::nanf("") : sum;
      cost[h][page] += double(sum) * std::exp(double(ref) - pass.head[h].m) * double(pass.nu[b]) /
                       pass.head[h].l;
    }
  }
  for (double share : {1e-5, 1e-3, 0.02}) {
    SkipGuess guess;
    const double spend[2] = {share * 10, share};
    guess_skips(pass, blocks, spend, &guess);
    ASSERT_EQ(guess.limits.size(), 2u);
    double spent[2] = {}, cheapest = INFINITY;
    for (size_t page = 0; page < kPages; ++page) {
      if (!counts(page)) continue;
      bool skipped = true;
      for (size_t h = 0; h < 2; ++h)
        skipped = skipped && cost[h][page] * pass.head[h].l * std::exp(pass.head[h].m) <=
                                 std::exp(guess.limits[h]);
      const double most = std::max(cost[0][page] / spend[0], cost[1][page] / spend[1]);
      if (!skipped) cheapest = std::min(cheapest, most);
      for (size_t h = 0; h < 2 && skipped; ++h) spent[h] += cost[h][page];
    }
    EXPECT_LE(spent[0], spend[0] * (1 + 1e-5));  // sums of floats
    EXPECT_LE(spent[1], spend[1] * (1 + 1e-5));
    // All runs of the cheapest's bin, a quarter wide, would have cost more than was left.
    double with_bin[2] = {spent[0], spent[1]};
    for (size_t page = 0; page < kPages; ++page) {
      if (!counts(page)) continue;
      const double most = std::max(cost[0][page] / spend[0], cost[1][page] / spend[1]);
      if (most >= cheapest && most < 1.25 * cheapest)
        for (size_t h = 0; h < 2; ++h) with_bin[h] += cost[h][page];
    }
    EXPECT_TRUE(with_bin[0] > spend[0] || with_bin[1] > spend[1]) << share;
    EXPECT_GT(spent[0] + spent[1], 0) << share;
  }
  // What may be spent is not a number: nothing is skipped.
  SkipGuess guess;
  const double nothing[2] = {std::nan(""), 1};
  guess_skips(pass, blocks, nothing, &guess);
  EXPECT_FALSE(0 <= std::exp(guess.limits[0]));
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
  for (double& limit : s.state.skip.limits) limit += 30;
  s.step();
  EXPECT_EQ(s.report.skipped_blocks, 0u);
  EXPECT_EQ(s.head().outcome, Outcome::Certified);
  EXPECT_EQ(s.head().rung, 0);
  for (int paused = 4; paused > 1; --paused) {  // the step itself has counted as one
    EXPECT_EQ(s.state.skip.pause, paused - 1);
    s.step();
    EXPECT_EQ(s.report.skipped_blocks, 0u);
  }
  s.step();
  EXPECT_EQ(s.report.skipped_blocks, 0u);  // nothing is remembered of the paused steps
  s.step();
  EXPECT_GT(s.report.skipped_blocks, 0u);
  // NaN or infinity in what is remembered skips nothing, or everything and is judged.
  for (double bad : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
    for (int i = 0; i < 2; ++i) s.step();
    for (double& limit : s.state.skip.limits) limit = bad;
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
    EXPECT_TRUE(s.state.skip.limits.empty());
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
