// What happens when NCCL, a device or a peer fails: the communicator over a fake NCCL of thread
// ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "parallel/nccl_handle.h"
#include "tests/parallel/nccl_ranks.h"

namespace certkv {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint64_t kStep = 77;

// ---- NCCL fails ---------------------------------------------------------------------------------

TEST(NcclFaults, ACollectiveThatNeverEndsIsAbortedAfterTheDeadline) {
  FakeNccl nccl(2);
  Gate gate(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    rank.api.all_reduce = [&](const void*, void*, size_t, NcclType, NcclOp, NcclComm,
                              NcclStream s) {
      static_cast<FakeStreamDevice*>(s)->enqueue([] { return false; });
      return NcclResult::Success;
    };
    const auto c = rank.started();
    float x = 5;
    VerdictRecord vote;
    vote.sum.votes = 1;
    set_step(vote, kStep);
    c->all_reduce_sum(view_f32(&x, 1), {});
    c->reduce_verdict({&vote, 1}, {});
    const std::string why = error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded);
    EXPECT_THAT(why, AllOf(HasSubstr("all_reduce_sum"), HasSubstr("NCCL_DEBUG=INFO")));
    EXPECT_EQ(x, 5.0f) << "nothing was made, nothing is written";
    EXPECT_FALSE(verdict_agreed(vote, 2, kStep));
    EXPECT_EQ(outcome_of_severity(vote.max.severity), Outcome::Failed);
    // The same error for ever after, and at once.
    const milliseconds at_once{200};
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(error_of([&] { c->wait(kLong); }, ErrorKind::DeadlineExceeded, at_once), why);
      EXPECT_EQ(error_of([&] { c->barrier({}); }, ErrorKind::DeadlineExceeded, at_once), why);
      EXPECT_EQ(error_of([&] { c->poll_error(); }, ErrorKind::DeadlineExceeded, at_once), why);
      EXPECT_EQ(error_of([&] { c->all_reduce_sum(view_f32(&x, 1), {}); },
                         ErrorKind::DeadlineExceeded, at_once),
                why);
    }
    gate.pass();
  });
  EXPECT_EQ(nccl.calls().aborts, 2);
  EXPECT_EQ(nccl.calls().destroys, 0);
}

TEST(NcclFaults, ACallThatStaysInProgressIsAbortedAfterTheDeadline) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    bool stuck = false;
    const auto good = rank.api.get_async_error;
    rank.api.get_async_error = [&, good](NcclComm comm, NcclResult* state) {
      if (!stuck) return good(comm, state);
      *state = NcclResult::InProgress;
      return NcclResult::Success;
    };
    const auto c = rank.started(kShort);
    stuck = true;
    float x = 1;
    EXPECT_THAT(
        error_of([&] { c->all_reduce_sum(view_f32(&x, 1), {}); }, ErrorKind::DeadlineExceeded),
        HasSubstr("all_reduce_sum"));
  });
  EXPECT_EQ(nccl.calls().aborts, 2);
}

TEST(NcclFaults, AnAsynchronousErrorOfOneRankIsEveryRanks) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [&](Rank& rank) {
    std::atomic<bool> broken{false};
    const auto good = rank.api.get_async_error;
    rank.api.get_async_error = [&, good](NcclComm comm, NcclResult* state) {
      if (!broken) return good(comm, state);
      *state = NcclResult::SystemError;
      return NcclResult::Success;
    };
    rank.api.last_error = [](NcclComm) { return std::string("socketProgress: reset by peer"); };
    const auto c = rank.started();
    float x = 1;
    broken = rank.rank == 1;
    const std::string why = error_of(
        [&] {
          if (rank.rank == 1) return c->poll_error();
          c->all_reduce_sum(view_f32(&x, 1), {});
          c->wait(kLong);
        },
        ErrorKind::CommError);
    EXPECT_THAT(
        why, AllOf(HasSubstr("rank 1 ("), HasSubstr("ncclSystemError"), HasSubstr("reset by peer"),
                   HasSubstr("NCCL_SOCKET_IFNAME"), HasSubstr("NCCL_DEBUG=INFO")));
    EXPECT_EQ(x, 1.0f);
  });
  EXPECT_TRUE(soon([&] { return nccl.calls().aborts == 3; }));
}

