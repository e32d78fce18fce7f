// Steps captured in a graph, with the collectives of a fake NCCL of thread ranks in them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/parallel/nccl_ranks.h"

namespace certkv {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr size_t kCount = 64;

// A step as the forward pass has it: work of the device, and sums and gathers between.
struct Step {
  cuda::Device& device;
  NcclCommunicator& c;
  cuda::DeviceArray<float> in{device, kCount, "test"}, sum{device, kCount, "test"};
  cuda::DeviceArray<uint16_t> half{device, kCount, "test"}, halves{device, kCount, "test"};
  cuda::DeviceArray<float> all{device, kCount* size_t(c.size()), "test"};

  void set(float x) {
    std::fill_n(in.data(), kCount, x);
    std::fill_n(half.data(), kCount, float_to_f16(x));
  }
  void enqueue() {
    const auto view = [](void* data, size_t count, DType type) {
      return TensorView{data, count, type, MemoryKind::Device};
    };
    device.copy(sum.data(), in.data(), in.bytes());
    device.copy(halves.data(), half.data(), half.bytes());
    c.all_reduce_sum(view(sum.data(), kCount, DType::F32), {});
    c.all_reduce_sum(view(halves.data(), kCount, DType::F16), {});
    c.all_gather(view(sum.data(), kCount, DType::F32), view(all.data(), all.count(), DType::F32),
                 {});
  }
  // The first one, outside of a capture, then the capture; what was refused.
  std::string prepare() {
    set(1);
    enqueue();
    c.wait(kLong);
    check(float(c.size()));
    return c.capture(1, [this] { enqueue(); });
  }
  void check(float x) const {
    for (size_t i = 0; i < kCount; ++i) {
      ASSERT_EQ(sum.data()[i], x);
      ASSERT_EQ(halves.data()[i], float_to_f16(x));
    }
    for (size_t i = 0; i < all.count(); ++i) ASSERT_EQ(all.data()[i], x);
  }
};

TEST(NcclGraphs, DoAtEveryLaunchWhatTheyHaveCaptured) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    Step step{rank.device.device(), *c};
    ASSERT_EQ(step.prepare(), "");
    step.set(float(rank.rank));
    c->wait(kLong);
    step.check(3);  // nothing of it has been done
    const uint64_t before = rank.device.allocations();
    for (int i = 1; i <= 3; ++i) {
      step.set(float(i * (rank.rank + 1)));
      c->launch(1);
      c->wait(kLong);
      step.check(float(6 * i));
    }
    EXPECT_EQ(rank.device.allocations(), before);
    // Between launches, and in place of what was captured.
    step.set(2);
    step.enqueue();
    c->launch(1);
    c->wait(kLong);
    step.check(6);
    ASSERT_EQ(c->capture(1, [&] { rank.device.device().copy(step.sum.data(), step.in.data(), 4); }),
              "");
    step.set(50);
    c->launch(1);
    c->wait(kLong);
    EXPECT_EQ(step.sum.data()[0], 50.0f);
    EXPECT_EQ(step.sum.data()[1], 6.0f);
    ASSERT_EQ(c->capture(1, [&] { step.enqueue(); }), "");
  });
  EXPECT_EQ(nccl.calls().destroys, 3) << "a graph that is alive holds up the end";
  EXPECT_EQ(nccl.calls().aborts, 0);
}

TEST(NcclGraphs, WaitForACallThatNcclGoesOnWithByItself) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    int to_come = 0, polls = 0;
    const auto good = rank.api.get_async_error;
    rank.api.get_async_error = [&, good](NcclComm comm, NcclResult* state) {
      if (to_come == 0) return good(comm, state);
      --to_come;
      ++polls;
      *state = NcclResult::InProgress;
      return NcclResult::Success;
    };
    const auto reduce = rank.api.all_reduce;
    const auto gather = rank.api.all_gather;
    rank.api.all_reduce = [&, reduce](const void* from, void* to, size_t n, NcclType type,
                                      NcclOp op, NcclComm comm, NcclStream stream) {
      EXPECT_EQ(to_come, 0) << "the call overtakes one in progress";
      to_come = 5;
      const NcclResult result = reduce(from, to, n, type, op, comm, stream);
      return result == NcclResult::Success ? NcclResult::InProgress : result;
    };
    rank.api.all_gather = [&, gather](const void* from, void* to, size_t n, NcclType type,
                                      NcclComm comm, NcclStream stream) {
      EXPECT_EQ(to_come, 0) << "the call overtakes one in progress";
      return gather(from, to, n, type, comm, stream);
    };
    const auto c = rank.communicator();
    Step step{rank.device.device(), *c};
    ASSERT_EQ(step.prepare(), "");
    EXPECT_EQ(to_come, 0);
    EXPECT_EQ(polls, 10);  // of two sums
    c->launch(1);
    c->wait(kLong);
    step.check(2);
  });
}

