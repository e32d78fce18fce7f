#include "tests/support/engine_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"

namespace certkv::test {
namespace {

constexpr uint64_t kArena = uint64_t(64) << 20;

// Byte-level tokenizer without merges: id = byte.
std::shared_ptr<const Tokenizer> byte_tokenizer() {
  return load_tokenizer(CERTKV_READER_DIR);
}

}  // namespace

Request random_request(uint64_t id, int64_t vocab, size_t prompt, int64_t max_tokens) {
  std::mt19937 random(uint32_t(id + 1));
  Request r;
  r.id = id;
  for (size_t i = 0; i < prompt; ++i) r.prompt.push_back(int32_t(random() % uint64_t(vocab)));
  r.sampling.max_tokens = max_tokens;
  r.sampling.temperature = 1.0;  // random weights have near ties: draws exercise the stream too
  r.sampling.seed = 7;
  return r;
}

RunResult run(const JobOptions& options, int ranks, int threads,
              const std::vector<Request>& requests, const RunHooks& hooks) {
  std::optional<ThreadHolder> own;
  if (hooks.store == nullptr) own.emplace(kArena);
  ThreadHolder& store = hooks.store == nullptr ? *own : *hooks.store;
  RunResult result;
  run_thread_ranks(ranks, [&](LocalWorld& world, int rank) {
    const auto group = world.communicator(rank);
    EngineParts parts;
    parts.config = std::make_shared<const ModelConfig>(random_model_config());
    Weights weights = random_weights(*parts.config, ranks, rank, 11);
    if (hooks.change) hooks.change(weights);
    parts.weights = std::make_shared<const Weights>(std::move(weights));
    parts.make_device = hooks.make_device;
    parts.tokenizer = byte_tokenizer();
    parts.group = group.get();
    parts.store = store.attach(rank);
    parts.threads = threads;
    parts.scope = hooks.scope;
    if (hooks.before) hooks.before(*parts.store, rank);
    const auto engine = make_engine(options, parts);
    engine->on_completion = [&](Completion&& c) {
      const auto key = std::pair{c.id, c.policy};
      result.completions.emplace(key, std::move(c));
    };
    engine->on_step = [&](const StepRecord& s) {
      result.steps.push_back(s);
      result.tier1_peak = std::max(result.tier1_peak, engine->load().tier1_bytes);
      if (result.steps.size() == 1 && hooks.after_prefill) hooks.after_prefill(*parts.store);
    };
    engine->on_progress = [&](const AnswerProgress& p) { result.progress.push_back(p); };
    engine->on_prefill = [&](const PrefillRecord& p) { result.prefills.push_back(p); };
    engine->on_prefill_progress = [&](double share) { result.prefilled.push_back(share); };
    if (rank == 0)
      for (const Request& r : requests) engine->submit(r);
    uint64_t steps = 0;
    while (engine->step(hooks.kill_after != 0 && steps == hooks.kill_after)) ++steps;
    // What has a name stays in the store, as after a death; nothing is given back.
    if (hooks.kill_after != 0) parts.store->detach();
  });
  return result;
}

JobOptions deterministic_options() {
  JobOptions o;
  o.deterministic = true;
  o.run.tier1_memory = "1GiB";
  o.scratch.key_blocks = o.scratch.value_blocks = 64;
  return o;
}

void expect_same(const RunResult& a, const RunResult& b, const std::string& what) {
  ASSERT_EQ(a.completions.size(), b.completions.size()) << what;
  for (const auto& [key, x] : a.completions) {
    const Completion& y = b.completions.at(key);
    EXPECT_FALSE(x.failed) << x.error;
    EXPECT_EQ(x.tokens, y.tokens) << what;
    EXPECT_EQ(x.outcome, y.outcome) << what;
    EXPECT_EQ(x.bound_max, y.bound_max) << what;
    EXPECT_EQ(x.relative_max, y.relative_max) << what;
    EXPECT_EQ(x.counts.rungs, y.counts.rungs) << what;
    EXPECT_EQ(x.counts.certified, y.counts.certified) << what;
    EXPECT_EQ(x.counts.promoted_keys, y.counts.promoted_keys) << what;
    EXPECT_EQ(x.counts.promoted_values, y.counts.promoted_values) << what;
    EXPECT_EQ(x.returned.bound.bins, y.returned.bound.bins) << what;
  }
}

}  // namespace certkv::test
