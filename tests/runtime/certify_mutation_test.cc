// Each term alone on inputs that leave nothing of it unused, and what happens when it is damaged:
// the checking function must notice.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/quantize.h"
#include "runtime/certify/certificate.h"
#include "tests/support/attention_cases.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

constexpr int kDim = 64, kGroup = 64;
constexpr double kStep = 0x1p-4;        // of every key channel: keys span [0, 255 / 16]
constexpr double kError = 7.0 / 16;     // of a step, of every other key and value

// A pass over groups of aligned keys and values, and the certificate of its output.
struct Aligned {
  oracle::Originals x{.dtype = DType::F16, .head_dim = kDim, .k = {}, .v = {}};
  PageFormat format = make_page_format(layout_by_name("compact"), kDim, 16);
  std::vector<std::vector<uint64_t>> pages;  // 64-byte alignment is not needed by the kernels' loads
  std::vector<BlockRef> blocks;
  std::vector<float> q = std::vector<float>(kDim);
  std::vector<float> out = std::vector<float>(kDim);
  PassState pass;

  AttendContext context() const { return {&format, DType::F16}; }

  // Tokens whose key errors all point `direction` times sign(q); values v(c). The first two tokens
  // only hold the ends of the channels' range.
  template <typename Value>
  void add_group(double direction, double level, Value value) {
    for (int t = 0; t < kGroup; ++t)
      for (int c = 0; c < kDim; ++c) {
        const double sign = q[size_t(c)] < 0 ? -1 : 1;
        const double k = t == 0 ? 0 : t == 1 ? 255 : 8 + level * sign + direction * sign * kError;
        x.k.push_back(oracle::encode(DType::F16, k * kStep));
        x.v.push_back(oracle::encode(DType::F16, value(c)));
      }
  }
  void seal() {
    for (size_t first = 0; first < x.tokens(); first += kGroup) {
      pages.emplace_back(format.page_bytes / 8);
      auto* page = reinterpret_cast<std::byte*>(pages.back().data());
      const uint16_t *k = x.k.data() + first * kDim, *v = x.v.data() + first * kDim;
      ASSERT_EQ(seal_page(format, DType::F16, k, v, page), SealStatus::Sealed);
      for (int b = 0; b < format.blocks(); ++b) {
        const BlockAnnotations& note = page_annotations(format, page, b);
        blocks.push_back({.page = page, .index = int16_t(b), .tokens = 16, .k = nullptr,
                          .v = nullptr, .nu = note.nu, .k_norm = note.k_norm});
      }
    }
  }
  void run() {
    attend_pass(context(), make_query_group(1, kDim, q.data()), blocks, &pass);
    finish_output(pass, 0, out.data());
  }
  oracle::Verdict judge() {
    const Certificate c = certify(pass, 0, {}, out.data());
    const oracle::Claim claim{.kind = oracle::Claim::Kind::Over, .bound = c.bound, .s = c.s,
                              .enforces = false};
    return oracle::check(oracle::attention(x, x.tokens(), q.data()), out, claim);
  }
  double bound() { return certify(pass, 0, {}, out.data()).bound; }
  void alternate(float size) {
    for (int c = 0; c < kDim; ++c) q[size_t(c)] = c % 2 == 0 ? size : -size;
  }
};

// Keys that err one way where values are +1 (times 15/16, on the grid), the other way where -1.
Aligned opposed_keys() {
  Aligned a;
  a.alternate(0.1f);
  a.add_group(+1, 0, [](int) { return 15.0; });
  a.add_group(-1, 0, [](int c) { return c % 16 == 0 ? 15.0 : 0.0; });
  a.seal();
  a.run();
  return a;
}

// Values that all err the same way; q = 0 spreads the mass evenly.
Aligned opposed_values() {
  Aligned a;
  a.add_group(0, 0, [](int c) { return c % 16 == 0 ? 0 : c % 16 == 1 ? 15.0 : 7 + kError; });
  a.seal();
  a.run();
  return a;
}

TEST(Bounds, TheScoreErrorBoundIsReachedByAlignedKeys) {  // D1
  Aligned a = opposed_keys();
  const QueryGroup q = make_query_group(1, kDim, a.q.data());
  const oracle::Exact exact = oracle::attention(a.x, a.x.tokens(), a.q.data());
  double worst = 0;
  for (size_t b = 0; b < a.blocks.size(); ++b) {
    BlockTerms terms;
    terms.ref[0] = 0;
    block_terms(a.context(), q, a.blocks[b], 1, true, &terms);
    for (size_t t = 0; t < 16; ++t) {
      const double apart = std::abs(exact.score[b * 16 + t] - double(terms.score[0][t]));
      EXPECT_LE(apart, double(terms.score_bound[0])) << "block " << b << " token " << t;
      worst = std::max(worst, apart / double(terms.score_bound[0]));
    }
  }
  EXPECT_GE(worst, 0.8);
}

TEST(Bounds, TheKeyBoundIsNearlyReachedByOpposedBlocks) {  // E2
  Aligned a = opposed_keys();
  const oracle::Verdict v = a.judge();
  EXPECT_TRUE(v.holds) << v.why;
  EXPECT_GE(v.error, 0.6 * a.bound());
}

TEST(Bounds, TheValueBoundIsNearlyReachedByAlignedValues) {  // E1
  Aligned a = opposed_values();
  const oracle::Verdict v = a.judge();
  EXPECT_TRUE(v.holds) << v.why;
  EXPECT_GE(v.error, 0.8 * a.bound());
}

