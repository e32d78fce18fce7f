// Prompts that begin alike share originals (store.reuse): the same bits, less prefill.
#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "kvstore/block.h"
#include "kvstore/client.h"
#include "runtime/certify/head_class.h"
#include "runtime/originals_scope.h"
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

constexpr int64_t kAnswer = 40;
constexpr uint64_t kRoom = uint64_t(128) << 20;

class PrefixReuse : public ::testing::Test {
 protected:
  // Requests with the same first `common` tokens, and different ones after them.
  std::vector<Request> alike(size_t common, std::vector<size_t> lengths) const {
    std::vector<Request> list;
    const Request first = random_request(99, vocab, common, kAnswer);
    for (const size_t length : lengths) {
      Request r = random_request(list.size(), vocab, length, kAnswer);
      std::copy_n(first.prompt.begin(), std::min(common, length), r.prompt.begin());
      list.push_back(std::move(r));
    }
    return list;
  }
  static RunHooks sharing(ThreadHolder* store = nullptr) {
    RunHooks h;
    h.scope = ContentScope{sha256("the random model"), sha256("its layout"), DType::BF16};
    h.store = store;
    return h;
  }
  static std::vector<uint64_t> reused(const RunResult& r) {
    std::vector<uint64_t> list;
    for (const auto& [key, c] : r.completions) list.push_back(c.reused_tokens);
    return list;
  }
  using Tokens = std::vector<uint64_t>;

  const int64_t vocab = test::random_model_config().vocab;
};

TEST_F(PrefixReuse, AnswersAndVerdictsAreTheSameBitForBitWhetherPagesAreSharedOrMadeAgain) {
  const auto requests = alike(1100, {1200, 1105, 600});
  for (const bool deterministic : {true, false})
    for (const char* layout : {"compact", kClassesLayout})
      for (const int ranks : {1, 2}) {
        if (!deterministic && ranks == 2 && layout == std::string("compact")) continue;  // time
        JobOptions o = deterministic_options();
        o.deterministic = deterministic;
        o.cache.layout = layout;
        const std::string what = fmt::format("{} ranks {} {}", layout, ranks, deterministic);
        const RunResult alone = run(o, ranks, 2, requests);
        EXPECT_EQ(reused(alone), (Tokens{0, 0, 0})) << what;
        for (const int64_t at_once : {1, 3}) {  // 1: the first is gone when the next one comes
          o.run.max_batch = at_once;
          const RunResult shared = run(o, ranks, 2, requests, sharing());
          expect_same(alone, shared, what + " at once " + std::to_string(at_once));
          EXPECT_EQ(reused(shared), (Tokens{0, 1024, 512})) << what;
          ASSERT_EQ(shared.prefills.size(), 3u);
          EXPECT_EQ(shared.prefills[1].reused_tokens, 1024u);
          // Three prompts at once, of which 1024 and 512 tokens lie in pages of the first one.
          // Under `classes` these heads are all re-encoded, each sequence's for itself.
          if (at_once == 3 && layout == std::string("compact")) {
            EXPECT_LT(shared.tier1_peak, alone.tier1_peak);
          }
        }
      }
}

TEST_F(PrefixReuse, TheLastTokenIsRunThoughAllSegmentsAreThere) {
  const auto requests = alike(1024, {1024, 1024});
  const JobOptions o = deterministic_options();
  const RunResult shared = run(o, 1, 1, requests, sharing());
  expect_same(run(o, 1, 1, requests), shared, "aligned");
  EXPECT_EQ(reused(shared), (Tokens{0, 512}));
}

TEST_F(PrefixReuse, ATokenThatDiffersEndsWhatIsShared) {
  auto requests = alike(1600, {1600, 1600});
  requests[1].prompt[700] ^= 1;
  const JobOptions o = deterministic_options();
  const RunResult shared = run(o, 1, 1, requests, sharing());
  expect_same(run(o, 1, 1, requests), shared, "differs");
  EXPECT_EQ(reused(shared), (Tokens{0, 512}));
}

TEST_F(PrefixReuse, AnotherJobWithAnotherNumberOfRanksFindsThem) {
  const auto requests = alike(1100, {1100});
  const JobOptions o = deterministic_options();
  for (const auto& [before, after] : {std::pair{1, 2}, std::pair{4, 1}, std::pair{2, 2}}) {
    ThreadHolder store(kRoom, ended_by_the_test());
    const RunResult first = run(o, before, 1, requests, sharing(&store));
    EXPECT_EQ(reused(first), (Tokens{0}));
    const RunResult second = run(o, after, 1, requests, sharing(&store));
    expect_same(first, second, "second job");
    EXPECT_EQ(reused(second), (Tokens{1024})) << before << " ranks, then " << after;
  }
}

