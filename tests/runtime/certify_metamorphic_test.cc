// One attention step on the same tensors, computed in other ways: outputs within the sum of both
// rounding terms E_fp, outcomes the same except where a bound lies within its own rounding of the
// tolerance.
//
// What another order changes is rounding alone: of sums, all charged in E_acc, and of exponentials
// about another reference, 2 (eps_e + 2u) and 3u times the distance from it for each weight,
// together below 12 u for weights that count (a weight e^-x has x e^-x of the latter), beside the
// 136 u and more that E_acc charges on the same sums of norms. So the sum of both E_fp is the right
// measure.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>

#include "kernels/base/log.h"
#include "tests/support/attention_cases.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;
constexpr int kHeads = 4, kDim = 64;

struct Problem {
  SealedHead head;
  Floats q;
  explicit Problem(std::string_view layout, int block_tokens = 16, size_t tokens = 3008)
      : head(layout, DType::F16, kDim, block_tokens) {
    std::mt19937_64 random(tokens);
    std::normal_distribution<double> normal;
    head.add(tokens, [&](size_t, size_t) {
      const double k = normal(random), v = 0.5 + normal(random);
      return std::pair{k, std::abs(v) < 0x1p-6 ? 0x1p-6 : v};  // so that v / 8 is normal in F16
    });
    head.seal();
    for (int i = 0; i < kHeads * kDim; ++i) q.push_back(float((1 + i / kDim) * normal(random)));
  }
  JudgedPass judge(std::span<const BlockRef> blocks) const {
    return JudgedPass(head, blocks, kHeads, q.data());
  }
};

double apart(const Floats& a, const Floats& b) {
  const std::vector<double> exact(a.begin(), a.end());
  return distance(exact, b);
}

// Bounds are sums of positive terms, the same but for rounding: E4's own allowance for that is
// 2^-10.
constexpr double kBoundRounding = 0x1p-10;

// Also that no verdict differs at any tolerance outside of the bounds' rounding.
void expect_same_answer(const Floats& out, const Certificate& c, const Floats& other_out,
                        const Certificate& other) {
  EXPECT_LE(apart(out, other_out), c.e_fp + other.e_fp);
  EXPECT_GT(c.bound, 0);
  const double allowed = kBoundRounding * c.bound + c.e_fp + other.e_fp;
  EXPECT_LE(std::abs(c.bound - other.bound), allowed);
  for (double factor : {0.5, 0.9, 1.1, 2.0}) {
    const double tolerance = factor * c.bound;
    if (std::abs(tolerance - c.bound) <= allowed) continue;
    EXPECT_EQ(within_tolerance(c, false, tolerance), within_tolerance(other, false, tolerance));
    EXPECT_EQ(within_tolerance(c, true, tolerance / c.s),
              within_tolerance(other, true, tolerance / c.s));
  }
}

void expect_same_answers(const JudgedPass& a, const JudgedPass& b) {
  ASSERT_EQ(a.out.size(), b.out.size());
  for (size_t h = 0; h < a.out.size(); ++h)
    expect_same_answer(a.out[h], a.certificate[h], b.out[h], b.certificate[h]);
}

// Where b's runs are parts of a's: each block is charged its own Delta or that of fewer others.
void expect_finer_runs(const JudgedPass& a, const JudgedPass& b) {
  for (size_t h = 0; h < a.out.size(); ++h) {
    const Certificate &x = a.certificate[h], &y = b.certificate[h];
    EXPECT_LE(apart(a.out[h], b.out[h]), x.e_fp + y.e_fp);
    EXPECT_GT(y.bound, 0.8 * x.bound);
    EXPECT_LE(y.bound, x.bound * (1 + kBoundRounding) + x.e_fp + y.e_fp);
  }
}

class Metamorphic : public testing::TestWithParam<int> {
 protected:
  std::string_view layout() const { return layouts()[size_t(GetParam())].name; }
};

