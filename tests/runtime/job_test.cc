#include "runtime/job.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>
#include <atomic>

#include <atomic>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "parallel/local_world.h"
#include "runtime/json_file.h"
#include "runtime/summary.h"
#include "tests/support/fake_engine.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using nlohmann::json;
using test::FakeEngine;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::vector<int32_t> bytes_of(const BatchLine& line) {
  CERTKV_EXPECT(line.prompt != "no tokens", InvalidArgument, "the prompt cannot be encoded");
  std::vector<int32_t> ids;
  for (unsigned char c : line.prompt) ids.push_back(c);
  return ids;
}

std::vector<json> read_lines(const std::string& path) {
  std::vector<json> lines;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) lines.push_back(json::parse(line));
  return lines;
}

class JobTest : public ::testing::Test {
 protected:
  JobTest() {
    options_.run.output = (folder_ / "out").string();
    options_.run.input = (folder_ / "in.jsonl").string();
    options_.run.max_batch = 2;
    options_.sampling.max_tokens = 6;
  }

  void write_input(int lines) {
    std::string text;
    for (int i = 0; i < lines; ++i) text += json{{"prompt", prompt(i)}}.dump() + "\n";
    std::ofstream(options_.run.input) << text;
  }
  static std::string prompt(int i) { return "prompt number " + std::to_string(i); }
  static std::string expected(int i) {
    const std::string p = prompt(i);
    return FakeEngine::answer({p.begin(), p.end()}, 6);
  }

  BatchDefaults defaults() const {
    return {options_.sampling, options_.policy, options_.tolerance, !options_.compare.empty()};
  }

  std::unique_ptr<JobOutput> open_output(BatchReader& reader, int replicas = 1) {
    const BatchSurvey survey = reader.survey();
    JobOutputOptions o;
    o.folder = options_.run.output;
    o.resume = options_.run.resume;
    o.policies = options_.compare.empty() ? std::vector<Policy>{options_.policy} : options_.compare;
    o.compare = !options_.compare.empty();
    o.tolerance = options_.tolerance;
    o.replicas = replicas;
    o.session.name = "session-" + std::to_string(++sessions_);
    o.progress_seconds = 0;
    o.results_seconds = 0;
    o.monitor = monitor_;
    return std::make_unique<JobOutput>(std::move(o), identify_job(options_, survey, "model"),
                                       survey);
  }

  int run() { return run(engine_); }
  int run(FakeEngine& engine) {
    BatchReader reader(options_.run.input, defaults());
    const auto output = open_output(reader);
    return run_job(
        {.engine = engine, .max_batch = options_.run.max_batch, .stop = [this] { return stop_; }},
        {reader, bytes_of, options_.compare}, *output);
  }

  std::string out(const std::string& name) const { return options_.run.output + "/" + name; }
  json summary() const { return load_json_file(out("summary.json")); }
  void expect_all_answers(int lines, const std::string& file = "results.jsonl") {
    const auto results = read_lines(out(file));
    ASSERT_EQ(int(results.size()), lines);
    for (int i = 0; i < lines; ++i) {
      EXPECT_EQ(results[size_t(i)]["custom_id"], std::to_string(i + 1));
      EXPECT_EQ(results[size_t(i)]["response"]["body"]["choices"][0]["text"], expected(i));
    }
  }

  test::TempFolder folder_;
  JobOptions options_;
  FakeEngine engine_;
  bool stop_ = false;
  int sessions_ = 0;
  std::shared_ptr<JobMonitor> monitor_;
};

TEST_F(JobTest, EveryLineIsAnsweredInInputOrderAndTheSummaryAddsUp) {
  write_input(9);
  EXPECT_EQ(run(), kJobSucceeded);
  expect_all_answers(9);
  const json s = summary();
  EXPECT_EQ(s["requests"], 9);
  EXPECT_EQ(s["complete"], true);
  EXPECT_EQ(s["exit_code"], 0);
  // Six tokens, the first of them from the prefill: five decode steps and one that finds the end.
  EXPECT_EQ(s["tokens"], 9 * 6);
  EXPECT_EQ(s["head_steps"], 9 * 6 * FakeEngine::kHeads);
  EXPECT_EQ(s["certified"], s["head_steps"]);
  EXPECT_EQ(s["rungs"]["0"], s["head_steps"]);
  EXPECT_EQ(s["returned"]["relative_max"], 0.025);
  EXPECT_EQ(read_lines(out("steps.jsonl")).size(), size_t(9 * 6));
  const json manifest = load_json_file(out("manifest.json"));
  EXPECT_EQ(manifest["input"]["lines"], 9);
  EXPECT_EQ(manifest["sessions"].size(), 1u);
  EXPECT_TRUE(fs::exists(out("summary.csv")));
}

