// Whatever the certified core returns on generated problems, its audit verifies; and the verifier's
// arithmetic agrees with the oracle's and with the product's bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "kernels/base/log.h"
#include "kernels/quantize.h"
#include "runtime/audit/check.h"
#include "runtime/audit/requantise.h"
#include "runtime/audit/verify.h"
#include "tests/support/audited_case.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

const bool kQuiet = (log_set_level(LogLevel::Warning), true);

audit::VerifyResult verify(const std::string& folder) {
  audit::VerifyOptions o;
  o.folder = folder;
  o.threads = 1;
  return audit::verify_folder(o);
}

std::string text_of(const audit::VerifyResult& r) {
  std::string text;
  for (const audit::Violation& v : r.listed) text += v.rule + ": " + v.where + ": " + v.text + "\n";
  return text;
}

class AuditProperty : public ::testing::TestWithParam<int> {};

TEST_P(AuditProperty, EveryHeadStepOfEveryPolicyVerifies) {
  constexpr uint64_t kSeeds = 30;
  std::map<std::string, uint64_t> outcomes;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    AttentionCase c = draw_case(Shape(GetParam()), seed);
    c.tokens = std::min<size_t>(c.tokens, 1100);
    for (const Policy policy : {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense}) {
      const test::TempFolder folder;
      c.rules.policy = policy;
      const AuditedRun run = run_audited(c, folder.path().string());
      const audit::VerifyResult r = verify(folder.path().string());
      EXPECT_EQ(r.violations, 0u) << c.describe() << "\n" << text_of(r);
      EXPECT_EQ(r.head_steps, uint64_t(c.heads * c.steps)) << c.describe();
      for (const auto& [key, t] : r.tightness) outcomes[key.second] += t.head_steps;
    }
  }
  EXPECT_GT(outcomes["certified"], 0u);
  EXPECT_GT(outcomes["exact"], 0u);
}

INSTANTIATE_TEST_SUITE_P(Shapes, AuditProperty, ::testing::Range(0, kShapes),
                         [](const auto& i) { return shape_name(Shape(i.param)); });

AttentionCase plain_case() {
  AttentionCase c;
  c.seed = 5;
  c.heads = 2;
  c.tokens = 200;
  c.steps = 3;
  c.key_quota = c.value_quota = 64;
  c.q_scale = 1;
  c.rules.policy = Policy::Budget;
  return c;
}

