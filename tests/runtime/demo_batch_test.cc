#include "runtime/demo_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/base/error.h"
#include "runtime/batch_io.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using nlohmann::json;

std::string prose() {
  std::string text;
  for (int i = 0; text.size() < 60000; ++i) {
    text += "Clause " + std::to_string(i) + ": nobody may copy \xc3\xa9 this without a notice.\n";
  }
  return text;
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(DemoBatch, TheAskedFactStandsOnceInTheTextAndThePromptEndsWithItsBeginning) {
  for (const char* model : {"reader", "needle"}) {
    DemoBatchOptions o{model, {3000, 4096, 20000}, 5, 9};
    const auto batch = make_demo_batch(prose(), o);
    ASSERT_EQ(batch.size(), 15u);
    std::set<std::string> ids;
    for (const DemoQuestion& q : batch) {
      ids.insert(q.custom_id);
      const size_t lead = std::max(q.prompt.rfind("\nQ: ") + 4, q.prompt.rfind("\n\n") + 2);
      const std::string question =
          q.prompt.substr(std::string(model) == "reader" ? q.prompt.rfind("\nQ: ") + 4 : lead);
      EXPECT_EQ(count(q.prompt, question + " " + q.expected + "."), 1u) << question;
      EXPECT_EQ(count(q.prompt, question), 2u) << question;
      // With the beginning-of-text token and the answer it fits its context and fills most of it.
      EXPECT_LE(int64_t(q.prompt.size()) + 1 + q.max_tokens, q.context_tokens);
      EXPECT_GE(int64_t(q.prompt.size()) + q.max_tokens + 80, q.context_tokens);
      EXPECT_EQ(q.expected.find('.'), std::string::npos);
      for (char c : q.prompt) EXPECT_TRUE(c == '\n' || (c >= ' ' && c <= '~'));
    }
    EXPECT_EQ(ids.size(), batch.size());
  }
}

// What the needle model attends to: the last 16 bytes at every byte of the answer. Where they stood
// earlier, the same byte must have followed.
TEST(DemoBatch, NoOtherPlaceInANeedlePromptLeadsElsewhere) {
  const auto batch = make_demo_batch(prose(), {"needle", {8192}, 10, 3});
  for (const DemoQuestion& q : batch) {
    std::string text = q.prompt;
    for (char c : " " + q.expected + ".") {
      const std::string window = text.substr(text.size() - 16);
      size_t found = 0;
      for (size_t at = text.find(window); at + 16 < text.size(); at = text.find(window, at + 1)) {
        EXPECT_EQ(text[at + 16], c) << window;
        ++found;
      }
      EXPECT_EQ(found, 1u) << window;
      text += c;
    }
  }
}

TEST(DemoBatch, TheSeedDecidesEverything) {
  const DemoBatchOptions o{"reader", {4096}, 3, 5};
  const auto a = make_demo_batch(prose(), o), b = make_demo_batch(prose(), o);
  const auto c = make_demo_batch(prose(), {"reader", {4096}, 3, 6});
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].prompt, b[i].prompt);
    EXPECT_NE(a[i].prompt, c[i].prompt);
  }
}

TEST(DemoBatch, WhatCannotBeMadeIsRefused) {
  EXPECT_THROW(make_demo_batch(prose(), {"other", {4096}, 1, 1}), Error);
  EXPECT_THROW(make_demo_batch(prose(), {"reader", {100}, 1, 1}), Error);
  EXPECT_THROW(make_demo_batch(prose(), {"reader", {-5}, 1, 1}), Error);
  EXPECT_THROW(make_demo_batch("short", {"reader", {4096}, 1, 1}), Error);
  EXPECT_THROW(make_demo_batch(prose(), {"reader", {4096}, 0, 1}), Error);
  EXPECT_THROW(read_demo_text("/nowhere/at/all"), Error);
}

TEST(DemoBatch, ItsLinesAreReadByTheJobAsTheyWereMeant) {
  const test::TempFolder folder;
  const auto batch = make_demo_batch(prose(), {"reader", {4096}, 4, 1});
  write_demo_batch(folder.path().string(), batch, "reader");
  BatchReader reader((folder / "batch.jsonl").string(), {});
  for (const DemoQuestion& q : batch) {
    const auto line = reader.next();
    ASSERT_TRUE(line.has_value());
    EXPECT_FALSE(line->bad) << line->error;
    EXPECT_EQ(line->custom_id, q.custom_id);
    EXPECT_EQ(line->prompt, q.prompt);
    EXPECT_EQ(line->sampling.stop, q.stop);
  }
  EXPECT_FALSE(reader.next().has_value());
}

TEST(DemoScore, AnAnswerIsRightUpToTheFullStop) {
  EXPECT_TRUE(answer_is_right(" 48213", "48213"));
  EXPECT_TRUE(answer_is_right(" 48213. And", "48213"));
  EXPECT_TRUE(answer_is_right(" Marble Walnut\nQ:", "Marble Walnut"));
  EXPECT_FALSE(answer_is_right(" 482131", "48213"));
  EXPECT_FALSE(answer_is_right(" 4821", "48213"));
  EXPECT_FALSE(answer_is_right("", "48213"));
  EXPECT_FALSE(answer_is_right(" ", "48213"));
}

TEST(DemoScore, FailedAndMissingLinesAreWrong) {
  const test::TempFolder folder;
  folder.write(
      "answers.jsonl",
      "{\"custom_id\":\"a\",\"expected\":\"1\"}\n{\"custom_id\":\"b\",\"expected\":\"2\"}\n"
      "{\"custom_id\":\"c\",\"expected\":\"3\"}\n{\"custom_id\":\"d\",\"expected\":\"4\"}\n");
  const auto line = [](const char* id, const char* text) {
    return json{{"custom_id", id},
                {"response", {{"body", {{"choices", {{{"text", text}}}}}}}},
                {"error", nullptr}}
               .dump() +
           "\n";
  };
  folder.write("results.jsonl", line("a", " 1") + line("b", " 7") +
                                    "{\"custom_id\":\"c\",\"response\":null,\"error\":{}}\n");
  const DemoScore score =
      score_results((folder / "results.jsonl").string(), (folder / "answers.jsonl").string());
  EXPECT_EQ(score.right, 1u);
  EXPECT_EQ(score.questions, 4u);
  EXPECT_EQ(score.wrong, (std::vector<std::string>{"b", "c", "d"}));
}

}  // namespace
}  // namespace certkv