// `at_once` blocks move together. Whole pages keep their runs, single blocks do not.
void expect_order_does_not_matter(std::string_view layout, size_t at_once) {
  Problem p(layout);
  const JudgedPass in_order = p.judge(p.head.blocks);
  std::mt19937_64 random(1);
  std::vector<size_t> parts((p.head.blocks.size() + at_once - 1) / at_once);
  std::iota(parts.begin(), parts.end(), size_t(0));
  for (int round = 0; round < 4; ++round) {
    if (round == 0)
      std::reverse(parts.begin(), parts.end());
    else
      std::shuffle(parts.begin(), parts.end(), random);
    std::vector<BlockRef> moved;
    std::vector<size_t> order;
    for (size_t part : parts)
      for (size_t b = part * at_once; b < std::min(p.head.blocks.size(), (part + 1) * at_once); ++b) {
        order.push_back(b);
        moved.push_back(p.head.blocks[b]);
      }
    const JudgedPass permuted = p.judge(moved);
    if (at_once == 1)
      expect_finer_runs(in_order, permuted);
    else
      expect_same_answers(in_order, permuted);
    // A block's own figures move with it: its mass, and what its codes are charged.
    for (int h = 0; h < kHeads; ++h)
      for (size_t b = 0; b < order.size(); ++b) {
        const size_t there = permuted.pass.at(h, b), here = in_order.pass.at(h, order[b]);
        if (at_once == 1)
          ASSERT_LE(permuted.pass.delta[there], in_order.pass.delta[here]);
        else
          ASSERT_EQ(permuted.pass.delta[there], in_order.pass.delta[here]);
        ASSERT_NEAR(
            double(permuted.pass.block_ref[there]) + std::log(permuted.pass.block_sum[there]),
            double(in_order.pass.block_ref[here]) + std::log(in_order.pass.block_sum[here]),
            kEpsW + 2 * gamma_n(36));  // exponentials and sums of up to 32, on both sides
      }
  }
}

TEST_P(Metamorphic, TheOrderOfPagesDoesNotMatter) {
  expect_order_does_not_matter(layout(), 4);
}
TEST_P(Metamorphic, TheOrderOfBlocksMattersByTheirRunsAlone) {
  expect_order_does_not_matter(layout(), 1);
}

// The split plan depends on the length alone; where blocks lie in it is shifted by putting other
// blocks before them, which here weigh nothing: keys opposed to every query.
TEST_P(Metamorphic, WhereSplitsBeginDoesNotMatter) {
  for (size_t before : {size_t(16), size_t(528), size_t(1024)}) {
    Problem p(layout());
    std::fill(p.q.begin() + kDim, p.q.end(), 0.0f);
    for (int h = 1; h < kHeads; ++h) std::copy_n(p.q.begin(), kDim, p.q.begin() + h * kDim);
    double norm2 = 0;
    for (int c = 0; c < kDim; ++c) norm2 += double(p.q[size_t(c)]) * p.q[size_t(c)];
    const double far = 150 * std::sqrt(double(kDim)) / norm2;  // scores of -150
    SealedHead unseen(layout(), DType::F16, kDim);
    unseen.add(before, [&](size_t, size_t c) { return std::pair{-far * p.q[c], 1.0}; });
    std::vector<BlockRef> shifted;
    for (size_t b = 0; b * 16 < before; ++b) {
      BlockRef ref{.page = nullptr,
                   .index = 0,
                   .tokens = 16,
                   .k = unseen.x.k.data() + b * 16 * kDim,
                   .v = unseen.x.v.data() + b * 16 * kDim,
                   .nu = 8.01f,
                   .k_norm = 0};
      ref.k_norm = float(far * std::sqrt(norm2) * 1.01);
      shifted.push_back(ref);
    }
    shifted.insert(shifted.end(), p.head.blocks.begin(), p.head.blocks.end());
    const JudgedPass plain = p.judge(p.head.blocks), moved = p.judge(shifted);
    if (before % size_t(p.head.format->group_tokens) == 0)
      expect_same_answers(plain, moved);
    else
      expect_finer_runs(plain, moved);  // where a split now ends within a page
  }
}

