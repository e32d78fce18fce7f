// The simulation of the control plane, as a test and as a program.
//
//   cluster_sim_test                  the cases below, for a few seconds
//   cluster_sim_test --seeds N        seeds 1 .. N of both simulations
//   cluster_sim_test --seed S         one seed, with its log
//   CERTKV_SIM_SECONDS=60             how long the case of many seeds goes on
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "tests/kvstore/cluster_sim.h"
#include "tests/kvstore/cluster_sim_mutants.h"
#include "tests/kvstore/cluster_sim_verdict.h"

namespace certkv::test {
namespace {

constexpr uint64_t kFirstSeed = 1;
// A mutation is found within so many seeds, or the simulation sees too little.
constexpr uint64_t kSeedsToFind = 100;

struct Totals {
  uint64_t seeds = 0, events = 0, views = 0, blocks = 0, fences = 0, restarts = 0, accepted = 0;
};

// The violation of one seed, or empty.
std::string one_seed(uint64_t seed, Totals& totals) {
  const SimResult c = simulate_cluster(seed, Mutation::None, {});
  const VerdictSimResult v = simulate_verdicts(seed, VerdictMutation::None, {});
  ++totals.seeds;
  totals.events += c.events;
  totals.views += c.views;
  totals.blocks += c.acknowledged_blocks;
  totals.fences += c.fences;
  totals.restarts += c.restarts;
  totals.accepted += v.accepted;
  if (!c.violation.empty()) return "cluster " + c.violation;
  if (!v.violation.empty()) return "verdicts " + v.violation;
  return {};
}

std::string text(const Totals& t) {
  return fmt::format(
      "{} seeds, {} events, {} views, {} restarts, {} fences, {} blocks acknowledged, {} steps "
      "agreed",
      t.seeds, t.events, t.views, t.restarts, t.fences, t.blocks, t.accepted);
}

TEST(ClusterSimulation, NothingForbiddenHappensAndEverythingHeals) {
  const char* wanted = std::getenv("CERTKV_SIM_SECONDS");
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::seconds(wanted != nullptr ? std::atoi(wanted) : 3);
  Totals totals;
  uint64_t seed = kFirstSeed;
  do {
    const std::string violation = one_seed(seed, totals);
    ASSERT_EQ(violation, "") << "replay: cluster_sim_test --seed " << seed;
    ++seed;
  } while (std::chrono::steady_clock::now() < end);
  std::printf("%s\n", text(totals).c_str());
  // It was no idle run: all that is checked did happen.
  EXPECT_GT(totals.views, totals.seeds);
  EXPECT_GT(totals.blocks, totals.seeds);
  EXPECT_GT(totals.accepted, totals.seeds);
}

TEST(ClusterSimulation, ASeedReplaysExactly) {
  std::string logs[2];
  for (std::string& log : logs)
    simulate_cluster(7, Mutation::None, [&](const std::string& line) { log += line + '\n'; });
  EXPECT_FALSE(logs[0].empty());
  EXPECT_EQ(logs[0], logs[1]);
}

class BrokenRule : public testing::TestWithParam<Mutation> {};
TEST_P(BrokenRule, IsFound) {
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + kSeedsToFind; ++seed) {
    const SimResult r = simulate_cluster(seed, GetParam(), {});
    if (r.violation.empty()) continue;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), r.violation.c_str());
    return;
  }
  FAIL() << mutation_name(GetParam()) << " was not found within " << kSeedsToFind << " seeds";
}
INSTANTIATE_TEST_SUITE_P(ClusterSimulation, BrokenRule,
                         testing::Values(Mutation::MajorityOffByOne, Mutation::VotesTwice,
                                         Mutation::OldViewsInstalled, Mutation::NoChallenge,
                                         Mutation::NoLease, Mutation::LeaseFromArrival,
                                         Mutation::ReplayAccepted, Mutation::AckCountedTwice,
                                         Mutation::OldAckCounts, Mutation::FormerLifeCounts,
                                         Mutation::OneCopyTooFew, Mutation::FencedAcknowledges),
                         [](const auto& p) { return std::string(mutation_name(p.param)); });

class BrokenAgreement : public testing::TestWithParam<VerdictMutation> {};
TEST_P(BrokenAgreement, IsFound) {
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + kSeedsToFind; ++seed) {
    const VerdictSimResult r = simulate_verdicts(seed, GetParam(), {});
    if (r.violation.empty()) continue;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), r.violation.c_str());
    return;
  }
  FAIL() << verdict_mutation_name(GetParam()) << " was not found within " << kSeedsToFind
         << " seeds";
}
INSTANTIATE_TEST_SUITE_P(ClusterSimulation, BrokenAgreement,
                         testing::Values(VerdictMutation::VotesNotCounted,
                                         VerdictMutation::RankCountedTwice,
                                         VerdictMutation::StepNotCompared,
                                         VerdictMutation::FloatMaximum),
                         [](const auto& p) { return std::string(verdict_mutation_name(p.param)); });

int replay(uint64_t seed) {
  const auto print = [](const std::string& line) { std::printf("%s\n", line.c_str()); };
  const SimResult c = simulate_cluster(seed, Mutation::None, print);
  std::printf("-- verdicts --\n");
  const VerdictSimResult v = simulate_verdicts(seed, VerdictMutation::None, print);
  std::printf("seed %llu: %s; %s\n", static_cast<unsigned long long>(seed),
              c.violation.empty() ? "cluster whole" : c.violation.c_str(),
              v.violation.empty() ? "verdicts whole" : v.violation.c_str());
  return c.violation.empty() && v.violation.empty() ? 0 : 1;
}

int many(uint64_t seeds) {
  Totals totals;
  int failed = 0;
  for (uint64_t seed = kFirstSeed; seed < kFirstSeed + seeds && failed < 10; ++seed) {
    const std::string violation = one_seed(seed, totals);
    if (violation.empty()) continue;
    ++failed;
    std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), violation.c_str());
  }
  std::printf("%s; %d violations\n", text(totals).c_str(), failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace certkv::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc == 3 && std::strcmp(argv[1], "--seed") == 0)
    return certkv::test::replay(std::strtoull(argv[2], nullptr, 10));
  if (argc == 3 && std::strcmp(argv[1], "--seeds") == 0)
    return certkv::test::many(std::strtoull(argv[2], nullptr, 10));
  return RUN_ALL_TESTS();
}
