#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "runtime/engine.h"

namespace certkv {
namespace {

const double kBinWidth = std::exp2(1.0 / 16);
// The edge itself is computed by exp2 and the figure compared with it exactly: no slack is needed
// below; above, one bin plus the rounding of exp2.
const double kUpperSlack = kBinWidth * (1 + 1e-12);

// Oracle: sort and count.
double sorted_quantile(std::vector<double> x, double p) {
  std::sort(x.begin(), x.end());
  const size_t rank = size_t(std::max(1.0, std::ceil(p * double(x.size()))));
  return x[rank - 1];
}

TEST(BoundHistogram, QuantilesAreNeverBelowTheTrueOnesAndAtMostOneBinAbove) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 20; ++round) {
    std::lognormal_distribution<double> draw(-6.0 + round % 5, 0.5 + 0.3 * (round % 4));
    std::vector<double> x(200 + size_t(round) * 37);
    BoundHistogram h;
    for (double& v : x) h.add(v = draw(random));
    for (double p : {0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 1.0}) {
      const double truth = sorted_quantile(x, p);
      EXPECT_GE(h.quantile(p), truth) << "p " << p;
      EXPECT_LE(h.quantile(p), truth * kUpperSlack) << "p " << p;
    }
    EXPECT_EQ(h.max, *std::max_element(x.begin(), x.end()));
  }
}

TEST(BoundHistogram, AFigureOnABinEdgeIsNotReportedBelowItself) {
  for (int i = -700; i < 400; ++i) {
    for (double x : {std::exp2(i / 16.0), std::nextafter(std::exp2(i / 16.0), 1e300),
                     std::nextafter(std::exp2(i / 16.0), 0.0)}) {
      BoundHistogram h;
      h.add(x);
      h.add(1e9);
      EXPECT_GE(h.quantile(0.5), x);
    }
  }
}

TEST(BoundHistogram, ZeroInfinityAndHugeFiguresKeepTheirPlace) {
  BoundHistogram h;
  h.add(0);
  EXPECT_EQ(h.quantile(1), 0);
  h.add(1e20);
  EXPECT_EQ(h.quantile(1), 1e20);
  h.add(std::numeric_limits<double>::infinity());
  EXPECT_TRUE(std::isinf(h.quantile(0.99)));
  EXPECT_EQ(h.count, 3u);
}

TEST(BoundHistogram, NaNAndNegativeFiguresMakeTheMaximumNaN) {
  for (double bad : {std::numeric_limits<double>::quiet_NaN(), -1e-9, -1.0}) {
    BoundHistogram h;
    h.add(0.5);
    h.add(bad);
    h.add(0.25);
    EXPECT_TRUE(std::isnan(h.max));
    EXPECT_TRUE(std::isnan(h.quantile(1)));
    EXPECT_TRUE(std::isnan(h.mean()));
    BoundHistogram sum;
    sum.add(1.0);
    sum.merge(h);
    EXPECT_TRUE(std::isnan(sum.max));
  }
}

TEST(BoundHistogram, MergingEqualsAddingEverythingToOne) {
  std::mt19937_64 random(3);
  std::exponential_distribution<double> draw(20);
  BoundHistogram all, merged;
  for (int part = 0; part < 8; ++part) {
    BoundHistogram h;
    for (int i = 0; i < part * 50; ++i) {
      const double x = draw(random);
      all.add(x);
      h.add(x);
    }
    merged.merge(h);
  }
  EXPECT_EQ(all.bins, merged.bins);
  EXPECT_EQ(all.max, merged.max);
  EXPECT_EQ(all.count, merged.count);
  for (double p : {0.1, 0.5, 0.99}) EXPECT_EQ(all.quantile(p), merged.quantile(p));
}

TEST(BoundHistogram, AnEmptyOneReportsZero) {
  BoundHistogram h;
  h.merge(BoundHistogram{});
  EXPECT_EQ(h.quantile(0.99), 0);
  EXPECT_EQ(h.mean(), 0);
  EXPECT_TRUE(h.bins.empty());
}

TEST(HeadStepCounts, AVerdictRecordIsCountedOverOutcomesAndRungs) {
  VerdictRecord r;
  r.sum.certified = 5;
  r.sum.exact = 2;
  r.sum.over = 1;
  r.sum.failed = 4;
  r.sum.rungs = {6, 3, 1, 1, 1};
  r.sum.promoted_keys = 10;
  r.sum.promoted_values = 11;
  r.sum.scratch_hits = 12;
  r.sum.scratch_misses = 13;
  r.sum.paged_bytes = 14;
  r.sum.canary = 15;
  r.sum.digest = 16;
  r.sum.read_bytes = 17;
  r.sum.attended_tokens = 18;
  r.sum.prefetched = 31;
  r.sum.prefetched_used = 29;
  r.sum.dense_bytes = 19;
  HeadStepCounts a;
  a.add(r);
  a.add(r);
  HeadStepCounts b;
  b.add(a);
  for (const HeadStepCounts& c : {a, b}) {
    EXPECT_EQ(c.head_steps, 24u);
    EXPECT_EQ(c.certified, 10u);
    EXPECT_EQ(c.exact, 4u);
    EXPECT_EQ(c.over, 2u);
    EXPECT_EQ(c.failed, 8u);
    EXPECT_EQ(c.rungs, (std::array<uint64_t, kRungs>{12, 6, 2, 2, 2}));
    EXPECT_EQ(c.promoted_keys, 20u);
    EXPECT_EQ(c.promoted_values, 22u);
    EXPECT_EQ(c.scratch_hits, 24u);
    EXPECT_EQ(c.scratch_misses, 26u);
    EXPECT_EQ(c.paged_bytes, 28u);
    EXPECT_EQ(c.canary, 30u);
    EXPECT_EQ(c.digest, 32u);
    EXPECT_EQ(c.read_bytes, 34u);
    EXPECT_EQ(c.attended_tokens, 36u);
    EXPECT_EQ(c.prefetched, 62u);
    EXPECT_EQ(c.prefetched_used, 58u);
    EXPECT_EQ(c.dense_bytes, 38u);
  }
}

}  // namespace
}  // namespace certkv