TEST_F(JobTest, TheMonitorShowsTheFiguresOfTheJobToWhoeverAsksMeanwhile) {
  write_input(9);
  monitor_ = std::make_shared<JobMonitor>("rank 0 of 1", "1.0", options_.tolerance);
  EXPECT_FALSE(monitor_->report().ready);
  std::atomic<bool> over{false};
  uint64_t asked = 0, partial = 0;
  std::thread reader([&] {
    for (uint64_t last = 0; !over; ++asked) {
      const StatusReport r = monitor_->report();
      EXPECT_GE(r.job->finished, last) << "it went back";
      partial += r.job->finished > 0 && r.job->finished < 9;
      last = r.job->finished;
    }
  });
  engine_.before_step = [](uint64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(2)); };
  monitor_->set_ready();
  EXPECT_EQ(run(), kJobSucceeded);
  over = true;
  reader.join();
  EXPECT_GT(partial, 0u) << "of " << asked << " answers none showed the job under way";
  const StatusReport r = monitor_->report();
  const json s = summary();
  EXPECT_TRUE(r.ready);
  EXPECT_EQ(r.job->lines, 9u);
  EXPECT_EQ(r.job->finished, 9u);
  EXPECT_EQ(r.job->failed, 0u);
  EXPECT_EQ(r.job->prompt_tokens, s["prompt_tokens"]);
  EXPECT_EQ(r.job->steps, read_lines(out("steps.jsonl")).size());
  EXPECT_EQ(r.job->certified, s["certified"]);
  EXPECT_EQ(r.job->rungs[0], s["rungs"]["0"]);
  EXPECT_EQ(r.job->worst_relative, s["returned"]["relative_max"]);
}

TEST_F(JobTest, ABadLineFailsAloneByName) {
  std::ofstream(options_.run.input) << R"({"prompt": "one"})"
                                    << "\n"
                                    << R"({"prompt": "two", "n": 3})"
                                    << "\n"
                                    << "{"
                                    << "\n"
                                    << R"({"prompt": "no tokens"})"
                                    << "\n"
                                    << json{{"prompt", std::string(2000, 'x')}}.dump() << "\n"
                                    << R"({"prompt": "six"})"
                                    << "\n";
  EXPECT_EQ(run(), kJobHasFailedLines);
  const auto results = read_lines(out("results.jsonl"));
  ASSERT_EQ(results.size(), 6u);
  for (size_t good : {0u, 5u}) EXPECT_TRUE(results[good]["error"].is_null());
  EXPECT_THAT(results[1]["error"]["message"].get<std::string>(), HasSubstr("n is 3"));
  EXPECT_THAT(results[2]["error"]["message"].get<std::string>(), HasSubstr("not valid JSON"));
  EXPECT_THAT(results[3]["error"]["message"].get<std::string>(), HasSubstr("line 4: the prompt"));
  EXPECT_THAT(results[4]["error"]["message"].get<std::string>(),
              HasSubstr("longer than the limit"));
  EXPECT_EQ(summary()["requests_failed"], 4);
  EXPECT_EQ(summary()["requests"], 6);
}

TEST_F(JobTest, ARequestThatFailsInTheMiddleLosesNothingElse) {
  write_input(5);
  engine_.fail_request = 2;
  EXPECT_EQ(run(), kJobHasFailedLines);
  const auto results = read_lines(out("results.jsonl"));
  ASSERT_EQ(results.size(), 5u);
  EXPECT_TRUE(results[2]["response"].is_null());
  EXPECT_EQ(results[2]["error"]["code"], "OriginalsLost");
  EXPECT_EQ(results[2]["error"]["certkv"]["failed"], FakeEngine::kHeads);
  EXPECT_EQ(results[4]["response"]["body"]["choices"][0]["text"], expected(4));
  EXPECT_EQ(summary()["failed"], FakeEngine::kHeads);
}

