// A job that was killed goes on: what its folder and the store keep of answers that were begun.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "kvstore/block.h"
#include "kvstore/client.h"
#include "runtime/certify/head_class.h"
#include "runtime/finished_line.h"
#include "runtime/open_answers.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/engine_run.h"
#include "tests/support/random_model.h"

namespace certkv {
namespace {

using test::deterministic_options;
using test::ended_by_the_test;
using test::expect_same;
using test::random_request;
using test::run;
using test::RunHooks;
using test::RunResult;
using test::ThreadHolder;

constexpr int64_t kAnswer = 200;
constexpr size_t kPrompt = 1100;  // two segments, a page of the rest, and 12 open tokens
constexpr uint64_t kRoom = uint64_t(128) << 20;

class Resume : public ::testing::Test {
 protected:
  std::vector<Request> requests(Policy policy) const {
    std::vector<Request> list;
    for (uint64_t i = 0; i < 2; ++i) {
      list.push_back(random_request(i, vocab, kPrompt + 7 * i, kAnswer));
      list.back().policy = policy;
      list.back().sampling.seed = 3;
    }
    return list;
  }
  static RunHooks sharing(ThreadHolder* store) {
    RunHooks h;
    h.scope = ContentScope{sha256("the random model"), sha256("its layout"), DType::BF16};
    h.store = store;
    return h;
  }
  // The requests as a second job gets them: with what the first one has told.
  static std::vector<Request> again(std::vector<Request> list, const RunResult& killed) {
    for (Request& r : list) {
      AnswerState state;
      state.policy = r.policy;
      for (const AnswerProgress& p : killed.progress) {
        if (p.id != r.id) continue;
        // As it comes back from a file.
        EXPECT_TRUE(follow(&state, decode_progress(encode_progress(p))));
      }
      if (!state.tokens.empty()) r.resumed.push_back(state);
    }
    return list;
  }
  static uint64_t sealed_tokens(const Request& r) {
    return r.resumed.empty() || !r.resumed[0].sealed ? 0 : r.resumed[0].sealed->tokens;
  }
  // Nothing is told twice: every token comes once, in its order, over both jobs.
  static void expect_told_once(const RunResult& killed, const RunResult& second) {
    std::map<uint64_t, std::vector<int32_t>> told;
    for (const RunResult* r : {&killed, &second})
      for (const AnswerProgress& p : r->progress) {
        if (p.tokens.empty()) continue;
        EXPECT_EQ(p.first, told[p.id].size());
        told[p.id].insert(told[p.id].end(), p.tokens.begin(), p.tokens.end());
      }
    for (const auto& [key, c] : second.completions) {
      std::vector<int32_t>& all = told[key.first];
      if (c.finish_reason == "stop" && !all.empty() && all.size() == c.tokens.size() + 1)
        all.pop_back();  // the token that ended it
      EXPECT_EQ(all, c.tokens);
    }
  }
  static void expect_sound(const RunResult& r, const Tolerance& tolerance) {
    for (const auto& [key, c] : r.completions) {
      EXPECT_FALSE(c.failed) << c.error;
      EXPECT_EQ(accounting_error(c, tolerance), "");
      EXPECT_EQ(c.returned.bound.count, c.counts.head_steps);
    }
  }

