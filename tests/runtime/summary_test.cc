#include "runtime/summary.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "runtime/json_file.h"
#include "runtime/record_json.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

FinishedLine line(uint64_t index, Policy policy, HeadStepCounts counts, Outcome outcome) {
  FinishedLine f;
  f.index = index;
  f.number = index + 1;
  f.custom_id = "id";
  f.tokens = 5;
  Completion& c = f.completion;
  c.id = index;
  c.policy = policy;
  c.outcome = outcome;
  c.failed = outcome == Outcome::Failed;
  c.counts = counts;
  c.prompt_tokens = 100;
  c.tier1_bytes = 240;
  c.dense_bytes = 512;
  for (uint64_t i = 0; i < counts.head_steps; ++i) {
    c.returned.relative.add(0.001 * double(i + 1));
    c.returned.bound.add(0.01 * double(i + 1));
    c.candidate.relative.add(0.002 * double(i + 1));
    c.candidate.bound.add(0.02 * double(i + 1));
  }
  c.relative_max = c.returned.relative.max;
  c.bound_max = c.returned.bound.max;
  f.over_asked = over_is_asked_for(policy, true);
  f.time = {"s1/0", double(index + 1), {{policy, {0.5 * double(index + 1), 4 * (index + 1)}}}};
  return f;
}

HeadStepCounts counts(uint64_t certified, uint64_t exact, uint64_t over, uint64_t failed) {
  HeadStepCounts c;
  c.certified = certified;
  c.exact = exact;
  c.over = over;
  c.failed = failed;
  c.head_steps = certified + exact + over + failed;
  c.rungs = {certified + over, 0, 0, exact, failed};
  c.scratch_hits = 3;
  c.scratch_misses = 1;
  return c;
}

TEST(Summary, HasEveryPromisedKeyAndTheFiguresAddUp) {
  Summary s({Policy::Budget}, {true, 0.05}, false);
  s.lines_total = 3;
  s.tier1_digest = tier1_digest_name({.scrub_steps = 256});
  s.add(line(0, Policy::Budget, counts(10, 0, 0, 0), Outcome::Certified));
  s.add(line(1, Policy::Budget, counts(8, 2, 0, 0), Outcome::Exact));
  s.add(line(2, Policy::Budget, counts(3, 0, 0, 1), Outcome::Failed));
  s.complete = true;
  const json v = s.json();
  for (const char* key :
       {"policy", "tolerance", "requests", "tokens", "head_steps", "certified", "exact", "failed",
        "over", "rungs", "returned", "candidate", "tier1_bytes", "dense_bytes", "scratch_hit_rate",
        "tier1_digest", "tokens_per_second", "requests_failed"}) {
    EXPECT_TRUE(v.contains(key)) << key;
    if (std::string(key) == "tier1_digest") continue;
    EXPECT_TRUE(v["policies"]["budget"].contains(key)) << key;
  }
  for (const char* key : {"bound_max", "relative_max", "relative_p99"}) {
    EXPECT_TRUE(v["returned"].contains(key));
    EXPECT_TRUE(v["candidate"].contains(key));
  }
  EXPECT_EQ(v["policy"], "budget");
  EXPECT_EQ(v["tolerance"], (json{{"relative", 0.05}}));
  EXPECT_EQ(v["requests"], 3);
  EXPECT_EQ(v["requests_failed"], 1);
  EXPECT_EQ(v["requests_exact"], 1);
  EXPECT_EQ(v["tokens"], 15);
  EXPECT_EQ(v["head_steps"], 24);
  EXPECT_EQ(v["certified"], 21);
  EXPECT_EQ(v["exact"], 2);
  EXPECT_EQ(v["failed"], 1);
  EXPECT_EQ(v["over"], 0);
  EXPECT_EQ(v["rungs"], (json{{"0", 21}, {"1", 0}, {"2", 0}, {"3", 2}, {"4", 1}}));
  EXPECT_EQ(v["scratch_hit_rate"], 0.75);
  EXPECT_EQ(v["tier1_digest"], "scrub:256");
  EXPECT_EQ(v["returned"]["relative_max"], 0.01);
  EXPECT_GE(v["returned"]["relative_p99"].get<double>(), 0.0099);
  // The session's last word: 12 tokens in 1.5 s of decode steps.
  EXPECT_EQ(v["tokens_per_second"], 8.0);
  EXPECT_EQ(v["wall_seconds"], 3.0);
  EXPECT_EQ(s.exit_code(), kJobHasFailedLines);
}

