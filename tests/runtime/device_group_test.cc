// The group of a device's forward pass over a fake NCCL of thread ranks: what is captured, and what
// happens where one rank cannot.
#include "runtime/device/device_group.h"

#include "tests/parallel/nccl_ranks.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;

// A word of each rank, gathered, and a sum.
struct Work {
  cuda::Device& device;
  DeviceGroup& group;
  cuda::DeviceArray<float> sum{device, 1, "test"};
  cuda::DeviceArray<uint32_t> own{device, 1, "test"};
  cuda::DeviceArray<uint32_t> all{device, uint64_t(group.size()), "test"};

  void set(float x) {
    sum.data()[0] = x;
    own.data()[0] = 10 + uint32_t(group.rank());
    std::fill_n(all.data(), all.count(), 0u);
  }
  void enqueue() {
    group.sum(sum.data(), 1);
    group.gather(own.data(), all.data(), 1);
  }
  void check(float x) {
    group.wait();
    EXPECT_EQ(sum.data()[0], x);
    for (uint32_t r = 0; r < all.count(); ++r) EXPECT_EQ(all.data()[r], 10 + r);
  }
};

std::unique_ptr<DeviceGroup> group_of(Rank& rank, Communicator& hosts) {
  hosts.set_silence(kLong);
  NcclControls controls{rank.world.communicator(rank.rank), rank.world.communicator(rank.rank)};
  return make_nccl_group(std::move(controls), hosts, std::make_shared<NcclApi>(rank.api),
                         rank.device);
}

TEST(DeviceGroups, AgreeWhereAllRanksSayTheSame) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [](Rank& rank) {
    const auto hosts = rank.world.communicator(rank.rank);
    const auto group = group_of(rank, *hosts);
    const auto on_host = make_host_group(*hosts, rank.device.device());
    for (DeviceGroup* g : {group.get(), on_host.get()}) {
      EXPECT_TRUE(g->all_same(0));
      EXPECT_TRUE(g->all_same(UINT64_MAX));
      for (int other : {0, 1, 2}) EXPECT_FALSE(g->all_same(rank.rank == other ? 7 : 8));
    }
  });
}

TEST(DeviceGroups, LaunchWhatTheyHaveCaptured) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    const auto hosts = rank.world.communicator(rank.rank);
    const auto group = group_of(rank, *hosts);
    Work work{rank.device.device(), *group};
    work.set(1);
    work.enqueue();
    work.check(2);
    ASSERT_TRUE(group->capture(1, [&] { work.enqueue(); }));
    for (float x : {3.0f, 4.0f}) {
      work.set(x);
      group->launch(1);
      work.check(2 * x);
    }
  });
  EXPECT_EQ(nccl.calls().inits, 2);
  EXPECT_EQ(nccl.calls().aborts, 0);
}

TEST(DeviceGroups, GoOnCallByCallWhereOneRankCannotCapture) {
  FakeNccl nccl(2);
  std::atomic<int> tried{0};
  testing::internal::CaptureStderr();
  run_ranks(2, nccl, [&](Rank& rank) {
    const auto hosts = rank.world.communicator(rank.rank);
    const auto group = group_of(rank, *hosts);
    Work work{rank.device.device(), *group};
    work.set(1);
    work.enqueue();
    work.check(2);
    if (rank.rank == 1) rank.device.refuse_capture("the stream is invalidated");
    const auto captured = [&] {
      ++tried;
      work.enqueue();
    };
    EXPECT_FALSE(group->capture(1, captured));
    EXPECT_FALSE(group->capture(1, captured));
    work.set(5);
    work.enqueue();
    work.check(10);
  });
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_THAT(log, HasSubstr("call by call: the stream is invalidated"));
  EXPECT_THAT(log, HasSubstr("call by call: another rank cannot"));
  EXPECT_EQ(tried, 2) << "each rank once";
  EXPECT_EQ(nccl.calls().inits, 4) << "NCCL was started anew";
  EXPECT_EQ(nccl.calls().aborts, 2);
  EXPECT_EQ(nccl.calls().destroys, 2);
}

}  // namespace
}  // namespace certkv
