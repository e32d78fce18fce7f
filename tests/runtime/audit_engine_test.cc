// The engine's audit, as thread ranks with a store in this process: complete, sound, and chosen by
// request, layer, head and step alone.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "kernels/base/log.h"
#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/audit/reader.h"
#include "runtime/audit/verify.h"
#include "runtime/certified_engine.h"
#include "runtime/needle_model.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_ranks.h"

namespace certkv {
namespace {

const bool kQuiet = (log_set_level(LogLevel::Warning), true);

std::string long_text(size_t bytes) {
  std::string text;
  for (int i = 0; text.size() < bytes; ++i)
    text += "The magic number for violet-otter-" + std::to_string(i * 7919) + " is " +
            std::to_string(i * 104729 % 100000) + ". ";
  return text.substr(0, bytes);
}

// Answers one prompt per id under every policy on `ranks` ranks; the audit goes to folder.
void answer(const std::string& model, const std::string& folder, int ranks, double sample,
            const std::vector<uint64_t>& ids) {
  JobOptions options;
  options.deterministic = true;
  options.run.tier1_memory = "1GiB";
  options.tolerance = {true, 0.05};
  test::ThreadHolder store(uint64_t(64) << 20);
  run_thread_ranks(ranks, [&](LocalWorld& world, int rank) {
    const auto group = world.communicator(rank);
    EngineParts parts;
    parts.config = std::make_shared<const ModelConfig>(load_model_config(model));
    parts.weights =
        std::make_shared<const Weights>(load_weights(model, *parts.config, ranks, rank));
    parts.tokenizer = load_tokenizer(model);
    parts.group = group.get();
    parts.store = store.attach(rank);
    parts.audit = AuditSetup{.folder = folder,
                             .sample = sample,
                             .seed = 11,
                             .rank = rank,
                             .world = ranks,
                             .tensor_rank = rank,
                             .tensor = ranks,
                             .model_files = "test"};
    const auto engine = make_engine(options, parts);
    engine->on_completion = [&](Completion&& c) { EXPECT_FALSE(c.failed) << c.error; };
    for (uint64_t id : ids) {
      Request r;
      r.id = id;
      r.prompt = parts.tokenizer->encode(long_text(300 + 50 * id), true);
      r.sampling.max_tokens = 5;
      r.tolerance = options.tolerance;
      r.compare = {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense};
      if (rank == 0) engine->submit(r);
    }
    while (engine->step(false)) {
    }
  });
}

audit::VerifyResult verify(const std::string& folder) {
  audit::VerifyOptions o;
  o.folder = folder;
  o.threads = 2;
  return audit::verify_folder(o);
}

void expect_clean(const audit::VerifyResult& r) {
  EXPECT_EQ(r.violations, 0u);
  for (const audit::Violation& v : r.listed) ADD_FAILURE() << v.rule << ": " << v.where << v.text;
}

TEST(AuditedEngine, AFullAuditOfReaderVerifiesUnderEveryPolicy) {
  const test::TempFolder folder;
  answer(CERTKV_READER_DIR, folder.path().string(), 2, 1.0, {3});
  const audit::VerifyResult r = verify(folder.path().string());
  expect_clean(r);
  EXPECT_EQ(r.files.size(), 2u);
  EXPECT_EQ(r.sequences, 4u);
  std::map<std::string, uint64_t> head_steps;
  for (const auto& [key, t] : r.tightness) head_steps[key.first] += t.head_steps;
  // 5 layers, 8 query heads; 5 tokens, the first of which comes from the prefill.
  for (const char* policy : {"budget", "paper", "naive", "dense"})
    EXPECT_EQ(head_steps[policy], 5u * 8u * 4u) << policy;
  EXPECT_GT(r.tightness.at({"budget", "certified"}).worst, 0);
  EXPECT_EQ(r.tightness.count({"budget", "over"}), 0u);
}

TEST(AuditedEngine, AFullAuditOfTheFragileNeedleVerifiesUnderEveryPolicy) {
  const test::TempFolder folder;
  make_needle_model(needle_preset("fragile"), folder / "model");
  std::filesystem::create_directory(folder / "audit");
  answer(folder / "model", folder / "audit", 2, 1.0, {1});
  const audit::VerifyResult r = verify(folder / "audit");
  expect_clean(r);
  EXPECT_EQ(r.sequences, 4u);
}

using Chosen = std::set<std::tuple<int64_t, std::string, uint32_t, uint32_t, uint64_t>>;
Chosen chosen(const std::string& folder, int ranks) {
  Chosen out;
  for (int rank = 0; rank < ranks; ++rank) {
    const audit::FileIndex f =
        audit::read_index(folder + "/" + audit::file_name(0, rank), [](uint64_t) {});
    EXPECT_EQ(f.broken, "");
    for (const auto& [key, list] : f.record)
      for (const audit::RecordRef& r : list)
        out.insert({f.streams.at(key.stream).request, f.streams.at(key.stream).policy, key.layer,
                    key.kv_head, r.tokens});
  }
  return out;
}

TEST(AuditedEngine, WhatASampleHoldsDependsNeitherOnTheRanksNorOnNeighbours) {
  const test::TempFolder one, two, four, alone;
  const auto run = [](const test::TempFolder& folder, int ranks, std::vector<uint64_t> ids) {
    answer(CERTKV_READER_DIR, folder.path().string(), ranks, 0.2, ids);
    expect_clean(verify(folder.path().string()));
    return chosen(folder.path().string(), ranks);
  };
  const Chosen reference = run(one, 1, {0, 1});
  // 4 policies, 4 steps, 5 layers, 4 KV heads, 2 requests: a fifth of 640 is 128, +- 4 sigma of 10.
  EXPECT_GT(reference.size(), 88u);
  EXPECT_LT(reference.size(), 168u);
  EXPECT_EQ(run(two, 2, {0, 1}), reference);
  EXPECT_EQ(run(four, 4, {0, 1}), reference);
  Chosen second;
  for (const auto& x : reference)
    if (std::get<0>(x) == 1) second.insert(x);
  EXPECT_EQ(run(alone, 1, {1}), second);
}

}  // namespace
}  // namespace certkv