TEST_F(JobTest, StoppedAtAnyStepItResumesToTheSameResults) {
  write_input(6);
  ASSERT_EQ(run(), kJobSucceeded);
  const auto whole = read_lines(out("results.jsonl"));
  const uint64_t steps = read_lines(out("steps.jsonl")).size() + 6;
  for (uint64_t at = 1; at < steps; at += 5) {
    fs::remove_all(options_.run.output);
    options_.run.resume = false;
    FakeEngine first;
    stop_ = false;
    first.before_step = [&](uint64_t step) { stop_ = step >= at; };
    EXPECT_EQ(run(first), kJobStopped);
    EXPECT_EQ(summary()["complete"], false);
    const size_t kept = read_lines(out("results.jsonl")).size();
    stop_ = false;
    options_.run.resume = true;
    FakeEngine second;
    EXPECT_EQ(run(second), kJobSucceeded);
    EXPECT_LE(second.submitted, 6 - kept);
    expect_all_answers(6);
    const json s = summary();
    EXPECT_EQ(s["head_steps"],
              6 * 6 * FakeEngine::kHeads);  // what was dropped is not counted twice
    EXPECT_EQ(s["requests"], 6);
    EXPECT_EQ(load_json_file(out("manifest.json"))["sessions"].size(), 2u);
  }
}

TEST_F(JobTest, KilledAtAnyMomentItResumesAndAnswersEveryLineOnce) {
  write_input(8);
  for (int round = 0; round < 8; ++round) {
    fs::remove_all(options_.run.output);
    options_.run.resume = false;
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      FakeEngine engine;
      engine.before_step = [&](uint64_t step) {
        if (step == uint64_t(3 + 7 * round)) ::kill(::getpid(), SIGKILL);
      };
      run(engine);
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "round " << round;
    options_.run.resume = true;
    FakeEngine engine;
    EXPECT_EQ(run(engine), kJobSucceeded);
    expect_all_answers(8);
    EXPECT_EQ(summary()["requests"], 8);
    EXPECT_EQ(summary()["head_steps"], 8 * 6 * FakeEngine::kHeads);
  }
}

TEST_F(JobTest, ResumingACompleteJobDoesNothingAndSaysTheSame) {
  write_input(3);
  ASSERT_EQ(run(), kJobSucceeded);
  options_.run.resume = true;
  FakeEngine idle;
  EXPECT_EQ(run(idle), kJobSucceeded);
  EXPECT_EQ(idle.submitted, 0u);
  expect_all_answers(3);
}

TEST_F(JobTest, ResumingWhereTheStatusIsServedElsewhereIsTheSameJob) {
  write_input(3);
  options_.http.listen = "127.0.0.1:8080";
  ASSERT_EQ(run(), kJobSucceeded);
  options_.run.resume = true;
  options_.http.listen = "127.0.0.1:8081";
  FakeEngine idle;
  EXPECT_EQ(run(idle), kJobSucceeded);
  EXPECT_EQ(idle.submitted, 0u);
}

TEST_F(JobTest, ResumingWithAnotherInputOrOptionIsRefusedNamingWhatDiffers) {
  write_input(3);
  stop_ = true;
  ASSERT_EQ(run(), kJobStopped);
  stop_ = false;
  options_.run.resume = true;
  const auto refused = [&] {
    try {
      FakeEngine engine;
      run(engine);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
      return std::string(e.what());
    }
    return std::string("not refused");
  };
  options_.tolerance.value = 0.01;
  options_.cache.layout = "balanced";
  const std::string message = refused();
  EXPECT_THAT(message, HasSubstr("cache.layout was compact and is now balanced"));
  EXPECT_THAT(message, HasSubstr("tolerance was relative 0.05 and is now relative 0.01"));
  EXPECT_THAT(message, ::testing::Not(HasSubstr("sampling")));
  options_.tolerance.value = 0.05;
  options_.cache.layout = "compact";
  write_input(4);
  EXPECT_THAT(refused(), HasSubstr("input was 3 lines"));
  write_input(3);
  options_.run.max_batch = 5;  // changes speed only
  options_.scratch.key_blocks = 7;
  EXPECT_EQ(run(), kJobSucceeded);
}

TEST_F(JobTest, AnUnfinishedJobIsNotOverwrittenAndACompleteOneIsMovedAside) {
  write_input(4);
  FakeEngine first;
  first.before_step = [&](uint64_t step) { stop_ = step >= 15; };
  ASSERT_EQ(run(first), kJobStopped);
  stop_ = false;
  try {
    run();
    FAIL();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("--resume"));
  }
  options_.run.resume = true;
  ASSERT_EQ(run(), kJobSucceeded);
  options_.run.resume = false;
  FakeEngine again;
  EXPECT_EQ(run(again), kJobSucceeded);
  EXPECT_EQ(again.submitted, 4u);
  EXPECT_TRUE(fs::exists(options_.run.output + ".1/results.jsonl"));
}

