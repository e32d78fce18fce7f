// The engine's audit on a device, checked by the verifier, which knows nothing of the device's
// code: in emulation, or, as a program of tests/gpu, on a GPU (CERTKV_TEST_ON_GPU).
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>

#include "kernels/base/log.h"
#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/audit/reader.h"
#include "runtime/audit/verify.h"
#include "runtime/certified_engine.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"
#include "tests/kvstore/store_support.h"
#include "tests/runtime/device_scrub_rank.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_ranks.h"
#ifdef CERTKV_TEST_ON_GPU
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {
namespace {

const bool kQuiet = (log_set_level(LogLevel::Error), true);

// A prompt with needles, some tokens short of a page's end, so that the answer seals one.
std::vector<int32_t> prompt_of(const Tokenizer& tokenizer, size_t tokens) {
  std::string text;
  for (int i = 0; text.size() < 8 * tokens; ++i)
    text += "The magic number for violet-otter-" + std::to_string(i * 7919) + " is " +
            std::to_string(i * 104729 % 100000) + ". ";
  std::vector<int32_t> ids = tokenizer.encode(text, true);
  ids.resize(tokens);
  return ids;
}

class DeviceAuditTest : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef CERTKV_TEST_ON_GPU
    if (cuda::cuda_device_count() == 0) GTEST_SKIP() << "no device answers";
#endif
  }

  // The reader's answers to one prompt under the policies; the audit goes to folder, if any.
  // make_device: of a rank; nullptr: as the options say.
  static std::vector<Completion> answer(
      const std::string& folder, double tolerance, double sample,
      const std::vector<Policy>& policies, int ranks = 1,
      const std::function<DeviceBackend(int rank)>& make_device = nullptr) {
    std::vector<Completion> answers;
    JobOptions options;
    options.deterministic = true;
    options.run.tier1_memory = "1GiB";
#ifdef CERTKV_TEST_ON_GPU
    options.run.backend = "cuda";
#else
    options.run.backend = "emulated";
#endif
    options.tolerance = {true, tolerance};
    test::ThreadHolder store(uint64_t(64) << 20);
    run_thread_ranks(ranks, [&](LocalWorld& world, int rank) {
      const auto group = world.communicator(rank);
      EngineParts parts;
      parts.config = std::make_shared<const ModelConfig>(load_model_config(CERTKV_READER_DIR));
      parts.weights = std::make_shared<const Weights>(
          load_weights(CERTKV_READER_DIR, *parts.config, ranks, rank));
      if (make_device)
        parts.make_device = [&, rank](const std::string&, int) { return make_device(rank); };
      parts.tokenizer = load_tokenizer(CERTKV_READER_DIR);
      parts.group = group.get();
      parts.store = store.attach(rank);
      if (!folder.empty())
        parts.audit = AuditSetup{.folder = folder,
                                 .sample = sample,
                                 .seed = 11,
                                 .rank = rank,
                                 .world = ranks,
                                 .tensor_rank = rank,
                                 .tensor = ranks,
                                 .model_files = "test"};
      const auto engine = make_engine(options, parts);
      engine->on_completion = [&](Completion&& c) {
        EXPECT_FALSE(c.failed) << c.error;
        answers.push_back(std::move(c));
      };
      Request r;
      r.id = 1;
      r.prompt = prompt_of(*parts.tokenizer, 5 * 64 - 3);
      r.sampling.max_tokens = 7;
      r.tolerance = options.tolerance;
      r.compare = policies;
      if (rank == 0) engine->submit(r);
      while (engine->step(false)) {
      }
    });
    return answers;
  }

  static audit::VerifyResult verified(const std::string& folder) {
    audit::VerifyOptions o;
    o.folder = folder;
    o.threads = 2;
    const audit::VerifyResult r = audit::verify_folder(o);
    EXPECT_EQ(r.violations, 0u);
    for (const audit::Violation& v : r.listed) ADD_FAILURE() << v.rule << ": " << v.where << v.text;
    for (const auto& [key, t] : r.tightness)
      fmt::print("{} {}: {} head-steps, true error / bound at most {:.3g}\n", key.first, key.second,
                 t.head_steps, t.worst);
    return r;
  }
};

