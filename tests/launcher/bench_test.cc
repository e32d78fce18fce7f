// certkv bench attention writes what readers of its JSON rely on, and its parts mean what they say.
// Speed is never judged here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "kernels/layout.h"
#include "launcher/commands.h"
#include "runtime/bench/attention_bench.h"
#include "runtime/bench/bench_layer.h"
#include "runtime/bench/prefill_work.h"
#include "runtime/json_file.h"
#include "runtime/model_config.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using testing::HasSubstr;

nlohmann::json bench(std::vector<std::string> more) {
  const test::TempFolder folder;
  const std::string path = (folder / "figures.json").string();
  std::vector<std::string> line = {"bench",     "attention", "--cache", "1MiB",
                                   "--threads", "2",         "--json",  path};
  line.insert(line.end(), more.begin(), more.end());
  Args args;
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  const int code = dispatch(args, line);
  testing::internal::GetCapturedStderr();
  EXPECT_THAT(testing::internal::GetCapturedStdout(), HasSubstr("certified, steady"));
  EXPECT_EQ(code, 0);
  return load_json_file(path);
}

TEST(BenchAttention, WritesEveryFieldOfEveryCaseWithPositiveFigures) {
  const nlohmann::json report =
      bench({"--context", "2048,4096", "--layout", "compact,balanced", "--repeats", "2",
             "--query-heads", "4", "--kv-heads", "2", "--head-dim", "64", "--batch", "2"});
  EXPECT_FALSE(report.at("machine").at("cpu").get<std::string>().empty());
  EXPECT_EQ(report.at("machine").at("threads"), 2);
  const nlohmann::json& cases = report.at("cases");
  ASSERT_EQ(cases.size(), 4u);
  for (size_t i = 0; i < cases.size(); ++i) {
    const nlohmann::json& c = cases[i];
    EXPECT_EQ(c.at("backend"), "cpu");
    EXPECT_EQ(c.at("context"), i < 2 ? 2048 : 4096);
    EXPECT_EQ(c.at("layout"), i % 2 == 0 ? "compact" : "balanced");
    EXPECT_EQ(c.at("query_heads"), 4);
    EXPECT_EQ(c.at("kv_heads"), 2);
    EXPECT_EQ(c.at("head_dim"), 64);
    EXPECT_EQ(c.at("batch"), 2);
    for (const char* key :
         {"dense_us", "certified_us", "cold_us", "correction_us", "paper_us", "naive_us",
          "ladder_us", "pass_us", "copy_gbps", "dense_gbps", "certified_gbps", "read_gbps"}) {
      EXPECT_GT(c.at(key).get<double>(), 0) << key;
    }
    EXPECT_GE(c.at("spread").get<double>(), 0);
    // Null where the kernels cannot leave the certificate out.
    const nlohmann::json& bare = c.at("uncertified_pass_us");
    EXPECT_TRUE(bare.is_null() || bare.get<double>() > 0);
    // 2 repeats of 2 sequences of 4 heads.
    uint64_t head_steps = 0;
    for (const auto& [rung, n] : c.at("rungs").items()) head_steps += n.get<uint64_t>();
    EXPECT_EQ(head_steps, 16u);
    // More than four caches of 1 MiB, if every set's tier 1 is read once.
    const double tier1 = c.at("bytes_per_token").get<double>() * 4 * c.at("tokens").get<double>();
    EXPECT_GT(c.at("rotating_sets").get<double>() * tier1, 4.0 * (1 << 20));
  }
}

TEST(BenchAttention, ConcentratedHeadsStayAtRungZeroAndDiffuseOnesClimb) {
  const auto at_rung_0 = [](const char* heads, const char* layout) {
    const nlohmann::json report =
        bench({"--context", "8192", "--heads", heads, "--layout", layout, "--repeats", "4"});
    const nlohmann::json& rungs = report.at("cases").at(0).at("rungs");
    return rungs.at("0").get<double>() / (4 * 8);
  };
  for (const char* layout : {"compact", "balanced", "paper"}) {
    EXPECT_GE(at_rung_0("mixed", layout), 0.9) << layout;
    EXPECT_GE(at_rung_0("sharp", layout), 0.9) << layout;
  }
  EXPECT_LE(at_rung_0("diffuse", "compact"), 0.1);
}

