// The contract of communicators and channels over MPI. Every rank runs all cases in the same order:
//   mpirun -np 2 parallel_mpi_contract
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <thread>

#include "kernels/base/error.h"
#include "parallel/mpi_session.h"
#include "parallel/topology.h"
#include "tests/parallel/communicator_contract.h"

namespace certkv {
namespace {

constexpr std::chrono::seconds kSilence{10};

MpiSession* session = nullptr;
Communicator* world = nullptr;
MessageChannel* channel = nullptr;

class MpiCommunicators : public testing::TestWithParam<CommunicatorCase> {};
TEST_P(MpiCommunicators, KeepTheContract) { GetParam().check(*world); }
INSTANTIATE_TEST_SUITE_P(Contract, MpiCommunicators, testing::ValuesIn(communicator_contract()),
                         [](const auto& c) { return std::string(c.param.sentence); });

class MpiChannels : public testing::TestWithParam<ChannelCase> {};
TEST_P(MpiChannels, KeepTheContract) {
  GetParam().check(*channel);
  world->barrier({});  // a fast rank's next messages are not this case's
  world->wait(kSilence);
}
INSTANTIATE_TEST_SUITE_P(Contract, MpiChannels, testing::ValuesIn(channel_contract()),
                         [](const auto& c) { return std::string(c.param.sentence); });

TEST(MpiSessions, TheLaunchIsSeenInTheEnvironment) {
  const MpiLaunch launch = detect_mpi_launch();
  EXPECT_TRUE(launch.by_launcher);
  EXPECT_EQ(launch.rank, session->rank());
  EXPECT_EQ(launch.size, session->size());
  EXPECT_THROW(MpiSession(), Error);
}

TEST(MpiSessions, ReplicasReduceApartAndTheirLeadersTalk) {
  for (const int data : {1, 2}) {
    if (session->size() % data != 0) continue;
    const RankLayout layout = plan_ranks(0, data, session->size());
    const auto group = session->tensor_group(layout);
    const auto leaders = session->leaders_channel(layout);
    EXPECT_EQ(group->size(), layout.tensor);
    EXPECT_EQ(group->rank(), layout.tensor_rank(session->rank()));
    uint64_t sum = uint64_t(session->rank()), expected = 0;
    for (int r : layout.members(layout.replica(session->rank()))) expected += uint64_t(r);
    group->all_reduce_sum(view_u64(&sum, 1), {});
    group->wait(kSilence);
    EXPECT_EQ(sum, expected);
    EXPECT_EQ(leaders != nullptr, layout.is_leader(session->rank()));
    if (leaders) {
      EXPECT_EQ(leaders->size(), data);
      EXPECT_EQ(leaders->rank(), layout.replica(session->rank()));
      leaders->send(0, "ready");
      for (int d = 0; leaders->rank() == 0 && d < data; ++d) {
        EXPECT_EQ(leaders->receive(d, kSilence).bytes, "ready");
      }
      leaders->flush(kSilence);
    }
    world->barrier({});
    world->wait(kSilence);
  }
}

// A rank that waits in another group passes on the life of the one it waits for.
TEST(MpiSessions, AChainOfWaitsLivesAsLongAsItsEndLives) {
  if (session->size() != 4) GTEST_SKIP() << "needs 4 ranks";
  constexpr std::chrono::milliseconds kShort{1000};
  const auto pairs = session->tensor_group({2, 2});  // 0-1, 2-3
  if (session->rank() == 3) {
    for (int i = 0; i < 250; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      world->alive();
    }
  }
  pairs->barrier({});
  EXPECT_NO_THROW(pairs->wait(kShort));  // 2 waits for 3
  world->barrier({});
  EXPECT_NO_THROW(world->wait(kShort));  // 0 and 1 wait for 2 and 3
}

TEST(MpiSessions, TheTopologyIsOneNode) {
  const Topology t = gather_topology(*world, kSilence);
  EXPECT_EQ(t.nodes, 1);
  EXPECT_EQ(t.local_rank, world->rank());
  EXPECT_EQ(t.local_size, world->size());
  EXPECT_GE(t.threads, 1);
}

TEST(MpiCommunicator, CountsBeyondAnIntAreRefused) {
  float x = 0;
  try {
    world->broadcast(view_f32(&x, size_t(1) << 29), 0, {});
    FAIL() << "2^31 bytes were accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::InvalidArgument);
  }
  world->poll_error();
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) {
  testing::InitGoogleMock(&argc, argv);
  certkv::MpiSession session;
  const auto world = session.world();
  const auto channel = session.channel();
  certkv::session = &session;
  certkv::world = world.get();
  certkv::channel = channel.get();
  if (session.rank() != 0) {
    // One rank reports the course; failures of the others go to standard error.
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    class Failures : public testing::EmptyTestEventListener {
      void OnTestPartResult(const testing::TestPartResult& r) override {
        if (r.failed()) std::fprintf(stderr, "rank failed: %s:%d %s\n", r.file_name(), r.line_number(), r.summary());
      }
    };
    listeners.Append(new Failures);
  }
  uint64_t failed = uint64_t(RUN_ALL_TESTS());
  try {
    world->all_reduce_sum(certkv::view_u64(&failed, 1), {});
    world->wait(certkv::kSilence);
  } catch (const certkv::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    session.abort(1);
  }
  if (!session.finish()) session.abort(1);
  return failed == 0 ? 0 : 1;
}
