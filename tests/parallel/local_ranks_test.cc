// The contract of communicators and channels on thread ranks, and what happens when ranks fail.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "parallel/ordered_sum.h"
#include "parallel/verdict_reduce.h"
#include "tests/parallel/communicator_contract.h"
#include "tests/support/thread_ranks.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kShort{500};   // silence allowed where a test waits for its end
constexpr milliseconds kLong{20000};  // where it must not matter

template <typename Case>
std::string case_name(const testing::TestParamInfo<std::tuple<Case, int>>& info) {
  return fmt::format("{}_{}ranks", std::get<0>(info.param).sentence, std::get<1>(info.param));
}

class LocalCommunicators : public testing::TestWithParam<std::tuple<CommunicatorCase, int>> {};
TEST_P(LocalCommunicators, KeepTheContract) {
  const auto& [c, ranks] = GetParam();
  run_thread_ranks(ranks, [&c = c](Communicator& communicator) { c.check(communicator); });
}
INSTANTIATE_TEST_SUITE_P(Contract, LocalCommunicators,
                         testing::Combine(testing::ValuesIn(communicator_contract()),
                                          testing::Values(1, 2, 3, 4)),
                         case_name<CommunicatorCase>);

class LocalChannels : public testing::TestWithParam<std::tuple<ChannelCase, int>> {};
TEST_P(LocalChannels, KeepTheContract) {
  const auto& [c, ranks] = GetParam();
  run_thread_ranks(ranks, [&c = c](LocalWorld& world, int rank) {
    const auto channel = world.channel(rank);
    c.check(*channel);
  });
}
INSTANTIATE_TEST_SUITE_P(Contract, LocalChannels,
                         testing::Combine(testing::ValuesIn(channel_contract()),
                                          testing::Values(1, 2, 4)),
                         case_name<ChannelCase>);

// ---- faults -------------------------------------------------------------------------------------

// Runs f, which must throw `kind` within the limit, and returns the message.
template <typename F>
std::string error_of(F&& f, ErrorKind kind, milliseconds within) {
  const auto start = steady_clock::now();
  try {
    f();
    ADD_FAILURE() << "no error";
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_LT(steady_clock::now() - start, within * kDeadlineFactor) << error.what();
    return error.what();
  }
}

TEST(LocalFaults, ARankThatNeverComesIsNamedByAllOthers) {
  std::atomic<int> ended{0};
  run_thread_ranks(4, [&](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    if (rank == 2) {
      while (ended < 3) std::this_thread::sleep_for(milliseconds(5));
      return;
    }
    float x = 1;
    c->all_reduce_sum(view_f32(&x, 1), {});
    const std::string why =
        error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded, 5 * kShort);
    ++ended;
    EXPECT_THAT(why, HasSubstr("all_reduce_sum"));
    EXPECT_THAT(why, HasSubstr("of rank 2 ("));
  });
}

TEST(LocalFaults, SilenceCountsFromTheLastSignOfLife) {
  std::atomic<bool> ended{false};
  run_thread_ranks(2, [&](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    if (rank == 1) {
      const Deadline busy = Deadline::after(2 * kShort);
      while (!busy.passed()) c->alive(), std::this_thread::sleep_for(milliseconds(5));
      while (!ended) std::this_thread::sleep_for(milliseconds(5));  // hangs
      return;
    }
    const auto start = steady_clock::now();
    c->barrier({});
    error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded, 8 * kShort);
    EXPECT_GE(steady_clock::now() - start, 3 * kShort * kDeadlineFactor - milliseconds(20));
    ended = true;
  });
}

TEST(LocalFaults, ABrokenGroupStaysBrokenAndWritesNothing) {
  std::atomic<bool> ended{false};
  run_thread_ranks(2, [&](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    float x = 1;
    if (rank == 1) {
      while (!ended) std::this_thread::sleep_for(milliseconds(5));
      // The late rank must not carry out an operation on memory that the other has given up.
      error_of([&] { c->all_reduce_sum(view_f32(&x, 1), {}); }, ErrorKind::DeadlineExceeded, kLong);
      EXPECT_EQ(x, 1);
      return;
    }
    VerdictRecord v;
    v.sum.votes = 2;
    c->reduce_verdict({&v, 1}, {});
    error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded, 5 * kShort);
    error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded, kShort);
    error_of([&] { c->poll_error(); }, ErrorKind::DeadlineExceeded, kShort);
    error_of([&] { c->barrier({}); }, ErrorKind::DeadlineExceeded, kShort);
    EXPECT_EQ(outcome_of_severity(v.max.severity), Outcome::Failed);
    EXPECT_FALSE(verdict_agreed(v, 2, 0));
    ended = true;
  });
}

