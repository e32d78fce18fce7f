// Shards, nodes and cores.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "kernels/base/error.h"
#include "parallel/mpi_session.h"
#include "parallel/rank_layout.h"
#include "parallel/shard.h"
#include "parallel/startup_watch.h"
#include "parallel/topology.h"
#include "tests/support/thread_ranks.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;

TEST(Shard, RangesFollowOneAnotherAndDifferByAtMostOne) {
  for (int64_t items : {0, 1, 7, 64, 258, 11008}) {
    for (int64_t parts : {1, 2, 3, 4, 7, 8, 300}) {
      int64_t next = 0, least = items, most = 0;
      for (int64_t g = 0; g < parts; ++g) {
        const ShardRange r = shard_range(items, parts, g);
        EXPECT_EQ(r.begin, next);
        least = std::min(least, r.count());
        most = std::max(most, r.count());
        next = r.end;
      }
      EXPECT_EQ(next, items);
      EXPECT_LE(most - least, 1);
    }
  }
  EXPECT_THROW(shard_range(4, 0, 0), Error);
  EXPECT_THROW(shard_range(4, 2, 2), Error);
  EXPECT_THROW(shard_range(-1, 2, 0), Error);
}

TEST(Shard, ATensorSizeThatDoesNotDivideNamesTheOnesThatDo) {
  EXPECT_EQ(kv_heads_of_rank(8, 4, 3).begin, 6);
  EXPECT_EQ(kv_heads_of_rank(8, 4, 3).end, 8);
  try {
    kv_heads_of_rank(6, 4, 0);
    FAIL() << "4 ranks share 6 KV heads";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::InvalidArgument);
    EXPECT_THAT(error.what(), HasSubstr("parallel.tensor is 4"));
    EXPECT_THAT(error.what(), HasSubstr("1, 2, 3, 6"));
  }
  EXPECT_THROW(kv_heads_of_rank(8, 16, 0), Error);
  EXPECT_THROW(kv_heads_of_rank(8, 0, 0), Error);
}

// ---- tensor groups and replicas -----------------------------------------------------------------

std::string refusal_of(int tensor, int data, int world) {
  try {
    plan_ranks(tensor, data, world);
    return "none";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::InvalidArgument);
    return error.what();
  }
}

TEST(RankLayout, RanksOfATensorGroupAreConsecutive) {
  const RankLayout layout = plan_ranks(4, 2, 8);
  EXPECT_EQ(layout.members(1), (std::vector{4, 5, 6, 7}));
  EXPECT_EQ(layout.leaders(), (std::vector{0, 4}));
  EXPECT_EQ(layout.replica(5), 1);
  EXPECT_EQ(layout.tensor_rank(5), 1);
  EXPECT_TRUE(layout.is_leader(4));
  EXPECT_FALSE(layout.is_leader(5));
}

TEST(RankLayout, TensorZeroTakesWhatTheReplicasLeave) {
  EXPECT_EQ(plan_ranks(0, 1, 6).tensor, 6);
  EXPECT_EQ(plan_ranks(0, 3, 6).tensor, 2);
  EXPECT_EQ(plan_ranks(1, 1, 1).world(), 1);
}

TEST(RankLayout, NumbersThatDoNotFitAreNamedWithWhatFits) {
  EXPECT_THAT(refusal_of(2, 1, 4), HasSubstr("parallel.tensor 2 times parallel.data 1 needs 2"));
  EXPECT_THAT(refusal_of(2, 1, 4), HasSubstr("set parallel.data to 2"));
  EXPECT_THAT(refusal_of(4, 1, 2), HasSubstr("mpirun -np 4"));
  EXPECT_THAT(refusal_of(0, 3, 4), HasSubstr("parallel.data is 3"));
  EXPECT_THAT(refusal_of(-1, 1, 4), HasSubstr("parallel.tensor is -1"));
  EXPECT_THAT(refusal_of(1, 0, 4), HasSubstr("parallel.data is 0"));
  EXPECT_THAT(refusal_of(1 << 20, 1 << 20, 4), HasSubstr("needs 1099511627776 ranks"));
}

// ---- launchers ----------------------------------------------------------------------------------

TEST(MpiLaunch, ABatchScriptIsNoRankButAStepIs) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_STEP_ID"}) {
    unsetenv(name);
  }
  setenv("SLURM_PROCID", "0", 1);
  EXPECT_FALSE(detect_mpi_launch().by_launcher);
  setenv("SLURM_STEP_ID", "0", 1);
  setenv("SLURM_PROCID", "3", 1);
  setenv("SLURM_STEP_NUM_TASKS", "8", 1);
  EXPECT_TRUE(detect_mpi_launch().by_launcher);
  EXPECT_EQ(detect_mpi_launch().rank, 3);
  EXPECT_EQ(detect_mpi_launch().size, 8);
  setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
  setenv("OMPI_COMM_WORLD_RANK", "1", 1);
  EXPECT_EQ(detect_mpi_launch().launcher, "mpirun");
  EXPECT_EQ(detect_mpi_launch().rank, 1);
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID",
                           "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"}) {
    unsetenv(name);
  }
}

// ---- the start ----------------------------------------------------------------------------------

