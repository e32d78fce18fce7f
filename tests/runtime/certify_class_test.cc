// Precision classes of one KV head: choice, re-encoding, revision, and that every claim holds
// meanwhile.
#include <gtest/gtest.h>

#include <cstring>

#include "runtime/certify/class_change.h"
#include "runtime/certify/scrub.h"
#include "tests/support/attention_cases.h"

namespace certkv {
namespace {

AttentionCase class_case(double tolerance) {
  AttentionCase c;
  c.seed = 5;
  c.dtype = DType::F16;
  c.heads = 2;
  c.tokens = 64 * 24 + 5;
  c.key_quota = c.value_quota = 4096;
  c.q_scale = 0.5f;
  c.rules.tolerance.value = tolerance;
  return c;
}

class Head {
 public:
  explicit Head(const AttentionCase& c, int number = 0)
      : case_(c),
        formats_(make_class_formats(c.head_dim, c.block_tokens)),
        rows_(c),
        originals(x, c.block_tokens),
        state(DeviceTier(formats_[size_t(number)], c.dtype, std::make_shared<TierAccount>()),
              c.key_quota, c.value_quota) {
    state.precision.formats = &formats_;
    state.precision.now = state.precision.next = number;
    append(c.tokens);
  }

  std::vector<float> queries(size_t rows) {
    std::vector<float> all;
    for (size_t i = 0; i < rows; ++i) {
      const std::vector<float> q = rows_.query();
      all.insert(all.end(), q.begin(), q.end());
    }
    return all;
  }

  // One step, judged by the oracle.
  void step() {
    append(1);
    const size_t d = size_t(case_.head_dim), heads = size_t(case_.heads);
    const std::vector<float> q = rows_.query();
    std::vector<float> out(heads * d, 0.0f);
    head_step(case_.rules, {.step = state.tier.tokens()}, case_.heads, q.data(), &state, originals,
              out.data(), nullptr, &report);
    ASSERT_FALSE(report.broken);
    for (size_t h = 0; h < heads; ++h) {
      const oracle::Verdict v =
          oracle::check(oracle::attention(x, x.tokens(), q.data() + h * d), {&out[h * d], d},
                        claim_of(case_.rules, report.heads[h]));
      EXPECT_TRUE(v.holds) << v.why;
      EXPECT_TRUE(report.heads[h].outcome == Outcome::Certified ||
                  report.heads[h].outcome == Outcome::Exact);
    }
    EXPECT_EQ(report.attended_tokens, state.tier.tokens());
    state.precision.count(double(report.read_bytes) / double(report.attended_tokens));
  }

  // A head of that class from the same rows.
  bool is_fresh_seal_of(int number) const {
    DeviceTier fresh(formats_[size_t(number)], case_.dtype, std::make_shared<TierAccount>());
    fresh.append(x.k.data(), x.v.data(), x.tokens(), {});
    if (fresh.pages() != state.tier.pages() || fresh.bytes() != state.tier.bytes()) return false;
    for (size_t b = 0; b < fresh.sealed_blocks(); ++b)
      if (std::memcmp(fresh.blocks()[b].page, state.tier.blocks()[b].page,
                      fresh.format().page_bytes) != 0)
        return false;
    return true;
  }

 private:
  void append(size_t tokens) {
    const size_t before = x.tokens(), d = size_t(case_.head_dim);
    rows_.append(tokens, &x);
    state.tier.append(x.k.data() + before * d, x.v.data() + before * d, tokens, {});
  }
  AttentionCase case_;
  ClassFormats formats_;
  RowMaker rows_;