// Values on a grid that codes hold exactly, moved by a multiple of its step: the output moves with
// them, and R, which is taken about the output, stays but for the rounding that r_fp charges.
TEST_P(Metamorphic, WhereValuesLieDoesNotMatterBeyondRounding) {
  const auto head_at = [&](double at) {
    Problem p(layout());
    SealedHead moved(layout(), DType::F16, kDim);
    std::mt19937_64 random(4);
    moved.x.k = p.head.x.k;
    for (size_t i = 0; i < p.head.x.v.size(); ++i) {
      const size_t in_group = i % 16;  // both ends in every group, so that scales are the same
      const double code = in_group == 0 ? 0 : in_group == 1 ? 15 : double(random() % 16);
      moved.x.v.push_back(oracle::encode(DType::F16, at + code));
    }
    moved.seal();
    return JudgedPass(moved, moved.blocks, kHeads, p.q.data());
  };
  const JudgedPass plain = head_at(0);
  for (double at : {16.0, -1024.0}) {
    const JudgedPass about = head_at(at);
    for (size_t h = 0; h < kHeads; ++h) {
      const Certificate &a = plain.certificate[h], &b = about.certificate[h];
      Floats back = about.out[h];
      for (float& x : back) x -= float(at);
      // Subtracting `at` rounds at most as much as the output's own last place.
      EXPECT_LE(apart(plain.out[h], back), a.e_fp + b.e_fp);
      // r_fp is at most gamma (m2 + 2 ||O|| a_bar + s ||O||^2), each about s ||O||^2, where its
      // norms, kept as 16 bits, add 2^-15 of m2.
      const double far2 = b.s_term * std::pow(b.out_norm + 15 * std::sqrt(kDim), 2);
      const double most = 4 * gamma_n(kChainOutput + 3 * kDim) * far2 + 0x1p-14 * far2;
      EXPECT_GE(b.r_term, a.r_term * (1 - 1e-3));
      EXPECT_LE(b.r_term, std::sqrt(a.r_term * a.r_term * (1 + 1e-3) + most));
    }
  }
}

// Query heads that share a KV head may be served together or apart: another number of ranks, or
// more query heads than one pass takes.
TEST_P(Metamorphic, QueryHeadsServedApartAgreeWithThoseServedTogether) {
  Problem p(layout());
  const JudgedPass together = p.judge(p.head.blocks);
  for (int each : {1, 2}) {
    for (int first = 0; first < kHeads; first += each) {
      const JudgedPass part(p.head, p.head.blocks, each, p.q.data() + first * kDim);
      for (int h = 0; h < each; ++h) {
        const auto i = size_t(h), all = size_t(first + h);
        expect_same_answer(together.out[all], together.certificate[all], part.out[i],
                           part.certificate[i]);
      }
    }
  }
}

// The same scale groups cut into blocks of 16 or of 32: the same codes, coarser annotations.
TEST(MetamorphicBlocks, BlocksOfOtherLengthsAgreeInTheirOutputs) {
  for (const Layout& layout : layouts()) {
    if (layout.key_group_tokens < 32) continue;  // other groups, other codes
    Problem small(layout.name, 16), large(layout.name, 32);
    const JudgedPass a = small.judge(small.head.blocks), b = large.judge(large.head.blocks);
    for (size_t h = 0; h < kHeads; ++h) {
      EXPECT_LE(apart(a.out[h], b.out[h]), a.certificate[h].e_fp + b.certificate[h].e_fp);
      EXPECT_LE(a.certificate[h].e_val, b.certificate[h].e_val * (1 + kBoundRounding))
          << "an annotation of a larger block is the larger of its halves'";
      EXPECT_LE(b.certificate[h].e_val, 1.5 * a.certificate[h].e_val);
    }
  }
}