TEST(Summary, ComparedPoliciesHaveAnObjectEachAndTheFirstIsOnTop) {
  Summary s({Policy::Naive, Policy::Budget}, {false, 0.5}, true);
  s.add(line(0, Policy::Naive, counts(6, 0, 4, 0), Outcome::Over));
  s.add(line(0, Policy::Budget, counts(9, 1, 0, 0), Outcome::Exact));
  s.complete = true;
  const json v = s.json();
  EXPECT_EQ(v["policy"], "naive");
  EXPECT_EQ(v["over"], 4);
  EXPECT_EQ(v["requests"], 1);
  EXPECT_EQ(v["policies"]["budget"]["exact"], 1);
  EXPECT_EQ(v["policies"]["budget"]["over"], 0);
  EXPECT_EQ(v["tolerance"], (json{{"absolute", 0.5}}));
  EXPECT_EQ(s.exit_code(), kJobSucceeded);
  const std::string csv = s.csv();
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 3);
  const auto columns = [](const std::string& row) {
    return std::count(row.begin(), row.end(), ',');
  };
  const size_t first = csv.find('\n'), second = csv.find('\n', first + 1);
  EXPECT_EQ(columns(csv.substr(0, first)), columns(csv.substr(first, second - first)));
}

TEST(Summary, ExitCodesTellAskedForFromUnaskedOver) {
  const auto code = [](Policy policy, bool job_wide, Outcome outcome, bool complete) {
    Summary s({policy}, {}, false);
    FinishedLine f = line(0, policy, counts(1, 0, outcome == Outcome::Over, 0), outcome);
    f.over_asked = over_is_asked_for(policy, job_wide);
    s.add(f);
    s.complete = complete;
    return s.exit_code();
  };
  EXPECT_EQ(code(Policy::Budget, true, Outcome::Certified, true), kJobSucceeded);
  EXPECT_EQ(code(Policy::Naive, true, Outcome::Over, true), kJobSucceeded);
  EXPECT_EQ(code(Policy::Paper, true, Outcome::Over, true), kJobSucceeded);
  EXPECT_EQ(code(Policy::Naive, false, Outcome::Over, true), kJobHasFailedLines);
  EXPECT_EQ(code(Policy::Paper, false, Outcome::Over, true), kJobHasFailedLines);
  EXPECT_EQ(code(Policy::Budget, true, Outcome::Over, true), kJobHasFailedLines);
  EXPECT_EQ(code(Policy::Budget, true, Outcome::Failed, true), kJobHasFailedLines);
  EXPECT_EQ(code(Policy::Budget, true, Outcome::Certified, false), kJobStopped);
}

TEST(Summary, CountsThatDoNotAddUpAreAnErrorAndNotASummary) {
  for (int which = 0; which < 2; ++which) {
    Summary s({Policy::Budget}, {}, false);
    HeadStepCounts c = counts(5, 1, 0, 0);
    if (which == 0) ++c.certified;
    if (which == 1) --c.rungs[0];
    s.add(line(0, Policy::Budget, c, Outcome::Exact));
    EXPECT_THROW(s.json(), Error);
  }
}

TEST(Summary, AJobWithoutFinishedLinesStillHasItsKeys) {
  Summary s({Policy::Dense}, {}, false);
  const json v = s.json();
  EXPECT_EQ(v["head_steps"], 0);
  EXPECT_TRUE(v["scratch_hit_rate"].is_null());
  EXPECT_EQ(v["exit_code"], kJobStopped);
}