TEST_F(JobTest, AJobThatFinishedNothingIsNotInTheWayOfTheNext) {
  write_input(2);
  stop_ = true;
  ASSERT_EQ(run(), kJobStopped);
  stop_ = false;
  ASSERT_EQ(run(), kJobSucceeded);
  expect_all_answers(2);
  EXPECT_TRUE(fs::exists(options_.run.output + ".1/manifest.json"));
}

TEST_F(JobTest, ComparedPoliciesHaveAResultFileEachAndNaiveAskedForByNameIsNoFailure) {
  write_input(4);
  options_.compare = {Policy::Budget, Policy::Dense, Policy::Naive};
  EXPECT_EQ(run(), kJobSucceeded);
  for (const char* policy : {"budget", "dense", "naive"}) {
    expect_all_answers(4, std::string("results-") + policy + ".jsonl");
    EXPECT_EQ(read_lines(out(std::string("results-") + policy +
                             ".jsonl"))[0]["response"]["body"]["certkv"]["policy"],
              policy);
  }
  const json s = summary();
  EXPECT_EQ(s["policy"], "budget");
  EXPECT_EQ(s["over"], 0);
  EXPECT_EQ(s["policies"]["dense"]["exact"], s["policies"]["dense"]["head_steps"]);
  EXPECT_EQ(s["policies"]["dense"]["rungs"]["3"], s["policies"]["dense"]["head_steps"]);
  EXPECT_EQ(s["policies"]["naive"]["over"], 4 * 6);
  EXPECT_EQ(s["policies"]["naive"]["returned"]["relative_max"], FakeEngine::kNaiveRelative);
}

TEST_F(JobTest, AResumedComparisonDecodesOnlyThePoliciesThatAreMissing) {
  write_input(1);
  options_.compare = {Policy::Budget, Policy::Naive};
  engine_.max_running = 1;
  // The first policy ends one step before the second.
  engine_.before_step = [&](uint64_t step) { stop_ = step >= 12; };
  ASSERT_EQ(run(), kJobStopped);
  EXPECT_EQ(read_lines(out("results-budget.jsonl")).size(), 1u);
  EXPECT_EQ(read_lines(out("results-naive.jsonl")).size(), 0u);
  stop_ = false;
  options_.run.resume = true;
  FakeEngine second;
  uint64_t steps = 0;
  second.before_step = [&](uint64_t) { ++steps; };
  EXPECT_EQ(run(second), kJobSucceeded);
  EXPECT_EQ(steps, 1u + 6u);  // one prefill, and the steps of one policy
  expect_all_answers(1, "results-naive.jsonl");
}

TEST_F(JobTest, ALinesOwnNaivePolicyThatEndsOverIsAFailureOfTheJob) {
  std::ofstream(options_.run.input) << R"({"prompt": "a prompt", "certkv": {"policy": "naive"}})"
                                    << "\n"
                                    << R"({"prompt": "a prompt"})"
                                    << "\n";
  EXPECT_EQ(run(), kJobHasFailedLines);
  EXPECT_EQ(summary()["requests_over_unasked"], 1);
  fs::remove_all(options_.run.output);
  write_input(2);
  options_.policy = Policy::Naive;
  FakeEngine engine;
  EXPECT_EQ(run(engine), kJobSucceeded);
}

class LyingEngine : public FakeEngine {
 public:
  bool step(bool stop) override {
    if (!wrapped_) {
      wrapped_ = true;
      auto honest = on_completion;
      on_completion = [honest](Completion&& c) {
        if (c.id == 1) ++c.counts.certified;
        if (c.id == 2) c.relative_max = 0.06;
        if (c.id == 3) {
          c.failed = true;
          c.error_kind = "NonFinite";
          c.error = "a NaN";
          ++c.counts.rungs[2];
        }
        honest(std::move(c));
      };
    }
    return FakeEngine::step(stop);
  }

 private:
  bool wrapped_ = false;
};

TEST_F(JobTest, AnAnswerWhoseAccountsDoNotAddUpIsNotReturned) {
  write_input(5);
  LyingEngine engine;
  EXPECT_EQ(run(engine), kJobHasFailedLines);
  const auto results = read_lines(out("results.jsonl"));
  EXPECT_TRUE(results[0]["error"].is_null());
  EXPECT_THAT(results[1]["error"]["message"].get<std::string>(), HasSubstr("do not add up"));
  EXPECT_THAT(results[2]["error"]["message"].get<std::string>(), HasSubstr("certified at a bound"));
  EXPECT_EQ(results[3]["error"]["code"], "NonFinite");
  EXPECT_THAT(results[3]["error"]["message"].get<std::string>(), HasSubstr("a NaN; besides"));
  EXPECT_TRUE(results[4]["error"].is_null());
}

