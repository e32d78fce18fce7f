// A device with too little memory: at load, at admission, for rung 3's staging; and numbers that
// are not finite while others go on. In emulation, where any size of device can be had.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "runtime/device/device_cache.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/engine_run.h"
#include "tests/support/faulty_device.h"
#include "tests/support/random_model.h"
#include "tests/support/thrown_by.h"

namespace certkv {
namespace {

using test::FaultyDevice;
using test::random_request;
using test::run;
using test::RunHooks;
using test::RunResult;

::testing::AssertionResult says(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    if (text.find(part) == std::string::npos)
      return ::testing::AssertionFailure() << "'" << part << "' is not in: " << text;
  return ::testing::AssertionSuccess();
}

// ---- the cache alone ----------------------------------------------------------------------------

constexpr size_t kDim = 64, kKvHeads = 2, kPerGroup = 2;
constexpr int64_t kAnswer = 40;

ModelConfig small_config() {
  ModelConfig c;
  c.layers = 2;
  c.kv_heads = kKvHeads;
  c.heads = kKvHeads * kPerGroup;
  c.head_dim = kDim;
  return c;
}

std::vector<uint16_t> random_rows(size_t tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> rows(kKvHeads * tokens * kDim);
  for (uint16_t& x : rows) x = float_to_16(DType::BF16, normal(random));
  return rows;
}

// A cache on a device of its own.
struct OwnCache {
  explicit OwnCache(uint64_t device_bytes, const char* layout = "compact")
      : device(cuda::make_emulated_device({.total_bytes = device_bytes})),
        ops(cuda::make_emulated_cache_ops(*device)),
        holder(uint64_t(32) << 20),
        store(holder.attach(0)),
        world(LocalWorld::create(1)),
        group(world->communicator(0)) {
    options.cache.layout = layout;
    options.scratch.key_blocks = options.scratch.value_blocks = 16;
    cache.emplace(config, ShardRange{0, int64_t(kKvHeads)}, options, *device, *ops, pool, store,
                  *group);
  }
  int64_t prefill(size_t tokens) {
    const int64_t prompt = cache->create(int64_t(tokens), 1, kAnswer);
    for (int layer = 0; layer < int(config.layers); ++layer) {
      const auto k = random_rows(tokens, uint32_t(layer)), v = random_rows(tokens, 77);
      cache->store_prefill(prompt, layer, tokens, k.data(), v.data(), tokens * kDim, last_q);
    }
    return prompt;
  }
  int64_t fork(int64_t prompt, Policy policy = Policy::Budget) {
    StepRules rules;
    rules.policy = policy;
    rules.tolerance.value = 1e-5;  // nothing but originals will do
    return cache->fork(prompt, kAnswer, rules);
  }
  DeviceCache::Need need(size_t tokens, const std::vector<Policy>& policies) const {
    return DeviceCache::need(config, kKvHeads, options, device->shape(), int64_t(tokens), kAnswer,
                             policies);
  }
  uint64_t taken() const { return device->total_bytes() - device->free_bytes(); }