TEST(NcclFaults, AFailedCallNamesTheOperation) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    if (rank.rank == 0) {
      rank.api.all_gather = [](const void*, void*, size_t, NcclType, NcclComm, NcclStream) {
        return NcclResult::UnhandledCudaError;
      };
    }
    const auto c = rank.started();
    std::vector<float> x{1}, all(2);
    const std::string why = error_of(
        [&] {
          c->all_gather(view_f32(x.data(), 1), view_f32(all.data(), 2), {});
          c->wait(kLong);
        },
        ErrorKind::CommError);
    EXPECT_THAT(why, AllOf(HasSubstr("all_gather"), HasSubstr("rank 0 ("),
                           HasSubstr("ncclUnhandledCudaError"), HasSubstr("fake NCCL")));
  });
}

TEST(NcclFaults, AnAbortThatHangsHoldsNobodyUp) {
  std::atomic<bool> release{false};
  std::atomic<int> hanging{0};
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    rank.api.abort = [&](NcclComm) {
      ++hanging;
      while (!release) std::this_thread::sleep_for(milliseconds(2));
      --hanging;
      return NcclResult::Success;
    };
    const auto c = rank.started();
    float x = 1;
    if (rank.rank == 0) {
      c->all_reduce_sum(view_f32(&x, 1), {});
      error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded);
    } else {
      // Not even a sign of life; then the other's error.
      EXPECT_TRUE(soon([&] { return hanging > 0; }));
      error_of([&] { c->poll_error(); }, ErrorKind::DeadlineExceeded, milliseconds(200));
    }
  });
  release = true;
  EXPECT_TRUE(soon([&] { return hanging == 0; }));
}

TEST(NcclFaults, AFailureOfTheDeviceIsNamedOnAllRanks) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    const auto c = rank.started();
    float x = 1;
    if (rank.rank == 1) {
      rank.device.enqueue([]() -> bool { CERTKV_THROW(DeviceError, "an illegal memory access"); });
    }
    const auto sum = [&] {
      c->all_reduce_sum(view_f32(&x, 1), {});
      c->wait(kLong);
    };
    EXPECT_THAT(error_of(sum, ErrorKind::DeviceError), HasSubstr("illegal memory access"));
  });
}

TEST(NcclFaults, StagingThatCannotBeHadBreaksTheGroupByName) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    const auto c = rank.started();
    std::vector<float> x(1 << 20, 1);
    rank.device.refuse_memory(rank.rank == 1);
    EXPECT_THAT(error_of(
                    [&] {
                      c->all_reduce_sum(view_f32(x.data(), x.size()), {});
                      c->wait(kLong);
                    },
                    ErrorKind::OutOfMemory),
                HasSubstr("staging"));
  });
}

// ---- a peer fails -------------------------------------------------------------------------------

TEST(NcclFaults, ARankThatNeverComesIsNamedByAllOthers) {
  FakeNccl nccl(3);
  std::atomic<int> ended{0};
  run_ranks(3, nccl, [&](Rank& rank) {
    const auto c = rank.started();
    if (rank.rank == 1) {
      EXPECT_TRUE(soon([&] { return ended == 2; }));
      return;
    }
    float x = 1;
    c->all_reduce_sum(view_f32(&x, 1), {});
    EXPECT_THAT(error_of([&] { c->wait(kShort); }, ErrorKind::DeadlineExceeded),
                HasSubstr("no sign of life of rank 1 ("));
    ++ended;
  });
  EXPECT_TRUE(soon([&] { return nccl.calls().aborts == 3; }));
}