TEST_F(JobTest, AnAnswerOfOneTokenHasNoHeadStep) {
  write_input(1);
  options_.sampling.max_tokens = 1;
  engine_.ends_without_steps = true;
  EXPECT_EQ(run(), kJobSucceeded);
  EXPECT_EQ(summary()["head_steps"], 0);
  EXPECT_EQ(summary()["tokens"], 1);
}

TEST_F(JobTest, AStoreThatIsLostEndsTheJobAndNothingFinishedIsLost) {
  write_input(6);
  engine_.before_step = [](uint64_t step) {
    CERTKV_EXPECT(step < 20, StoreLost, "the store is gone");
  };
  EXPECT_THROW(run(), Error);
  const size_t kept = read_lines(out("results.jsonl")).size();
  EXPECT_GE(kept, 1u);
  EXPECT_EQ(summary()["complete"], false);
  options_.run.resume = true;
  FakeEngine engine;
  EXPECT_EQ(run(engine), kJobSucceeded);
  expect_all_answers(6);
}

TEST_F(JobTest, AFullDiskEndsTheJobByNameAndItResumesWhenThereIsRoom) {
  fs::create_directories(options_.run.output);
  if (::mount("certkv-test", options_.run.output.c_str(), "tmpfs", 0, "size=262144") != 0) {
    GTEST_SKIP() << "a small file system needs the right to mount";
  }
  const struct Unmount {
    std::string path;
    ~Unmount() { ::umount2(path.c_str(), MNT_DETACH); }
  } unmount{options_.run.output};
  write_input(400);
  std::string message;
  ErrorKind kind = ErrorKind::Stopped;
  try {
    FakeEngine engine;
    run(engine);
  } catch (const Error& e) {
    kind = e.kind();
    message = e.what();
  }
  EXPECT_EQ(kind, ErrorKind::IoError);
  EXPECT_THAT(message, HasSubstr("No space left"));
  EXPECT_THAT(message, HasSubstr("--resume"));
  ASSERT_EQ(
      ::mount("certkv-test", options_.run.output.c_str(), "tmpfs", MS_REMOUNT, "size=67108864"), 0);
  options_.run.resume = true;
  FakeEngine engine;
  EXPECT_EQ(run(engine), kJobSucceeded);
  EXPECT_LT(engine.submitted, 400u);
  expect_all_answers(400);
}

TEST_F(JobTest, ReplicasShareTheWorkAndOneThatIsSlowDoesNotHoldUpTheOthers) {
  write_input(24);
  constexpr int kReplicas = 3;
  const auto world = LocalWorld::create(kReplicas);
  std::vector<FakeEngine> engines(kReplicas);
  engines[2].before_step = [](uint64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  std::vector<std::thread> threads;
  for (int r = 1; r < kReplicas; ++r) {
    threads.emplace_back([&, r] {
      const auto channel = world->channel(r);
      run_replica({.engine = engines[size_t(r)],
                   .channel = channel.get(),
                   .replica = r,
                   .replicas = kReplicas,
                   .max_batch = 2});
    });
  }
  int code = -1;
  {
    const auto channel = world->channel(0);
    BatchReader reader(options_.run.input, defaults());
    const auto output = open_output(reader, kReplicas);
    code = run_job(
        {.engine = engines[0], .channel = channel.get(), .replicas = kReplicas, .max_batch = 2},
        {reader, bytes_of, {}}, *output);
    for (auto& t : threads) t.join();
  }
  EXPECT_EQ(code, kJobSucceeded);
  expect_all_answers(24);
  EXPECT_EQ(engines[0].submitted + engines[1].submitted + engines[2].submitted, 24u);
  EXPECT_GT(engines[1].submitted, 0u);
  EXPECT_LT(engines[2].submitted, engines[0].submitted + engines[1].submitted);
  std::set<int> seen;
  for (const json& step : read_lines(out("steps.jsonl"))) {
    seen.insert(step["replica"].get<int>());
    EXPECT_EQ(step["session"], "session-1");
  }
  EXPECT_EQ(seen, (std::set<int>{0, 1, 2}));
  EXPECT_EQ(summary()["head_steps"], 24 * 6 * FakeEngine::kHeads);

  // Another number of replicas may continue the job.
  options_.run.resume = true;
  FakeEngine idle;
  EXPECT_EQ(run(idle), kJobSucceeded);
  EXPECT_EQ(idle.submitted, 0u);
}

}  // namespace
}  // namespace certkv