TEST_F(PrefixReuse, AnotherScopeFindsNothing) {
  const auto requests = alike(600, {600});
  const JobOptions o = deterministic_options();
  ThreadHolder store(kRoom, ended_by_the_test());
  run(o, 1, 1, requests, sharing(&store));
  RunHooks other = sharing(&store);
  other.scope->model[3] ^= std::byte(1);
  EXPECT_EQ(reused(run(o, 1, 1, requests, other)), (Tokens{0}));
  EXPECT_EQ(reused(run(o, 1, 1, requests, sharing(&store))), (Tokens{512}));
}

// Flips one bit in the payload of the n-th sealed block of the arena.
void damage(StoreClient& store, size_t n) {
  const auto arena = store.arena();
  for (size_t at = 0; at + kBlockHeaderBytes <= arena.size(); at += kBlockAlignment) {
    BlockHeader h;
    std::memcpy(static_cast<void*>(&h), arena.data() + at, sizeof h);
    if (h.magic != kBlockMagic || h.seal == 0 || n-- != 0) continue;
    const_cast<std::byte*>(arena.data())[at + kBlockHeaderBytes + 5] ^= std::byte(0x10);
    return;
  }
  FAIL() << "there is no such block";
}

TEST_F(PrefixReuse, DamagedOriginalsAreFoundAndThePromptIsPrefilledFromItsFirstToken) {
  const auto requests = alike(1100, {1100});
  const JobOptions o = deterministic_options();
  for (const size_t block : {0, 7, 40}) {
    ThreadHolder store(kRoom, ended_by_the_test());
    const RunResult first = run(o, 2, 1, requests, sharing(&store));
    RunHooks hooks = sharing(&store);
    hooks.before = [&](StoreClient& client, int rank) {
      if (rank == 0) damage(client, block);
    };
    const RunResult second = run(o, 2, 1, requests, hooks);
    expect_same(first, second, "damaged");
    EXPECT_EQ(reused(second), (Tokens{0}));
    // What was made anew is found by the next one.
    EXPECT_EQ(reused(run(o, 2, 1, requests, sharing(&store))), (Tokens{1024}));
  }
}

TEST_F(PrefixReuse, WhatNobodyHoldsMakesRoomForOthers) {
  const JobOptions o = deterministic_options();
  // Room for about two prompts: every third one needs what an earlier one has left.
  ThreadHolder store(uint64_t(5) << 20);
  for (uint64_t i = 0; i < 6; ++i) {
    const RunResult r = run(o, 1, 1, {random_request(i, vocab, 1100, 4)}, sharing(&store));
    EXPECT_FALSE(r.completions.begin()->second.failed) << r.completions.begin()->second.error;
  }
  const auto again = [&](uint64_t i) {
    return reused(run(o, 1, 1, {random_request(i, vocab, 1100, 4)}, sharing(&store)));
  };
  EXPECT_EQ(again(5), (Tokens{1024}));
  EXPECT_EQ(again(0), (Tokens{0})) << "the oldest went first";
}

TEST(OriginalsScope, WhatDecidesBitsIsInIt) {
  const ModelConfig config = test::random_model_config();
  std::set<std::pair<Sha256, Sha256>> seen;
  const auto add = [&](auto change, int tensor = 2, const Sha256& files = sha256("files")) {
    JobOptions o = deterministic_options();
    o.deterministic = false;
    change(o);
    const ContentScope s = originals_scope(o, config, tensor, DType::BF16, files);
    return seen.insert({s.model, s.layout}).second;
  };
  EXPECT_TRUE(add([](JobOptions&) {}));
  EXPECT_FALSE(add([](JobOptions& o) { o.cache.layout = "paper"; })) << "of tier 1 alone";
  EXPECT_FALSE(add([](JobOptions& o) { o.tolerance.value = 0.01; }));
  EXPECT_TRUE(add([](JobOptions& o) { o.deterministic = true; }));
  EXPECT_TRUE(add([](JobOptions&) {}, 4)) << "sums over ranks";
  EXPECT_FALSE(add([](JobOptions& o) { o.deterministic = true; }, 4)) << "in one order for any T";
  EXPECT_TRUE(add([](JobOptions& o) { o.model.quantization = "int8"; }));
  EXPECT_TRUE(add([](JobOptions& o) { o.cache.block_tokens = 32; }));
  EXPECT_TRUE(add([](JobOptions& o) { o.run.backend = "emulated"; }));
  EXPECT_TRUE(add([](JobOptions&) {}, 2, sha256("other files")));
  JobOptions o;
  o.run.backend = "cuda";
  EXPECT_FALSE(shares_originals(o)) << "auto";
  o.store.reuse = "true";
  EXPECT_THROW(shares_originals(o), Error);
  o.run.backend = "cpu";
  EXPECT_TRUE(shares_originals(o));
  o.store.reuse = "false";
  EXPECT_FALSE(shares_originals(o));
}

}  // namespace
}  // namespace certkv