  const int64_t vocab = test::random_model_config().vocab;
};

// Under `dense` an answer depends on originals alone, so it is the same, bit for bit, with all that
// is recorded of it, wherever it was cut and taken up again.
TEST_F(Resume, AnAnswerGoesOnFromItsLastSealedTokensBitForBitWhereOriginalsDecide) {
  const JobOptions o = deterministic_options();
  const auto asked = requests(Policy::Dense);
  const RunResult whole = run(o, 2, 1, asked);
  uint64_t most = 0;
  for (const uint64_t kill : {1, 2, 40, 130, 195}) {
    SCOPED_TRACE(kill);
    ThreadHolder store(kRoom, ended_by_the_test());
    RunHooks hooks = sharing(&store);
    hooks.kill_after = kill;
    const RunResult killed = run(o, 2, 1, asked, hooks);
    ASSERT_TRUE(killed.completions.empty());
    const auto more = again(asked, killed);
    most = std::max(most, sealed_tokens(more[0]));
    const RunResult second = run(o, 2, 1, more, sharing(&store));
    expect_same(whole, second, "resumed");
    expect_sound(second, asked[0].tolerance);
    expect_told_once(killed, second);
    for (const auto& [key, c] : second.completions) {
      EXPECT_EQ(c.counts.head_steps, whole.completions.at(key).counts.head_steps);
      // The prompts that were prefilled before the end are not prefilled again.
      EXPECT_EQ(c.reused_tokens, key.first < kill ? 1024u : 0u);
    }
    // Only steps behind the last sealed token are done again.
    uint64_t steps = 0;
    for (const StepRecord& s : second.steps) steps += s.sequences;
    uint64_t expected = 0;
    for (const Request& r : more)
      expected += uint64_t(kAnswer - 1) - (sealed_tokens(r) == 0 ? 0 : sealed_tokens(r) - 1);
    EXPECT_EQ(steps, expected);
  }
  EXPECT_GT(most, 150u);
}

TEST_F(Resume, UnderBudgetTheKnownTokensStayAndTheCertificatesHold) {
  for (const char* layout : {"compact", kClassesLayout}) {
    JobOptions o = deterministic_options();
    o.cache.layout = layout;
    const auto asked = requests(Policy::Budget);
    const RunResult whole = run(o, 1, 2, asked);
    for (const uint64_t kill : {30, 150}) {
      ThreadHolder store(kRoom, ended_by_the_test());
      RunHooks hooks = sharing(&store);
      hooks.kill_after = kill;
      const RunResult killed = run(o, 1, 2, asked, hooks);
      const auto more = again(asked, killed);
      const RunResult second = run(o, 1, 2, more, sharing(&store));
      expect_sound(second, asked[0].tolerance);
      expect_told_once(killed, second);
      for (const auto& [key, c] : second.completions) {
        const Completion& w = whole.completions.at(key);
        EXPECT_EQ(c.counts.head_steps, w.counts.head_steps);
        const auto& known = more[key.first].resumed[0].tokens;
        ASSERT_GE(c.tokens.size(), known.size());
        EXPECT_TRUE(std::equal(known.begin(), known.end(), c.tokens.begin()));
        EXPECT_TRUE(std::equal(known.begin(), known.end(), w.tokens.begin()));
      }
    }
  }
}

// Without the originals every step is done again; then budget, too, comes to the same bits.
TEST_F(Resume, WithoutTheStoreEverythingIsMadeAgainAndNothingIsDrawnAgain) {
  const JobOptions o = deterministic_options();
  const auto asked = requests(Policy::Budget);
  const RunResult whole = run(o, 2, 1, asked);
  ThreadHolder store(kRoom, ended_by_the_test());
  RunHooks hooks = sharing(&store);
  hooks.kill_after = 150;
  const RunResult killed = run(o, 2, 1, asked, hooks);
  const auto more = again(asked, killed);
  EXPECT_GT(sealed_tokens(more[0]), 0u);
  ThreadHolder fresh(kRoom, ended_by_the_test());
  const RunResult second = run(o, 2, 1, more, sharing(&fresh));
  expect_same(whole, second, "lost store");
  expect_told_once(killed, second);
  expect_same(whole, run(o, 2, 1, more), "a job that shares nothing");
  RunHooks other = sharing(&store);
  other.scope->model[0] ^= std::byte(1);
  expect_same(whole, run(o, 2, 1, more, other), "another scope");
}

TEST_F(Resume, AnotherNumberOfRanksGoesOnFromTheSameOriginals) {
  const JobOptions o = deterministic_options();
  const auto asked = requests(Policy::Dense);
  const RunResult whole = run(o, 1, 1, asked);
  for (const auto& [before, after] : {std::pair{2, 1}, std::pair{1, 2}}) {
    ThreadHolder store(kRoom, ended_by_the_test());
    RunHooks hooks = sharing(&store);
    hooks.kill_after = 140;
    const RunResult killed = run(o, before, 1, asked, hooks);
    const auto more = again(asked, killed);
    // Killed a second time, so that its own sealed blocks stand behind those it adopted.
    hooks.kill_after = 75;
    const RunResult second = run(o, after, 1, more, hooks);
    auto last = more;
    for (Request& r : last)
      for (const AnswerProgress& p : second.progress) {
        if (p.id == r.id) {
          EXPECT_TRUE(follow(&r.resumed[0], p));
        }
      }
    EXPECT_GT(sealed_tokens(last[0]), sealed_tokens(more[0]));
    EXPECT_GE(last[0].resumed[0].sealed->spans.size(), 2u);
    const RunResult third = run(o, after, 1, last, sharing(&store));
    expect_same(whole, third, "third job");
    uint64_t steps = 0;
    for (const StepRecord& s : third.steps) steps += s.sequences;
    EXPECT_LT(steps, 2u * 40);
  }
}

// Flips a bit of every sealed block of a token range of the arena that `is_wanted`.
size_t damage(StoreClient& store, const std::function<bool(const BlockHeader&)>& is_wanted) {
  size_t n = 0;
  const auto arena = store.arena();
  for (size_t at = 0; at + kBlockHeaderBytes <= arena.size(); at += kBlockAlignment) {
    BlockHeader h;
    std::memcpy(static_cast<void*>(&h), arena.data() + at, sizeof h);
    if (h.magic != kBlockMagic || h.seal == 0 || !is_wanted(h)) continue;
    const_cast<std::byte*>(arena.data())[at + kBlockHeaderBytes + 9] ^= std::byte(0x20);
    ++n;
  }
  return n;
}

TEST_F(Resume, DamagedOriginalsOfAnAnswerOrItsPromptAreFoundAndMadeAgain) {
  const JobOptions o = deterministic_options();
  const auto asked = requests(Policy::Budget);
  const RunResult whole = run(o, 2, 1, asked);
  for (const uint32_t block : {3u, 70u}) {  // of the prompt; of the answer
    ThreadHolder store(kRoom, ended_by_the_test());
    RunHooks hooks = sharing(&store);
    hooks.kill_after = 150;
    const RunResult killed = run(o, 2, 1, asked, hooks);
    const auto more = again(asked, killed);
    hooks = sharing(&store);
    hooks.before = [&](StoreClient& client, int rank) {
      if (rank != 0) return;
      EXPECT_GT(damage(client,
                       [&](const BlockHeader& h) {
                         return h.id.block == block && h.id.kv_head == 3 && h.id.layer == 1;
                       }),
                0u);
    };
    const RunResult second = run(o, 2, 1, more, hooks);
    expect_sound(second, asked[0].tolerance);
    expect_told_once(killed, second);
    if (block == 70)
      expect_same(whole, second, "answer damaged");  // every step again
    else
      for (const auto& [key, c] : second.completions) EXPECT_EQ(c.reused_tokens, 0u);
  }
}

TEST_F(Resume, AStateThatIsNoneOfTheRequestIsRefused) {
  const JobOptions o = deterministic_options();
  auto asked = requests(Policy::Dense);
  ThreadHolder store(kRoom, ended_by_the_test());
  RunHooks hooks = sharing(&store);
  hooks.kill_after = 140;
  auto more = again(asked, run(o, 1, 1, asked, hooks));
  std::swap(more[0].resumed[0].sealed->figures, more[1].resumed[0].sealed->figures);
  EXPECT_THROW(run(o, 1, 1, more, sharing(&store)), Error);
}

// ---- the files ----------------------------------------------------------------------------------

class OpenAnswersTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(mkdtemp(folder.data()), nullptr); }
  void TearDown() override { std::filesystem::remove_all(folder); }
  OpenAnswers open(const std::string& job = "a job") {
    return OpenAnswers(folder + "/open", job, [](uint64_t line, Policy) { return line == 9; });
  }
  std::string file(uint64_t line) const {
    return fmt::format("{}/open/{}-budget.jsonl", folder, line);
  }
  static AnswerProgress news(uint64_t line, uint64_t first, std::vector<int32_t> tokens) {
    return {.id = line,
            .policy = Policy::Budget,
            .first = first,
            .tokens = std::move(tokens),
            .sealed = std::nullopt};
  }
  static AnswerProgress sealed_news(uint64_t line, uint64_t first, int32_t token) {
    AnswerProgress p = news(line, first, {token});
    SealedAnswer s;
    s.tokens = first + 1;
    s.scope = ~uint64_t(0);
    s.spans = {{{~uint64_t(0), 5}, 68, 12}, {{uint64_t(1) << 63, 6}, 80, 4}};
    s.figures = "{\"a\":\"b\"}";
    s.bound_sum = 0.1;
    s.steps = first;
    p.sealed = s;
    return p;
  }
  std::string folder = "/tmp/certkv-open-XXXXXX";
};

