// The optimiser of tests/support/adversary.h against each term alone: it must reach most of it, in
// every layout and head dim, or the attack that the property tests rely on is none.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/base/log.h"
#include "tests/support/adversary.h"
#include "tests/support/attention_cases.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

constexpr size_t kTokens = 320;

struct Stage {
  PageFormat format;
  oracle::Originals x;
  std::vector<float> q, out;
  HeadReport report;
  double error = 0;

  Stage(const Layout& layout, int head_dim)
      : format(make_page_format(layout, head_dim, 16)),
        x{.dtype = DType::F16, .head_dim = head_dim, .k = {}, .v = {}},
        q(size_t(head_dim)),
        out(size_t(head_dim)) {}
  size_t dim() const { return q.size(); }
  double used() const { return error / report.returned.bound; }

  // A query for which the codes of keys between -1 and 1 leave scores uncertain by D = score_error.
  void draw_query(std::mt19937_64* random, double score_error) {
    std::normal_distribution<double> normal;
    double sum = 0;
    for (float& c : q) {
      c = float(normal(*random));
      sum += std::abs(c);
    }
    const double step = 2.0 / format.layout.key.levels();
    for (float& c : q) c *= float(score_error * std::sqrt(double(dim())) / (0.5 * sum * step));
  }
  // Keys far smaller than the range of their channels, so that a 16-bit float resolves their cells;
  // two tokens of each group hold the ends of the ranges, and score about 0.
  template <typename Value>
  void draw_rows(std::mt19937_64* random, Value value) {
    std::normal_distribution<double> normal;
    std::vector<double> edge(dim());
    std::vector<size_t> order(dim());
    std::iota(order.begin(), order.end(), size_t(0));
    std::sort(order.begin(), order.end(),
              [&](size_t a, size_t b) { return std::abs(q[a]) > std::abs(q[b]); });
    double sum = 0;  // of the larger terms: each smaller one brings it back towards 0
    for (size_t c : order) {
      edge[c] = sum * q[c] > 0 ? -1 : 1;
      sum += edge[c] * q[c];
    }
    for (size_t t = 0; t < kTokens; ++t) {
      const size_t in_group = t % size_t(format.group_tokens);
      for (size_t c = 0; c < dim(); ++c) {
        const double small = 0.02 * normal(*random);
        x.k.push_back(
            oracle::encode(x.dtype, in_group < 2 ? (in_group == 0 ? 1 : -1) * edge[c] : small));
        x.v.push_back(oracle::encode(x.dtype, value(t, c)));
      }
    }
  }
  void run() {
    log_set_level(LogLevel::Error);
    HeadState state(DeviceTier(std::make_shared<const PageFormat>(format), x.dtype,
                               std::make_shared<TierAccount>()),
                    0, 0);
    state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
    MemoryOriginals originals(x, 16);
    StepRules rules;
    rules.policy = Policy::Naive;
    GroupReport group;
    head_step(rules, {}, 1, q.data(), &state, originals, out.data(), nullptr, &group);
    report = group.heads[0];
    const oracle::Verdict v =
        oracle::check(oracle::attention(x, x.tokens(), q.data()), out, claim_of(rules, report));
    EXPECT_TRUE(v.holds) << v.why;
    error = v.error;
  }
};

class Adversary : public testing::TestWithParam<int> {
 protected:
  const Layout& layout() const { return layouts()[size_t(GetParam())]; }
  // Tokens of a group that hold the ends of a channel's range, as a share: they cannot err.
  double at_edges() const { return 2.0 / std::max(layout().key_group_tokens, 16); }
};

// D = 0.05, all of it used by every key but those at the edges (each cell to 0.4995, and to the
// next 16-bit float: under 1/16 of a cell for keys below 1/16 of the range, up to 1/4 with codes of
// 12 bits), values at two opposite points: error tanh(D) of their distance's half, bound expm1(D)
// of it over den. 0.9: the halves do not weigh the same, and kappa is the largest of a whole block.
TEST_P(Adversary, ReachesTheKeyBoundAlone) {  // D1, E2
  const double resolved = layout().key.code_bits > 8 ? 0.75 : 0.93;
  for (int d : {64, 96, 128, 256}) {
    std::mt19937_64 random{uint64_t(d)};
    Stage stage(layout(), d);
    stage.draw_query(&random, 0.05);
    // 0 and 15 times the largest step are exact in every layout.
    const double top = layout().value.levels();
    stage.draw_rows(&random, [&](size_t t, size_t c) { return (t + c) % 2 == 0 ? top : 0.0; });
    const AttackResult r = attack(stage.format, {.rounds = 6}, stage.q.data(), &stage.x);
    EXPECT_LE(r.changed, r.codes / 1000);
    stage.run();
    EXPECT_LE(stage.report.returned.e_val, 0.02 * stage.report.returned.e_key);
    const double reached = std::exp(-0.05) * resolved * (1 - at_edges()) * 0.9;
    EXPECT_GE(stage.used(), reached) << "d " << d;
    fmt::print("key bound, {} d {}: {:.3f} of it reached, before the attack {:.3f}\n",
               layout().name, d, stage.used(), stage.used() * r.before / r.after);
  }
}