TEST(Startup, RanksThatDidNotComeAreNamedWithTheirHost) {
  using std::chrono::milliseconds;
  StartupPlace p{
      .job = "j", .rank = 4, .size = 8, .local_rank = 0, .local_size = 4, .host_ranks = {}};
  EXPECT_EQ(startup_diagnosis(p, {{0, 4}, {2, 6}}, "node-b", milliseconds(1500)),
            "start-up: rank 5, rank 7 on host node-b did not come within 1.5 s (2 of this host's 4 "
            "ranks are here): see parallel.start_seconds");
  // Dealt out host by host: the ranks do not follow one another.
  EXPECT_THAT(startup_diagnosis(p, {{0, 4}, {1, 6}}, "node-b", milliseconds(1000)),
              HasSubstr("local rank 2, local rank 3 on host node-b"));
  p.host_ranks = {4, 6, 0, 2};
  EXPECT_THAT(startup_diagnosis(p, {{0, 4}, {1, 6}}, "node-b", milliseconds(1000)),
              HasSubstr("rank 0, rank 2 on host node-b"));
  EXPECT_THAT(startup_diagnosis(p, {{0, 4}, {1, 6}, {2, 0}, {3, 2}}, "node-b", milliseconds(1000)),
              HasSubstr("all 4 rank(s) of host node-b are here, but not all 8"));
}

TEST(Startup, ThePlaceIsWhatTheLauncherTells) {
  setenv("SLURM_JOB_ID", "77", 1);
  setenv("SLURM_STEP_ID", "2", 1);
  setenv("SLURM_PROCID", "6", 1);
  setenv("SLURM_LOCALID", "1", 1);
  setenv("SLURM_STEP_NUM_TASKS", "8", 1);
  setenv("SLURM_GTIDS", "4,6", 1);
  StartupPlace p = startup_place();
  EXPECT_TRUE(p.known());
  EXPECT_EQ(p.job, "77-2");
  EXPECT_EQ(p.rank, 6);
  EXPECT_EQ(p.local_size, 2);
  EXPECT_EQ(p.host_ranks, (std::vector<int>{4, 6}));
  setenv("SLURM_GTIDS", "4,,6", 1);
  EXPECT_FALSE(startup_place().known());
  for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID",
                           "SLURM_STEP_NUM_TASKS", "SLURM_GTIDS"})
    unsetenv(name);
  EXPECT_FALSE(startup_place().known());
}

TEST(Startup, TheFirstThatCameSpeaksForItsHostAndTheOthersAreSilent) {
  const std::string job = "test-" + std::to_string(getpid());
  std::mutex mutex;
  std::vector<std::string> said;
  const auto late = [&](const std::string& text) {
    const std::lock_guard lock(mutex);
    said.push_back(text);
  };
  const auto place = [&](int local) {
    return StartupPlace{.job = job,
                        .rank = local,
                        .size = 3,
                        .local_rank = local,
                        .local_size = 3,
                        .host_ranks = {}};
  };
  const auto count = [&] {
    const std::lock_guard lock(mutex);
    return said.size();
  };
  {
    const StartupWatch a(place(1), std::chrono::milliseconds(300), late);
    const StartupWatch b(place(2), std::chrono::milliseconds(300), late);
    for (int i = 0; i < 2000 && count() < 2; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ASSERT_EQ(said.size(), 2u);
  std::sort(said.begin(), said.end());
  EXPECT_EQ(said[0], "");
  EXPECT_THAT(said[1], HasSubstr("rank 0 on host " + host_name() + " did not come within 0.3 s"));
  said.clear();
  { const StartupWatch met(place(0), std::chrono::minutes(10), late); }
  EXPECT_TRUE(said.empty());
}

// ---- nodes and cores ----------------------------------------------------------------------------

TEST(Topology, CoresAreSharedFairly) {
  EXPECT_EQ(fair_threads({{0, 1, 2, 3}}, 0, 0), 4);
  EXPECT_EQ(fair_threads({{0, 1, 2, 3}, {0, 1, 2, 3}}, 1, 0), 2);
  EXPECT_EQ(fair_threads({{0, 1}, {2, 3}}, 1, 0), 2);      // bound to cores of their own
  EXPECT_EQ(fair_threads({{0}, {0}, {0}, {0}}, 2, 0), 1);  // oversubscribed
  EXPECT_EQ(fair_threads({{0, 1, 2}, {0, 1, 2}, {0, 1, 2}}, 0, 0), 1);
  EXPECT_EQ(fair_threads({{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}}, 0, 4), 2);
  EXPECT_GE(usable_cores(), 1);
}

TEST(Topology, AConfiguredNodeReplacesTheHost) {
  ASSERT_EQ(setenv("CERTKV_NODE", "left", 1), 0);
  const std::string left = node_identity();
  ASSERT_EQ(setenv("CERTKV_NODE", "right", 1), 0);
  EXPECT_NE(left, node_identity());
  ASSERT_EQ(unsetenv("CERTKV_NODE"), 0);
  EXPECT_THAT(node_identity(), HasSubstr(host_name()));
  EXPECT_EQ(node_identity(), node_identity());
}

TEST(Topology, ThreadRanksShareOneNode) {
  run_thread_ranks(3, [](Communicator& c) {
    const Topology t = gather_topology(c, std::chrono::seconds(20));
    EXPECT_EQ(t.nodes, 1);
    EXPECT_EQ(t.local_size, 3);
    EXPECT_EQ(t.local_rank, c.rank());
    EXPECT_EQ(t.node_names.at(0), host_name());
    EXPECT_EQ(t.threads, std::max(1, usable_cores() / 3));
  });
}

}  // namespace
}  // namespace certkv