TEST(BenchAttention, RefusesWhatItCannotMeasureByName) {
  const auto message = [](std::vector<std::string> more) {
    std::vector<std::string> line = {"bench", "attention"};
    line.insert(line.end(), more.begin(), more.end());
    Args args;
    try {
      dispatch(args, line);
    } catch (const Error& e) {
      EXPECT_EQ(exit_code_of(e.kind()), kExitUsage) << e.what();
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(message({"--context", "4096,x"}), HasSubstr("context is '4096,x'"));
  EXPECT_THAT(message({"--context", "100"}), HasSubstr("numbers from 1024 on"));
  EXPECT_THAT(message({"--layout", "compct"}), HasSubstr("compct"));
  EXPECT_THAT(message({"--query-heads", "6", "--kv-heads", "4"}),
              HasSubstr("6 query heads over 4"));
  EXPECT_THAT(message({"--backend", "gpu"}), HasSubstr("backend is 'gpu'"));
  Args args;
  EXPECT_THROW(dispatch(args, {"bench", "atention"}), Error);
}

// The attention mass of each kind of token, by its definition in the header.
TEST(SyntheticHeads, HaveTheSharesOfMassThatTheyPromise) {
  struct Kind {
    HeadKind kind;
    double sinks, local, rest;
  };
  // A strength varies by 2 % of up to 12 in log mass (one standard deviation, over 8 steps and 4
  // heads), and what varies shares the mass with the others: shares within a third of themselves.
  constexpr double kWithin = 1.0 / 3;
  for (const Kind& expected :
       {Kind{HeadKind::Sharp, 0.30, 0.30, 0.04}, Kind{HeadKind::Mixed, 0.30, 0.29, 0.08},
        Kind{HeadKind::Diffuse, 0.20, 0.10, 0.70}}) {
    SCOPED_TRACE(head_kind_name(expected.kind));
    constexpr size_t kTokens = 4096, kDim = 64, kHeads = 4, kSteps = 8;
    const SyntheticHead head = make_synthetic_head({.kind = expected.kind,
                                                    .dtype = DType::F16,
                                                    .query_heads = int(kHeads),
                                                    .head_dim = int(kDim),
                                                    .tokens = kTokens,
                                                    .query_steps = int(kSteps)},
                                                   5);
    ASSERT_EQ(head.k.size(), kTokens * kDim);
    ASSERT_EQ(head.q.size(), kSteps * kHeads * kDim);
    double sinks = 0, local = 0, heavy = 0;
    for (size_t row = 0; row < kSteps * kHeads; ++row) {
      std::vector<double> s(kTokens);
      double largest = -INFINITY, sum = 0;
      for (size_t t = 0; t < kTokens; ++t) {
        for (size_t c = 0; c < kDim; ++c)
          s[t] += double(head.q[row * kDim + c]) * double(f16_to_float(head.k[t * kDim + c]));
        largest = std::max(largest, s[t] /= std::sqrt(double(kDim)));
      }
      for (double& x : s) sum += x = std::exp(x - largest);
      // What is neither sink nor local: the far tokens are the heaviest 2 topics of 12 of them.
      std::vector<double> middle(s.begin() + 4, s.end() - 256);
      std::sort(middle.rbegin(), middle.rend());
      for (size_t t = 0; t < 4; ++t) sinks += s[t] / sum;
      for (size_t t = kTokens - 256; t < kTokens; ++t) local += s[t] / sum;
      for (size_t t = 0; t < 24; ++t) heavy += middle[t] / sum;
    }
    const double n = kSteps * kHeads, rest = 1 - (sinks + local + heavy) / n;
    EXPECT_NEAR(sinks / n, expected.sinks, kWithin * expected.sinks);
    EXPECT_NEAR(local / n, expected.local, kWithin * expected.local);
    EXPECT_NEAR(rest, expected.rest, kWithin * expected.rest);
  }
}

TEST(BenchLayer, CountsTheBytesThatAPassReads) {
  const auto format =
      std::make_shared<const PageFormat>(make_page_format(layout_by_name("compact"), 128, 16));
  const SyntheticHead head = make_synthetic_head({.tokens = 1024 + 32}, 1);
  const BenchLayer layer = make_bench_layer(format, DType::F16, {&head, 1}, 8, 8);
  const HeadState& state = layer.heads[0]->sealed;
  EXPECT_EQ(dense_read_bytes(*format, 1056), 1056 * 512.0);
  // 32 tokens lie open.
  const double codes = 1024 * format->bytes_per_token() + 32 * 512.0;
  EXPECT_EQ(certified_read_bytes(state, 0, 0), codes);
  // A key block from originals reads 16 x 256 bytes instead of 16 x 128, a value block instead of
  // 16 x 64; scales are read all the same.
  EXPECT_EQ(certified_read_bytes(state, 3, 2), codes + 3 * 16 * 128.0 + 2 * 16 * 192.0);
}

TEST(BenchLayer, VerifyingOriginalsFindsADamagedBlock) {
  std::vector<uint16_t> k(64 * 64, 7), v(64 * 64, 9), to(16 * 64);
  BenchOriginals originals(k, v, 16, 64);
  const std::vector<uint32_t> blocks = {2, 4};
  std::vector<BlockResult> results;
  for (bool view : {false, true}) {
    const Destination d{.part = BlockPart::K, .view = view, .k = to.data()};
    originals.read(blocks, std::vector<Destination>{d, d}, &results);
    EXPECT_EQ(results[0].status, BlockStatus::Ok);
    EXPECT_EQ(results[0].k[5], 7);
    EXPECT_EQ(results[1].status, BlockStatus::Absent);  // there are 4
  }
  const_cast<uint16_t*>(originals.k())[2 * 16 * 64 + 3] ^= 1;
  const Destination d{.part = BlockPart::K, .view = true};
  originals.read({blocks.data(), 1}, {&d, 1}, &results);
  EXPECT_EQ(results[0].status, BlockStatus::Corrupt);
}

TEST(Timing, QuantilesInterpolateBetweenOrderStatistics) {
  const Timing t = timing_of({50, 10, 40, 20, 30});
  EXPECT_DOUBLE_EQ(t.us, 30);
  EXPECT_DOUBLE_EQ(t.spread, (46.0 - 14.0) / 30);
  EXPECT_DOUBLE_EQ(timing_of({7}).us, 7);
  EXPECT_DOUBLE_EQ(timing_of({7}).spread, 0);
  EXPECT_THROW(timing_of({}), Error);
}

// Counted pair by pair and weight by weight.
TEST(PrefillWork, CountsWhatAPromptNeeds) {
  ModelConfig c;
  c.layers = 3;
  c.hidden = 8;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 2;
  c.intermediate = 5;
  c.vocab = 11;
  const int64_t tokens = 300, tile = 128;  // 256 rows of 2 heads a group
  double products = 2.0 * 8 * 11, attention = 0;
  for (int layer = 0; layer < 3; ++layer)
    for (int64_t t = 0; t < tokens; ++t) {
      const bool asked = layer < 2 || t >= tokens / tile * tile;
      products += 2.0 * 8 * (4 * 2 + 2 * 2 * 2) + (asked ? 2.0 * 8 * (4 * 2 + 3 * 5) : 0);
      attention += asked ? 4.0 * 4 * 2 * double(t + 1) : 0;
    }
  const PrefillWork work = prefill_work(c, tokens);
  EXPECT_DOUBLE_EQ(work.products, products);
  EXPECT_DOUBLE_EQ(work.attention, attention);
}

}  // namespace
}  // namespace certkv