// q = 0: every token weighs the same and no key counts. All values err by half a step in every
// element but the two that hold the ends of their group's range: eta has nothing of those either.
TEST_P(Adversary, ReachesTheValueBoundAlone) {  // E1
  for (int d : {64, 96, 128, 256}) {
    std::mt19937_64 random(uint64_t(d) + 1);
    std::normal_distribution<double> normal;
    Stage stage(layout(), d);
    // The same two elements of every group hold the ends, so that all errors can be parallel; the
    // others lie where 16-bit floats resolve their cells.
    stage.draw_rows(&random, [&](size_t, size_t c) {
      const size_t i = c % size_t(stage.format.value_group);
      return i < 2 ? (i == 0 ? 1.0 : -1.0) : 0.02 * normal(random);
    });
    const AttackResult r = attack(stage.format, {.rounds = 6}, stage.q.data(), &stage.x);
    EXPECT_LE(r.changed, r.codes / 1000);
    stage.run();
    EXPECT_LE(stage.report.returned.e_key, 0.02 * stage.report.returned.e_val);
    EXPECT_GE(stage.used(), 0.9) << "d " << d;
    fmt::print("value bound, {} d {}: {:.3f} of it reached, before the attack {:.3f}\n",
               layout().name, d, stage.used(), stage.used() * r.before / r.after);
  }
}

// ---- snapshots that no ladder would choose ------------------------------------------------------

enum class Twist { None, FarFromZero, SharpPages, OutlierQuery };

// Two opposite sides of values, keys near the middle of their ranges, and a query; twisted.
struct Twisted {
  SealedHead head;
  std::vector<float> q;
  Twisted(const Layout& layout, int block_tokens, Twist twist, uint64_t seed)
      : head(layout.name, DType::F16, 64, block_tokens), q(head.dim()) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (float& c : q) c = float(2 * normal(random));
    if (twist == Twist::OutlierQuery)  // what remains of the others' 16 bits is next to nothing
      for (size_t c : {size_t(3), size_t(40)}) q[c] *= 200;
    double q2 = 0;
    for (float c : q) q2 += double(c) * c;
    const double mean = twist == Twist::FarFromZero ? 200 : 0;
    head.add(320 + 5, [&](size_t t, size_t c) {
      const double up = twist == Twist::SharpPages ? double(t / 64 * 37 % 5) * 5 : 0;
      const double edge = t % 64 < 2 ? (t % 2 == 0 ? 1 : -1) : 0.05 * normal(random);
      const double towards = up * 8 * double(q[c]) / q2;  // raises a whole page's scores by `up`
      const double quiet = std::abs(q[c]) > 50 ? 0.02 : 1;
      return std::pair{towards + quiet * edge,
                       mean + (t / 3 % 2 == 0 ? 4.0 : -4.0) + normal(random)};
    });
    attack(*head.format, {.rounds = 3}, q.data(), &head.x);
    head.seal();
  }
};

// Any F and X, also within one page, at once in a pass and by corrections of one that had none.
TEST_P(Adversary, NoSnapshotOfAttackedPagesErrsByMoreThanItsBound) {
  double largest = 0;
  for (int block_tokens : {16, 32})
    for (Twist twist : {Twist::None, Twist::FarFromZero, Twist::SharpPages, Twist::OutlierQuery}) {
      Twisted x(layout(), block_tokens, twist, uint64_t(block_tokens));
      const SealedHead& head = x.head;
      const oracle::Exact exact = oracle::attention(head.x, head.x.tokens(), x.q.data());
      std::mt19937_64 random(9);
      for (int share : {0, 1, 2, 3, 4}) {  // quarters of the blocks, promoted
        std::vector<BlockRef> blocks = head.blocks;
        JudgedPass corrected(head, head.blocks, 1, x.q.data());
        std::vector<CorrectionLog> logs(1);
        BlockTerms before, after;
        bool could = true;
        for (size_t b = 0; b < blocks.size(); ++b) {
          if (blocks[b].page == nullptr) continue;
          blocks[b] = head.promoted(b, int(random() % 4) < share, int(random() % 4) < share);
          could = could && correct_block(head.context(), corrected.q, b, head.blocks[b], blocks[b],
                                         1, &corrected.pass, logs, &before, &after);
        }
        const JudgedPass fresh(head, blocks, 1, x.q.data());
        corrected.judge(0, logs[0]);
        const auto judge = [&](const JudgedPass& j, const char* how) {
          const double error = distance(exact.out, j.out[0]), bound = j.certificate[0].bound;
          ASSERT_LE(error, bound) << how << " blocks of " << block_tokens << " twist " << int(twist)
                                  << " share " << share;
          largest = std::max(largest, error / bound);
        };
        judge(fresh, "at once,");
        if (could && !must_rerun(corrected.pass, 0, logs[0])) judge(corrected, "corrected,");
      }
    }
  EXPECT_GE(largest, 0.3) << "the attack is none";
  fmt::print("attacked snapshots, {}: error / bound {:.3f} at most\n", layout().name, largest);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Adversary, testing::Range(0, int(layouts().size())),
                         [](const auto& i) {
                           return std::string(layouts()[size_t(i.param)].name);
                         });

}  // namespace
}  // namespace certkv