  ModelConfig config = small_config();
  std::vector<float> last_q;  // of every layer
  CertifiedCacheOptions options;
  std::unique_ptr<cuda::Device> device;
  std::unique_ptr<cuda::CacheOps> ops;
  test::ThreadHolder holder;
  std::shared_ptr<StoreClient> store;
  std::shared_ptr<LocalWorld> world;
  std::unique_ptr<Communicator> group;
  ThreadPool pool{1};
  std::optional<DeviceCache> cache;
};

constexpr uint64_t kRoomy = uint64_t(1) << 30;

TEST(DeviceMemory, OfASequenceIsWhatWasForetold) {
  for (const size_t tokens : {40u, 64u, 700u, 3000u})
    for (const std::vector<Policy>& policies :
         {std::vector{Policy::Budget}, std::vector{Policy::Naive}, std::vector{Policy::Paper},
          std::vector{Policy::Dense, Policy::Budget, Policy::Naive}}) {
      OwnCache c(kRoomy);
      const DeviceCache::Need need = c.need(tokens, policies);
      const int64_t prompt = c.prefill(tokens);
      EXPECT_EQ(c.taken(), need.prompt);
      for (const Policy policy : policies) c.fork(prompt, policy);
      EXPECT_EQ(c.taken(), need.prompt + need.answers + need.scratch + need.staging)
          << tokens << " tokens, " << policies.size() << " policies";
    }
}

// Classes: as foretold where every head has the dearest one, and no more elsewhere.
TEST(DeviceMemory, OfClassesIsNoMoreThanWasForetold) {
  for (const size_t tokens : {40u, 700u, 3000u})
    for (const float sharpness : {0.0f, 4.0f}) {
      OwnCache c(kRoomy, "classes");
      std::mt19937 random(7);
      std::normal_distribution<float> normal;
      for (size_t i = 0; i < kKvHeads * kPerGroup * kDim; ++i)
        c.last_q.push_back(sharpness * normal(random));
      const DeviceCache::Need need = c.need(tokens, {Policy::Budget});
      const int64_t sequence = c.fork(c.prefill(tokens));
      const uint64_t foretold = need.prompt + need.answers + need.scratch + need.staging;
      EXPECT_LE(c.taken(), foretold);
      bool dearest = true;
      for (int layer = 0; layer < 2; ++layer)
        for (int head = 0; head < int(kKvHeads); ++head)
          dearest &= c.cache->kind(sequence, layer, head) == cuda::PageKind::K12V8;
      const uint64_t meanwhile = tokens / 64 * 64 * 4 * kDim;  // originals of one head, to encode
      EXPECT_EQ(dearest && tokens >= 64, c.taken() + meanwhile == foretold && tokens >= 64);
    }
}

constexpr size_t kWidth = (kPerGroup + 2) * kKvHeads * kDim, kOuts = kPerGroup * kKvHeads * kDim;

// Outputs and figures of some steps at rung 3.
struct Steps {
  std::vector<float> outputs;
  std::vector<int> rungs;
  std::vector<Outcome> outcomes;
  uint64_t paged = 0;
};
Steps steps_of(OwnCache* c, int64_t sequence) {
  Steps all;
  const cuda::DeviceArray<float> qkv(*c->device, kWidth, "rows"), out(*c->device, kOuts, "outs");
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (uint64_t step = 1; step <= 3; ++step) {
    c->cache->begin_step(step, {&sequence, 1});
    c->cache->begin_rows({&sequence, 1}, out.data());
    for (int layer = 0; layer < int(c->config.layers); ++layer) {
      std::vector<float> row(kWidth), got(kOuts);
      for (float& x : row) x = normal(random);
      c->device->copy(qkv.data(), row.data(), qkv.bytes());
      c->cache->decode(layer, qkv.data(), {});
      c->device->copy(got.data(), out.data(), out.bytes());
      all.outputs.insert(all.outputs.end(), got.begin(), got.end());
    }
    c->cache->end_step();
    for (const GroupReport& g : c->cache->report(sequence).layers) {
      all.paged += g.paged_bytes;
      for (const HeadReport& h : g.heads) {
        all.rungs.push_back(h.rung);
        all.outcomes.push_back(h.outcome);
      }
    }
  }
  return all;
}

TEST(DeviceMemory, StagingThatDoesNotFitWholeGoesPieceByPieceToTheSameBits) {
  constexpr size_t kTokens = 3000;
  OwnCache roomy(kRoomy);
  const Steps whole = steps_of(&roomy, roomy.fork(roomy.prefill(kTokens)));
  const DeviceCache::Need need = roomy.need(kTokens, {Policy::Budget});
  ASSERT_LT(3 * need.least_staging, need.staging);
  // What a step takes beside the sequence.
  const uint64_t step = roomy.taken() - need.prompt - need.answers - need.scratch - need.staging +
                        (kWidth + kOuts) * sizeof(float);
  for (const uint64_t staging : {need.least_staging, need.staging * 2 / 3}) {
    OwnCache tight(need.prompt + need.answers + need.scratch + staging + step);
    const int64_t prompt = tight.prefill(kTokens);
    // As an engine keeps room for a step, which staging must not take.
    cuda::DeviceArray<std::byte> kept(*tight.device, step, "a step's buffers");
    const int64_t sequence = tight.fork(prompt);
    kept.reset();
    const Steps pieces = steps_of(&tight, sequence);
    EXPECT_LE(tight.taken(), tight.device->total_bytes());
    ASSERT_EQ(pieces.outputs.size(), whole.outputs.size());
    EXPECT_EQ(0, std::memcmp(pieces.outputs.data(), whole.outputs.data(),
                             whole.outputs.size() * sizeof(float)));
    EXPECT_EQ(pieces.rungs, whole.rungs);
    EXPECT_EQ(pieces.outcomes, whole.outcomes);
    EXPECT_EQ(pieces.paged, whole.paged);
  }
  for (size_t i = 0; i < whole.rungs.size(); ++i) {
    EXPECT_EQ(whole.rungs[i], 3);
    EXPECT_EQ(whole.outcomes[i], Outcome::Exact);
  }
}

TEST(DeviceMemory, StagingThatCannotBeHadAtAllIsNamedAndNothingIsLost) {
  constexpr size_t kTokens = 3000;
  const DeviceCache::Need need = OwnCache(kRoomy).need(kTokens, {Policy::Budget});
  OwnCache c(need.prompt + need.answers + need.scratch + need.least_staging - 1);
  const int64_t prompt = c.prefill(kTokens);
  EXPECT_TRUE(says(thrown_by([&] { c.fork(prompt); }),
                   {"OutOfMemory: staging of rung 3", "sampling.max_tokens",
                    "bytes of device memory asked for", "are free"}));
  // A policy that needs none has room; so has a shorter prompt once this one is gone.
  c.cache->drop(c.fork(prompt, Policy::Naive));
  c.cache->drop(prompt);
  const Steps again = steps_of(&c, c.fork(c.prefill(700)));
  EXPECT_EQ(again.outcomes, std::vector<Outcome>(again.outcomes.size(), Outcome::Exact));
}

// ---- the engine ---------------------------------------------------------------------------------

JobOptions emulated_options() {
  JobOptions o = test::deterministic_options();
  o.run.backend = "emulated";
  return o;
}

Request greedy(uint64_t id, size_t prompt, double tolerance = 0.1, int64_t answer = 26) {
  Request r = random_request(id, test::random_model_config().vocab, prompt, answer);
  r.sampling.temperature = 0;
  r.tolerance.value = tolerance;
  return r;
}

TEST(DeviceMemory, WeightsThatDoNotFitAreNamedWithAllThatIsAskedForBeforeAnythingIsUploaded) {
  RunHooks hooks;
  hooks.make_device = [](const std::string&, int) {
    return make_emulated_backend(cuda::make_emulated_device({.total_bytes = 400000}));
  };
  EXPECT_TRUE(says(
      thrown_by([&] { run(emulated_options(), 1, 1, {greedy(0, 64)}, hooks); }),
      {"OutOfMemory: emulated device has too little memory", "for the model's weights",
       "parallel.tensor", "for a step's activations", "run.max_batch", "model.max_len", "390"}));
  // What is there suffices for that, but something is refused all the same.
  for (const auto& [what, key] :
       {std::pair{"o weights", "parallel.tensor"}, std::pair{"the rotary table", "model.max_len"},
        std::pair{"a step's activations", "run.max_batch"},
        std::pair{"a step's logits", "run.max_batch"}}) {
    hooks.make_device = [what = what](const std::string&, int) {
      return make_emulated_backend(std::make_unique<FaultyDevice>(
          [what](uint64_t, const std::string& name) { return name.starts_with(what); }));
    };
    EXPECT_TRUE(says(thrown_by([&] { run(emulated_options(), 1, 1, {greedy(0, 64)}, hooks); }),
                     {std::string("OutOfMemory: ") + what, key}));
  }
}

TEST(DeviceMemory, ARequestWithoutRoomOnTheDeviceFailsByNameAndTheOthersGoOn) {
  const RunResult alone = run(emulated_options(), 1, 1, {greedy(1, 64)});
  for (const auto& [what, key] : {std::pair{"staging of rung 3", "sampling.max_tokens"},
                                  std::pair{"tier 1: a prompt's pages", "parallel.tensor"},
                                  std::pair{"tier 1: an answer's pages", "sampling.max_tokens"},
                                  std::pair{"scratch (", "scratch.key_blocks"}}) {
    RunHooks hooks;
    hooks.make_device = [what = what](const std::string&, int) {
      // No more than the first request takes, which has no pages of its answer.
      auto most = std::make_shared<uint64_t>(0);
      return make_emulated_backend(
          std::make_unique<FaultyDevice>([what, most](uint64_t bytes, const std::string& name) {
            if (!name.starts_with(what)) return false;
            if (*most == 0 && !name.starts_with("tier 1: an answer")) *most = bytes;
            return bytes > *most;
          }));
    };
    const RunResult r = run(emulated_options(), 1, 1, {greedy(1, 64), greedy(2, 300)}, hooks);
    ASSERT_EQ(r.completions.size(), 2u) << what;
    const Completion& kept = r.completions.begin()->second;
    const Completion& refused = r.completions.rbegin()->second;
    EXPECT_FALSE(kept.failed) << what << ": " << kept.error;
    EXPECT_EQ(kept.tokens, alone.completions.begin()->second.tokens) << what;
    EXPECT_TRUE(refused.failed) << what;
    EXPECT_EQ(refused.error_kind, "OutOfMemory") << what;
    EXPECT_TRUE(refused.tokens.empty()) << what;
    EXPECT_TRUE(says(refused.error, {what, key}));
  }
}

// A prompt's activations count: a limit that its decode would keep is too small for its prefill.
TEST(DeviceMemory, AdmissionCountsWhatPrefillTakes) {
  const auto runs_with = [](uint64_t limit, const std::vector<Request>& requests) {
    JobOptions o = emulated_options();
    o.scratch.key_blocks = o.scratch.value_blocks = 4;
    o.run.max_batch = 4;
    o.run.tier1_memory = fmt::format("{}KiB", limit >> 10);
    return run(o, 1, 1, requests);
  };
  EXPECT_TRUE(says(thrown_by([&] { runs_with(uint64_t(2) << 20, {greedy(3, 300)}); }),
                   {"OutOfMemory: a prompt of 300 tokens does not fit the device", "2.00 MiB",
                    "for its prefill", "run.tier1_memory", "sampling.max_tokens",
                    "scratch.key_blocks", "parallel.tensor", "staging"}));
  // Room for one prefill beside what one decode holds on to, or not: then the second request waits.
  const std::vector<Request> two = {greedy(3, 300), greedy(4, 300)};
  const auto most_together = [](const RunResult& r) {
    size_t most = 0;
    for (const StepRecord& s : r.steps) most = std::max(most, s.sequences);
    for (const auto& [key, c] : r.completions) EXPECT_FALSE(c.failed) << c.error;
    EXPECT_EQ(r.completions.size(), 2u);
    return most;
  };
  EXPECT_EQ(most_together(runs_with(uint64_t(16) << 20, two)), 2u);
  EXPECT_EQ(most_together(runs_with(uint64_t(5) << 20, two)), 1u);
}

// ---- numbers that are not finite ----------------------------------------------------------------

TEST(DeviceFaults, ANanWhileDecodingEndsItsRequestByLayerAndPartAndTheOthersGoOn) {
  const std::vector<Request> requests = {greedy(8, 70), greedy(9, 70)};
  for (const char* backend : {"emulated", "cpu"}) {
    JobOptions o = emulated_options();
    o.run.backend = backend;
    const RunResult good = run(o, 1, 1, requests);
    // A token that only the first request meets, and only as an answer: its row of the embedding
    // becomes NaN.
    const std::vector<int32_t>& mine = good.completions.begin()->second.tokens;
    const std::vector<int32_t>& others = good.completions.rbegin()->second.tokens;
    const auto has = [](const std::vector<int32_t>& v, int32_t t) {
      return std::find(v.begin(), v.end(), t) != v.end();
    };
    const auto only = std::find_if(mine.begin(), mine.end(), [&](int32_t t) {
      return !has(others, t) && !has(requests[0].prompt, t) && !has(requests[1].prompt, t);
    });
    ASSERT_LT(only, mine.end() - 1) << "choose other seeds";
    RunHooks hooks;
    hooks.change = [&](Weights& w) {
      reinterpret_cast<float*>(w.embed.values.get())[*only * w.embed.cols + 3] = NAN;
    };
    const RunResult bad = run(o, 1, 1, requests, hooks);
    ASSERT_EQ(bad.completions.size(), 2u);
    const Completion& failed = bad.completions.begin()->second;
    EXPECT_TRUE(failed.failed);
    EXPECT_EQ(failed.error_kind, "NonFinite");
    const int64_t position = 70 + (only - mine.begin());
    EXPECT_EQ(failed.error,
              fmt::format("layer 0: a key or value of token {} is not finite", position))
        << backend;
    EXPECT_EQ(failed.tokens, std::vector<int32_t>(mine.begin(), only + 1)) << backend;
    EXPECT_FALSE(bad.completions.rbegin()->second.failed);
    EXPECT_EQ(bad.completions.rbegin()->second.tokens, others) << backend;
  }
}

TEST(DeviceFaults, ANanFromAProductEndsThePromptByLayerAndPart) {
  struct Poison {
    const char* says;
    std::function<void(Weights&)> change;
  };
  const Poison poisons[] = {
      {"layer 1: a key or value of token 0 ",
       [](Weights& w) { w.layers[1].groups[2].qkv.values[size_t(2 * 64 + 3) * 72] = NAN; }},
      {"layer 0: the attention output of token 0 ",
       [](Weights& w) { w.layers[0].groups[1].o.values[5] = NAN; }},
      {"layer 0: the MLP output of token 0 ",
       [](Weights& w) { w.layers[0].groups[3].down.values[7] = NAN; }},
      {"the logits ", [](Weights& w) { w.lm_head[1].values[9] = NAN; }}};
  for (const Poison& poison : poisons) {
    RunHooks hooks;
    hooks.change = poison.change;
    const RunResult r = run(emulated_options(), 1, 1, {greedy(10, 70)}, hooks);
    const Completion& c = r.completions.begin()->second;
    EXPECT_TRUE(c.failed);
    EXPECT_EQ(c.error_kind, "NonFinite");
    EXPECT_TRUE(c.tokens.empty());
    EXPECT_TRUE(c.error.starts_with(poison.says)) << c.error;
  }
}

}  // namespace
}  // namespace certkv