TEST(LocalFaults, AnAbortReachesWaitingRanksAtOnceWithItsReason) {
  std::atomic<int> failures{0};
  run_thread_ranks(3, [&](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    if (rank == 1) {
      std::this_thread::sleep_for(milliseconds(20));
      c->abort("out of tier-1 memory");
      EXPECT_THROW(c->poll_error(), Error);
      return;
    }
    c->barrier({});
    const std::string why = error_of([&] { c->wait(kLong); }, ErrorKind::CommError, kLong / 4);
    EXPECT_THAT(why, HasSubstr("rank 1 ("));
    EXPECT_THAT(why, HasSubstr("out of tier-1 memory"));
    ++failures;
  });
  EXPECT_EQ(failures, 2);
}

TEST(LocalFaults, TheErrorOfTheRankThatFailedFirstIsRethrown) {
  const std::string why = error_of(
      [] {
        run_thread_ranks(4, [](Communicator& c) {
          if (c.rank() == 3) CERTKV_THROW(NonFinite, "a NaN in layer 5");
          c.barrier({});
          c.wait(kLong);
        });
      },
      ErrorKind::NonFinite, kLong / 4);
  EXPECT_THAT(why, HasSubstr("layer 5"));
}

TEST(LocalFaults, ARankThatLeavesIsNamedAtOnce) {
  run_thread_ranks(2, [](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    if (rank == 1) return;
    c->barrier({});
    EXPECT_THAT(error_of([&] { c->wait(kLong); }, ErrorKind::CommError, kLong / 4),
                HasSubstr("rank 1"));
  });
}

TEST(LocalFaults, RanksThatDisagreeOnAnOperationGetAnErrorThatNamesBoth) {
  run_thread_ranks(2, [](LocalWorld& world, int rank) {
    const auto c = world.communicator(rank);
    std::vector<float> x(8, 1);
    const std::string why = error_of(
        [&] {
          c->all_reduce_sum(view_f32(x.data(), rank == 0 ? 8 : 7), {});
          c->wait(kLong);
        },
        ErrorKind::CommError, kLong / 4);
    EXPECT_THAT(why, HasSubstr("8 F32"));
    EXPECT_THAT(why, HasSubstr("7 F32"));
    EXPECT_EQ(x, std::vector<float>(8, 1));
  });
}

// Rank 0 waits for 1 in one group, 1 waits for 2 in another, 2 computes: 2's life is passed on.
TEST(LocalFaults, AChainOfWaitsLivesAsLongAsItsEndLives) {
  run_thread_ranks(3, [](LocalWorld& world, int rank) {
    if (rank == 2) {
      const auto tail = world.communicator(2, {1, 2});
      const Deadline end = Deadline::after(3 * kShort);
      while (!end.passed()) tail->alive(), std::this_thread::sleep_for(milliseconds(5));
      tail->barrier({});
      tail->wait(kShort);
      return;
    }
    const auto head = world.communicator(rank, {0, 1});
    if (rank == 1) {
      const auto tail = world.communicator(1, {1, 2});
      tail->barrier({});
      tail->wait(kShort);
    }
    head->barrier({});
    head->wait(kShort);
  });
}

TEST(LocalFaults, AChainOfWaitsBlamesItsEnd) {
  std::atomic<int> ended{0};
  run_thread_ranks(3, [&](LocalWorld& world, int rank) {
    if (rank == 2) {
      while (ended < 2) std::this_thread::sleep_for(milliseconds(5));
      return;
    }
    const auto head = world.communicator(rank, {0, 1});
    const auto tail = rank == 1 ? world.communicator(1, {1, 2}) : nullptr;
    Communicator& waits = rank == 1 ? *tail : *head;
    waits.barrier({});
    EXPECT_THAT(error_of([&] { waits.wait(kShort); }, ErrorKind::DeadlineExceeded, 5 * kShort),
                HasSubstr("of rank 2 ("));
    ++ended;
  });
}