// The verifier takes off what its own rounding may come to; the oracle does not.
TEST(AuditCheck, TheTrueErrorIsTheOracles) {
  constexpr double kOwnRounding = 1e-12;  // of S: 2^-52 * (n + 2d) * S with n, d below 1000
  const test::TempFolder folder;
  AttentionCase c = plain_case();
  c.rules.policy = Policy::Naive;
  const AuditedRun run = run_audited(c, folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  const audit::FileIndex index = audit::read_index(path, [](uint64_t) {});
  ASSERT_EQ(index.broken, "");
  audit::HeadRows x(index.header.layout, true);
  x.append(run.originals.tokens(), run.originals.k.data(), run.originals.v.data());
  const size_t d = size_t(c.head_dim);
  size_t step = 0;
  for (const AuditLink& link : read_links(path)) {
    if (link.kind != audit::LinkKind::Record) continue;
    audit::Record record;
    ASSERT_EQ(audit::decode(link.payload, d, &record), "");
    for (size_t h = 0; h < 2; ++h) {
      const audit::HeadResult r = audit::check_head(
          index.header, index.streams.at(2), x, record, h,
          [](const std::string& rule, const std::string& text) { ADD_FAILURE() << rule << text; });
      const oracle::Exact exact =
          oracle::attention(run.originals, run.tokens[step], run.q[step].data() + h * d);
      double error2 = 0;
      for (size_t i = 0; i < d; ++i) {
        const double e = exact.out[i] - double(record.heads[h].out[i]);
        error2 += e * e;
      }
      EXPECT_GT(error2, 0);
      EXPECT_NEAR(r.error, std::sqrt(error2), kOwnRounding * r.s);
    }
    ++step;
  }
  EXPECT_EQ(step, 3u);
}

// The verifier's codes and annotations are those of the pages that are served.
TEST(AuditRequantise, AgreesWithThePagesOfEveryLayout) {
  constexpr double kRoundedUp = 0x1p-22;  // annotations are floats, rounded up: one step of 2^-23
  size_t sealed = 0;
  for (int shape = 0; shape < kShapes; ++shape)
    for (uint64_t seed = 0; seed < 12; ++seed) {
      AttentionCase c = draw_case(Shape(shape), seed);
      SCOPED_TRACE(c.describe());
      const PageFormat f = make_page_format(layout_by_name(c.layout), c.head_dim, c.block_tokens);
      RowMaker maker(c);
      oracle::Originals rows{.dtype = c.dtype, .head_dim = c.head_dim, .k = {}, .v = {}};
      maker.append(size_t(f.group_tokens), &rows);
      const auto planes = [](const TensorPlanes& p) {
        return audit::PlaneRules{p.code_bits, p.residual_bits, p.read_residual,
                                 p.metadata == DType::F16};
      };
      audit::HeadRows x({c.head_dim, c.block_tokens, f.group_tokens, f.value_group,
                         planes(f.layout.key), planes(f.layout.value)},
                        c.dtype == DType::BF16);
      x.append(size_t(f.group_tokens), rows.k.data(), rows.v.data());
      std::vector<std::byte> page(f.page_bytes + 64);
      std::byte* at = page.data() + (64 - reinterpret_cast<uintptr_t>(page.data()) % 64) % 64;
      const SealStatus status = seal_page(f, c.dtype, rows.k.data(), rows.v.data(), at);
      ASSERT_EQ(x.groups.size(), 1u);
      ASSERT_EQ(x.groups[0].quantised, status == SealStatus::Sealed);
      if (status != SealStatus::Sealed) continue;
      ++sealed;
      const oracle::Served served = oracle::decode_page(f, at);
      const size_t d = size_t(c.head_dim), width = size_t(f.value_group);
      for (size_t i = 0; i < rows.k.size(); ++i) {
        const size_t t = i / d, ch = i % d, line = t * (d / width) + ch / width;
        ASSERT_EQ(x.k_base[ch] + x.k_step[ch] * x.k_code[i], served.k[i]) << i;
        ASSERT_EQ(x.v_base[line] + x.v_step[line] * x.v_code[i], served.v[i]) << i;
      }
      for (int b = 0; b < f.blocks(); ++b) {
        const BlockAnnotations& note = page_annotations(f, at, b);
        const audit::HeadRows::Block& mine = x.blocks[size_t(b)];
        const auto expect_up = [&](double recorded, double due, const char* what) {
          EXPECT_GE(recorded, due * (1 - 0x1p-40)) << what;
          EXPECT_LE(recorded, due * (1 + kRoundedUp) + 0x1p-149) << what;
        };
        expect_up(note.kappa, mine.kappa, "kappa");
        expect_up(note.e, mine.e, "e");
        expect_up(note.eta, mine.eta, "eta");
        expect_up(note.vbar, mine.vbar, "vbar");
      }
      // The largest norm, of which stored norms are 16-bit parts (each part rounded up), or the
      // smallest step.
      const double step = page_notes(f, at).norm_step;
      EXPECT_EQ(x.served_max.size(), x.blocks.size());
      for (const double largest : x.served_max) {
        EXPECT_GE(step, largest / 65535 * (1 - 0x1p-40));
        EXPECT_LE(step, largest / 65535 * (1 + kRoundedUp) + 0x1p-126);
      }
    }
  EXPECT_GT(sealed, 100u);
}

TEST(AuditRecord, ARungFourReplacesWhatTheFirstAttemptLeft) {
  const test::TempFolder folder;
  run_audited(plain_case(), folder.path().string(), 1);
  const audit::VerifyResult r = verify(folder.path().string());
  EXPECT_EQ(r.violations, 0u) << text_of(r);
  std::vector<int> rungs;
  for (const AuditLink& link : read_links(folder / audit::file_name(0, 0))) {
    audit::Record record;
    if (link.kind != audit::LinkKind::Record) continue;
    ASSERT_EQ(audit::decode(link.payload, 64, &record), "");
    for (const audit::HeadRecord& h : record.heads) {
      rungs.push_back(h.head.rung);
      if (h.head.rung == 4) {
        EXPECT_EQ(audit::outcome_text(h.head.outcome), std::string("exact"));
      }
    }
  }
  ASSERT_EQ(rungs.size(), 6u);
  EXPECT_EQ(rungs[2], 4);
  EXPECT_EQ(rungs[3], 4);
}

TEST(AuditRecord, AHeadStepWithoutOriginalsIsRecordedAsFailed) {
  const test::TempFolder folder;
  run_audited(plain_case(), folder.path().string(), -1, 2);
  const audit::VerifyResult r = verify(folder.path().string());
  EXPECT_EQ(r.violations, 0u) << text_of(r);
  EXPECT_EQ(r.tightness.at({"budget", "failed"}).head_steps, 2u);
}

}  // namespace
}  // namespace certkv