TEST_F(OpenAnswersTest, WhatWasToldComesBack) {
  {
    OpenAnswers a = open();
    EXPECT_FALSE(a.load(4, Policy::Budget));
    a.add(news(4, 0, {11}));
    a.add(sealed_news(4, 1, 12));
    a.add(news(4, 2, {13}));
    a.add(news(5, 0, {21}));
  }
  OpenAnswers b = open();
  EXPECT_EQ(b.found(), 2u);
  const auto state = b.load(4, Policy::Budget);
  ASSERT_TRUE(state);
  EXPECT_EQ(state->tokens, (std::vector<int32_t>{11, 12, 13}));
  ASSERT_TRUE(state->sealed);
  EXPECT_EQ(state->sealed->tokens, 2u);
  EXPECT_EQ(state->sealed->scope, ~uint64_t(0));
  EXPECT_EQ(state->sealed->spans, sealed_news(4, 1, 12).sealed->spans);
  EXPECT_EQ(state->sealed->figures, "{\"a\":\"b\"}");
  EXPECT_EQ(state->sealed->bound_sum, 0.1);
  EXPECT_FALSE(b.load(4, Policy::Dense));
  b.finish(4, Policy::Budget);
  EXPECT_FALSE(std::filesystem::exists(file(4)));
  EXPECT_FALSE(open().load(4, Policy::Budget));
}

