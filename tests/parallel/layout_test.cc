// Shards, nodes and cores.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/base/error.h"
#include "parallel/shard.h"
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

TEST(Topology, CoresAreSharedFairly) {
  EXPECT_EQ(fair_threads({{0, 1, 2, 3}}, 0, 0), 4);
  EXPECT_EQ(fair_threads({{0, 1, 2, 3}, {0, 1, 2, 3}}, 1, 0), 2);
  EXPECT_EQ(fair_threads({{0, 1}, {2, 3}}, 1, 0), 2);        // bound to cores of their own
  EXPECT_EQ(fair_threads({{0}, {0}, {0}, {0}}, 2, 0), 1);    // oversubscribed
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
