// Ranking consistency (method section 6) on hand-made passes.
#include <gtest/gtest.h>

#include <cmath>

#include "runtime/certify/learn.h"
#include "runtime/certify/selector.h"

namespace certkv {
namespace {

struct Ranked {
  PageFormat format = make_page_format(layout_by_name("compact"), 64, 16);
  PassState pass;
  std::vector<BlockRef> blocks;
  QueryGroup q;
  Ranked() {
    pass.heads = 1;
    pass.head.resize(1);
    q.heads = 1;
    q.head_dim = 64;
  }
  void add(double log_mass, double delta, bool in_f) {
    pass.block_ref.push_back(float(log_mass));
    pass.block_sum.push_back(1);
    pass.delta.push_back(float(delta));
    pass.score_bound.push_back(float(delta));
    pass.used.push_back(in_f ? kUsedKey : 0);
    blocks.push_back({.page = nullptr, .index = 0, .tokens = 16, .k = nullptr, .v = nullptr});
    pass.blocks = blocks.size();
  }
  std::vector<uint32_t> unresolved(int r) {
    return ranking_unresolved({&format, DType::BF16}, q, pass, 0, blocks, r);
  }
};

using Blocks = std::vector<uint32_t>;

TEST(Ranking, IsResolvedWhenNoBlockOutsideCanReachTheRthPlace) {
  Ranked x;
  x.add(10, 0, true);
  x.add(9, 0.5, false);
  x.add(3, 0.5, false);
  EXPECT_EQ(x.unresolved(1), Blocks{});
  EXPECT_EQ(x.unresolved(0), Blocks{});
}

TEST(Ranking, NamesExactlyTheBlocksThatMayBeHeavier) {
  Ranked x;
  x.add(10, 0, true);
  x.add(9.8, 0.5, false);
  x.add(9.2, 0.5, false);
  x.add(9.7, 0.4, false);
  EXPECT_EQ(x.unresolved(1), (Blocks{1, 3}));
}

// Both sides' rounding counts: eps_l twice, eps_w, and g of the block of F, which ||q|| K_b brings.
TEST(Ranking, IsUnresolvedWithinTheRoundingOfBothSides) {
  for (double apart : {0.5 * kEpsW, 2 * kEpsW}) {
    Ranked x;
    x.add(10, 0, true);
    x.add(10 - apart, 0, false);
    EXPECT_EQ(x.unresolved(1).empty(), apart > kEpsW + 4 * gamma_n(20));
  }
  for (float k_norm : {0.0f, 1000.0f}) {
    Ranked x;
    x.q.norm[0] = 100.0f;
    x.add(10, 0, true);
    x.blocks[0].k_norm = k_norm;
    x.add(9.95, 0, false);
    EXPECT_EQ(x.unresolved(1).empty(), k_norm == 0);
  }
}

TEST(Ranking, ATieIsUnresolved) {
  Ranked x;
  x.add(10, 0, true);
  x.add(10, 0, false);
  EXPECT_EQ(x.unresolved(1), Blocks{1});
}

TEST(Ranking, NaNIsUnresolved) {
  Ranked x;
  x.add(10, 0, true);
  x.add(-50, std::nan(""), false);
  EXPECT_EQ(x.unresolved(1), Blocks{1});
  Ranked y;
  y.add(std::nan(""), 0, true);
  y.add(-50, 0, false);
  EXPECT_EQ(y.unresolved(1), Blocks{1});
}

// Flushed as a whole: all that is known of its mass is that it lies between 0 and tokens * 2^-125
// about the reference, so another block far below that reference may still be heavier.
TEST(Ranking, ABlockOfFWhoseWeightsWereFlushedOutranksNothing) {
  Ranked x;
  x.add(0, 0, true);
  x.pass.block_sum[0] = 0;
  x.add(-110, 0.1, false);
  EXPECT_EQ(x.unresolved(1), Blocks{1});
}

// And those outside F count as if they were at the flush: ln(16 * 2^-125) = -83.9, beside -87.3 that
// is left of a single weight.
TEST(Ranking, AFlushedBlockOutsideMayBeHeavierThanAFaintOneOfF) {
  for (float sum : {0.0f, 0x1p-126f}) {
    Ranked x;
    x.add(-85, 0, true);
    x.add(0, 0.1, false);
    x.pass.block_sum[1] = sum;
    EXPECT_EQ(x.unresolved(1), Blocks{1});
  }
}

TEST(Ranking, TooSmallAnFAsksForWhatIsUnknownFirst) {
  Ranked x;
  x.add(10, 0, true);
  x.add(5, 0.1, false);
  x.add(std::nan(""), 0.1, false);
  x.add(4, 0.1, false);
  EXPECT_EQ(x.unresolved(2), Blocks{2});
}

TEST(Ranking, TooSmallAnFAsksForTheHeaviestOutside) {
  Ranked x;
  x.add(10, 0, true);
  x.add(1, 0.1, false);
  x.add(5, 0.1, false);
  x.add(4, 0.1, false);
  EXPECT_EQ(x.unresolved(3), (Blocks{2, 3}));
}

TEST(Ranking, IsResolvedWhenFIsEverything) {
  Ranked x;
  x.add(10, 0, true);
  x.add(9, 0, true);
  EXPECT_EQ(x.unresolved(5), Blocks{});
}

TEST(Ranking, ASwapUnderCodesIsSeen) {
  Ranked x;
  x.add(10, 0, true);
  x.add(9, 0, true);
  x.add(1, 0, false);
  EXPECT_TRUE(same_order_under_codes(x.pass, 0, std::vector<double>{8, 7, 1}, 1));
  EXPECT_FALSE(same_order_under_codes(x.pass, 0, std::vector<double>{7, 8, 1}, 1));
}

}  // namespace
}  // namespace certkv
