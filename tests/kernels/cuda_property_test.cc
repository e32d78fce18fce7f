// A few hundred head-steps that attack the device's pass: where its state certifies, the promise
// holds against float64 over the originals.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/support/attention_cases.h"
#include "tests/support/device_pass.h"
#include "tests/support/sealed_head.h"
#include "tests/support/tightness.h"

namespace certkv {
namespace {

struct Counts {
  int head_steps = 0, finite = 0, certified = 0;
  Tightness use;
};

void run_shape(const char* layout, Shape shape, uint64_t seed, int warps, Counts* counts) {
  AttentionCase c = draw_case(shape, seed);
  std::mt19937_64 random(seed * 77 + uint64_t(shape));
  c.layout = layout;
  c.head_dim = random() % 2 == 0 ? 64 : 128;
  c.block_tokens = 16;
  c.tokens = std::min<size_t>(c.tokens, 1100);
  SealedHead head(c.layout, c.dtype, c.head_dim);
  RowMaker rows(c);
  rows.append(c.tokens, &head.x);
  const std::vector<float> q = rows.query();
  if (c.attack.rounds > 0) attack(*head.format, c.attack, q.data(), &head.x);
  head.seal();
  std::vector<BlockRef> blocks = head.blocks;
  const uint64_t one_in = 1 + random() % 12;
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (blocks[b].page == nullptr) continue;
    const bool key = random() % one_in == 0, value = random() % one_in == 0;
    if (key || value) blocks[b] = head.promoted(b, key, value);
  }
  const QueryGroup group = make_query_group(c.heads, c.head_dim, q.data());
  const DevicePass pass(head.context(), group, blocks,
                        {.warps = warps, .pages_per_split = int(1 + random() % 9)});
  EXPECT_EQ(pass.flags, 0u);
  EXPECT_TRUE(pass.judged_alike()) << c.describe();
  const std::vector<Certificate>& judged = pass.judged;
  for (int h = 0; h < c.heads; ++h) {
    const Certificate& x = judged[size_t(h)];
    const size_t d = head.dim();
    const std::span<const float> out(pass.out.data() + size_t(h) * d, d);
    ++counts->head_steps;
    if (!std::isfinite(x.bound)) continue;
    ++counts->finite;
    const oracle::Exact exact =
        oracle::attention(head.x, head.x.tokens(), q.data() + size_t(h) * d);
    const bool within = within_tolerance(x, true, 0.05);
    counts->certified += within;
    oracle::Claim claim;
    claim.kind = within ? oracle::Claim::Kind::Certified : oracle::Claim::Kind::Over;
    claim.bound = x.bound;
    claim.s = x.s;
    claim.enforces = false;
    claim.tolerance = 0.05;
    const oracle::Verdict verdict = oracle::check(exact, out, claim);
    EXPECT_TRUE(verdict.holds) << c.describe() << " head " << h << ": " << verdict.why;
    if (x.bound > 0) {
      const float ratio = float(verdict.error / x.bound);
      counts->use.add(shape_name(shape), {&ratio, 1});
    }
  }
}

TEST_P(OnDevice, CertifiesNothingThatDoesNotHold) {
  Counts counts;
  constexpr uint64_t kSeeds = 8;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 0; seed < kSeeds; ++seed)
      run_shape(layout(), Shape(shape), seed, warps(), &counts);
  fmt::print("{}", counts.use.table("true error / bound"));
  fmt::print("{} head-steps, {} with a finite bound, {} within 0.05\n", counts.head_steps,
             counts.finite, counts.certified);
  EXPECT_GE(counts.head_steps, 300);
  // The test must try something: most are judged, and many certify.
  EXPECT_GE(counts.finite, counts.head_steps * 3 / 4);
  EXPECT_GE(counts.certified, counts.head_steps / 10);
}

INSTANTIATE_TEST_SUITE_P(Blocks, OnDevice, kEveryVariant, variant_name);

}  // namespace
}  // namespace certkv