TEST(NcclFaults, ARankThatGivesUpTellsTheOthersWhyFromAnyThread) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [&](Rank& rank) {
    const auto c = rank.started();
    float x = 1;
    if (rank.rank == 2) {
      std::thread([&] { c->abort("on fire"); }).join();
      EXPECT_TRUE(soon([&] { return nccl.calls().aborts >= 1; })) << "before the rank calls again";
    }
    const auto sum = [&] {
      c->all_reduce_sum(view_f32(&x, 1), {});
      c->wait(kLong);
    };
    EXPECT_THAT(error_of(sum, ErrorKind::CommError),
                AllOf(HasSubstr("rank 2 ("), HasSubstr("on fire")));
  });
  EXPECT_TRUE(soon([&] { return nccl.calls().aborts == 3; }));
}

TEST(NcclFaults, LeavingWithOperationsUnderWayBreaksTheGroup) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    auto c = rank.started();
    float x = 1;
    if (rank.rank == 1) {
      c->all_reduce_sum(view_f32(&x, 1), {});
      c.reset();
      return;
    }
    EXPECT_THAT(error_of(
                    [&] {
                      // The leaver's part may be taken before it has left: then the next one fails.
                      for (int i = 0; i < 2; ++i) {
                        c->all_reduce_sum(view_f32(&x, 1), {});
                        c->wait(kLong);
                      }
                    },
                    ErrorKind::CommError),
                HasSubstr("rank 1 ("));
  });
  EXPECT_TRUE(soon([&] { return nccl.calls().aborts == 2; }));
}

// ---- the start ----------------------------------------------------------------------------------

TEST(NcclStart, ThatNeverEndsIsADeadlineByName) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    rank.api.get_async_error = [](NcclComm, NcclResult* state) {
      *state = NcclResult::InProgress;
      return NcclResult::Success;
    };
    EXPECT_THAT(error_of([&] { rank.communicator(kShort, milliseconds(100)); },
                         ErrorKind::DeadlineExceeded),
                HasSubstr("the start of NCCL"));
  });
  EXPECT_TRUE(soon([&] { return nccl.calls().aborts == 2; }));
}

TEST(NcclStart, ThatFailsOnOneRankFailsOnAll) {
  for (const bool asynchronously : {false, true}) {
    FakeNccl nccl(3);
    run_ranks(3, nccl, [&](Rank& rank) {
      if (rank.rank == 1 && asynchronously) {
        rank.api.get_async_error = [](NcclComm, NcclResult* state) {
          *state = NcclResult::InvalidUsage;
          return NcclResult::Success;
        };
      } else if (rank.rank == 1) {
        rank.api.init_rank = [](NcclComm*, int, const NcclUniqueId&, int) {
          return NcclResult::InvalidUsage;
        };
      }
      // A rank whose own start has been well hears of it at its first operation.
      const auto start = [&] {
        const auto c = rank.communicator();
        c->barrier({});
        c->wait(kLong);
      };
      EXPECT_THAT(error_of(start, ErrorKind::CommError),
                  AllOf(HasSubstr("rank 1 ("), HasSubstr("ncclInvalidUsage"),
                        HasSubstr("CUDA_VISIBLE_DEVICES")));
    });
  }
}

TEST(NcclStart, WithoutAUniqueIdFailsOnAll) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [&](Rank& rank) {
    rank.api.get_unique_id = [](NcclUniqueId*) { return NcclResult::SystemError; };
    EXPECT_THAT(error_of([&] { rank.communicator(); }, ErrorKind::CommError),
                AllOf(HasSubstr("ncclGetUniqueId"), HasSubstr("rank 0 (")));
  });
  EXPECT_EQ(nccl.calls().inits, 0);
}

TEST(NcclStart, NamesTwoVersionsThatDiffer) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [&](Rank& rank) {
    if (rank.rank == 2) rank.api.version = 22105;
    EXPECT_THAT(error_of([&] { rank.communicator(); }, ErrorKind::CommError),
                AllOf(HasSubstr("rank 0 ("), HasSubstr("2.28.9"), HasSubstr("rank 2 ("),
                      HasSubstr("2.21.5"), HasSubstr("LD_LIBRARY_PATH")));
  });
  EXPECT_EQ(nccl.calls().inits, 0);
}