// An audited step is done piece by piece, others are captured, with work beside other work, and
// launched again: they are the same steps. Tolerances that rungs 1 to 3 are needed for.
TEST_F(DeviceAuditTest, ChangesNothingOfWhatItLooksAt) {
  const test::TempFolder folder;
  for (double tolerance : {0.03, 0.004}) {
    const auto sub = folder.path() / std::to_string(tolerance);
    std::filesystem::create_directory(sub);
    const auto watched = answer(sub.string(), tolerance, 1, {Policy::Budget});
    const auto alone = answer("", tolerance, 0, {Policy::Budget});
    ASSERT_EQ(watched.size(), 1u);
    ASSERT_EQ(alone.size(), 1u);
    const Completion &a = watched[0], &b = alone[0];
    EXPECT_EQ(a.tokens, b.tokens);
    EXPECT_EQ(a.relative_max, b.relative_max);
    EXPECT_EQ(a.bound_max, b.bound_max);
    EXPECT_EQ(a.counts.rungs, b.counts.rungs);
    EXPECT_GT(a.counts.rungs[1] + a.counts.rungs[2] + a.counts.rungs[3], 0u) << tolerance;
  }
}

TEST_F(DeviceAuditTest, EveryHeadStepVerifiesUnderEveryPolicyItKnows) {
  const test::TempFolder folder;
  answer(folder.path().string(), 0.05, 1,
         {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense});
  const audit::VerifyResult r = verified(folder.path().string());
  EXPECT_EQ(r.sequences, 4u);
  std::map<std::string, uint64_t> head_steps;
  for (const auto& [key, t] : r.tightness) head_steps[key.first] += t.head_steps;
  // 5 layers, 8 query heads; 7 tokens, the first of which comes from the prefill.
  for (const char* policy : {"budget", "paper", "naive", "dense"})
    EXPECT_EQ(head_steps[policy], 5u * 8u * 6u) << policy;
  EXPECT_EQ(r.tightness.count({"budget", "over"}), 0u);
  EXPECT_GT(r.tightness.at({"budget", "certified"}).worst, 0);
}

// What was tried: heads that no rung helps, beside heads that rungs 1 and 2 do.
TEST_F(DeviceAuditTest, EveryRungVerifies) {
  std::map<std::string, uint64_t> rungs;
  for (const double tolerance : {0.002, 0.01, 0.02}) {
    const test::TempFolder folder;
    answer(folder.path().string(), tolerance, 1, {Policy::Budget});
    verified(folder.path().string());
    const audit::FileIndex f =
        audit::read_index(folder.path().string() + "/" + audit::file_name(0, 0), [](uint64_t) {});
    for (const auto& [id, stream] : f.streams)
      for (const auto& [rung, count] : stream.rungs) rungs[rung] += count;
  }
  fmt::print("rungs {} {} {} {}\n", rungs["0"], rungs["1"], rungs["2"], rungs["3"]);
  EXPECT_GT(rungs["0"], 20u);
  EXPECT_GT(rungs["1"] + rungs["2"], 20u);
  EXPECT_GT(rungs["3"], 20u);
}

#ifndef CERTKV_TEST_ON_GPU
// A canary that breaks whenever something is paged in.
class BrokenCanary final : public scrub_test::CountingOps {
 public:
  explicit BrokenCanary(std::unique_ptr<cuda::CacheOps> of)
      : CountingOps(*of), of_(std::move(of)) {}
  void page_in(const cuda::LadderArgs& a) override {
    CountingOps::page_in(a);
    for (int i = 0; i < a.count && !a.halt.passed(); ++i) {
      if (a.listed[i] == 0) continue;
      a.items[i].counts->canary = 1;
      a.items[i].counts->canary_last = cuda::kCanaryNorm;
      *a.passes[i].any_failing = 1;
    }
  }

 private:
  std::unique_ptr<cuda::CacheOps> of_;
};

// Over two ranks a layer that falls back is audited as it was repeated, and the layers behind it as
// they were done once.
TEST_F(DeviceAuditTest, Rung4OverRanksVerifies) {
  const test::TempFolder folder;
  const auto answers = answer(folder.path().string(), 0.01, 1, {Policy::Budget}, 2, [](int rank) {
    DeviceBackend b = make_device_backend("emulated", 0);
    if (rank == 1) b.cache = std::make_unique<BrokenCanary>(std::move(b.cache));
    return b;
  });
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_GT(answers[0].counts.canary, 0u);
  EXPECT_EQ(answers[0].counts.rungs[4] % 8, 0u) << "all heads of a layer";
  EXPECT_GT(answers[0].counts.rungs[4], 0u);
  verified(folder.path().string());
  for (const int rank : {0, 1}) {
    const audit::FileIndex f = audit::read_index(
        folder.path().string() + "/" + audit::file_name(0, rank), [](uint64_t) {});
    uint64_t fell = 0, all = 0;
    for (const auto& [id, stream] : f.streams)
      for (const auto& [rung, count] : stream.rungs) {
        all += count;
        if (rung == "4") fell += count;
      }
    EXPECT_EQ(fell, answers[0].counts.rungs[4] / 2);
    EXPECT_EQ(all, 5u * 4u * 6u);
  }
}
#endif

}  // namespace
}  // namespace certkv