TEST(NcclGraphs, ARankThatDoesNotLaunchIsNamedAndTheAbortEnds) {
  FakeNccl nccl(2);
  std::atomic<int> ended{0}, aborted{0};
  run_ranks(2, nccl, [&](Rank& rank) {
    const auto abort = rank.api.abort;
    rank.api.abort = [&, abort](NcclComm comm) {
      const NcclResult result = abort(comm);
      ++aborted;
      return result;
    };
    const auto c = rank.started();
    Step step{rank.device.device(), *c};
    ASSERT_EQ(step.prepare(), "");
    c->launch(1);
    c->wait(kLong);
    if (rank.rank == 1) {
      EXPECT_TRUE(soon([&] { return ended > 0; }));
      EXPECT_THAT(error_of([&] { c->launch(1); }, ErrorKind::DeadlineExceeded),
                  HasSubstr("a captured step"));
      return;
    }
    c->launch(1);
    EXPECT_THAT(error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded),
                AllOf(HasSubstr("a captured step"), HasSubstr("rank 1 (")));
    EXPECT_EQ(aborted, 1) << "the graph was there still";
    ++ended;
  });
}

// A peer that works on between two launches is late, not gone: launches count as operations.
TEST(NcclGraphs, ARankThatWorksBeforeItsLaunchIsWaitedFor) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    const auto c = rank.started();
    Step step{rank.device.device(), *c};
    ASSERT_EQ(step.prepare(), "");
    for (int i = 0; i < 2; ++i) {
      if (rank.rank == 1 && i == 1)
        for (const auto start = steady_clock::now(); steady_clock::now() - start < 3 * kShort;) {
          std::this_thread::sleep_for(kShort / 8);
          c->alive();
        }
      c->launch(1);
      c->wait(kShort);
    }
  });
  EXPECT_EQ(nccl.calls().aborts, 0);
}

TEST(NcclGraphs, ThatSomeRanksAloneLaunchAreAnError) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    const auto c = rank.started();
    Step step{rank.device.device(), *c};
    ASSERT_EQ(step.prepare(), "");
    error_of(
        [&] {
          rank.rank == 0 ? c->launch(1) : step.enqueue();
          c->wait(kLong);
        },
        ErrorKind::CommError);
  });
}

TEST(NcclGraphs, ARefusalIsAReasonAndBreaksNothing) {
  for (const bool by_device : {false, true}) {
    FakeNccl nccl(2);
    run_ranks(2, nccl, [&](Rank& rank) {
      const auto reduce = rank.api.all_reduce;
      rank.api.all_reduce = [&, reduce](const void* from, void* to, size_t n, NcclType type,
                                        NcclOp op, NcclComm comm, NcclStream stream) {
        if (!by_device && rank.rank == 1 && rank.device.capturing())
          return NcclResult::UnhandledCudaError;
        return reduce(from, to, n, type, op, comm, stream);
      };
      if (by_device && rank.rank == 1) rank.device.refuse_capture("the stream is invalidated");
      auto c = rank.started();
      {
        Step step{rank.device.device(), *c};
        const std::string refused = step.prepare();
        if (rank.rank == 0)
          EXPECT_EQ(refused, "");
        else
          EXPECT_THAT(refused, HasSubstr(by_device ? "invalidated" : "ncclUnhandledCudaError"));
        c->discard();
        c.reset();
      }
      c = rank.communicator();
      Step step{rank.device.device(), *c};
      step.set(4);
      step.enqueue();
      c->wait(kLong);
      step.check(8);
    });
    EXPECT_EQ(nccl.calls().aborts, 2);
    EXPECT_EQ(nccl.calls().destroys, 2);
  }
}

TEST(NcclGraphs, TakeNoHostMemory) {
  FakeNccl nccl(1);
  run_ranks(1, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    float x = 1;
    VerdictRecord vote;
    const std::vector<std::function<void()>> works = {
        [&] { c->all_reduce_sum(view_f32(&x, 1), {}); },
        [&] {
          c->reduce_verdict({&vote, 1}, {});
        },
        [&] { c->barrier({}); }};
    for (const auto& work : works)
      EXPECT_THAT(error_of([&] { c->capture(1, work); }, ErrorKind::InvalidArgument),
                  HasSubstr("captured"));
    EXPECT_THAT(error_of([&] { c->launch(1); }, ErrorKind::InvalidArgument),
                HasSubstr("nothing has been captured"));
    c->barrier({});
    EXPECT_THAT(error_of([&] { c->capture(1, [] {}); }, ErrorKind::InvalidArgument),
                HasSubstr("1 operations under way"));
    c->wait(kLong);
  });
}

}  // namespace
}  // namespace certkv