TEST(NcclLibraries, ThatAreMissingAreNamed) {
  EXPECT_THAT(error_of([] { open_nccl("libnccl-that-is-not-there.so.2"); }, ErrorKind::DeviceError),
              AllOf(HasSubstr("NCCL"), HasSubstr("libnccl-that-is-not-there.so.2"),
                    HasSubstr("parallel.tensor"), HasSubstr("LD_LIBRARY_PATH")));
}

TEST(NcclLibraries, ThatAreTooOldOrOfAnotherMajorAreRefused) {
  for (const int version : {0, 2304, 21703, 30000}) {
    EXPECT_THAT(
        error_of([&] { check_nccl_version(version, "libnccl.so.2"); }, ErrorKind::DeviceError),
        AllOf(HasSubstr(nccl_version_text(version)), HasSubstr("2.18.0")));
  }
  for (const int version : {21800, 22005, 22809, 29999})
    check_nccl_version(version, "libnccl.so.2");
  EXPECT_EQ(nccl_version_text(2708), "2.7.8");
}

// ---- the handle ---------------------------------------------------------------------------------

TEST(NcclHandles, MakeNoCallAfterAnAbort) {
  FakeNccl nccl(1);
  NcclHandle handle(std::make_shared<NcclApi>(nccl.api()), "rank 0 (here)");
  const auto any = [](const NcclApi&, NcclComm) -> NcclResult {
    ADD_FAILURE() << "a call was made";
    return NcclResult::Success;
  };
  EXPECT_THAT(error_of([&] { handle.call("a sum", any); }, ErrorKind::CommError),
              HasSubstr("no NCCL communicator"));
  handle.start(
      1,
      [] {
        NcclUniqueId id;
        id.fill('u');
        return id;
      }(),
      0);
  EXPECT_TRUE(handle.settled("the start"));
  handle.abort();
  handle.abort();
  EXPECT_TRUE(handle.aborted());
  EXPECT_TRUE(handle.wait_abort(kLong));
  EXPECT_EQ(nccl.calls().aborts, 1);
  EXPECT_THAT(error_of([&] { handle.call("a sum", any); }, ErrorKind::CommError),
              AllOf(HasSubstr("aborted"), HasSubstr("rank 0 (here)")));
  EXPECT_THAT(error_of([&] { handle.settled("a sum"); }, ErrorKind::CommError),
              HasSubstr("aborted"));
  EXPECT_FALSE(handle.close(kShort));
}

TEST(NcclHandles, ThatCannotFinalizeAreAborted) {
  FakeNccl nccl(1);
  NcclApi api = nccl.api();
  bool finalizing = false;
  api.finalize = [&](NcclComm) {
    finalizing = true;
    return NcclResult::InProgress;
  };
  api.get_async_error = [&](NcclComm, NcclResult* state) {
    *state = finalizing ? NcclResult::InProgress : NcclResult::Success;
    return NcclResult::Success;
  };
  NcclHandle handle(std::make_shared<NcclApi>(api), "rank 0 (here)");
  handle.start(
      1,
      [] {
        NcclUniqueId id;
        id.fill('u');
        return id;
      }(),
      0);
  EXPECT_FALSE(handle.close(milliseconds(50)));
  EXPECT_TRUE(handle.wait_abort(kLong));
  EXPECT_EQ(nccl.calls().aborts, 1);
  EXPECT_EQ(nccl.calls().destroys, 0);
}

// A library that reports success without saying what the state is has said nothing.
TEST(NcclHandles, TakeNoAnswerForAnError) {
  FakeNccl nccl(1);
  NcclApi api = nccl.api();
  api.get_async_error = [](NcclComm, NcclResult*) { return NcclResult::Success; };
  NcclHandle handle(std::make_shared<NcclApi>(api), "rank 0 (here)");
  handle.start(
      1,
      [] {
        NcclUniqueId id;
        id.fill('u');
        return id;
      }(),
      0);
  EXPECT_THAT(error_of([&] { handle.settled("a sum"); }, ErrorKind::CommError),
              HasSubstr("ncclInternalError"));
}

}  // namespace
}  // namespace certkv