TEST(Accounting, ACompletionThatDoesNotAddUpIsNamed) {
  const Tolerance tolerance{true, 0.05};
  const FinishedLine good = line(0, Policy::Budget, counts(9, 1, 0, 0), Outcome::Exact);
  EXPECT_EQ(accounting_error(good.completion, tolerance), "");
  const auto broken = [&](auto&& change) {
    Completion c = good.completion;
    change(c);
    return accounting_error(c, tolerance);
  };
  EXPECT_THAT(broken([](Completion& c) { c.counts.certified = 8; }), HasSubstr("8 certified"));
  EXPECT_THAT(broken([](Completion& c) { c.counts.rungs[1] = 5; }), HasSubstr("rungs"));
  EXPECT_THAT(broken([](Completion& c) { c.outcome = Outcome::Certified; }), HasSubstr("outcome"));
  EXPECT_THAT(broken([](Completion& c) { c.returned.relative.add(1); }), HasSubstr("11 returned"));
  EXPECT_THAT(broken([](Completion& c) {
                --c.counts.certified;
                ++c.counts.over;
              }),
              HasSubstr("above the tolerance"));
  EXPECT_THAT(broken([](Completion& c) {
                --c.counts.certified;
                ++c.counts.failed;
              }),
              HasSubstr("did not fail"));
  // Certified in every head-step, and yet above the tolerance, or not a number.
  const FinishedLine certified = line(0, Policy::Budget, counts(10, 0, 0, 0), Outcome::Certified);
  EXPECT_EQ(accounting_error(certified.completion, tolerance), "");
  for (double bound : {0.0500001, 1.0, std::numeric_limits<double>::quiet_NaN()}) {
    Completion c = certified.completion;
    c.relative_max = bound;
    EXPECT_THAT(accounting_error(c, tolerance), HasSubstr("certified at a bound")) << bound;
  }
}

TEST(FinishedLine, ComesBackFromItsNoteWithEveryBit) {
  FinishedLine f = line(3, Policy::Paper, counts(7, 2, 1, 0), Outcome::Over);
  f.completion.returned.bound.add(std::numeric_limits<double>::quiet_NaN());
  f.completion.candidate.relative.add(std::numeric_limits<double>::infinity());
  f.completion.bound_mean = 0.1 + 0.2;
  f.completion.error_kind = "ignored, since it did not fail";
  f.completion.text = "left out";
  f.completion.tokens = {1, 2};
  const FinishedLine g = finished_line_of(note_of(f));
  EXPECT_EQ(note_of(g), note_of(f));
  EXPECT_EQ(g.completion.bound_mean, 0.1 + 0.2);
  EXPECT_TRUE(std::isnan(g.completion.returned.bound.max));
  EXPECT_TRUE(std::isinf(g.completion.candidate.relative.max));
  EXPECT_EQ(g.completion.returned.relative.bins, f.completion.returned.relative.bins);
  EXPECT_EQ(g.completion.outcome, Outcome::Over);
  EXPECT_EQ(g.time.steps.at(Policy::Paper).tokens, 16u);
  EXPECT_EQ(g.tokens, 5u);
  EXPECT_TRUE(g.over_asked);
  EXPECT_THROW(finished_line_of("{}"), Error);
  EXPECT_THROW(finished_line_of("{"), Error);
}

TEST(Wire, CompletionsComeBackFromOtherRanksUnchanged) {
  Completion c = line(1, Policy::Budget, counts(1, 2, 0, 3), Outcome::Failed).completion;
  c.error_kind = "OriginalsLost";
  c.error = "block 3";
  c.tokens = {4, 5};
  c.text = "x";
  EXPECT_EQ(encode_completion(decode_completion(encode_completion(c))), encode_completion(c));
  EXPECT_EQ(decode_completion(encode_completion(c)).error, "block 3");
  for (const char* bad : {"", "{}", "[1]", "{\"id\": -1}"}) {
    EXPECT_THROW(decode_completion(bad), Error);
  }
}

TEST(Figures, TextForPeopleIsNeverBelowTheFigure) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-30, 10), mantissa(1, 10);
  for (int i = 0; i < 20000; ++i) {
    const double x = mantissa(random) * std::pow(10, std::floor(exponent(random)));
    const std::string text = upper_text(x);
    const double shown = std::strtod(text.c_str(), nullptr);
    ASSERT_GE(shown, x) << text;
    ASSERT_LE(shown, x * 1.0101) << text;  // one unit of three digits is at most 1 %
  }
  EXPECT_EQ(upper_text(0.05), "0.05");
  EXPECT_EQ(upper_text(9.999), "10");
  EXPECT_EQ(upper_text(0), "0");
  EXPECT_EQ(upper_text(std::numeric_limits<double>::quiet_NaN()), "nan");
}

}  // namespace
}  // namespace certkv