 public:
  oracle::Originals x{.dtype = case_.dtype, .head_dim = case_.head_dim, .k = {}, .v = {}};
  MemoryOriginals originals;
  HeadState state;
  GroupReport report;
};

int chosen_at(double tolerance) {
  const AttentionCase c = class_case(tolerance);
  Head head(c);
  const ClassChoice choice =
      choose_class(c.rules, c.heads, head.queries(4), &head.state, head.originals);
  EXPECT_TRUE(choice.measured) << choice.error;
  const ClassRatios& r = head.state.precision.ratios;
  EXPECT_EQ(r.key[1], 1);  // k8v8 has the keys of k8v4
  EXPECT_LT(r.value[1], 0.25);
  EXPECT_EQ(r.value[2], r.value[1]);
  EXPECT_LT(r.key[2], 0.25);
  return choice.number;
}

TEST(PrecisionClass, TighterTolerancesAskForDearerClassesAndNoneForOriginals) {
  int last = 0;
  for (const double tolerance : {1.0, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0}) {
    const int number = chosen_at(tolerance);
    EXPECT_GE(number, last) << tolerance;
    last = number;
  }
  EXPECT_EQ(chosen_at(1.0), 0);
  EXPECT_EQ(chosen_at(0.02), 2);
  EXPECT_EQ(last, kExactClass);
}

TEST(PrecisionClass, ReencodingGivesTheSealOfTheOriginalsWhileStepsGoOn) {
  const AttentionCase c = class_case(0.05);
  for (const int number : {1, 2, 0}) {
    Head head(c, number == 0 ? 2 : 0);
    for (int i = 0; i < 3; ++i) head.step();  // some originals are near the compute
    head.state.precision.next = number;
    std::string error;
    int steps = 0;
    ReencodeResult result = ReencodeResult::Going;
    while (result == ReencodeResult::Going) {
      result = reencode(kPagesPerStep, &head.state, head.originals, &error);
      head.step();
      ++steps;
    }
    EXPECT_EQ(result, ReencodeResult::Adopted) << error;
    EXPECT_EQ(steps, 6);  // 24 pages
    EXPECT_EQ(head.state.precision.now, number);
    EXPECT_TRUE(head.is_fresh_seal_of(number));
    for (int i = 0; i < 70; ++i) head.step();  // a group of its own tokens is sealed
    EXPECT_TRUE(head.is_fresh_seal_of(number));
    EXPECT_EQ(head.state.fork().precision.now, number);
  }
}

TEST(PrecisionClass, TheScrubRepairsPagesOfEveryClass) {
  for (const int number : {0, 1, 2}) {
    Head head(class_case(0.2), number);
    auto* bytes = const_cast<std::byte*>(head.state.tier.blocks()[3 * 4].page);
    bytes[head.state.tier.format().value_base + 11] ^= std::byte(4);
    std::vector<PageFinding> found;
    scrub_all(head.state, &found);
    ASSERT_EQ(found.size(), 1u);
    EXPECT_EQ(found[0].page, 3u);
    EXPECT_EQ(repair_page(found[0], &head.state, head.originals).result,
              PageRepair::Result::Repaired);
    EXPECT_TRUE(head.is_fresh_seal_of(number));
  }
}

TEST(PrecisionClass, WithoutOriginalsTheOldClassStays) {
  const AttentionCase c = class_case(0.01);
  Head head(c);
  head.originals.fail(40, BlockStatus::Lost);
  head.state.precision.next = 2;
  std::string error;
  ReencodeResult result = ReencodeResult::Going;
  while (result == ReencodeResult::Going)
    result = reencode(kPagesPerStep, &head.state, head.originals, &error);
  EXPECT_EQ(result, ReencodeResult::Lost);
  EXPECT_NE(error.find("40"), std::string::npos) << error;
  EXPECT_EQ(head.state.precision.now, 0);
  EXPECT_EQ(head.state.precision.next, 0);
  EXPECT_FALSE(head.state.tier.resealing());
  EXPECT_TRUE(head.is_fresh_seal_of(0));
  head.originals.fail_all(BlockStatus::Lost);
  const ClassChoice choice =
      choose_class(c.rules, c.heads, head.queries(4), &head.state, head.originals);
  EXPECT_FALSE(choice.measured);
  EXPECT_EQ(choice.number, 0);
}

TEST(PrecisionClass, AHeadWhosePromotionsCostMoreThanBitsIsRevisedAndReadsLess) {
  const AttentionCase c = class_case(0.02);
  Head head(c);
  std::string error;
  ASSERT_TRUE(measure_classes({}, &head.state, head.originals, &error)) << error;
  double before = 0, after = 0;
  for (uint64_t i = 0; i < kRevisionSteps; ++i) {
    head.step();
    before += double(head.report.read_bytes);
  }
  EXPECT_GE(head.state.precision.forecasts, kRevisionSteps / kForecastSteps);
  head.state.precision.next = head.state.precision.decide();
  ASSERT_GT(head.state.precision.next, 0);
  ASSERT_LT(head.state.precision.next, kExactClass);
  ASSERT_EQ(reencode(1000, &head.state, head.originals, &error), ReencodeResult::Adopted);
  for (uint64_t i = 0; i < kRevisionSteps; ++i) {
    head.step();
    after += double(head.report.read_bytes);
  }
  EXPECT_LT(after, before);
  EXPECT_EQ(head.state.precision.decide(), head.state.precision.now);  // and stays
}

// Sums over the blocks of the same pass: what a step at rung 0 reads is its codes by the layout's
// bytes, and the originals of open tokens.
TEST(PrecisionClass, AStepFromCodesAloneReadsTheLayoutsBytes) {
  for (const int number : {0, 1, 2}) {
    Head head(class_case(1.0), number);
    head.step();
    ASSERT_EQ(head.report.heads[0].rung, 0);
    const size_t open = head.state.tier.tokens() % 64, sealed = head.state.tier.tokens() - open;
    const PageFormat& f = head.state.tier.format();
    EXPECT_EQ(head.report.read_bytes,
              sealed / 64 * f.payload_bytes + open * 4 * size_t(f.head_dim));
  }
}

TEST(PrecisionClass, ExactReadsTheOriginalsOnce) {
  Head head(class_case(0.02));
  head.state.precision.now = head.state.precision.next = kExactClass;
  for (int i = 0; i < 3; ++i) {
    head.step();
    EXPECT_EQ(head.report.heads[0].outcome, Outcome::Exact);
    EXPECT_EQ(head.report.heads[0].rung, 3);
    EXPECT_EQ(head.report.read_bytes, head.state.tier.tokens() * 4 * 64);
  }
}

}  // namespace
}  // namespace certkv