// A power of two goes through every step exactly: codes stay, scales and norms are multiplied.
TEST_P(Metamorphic, ScalingValuesScalesTheBoundAndLeavesTheRelativeOne) {
  for (int power : {-3, 1, 4}) {
    for (Policy policy : {Policy::Budget, Policy::Naive, Policy::Paper, Policy::Dense}) {
      Problem p(layout());
      SealedHead scaled(layout(), DType::F16, kDim);
      scaled.x = p.head.x;
      for (uint16_t& v : scaled.x.v)
        v = oracle::encode(DType::F16, std::ldexp(oracle::decode(DType::F16, v), power));
      log_set_level(LogLevel::Error);
      StepRules rules;
      rules.policy = policy;
      rules.paper.v_tol = 1e9;  // the only absolute figure of any policy: no values by it
      rules.ladder.max_share = 1;
      GroupReport reports[2];
      Floats out[2] = {Floats(kHeads * kDim), Floats(kHeads * kDim)};
      for (int side = 0; side < 2; ++side) {
        const oracle::Originals& x = side == 0 ? p.head.x : scaled.x;
        HeadState state(DeviceTier(p.head.format, DType::F16, std::make_shared<TierAccount>()), 512,
                        512);
        state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
        MemoryOriginals originals(x, 16);
        for (int step = 0; step < 3; ++step) {
          head_step(rules, {.step = uint64_t(step)}, kHeads, p.q.data(), &state, originals,
                    out[side].data(), nullptr, &reports[side]);
          ASSERT_FALSE(reports[side].broken);
        }
      }
      for (size_t i = 0; i < out[0].size(); ++i) ASSERT_EQ(std::ldexp(out[0][i], power), out[1][i]);
      for (int h = 0; h < kHeads; ++h) {
        const HeadReport &one = reports[0].heads[size_t(h)], &other = reports[1].heads[size_t(h)];
        EXPECT_EQ(std::ldexp(one.returned.bound, power), other.returned.bound);
        EXPECT_EQ(std::ldexp(one.candidate.bound, power), other.candidate.bound);
        EXPECT_EQ(one.returned.relative, other.returned.relative);
        EXPECT_EQ(one.outcome, other.outcome);
        EXPECT_EQ(one.rung, other.rung);
        EXPECT_EQ(one.promoted_keys, other.promoted_keys);
        EXPECT_EQ(one.promoted_values, other.promoted_values);
      }
    }
  }
}

// KV heads are independent: on any number of threads, or dealt out over any number of ranks, every
// head's outputs, bounds and outcomes are the same bits.
TEST_P(Metamorphic, ThreadsAndRanksThatShareOutHeadsChangeNothing) {
  constexpr int kKvHeads = 8, kSteps = 3;
  struct Result {
    Floats out = Floats(kHeads * kDim);
    GroupReport report;
  };
  log_set_level(LogLevel::Error);
  const auto run = [&](int workers) {
    std::vector<Result> results(kKvHeads);
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers; ++worker)
      threads.emplace_back([&, worker] {
        for (int kv = worker; kv < kKvHeads;
             kv += workers) {  // each with its own length and queries
          Problem p(layout(), 16, size_t(700 + 50 * kv));
          HeadState state(DeviceTier(p.head.format, DType::F16, std::make_shared<TierAccount>()),
                          16, 16);
          state.tier.append(p.head.x.k.data(), p.head.x.v.data(), p.head.x.tokens(), {});
          MemoryOriginals originals(p.head.x, 16);
          StepRules rules;
          rules.ladder.exploration = 0.05;
          Result& r = results[size_t(kv)];
          for (int step = 0; step < kSteps; ++step)
            head_step(rules, {.kv_head = kv, .step = uint64_t(step)}, kHeads, p.q.data(), &state,
                      originals, r.out.data(), nullptr, &r.report);
        }
      });
    for (std::thread& t : threads) t.join();
    return results;
  };
  const std::vector<Result> alone = run(1);
  for (int workers : {2, 3, 8}) {
    const std::vector<Result> shared = run(workers);
    for (size_t kv = 0; kv < kKvHeads; ++kv) {
      EXPECT_EQ(alone[kv].out, shared[kv].out);
      for (size_t h = 0; h < kHeads; ++h) {
        const HeadReport &a = alone[kv].report.heads[h], &b = shared[kv].report.heads[h];
        EXPECT_EQ(a.returned.bound, b.returned.bound);
        EXPECT_EQ(a.outcome, b.outcome);
        EXPECT_EQ(a.rung, b.rung);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Metamorphic, testing::Range(0, int(layouts().size())),
                         [](const auto& i) {
                           return std::string(layouts()[size_t(i.param)].name);
                         });

}  // namespace
}  // namespace certkv