TEST(LocalFaults, RanksThatWaitForEachOtherInACircleDoNotKeepEachOtherAlive) {
  run_thread_ranks(2, [](LocalWorld& world, int rank) {
    const auto a = world.communicator(rank), b = world.communicator(rank);
    Communicator& first = rank == 0 ? *a : *b;
    first.barrier({});
    error_of([&] { first.wait(kShort); }, ErrorKind::DeadlineExceeded, 5 * kShort);
  });
}

TEST(LocalFaults, ASilentSenderIsNamed) {
  std::atomic<bool> ended{false};
  run_thread_ranks(2, [&](LocalWorld& world, int rank) {
    const auto c = world.channel(rank);
    if (rank == 1) {
      c->send(0, "first");
      while (!ended) std::this_thread::sleep_for(milliseconds(5));
      return;
    }
    EXPECT_EQ(c->receive(1, kLong).bytes, "first");
    EXPECT_THAT(error_of([&] { c->receive(1, kShort); }, ErrorKind::DeadlineExceeded, 5 * kShort),
                HasSubstr("rank 1 ("));
    ended = true;
  });
}

TEST(LocalWorlds, GroupsOfTheSameRanksAreApart) {
  run_thread_ranks(4, [](LocalWorld& world, int rank) {
    const std::vector<int> members = rank < 2 ? std::vector{0, 1} : std::vector{2, 3};
    const auto a = world.communicator(rank, members), b = world.communicator(rank, members);
    EXPECT_EQ(a->size(), 2);
    EXPECT_EQ(a->rank(), rank % 2);
    EXPECT_THAT(a->peer_name(1), HasSubstr(fmt::format("rank {}", members[1])));
    uint64_t x = uint64_t(rank), y = 1;
    a->all_reduce_sum(view_u64(&x, 1), {});
    b->all_reduce_sum(view_u64(&y, 1), {});
    b->wait(kLong);
    a->wait(kLong);
    EXPECT_EQ(x, uint64_t(members[0] + members[1]));
    EXPECT_EQ(y, 2u);
  });
}

TEST(LocalWorlds, OnlyMembersJoinAGroup) {
  const auto world = LocalWorld::create(3);
  EXPECT_THROW(world->communicator(2, {0, 1}), Error);
  EXPECT_THROW(world->communicator(0, {0, 3}), Error);
  EXPECT_THROW(world->communicator(0, {0, 0}), Error);
  EXPECT_THROW(LocalWorld::create(0), Error);
}

// Any order of merging gives the same record: what lets a reduction tree be of any shape.
TEST(VerdictReduce, TheOrderOfRanksDoesNotMatter) {
  std::vector<VerdictRecord> votes(4);
  for (size_t r = 0; r < votes.size(); ++r) {
    votes[r].max.bound = bound_key(float(r * 7 % 4));
    votes[r].max.severity = r % 3;
    votes[r].sum.votes = 1;
    votes[r].sum.rungs[r] = ~uint64_t(0) - r;  // sums wrap
    set_step(votes[r], r);
  }
  VerdictRecord forward = votes[0], pairs = votes[3], right = votes[2];
  for (int r : {1, 2, 3}) merge_verdict(forward, votes[size_t(r)]);
  merge_verdict(pairs, votes[1]);
  merge_verdict(right, votes[0]);
  merge_verdict(pairs, right);
  EXPECT_EQ(std::memcmp(&forward, &pairs, sizeof forward), 0);
  EXPECT_EQ(forward.sum.votes, 4u);
  EXPECT_EQ(forward.max.bound, bound_key(3));
  EXPECT_EQ(forward.max.step, 3u);
  EXPECT_EQ(forward.max.step_complement, ~uint64_t(0));
}

TEST(OrderedSum, GoesFromLeftToRight) {
  const float a = 16777216.0f, b = 1.0f, c = -16777216.0f;
  float out = 9;
  const void* left[] = {&a, &b, &c};
  ordered_sum(DType::F32, left, 3, 1, &out);
  EXPECT_EQ(out, 0.0f);
  const void* outer_first[] = {&a, &c, &b};
  ordered_sum(DType::F32, outer_first, 3, 1, &out);
  EXPECT_EQ(out, 1.0f);
  EXPECT_THROW(ordered_sum(DType::I8, left, 3, 1, &out), Error);
}

}  // namespace
}  // namespace certkv