TEST_F(OpenAnswersTest, CutOrDamagedAnywhereWhatStandsBeforeIsUsedAndGoneOnFrom) {
  {
    OpenAnswers a = open();
    for (int i = 0; i < 8; ++i) a.add(i == 3 ? sealed_news(4, 3, 3) : news(4, uint64_t(i), {i}));
  }
  std::ifstream in(file(4), std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  for (size_t at = 0; at < whole.size(); at += 7)
    for (const bool cut : {true, false}) {
      std::string text = whole;
      if (cut)
        text.resize(at);
      else
        text[at] = char(text[at] ^ 1);
      std::ofstream(file(4), std::ios::binary | std::ios::trunc) << text;
      std::vector<int32_t> before;
      {
        OpenAnswers b = open();
        const auto state = b.load(4, Policy::Budget);
        if (state) before = state->tokens;
        for (size_t i = 0; i < before.size(); ++i) ASSERT_EQ(before[i], int32_t(i));
        ASSERT_LT(before.size(), 8u) << "what is damaged was used";
        ASSERT_EQ(state && state->sealed, before.size() >= 4);
        b.add(news(4, before.size(), {99}));
      }
      OpenAnswers c = open();
      const auto state = c.load(4, Policy::Budget);
      ASSERT_TRUE(state);
      before.push_back(99);
      ASSERT_EQ(state->tokens, before) << at;
    }
}

TEST_F(OpenAnswersTest, AnotherJobsFileIsNotUsed) {
  { open().add(news(4, 0, {11})); }
  OpenAnswers b = open("another job");
  EXPECT_FALSE(b.load(4, Policy::Budget));
  b.add(news(4, 0, {77}));
  EXPECT_EQ(open("another job").load(4, Policy::Budget)->tokens, (std::vector<int32_t>{77}));
}

TEST_F(OpenAnswersTest, FilesOfFinishedLinesAreRemovedAtTheStart) {
  { open().add(news(9, 0, {11})); }
  ASSERT_TRUE(std::filesystem::exists(file(9)));
  EXPECT_EQ(open().found(), 0u);
  EXPECT_FALSE(std::filesystem::exists(file(9)));
}

TEST(OpenAnswersText, NewsThatDoNotFollowChangeNothing) {
  AnswerState s;
  s.tokens = {1, 2};
  AnswerProgress p;
  p.first = 1;
  p.tokens = {9};
  EXPECT_FALSE(follow(&s, p));
  p.first = 2;
  p.sealed.emplace();
  p.sealed->tokens = 4;
  EXPECT_FALSE(follow(&s, p));
  EXPECT_EQ(s.tokens.size(), 2u);
  p.sealed->tokens = 3;
  EXPECT_TRUE(follow(&s, p));
  for (const char* bad : {"", "{}", "[1]", "{\"id\":1,\"policy\":\"none\",\"n\":0,\"t\":[]}",
                          "{\"id\":1,\"policy\":\"budget\",\"n\":0,\"t\":[\"x\"]}",
                          "{\"id\":1,\"policy\":\"budget\",\"n\":0,\"t\":[],\"sealed\":{}}"})
    EXPECT_THROW(decode_progress(bad), Error) << bad;
}

}  // namespace
}  // namespace certkv