TEST(Mutations, AHalvedDeltaIsCaught) {
  Aligned a = opposed_keys();
  ASSERT_TRUE(a.judge().holds);
  // Everything that the pass built from Delta: expm1 is nearly linear here.
  for (size_t i = 0; i < a.pass.delta.size(); ++i)
    a.pass.keep[i] = keep_of(a.pass.c[i] = c_of_delta(a.pass.delta[i] /= 2));
  for (double& x : a.pass.head[0].a) x /= 2;
  a.pass.head[0].m2 /= 2;
  EXPECT_FALSE(a.judge().holds);
}

TEST(Mutations, AnEtaOfZeroIsCaught) {
  Aligned a = opposed_values();
  ASSERT_TRUE(a.judge().holds);
  for (std::vector<uint64_t>& page : a.pages)
    for (int b = 0; b < a.format.blocks(); ++b) {
      const float zero = 0;
      std::memcpy(reinterpret_cast<std::byte*>(page.data()) + a.format.annotations +
                      size_t(b) * sizeof(BlockAnnotations) + offsetof(BlockAnnotations, eta),
                  &zero, sizeof zero);
    }
  a.run();
  EXPECT_FALSE(a.judge().holds);
}

// Two groups: values on the grid in the first, erring values in the second; the query decides.
Aligned two_sides(float size) {
  Aligned a;
  a.alternate(4);  // the sign by which keys are laid out
  a.add_group(0, -4, [](int) { return 15.0; });
  a.add_group(0, +4, [](int c) { return c % 16 == 0 ? 0 : c % 16 == 1 ? 15.0 : 7 + kError; });
  a.alternate(size);
  a.seal();
  a.run();
  return a;
}

TEST(Mutations, MassesOfAnotherQueryAreCaught) {
  Aligned first = two_sides(-4), second = two_sides(4);
  ASSERT_TRUE(first.judge().holds);
  ASSERT_TRUE(second.judge().holds);
  const double scale = second.pass.head[0].l / first.pass.head[0].l;
  for (size_t b = 0; b < second.pass.blocks; ++b) {
    second.pass.block_sum[b] = float(
        first.pass.block_sum[b] * std::exp(first.pass.block_ref[b] - first.pass.head[0].m) * scale);
    second.pass.block_ref[b] = float(second.pass.head[0].m);
  }
  EXPECT_FALSE(second.judge().holds);
}

TEST(Mutations, AStateAndOutputOfAnotherQueryAreCaught) {
  Aligned first = two_sides(-4), second = two_sides(4);
  second.pass = first.pass;
  second.out = first.out;
  EXPECT_FALSE(second.judge().holds);
}

TEST(Corrections, PromotingValuesAloneIsCountedOnce) {
  Aligned a = opposed_values();
  const double before = a.judge().error;
  std::vector<CorrectionLog> logs(1);
  BlockTerms old_terms, new_terms;
  const QueryGroup q = make_query_group(1, kDim, a.q.data());
  for (size_t b = 0; b < a.blocks.size(); ++b) {
    BlockRef now = a.blocks[b];
    now.v = a.x.v.data() + b * 16 * kDim;
    ASSERT_TRUE(correct_block(a.context(), q, b, a.blocks[b], now, 1, &a.pass, logs, &old_terms,
                              &new_terms));
    // The sums no longer stand on the codes: taking these away again is refused.
    EXPECT_FALSE(correct_block(a.context(), q, b, a.blocks[b], now, 1, &a.pass, logs, &old_terms,
                               &new_terms));
    a.blocks[b] = now;
  }
  finish_output(a.pass, 0, a.out.data());
  const Certificate c = certify(a.pass, 0, logs[0], a.out.data());
  const oracle::Verdict v =
      oracle::check(oracle::attention(a.x, a.x.tokens(), a.q.data()), a.out,
                    {.kind = oracle::Claim::Kind::Exact, .bound = c.bound, .s = c.s});
  EXPECT_TRUE(v.holds) << v.why;
  EXPECT_LT(v.error, 1e-3 * before);
}

TEST(Corrections, ACorrectionThatLowersAScoreByTwelveKeepsItsBound) {
  Aligned a;
  a.alternate(0.1f);
  a.add_group(-1, 0, [](int) { return 15.0; });
  a.add_group(+1, 0, [](int c) { return c % 16 == 0 ? 15.0 : 0.0; });
  // sum |q| kError kStep / 8 = 12
  a.alternate(float(12 / (kError * kStep * kDim / 8)));
  a.seal();
  a.run();
  ASSERT_TRUE(a.judge().holds);
  const oracle::Exact exact = oracle::attention(a.x, a.x.tokens(), a.q.data());
  std::vector<CorrectionLog> logs(1);
  BlockTerms old_terms, new_terms;
  const QueryGroup q = make_query_group(1, kDim, a.q.data());
  double lowered = 0;
  for (size_t b = 0; b < a.blocks.size(); ++b) {
    BlockRef now = a.blocks[b];
    now.k = a.x.k.data() + b * 16 * kDim;
    ASSERT_TRUE(correct_block(a.context(), q, b, a.blocks[b], now, 1, &a.pass, logs, &old_terms,
                              &new_terms));
    a.blocks[b] = now;
    lowered = std::max(lowered, double(old_terms.score[0][8]) - double(new_terms.score[0][8]));
    finish_output(a.pass, 0, a.out.data());
    const Certificate c = certify(a.pass, 0, logs[0], a.out.data());
    if (!std::isfinite(c.bound)) continue;  // nothing is claimed
    const oracle::Verdict v = oracle::check(
        exact, a.out,
        {.kind = oracle::Claim::Kind::Over, .bound = c.bound, .s = c.s, .enforces = false});
    EXPECT_TRUE(v.holds) << "block " << b << ": " << v.why;
  }
  EXPECT_NEAR(lowered, 12, 0.1);
}

}  // namespace
}  // namespace certkv
