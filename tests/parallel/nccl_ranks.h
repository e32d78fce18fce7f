// Thread ranks with a fake NCCL, for the tests of the communicator over it.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "parallel/nccl_communicator.h"
#include "tests/support/fake_nccl.h"
#include "tests/support/thread_ranks.h"

namespace certkv {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

inline constexpr milliseconds kShort{400};   // silence allowed where a test waits for its end
inline constexpr milliseconds kLong{20000};  // where it must not matter
inline constexpr milliseconds kAbort{300};   // what an abort may take
// From a fault to the error: the silence, the abort, and scheduling on a busy machine.
inline constexpr milliseconds kNoticed = kShort + kAbort + milliseconds(1500);

template <typename Condition>
bool soon(Condition&& condition) {
  const Deadline end = Deadline::after(kLong);
  while (!condition() && !end.passed()) std::this_thread::sleep_for(milliseconds(2));
  return condition();
}

// Holds the ranks together without the communicator under test.
class Gate {
 public:
  explicit Gate(int ranks) : missing_(ranks) {}
  void pass() {
    --missing_;
    EXPECT_TRUE(soon([&] { return missing_ <= 0; }));
  }

 private:
  std::atomic<int> missing_;
};

struct Rank {
  LocalWorld& world;
  FakeNccl& nccl;
  int rank;
  NcclApi api;
  FakeStreamDevice device;
  Gate& all_started;

  std::unique_ptr<NcclCommunicator> communicator(milliseconds silence = kLong,
                                                 milliseconds init = milliseconds(0)) {
    auto control = world.communicator(rank);
    control->set_silence(silence);
    return make_nccl_communicator(std::move(control), std::make_shared<NcclApi>(api), device,
                                  {.init_time = init, .abort_time = kAbort});
  }
  // The same, once every rank has one: no later fault meets a start.
  std::unique_ptr<NcclCommunicator> started(milliseconds silence = kLong) {
    auto c = communicator(silence);
    all_started.pass();
    return c;
  }
};

// Runs body on every rank, on a fake of its own.
inline void run_ranks(int ranks, FakeNccl& nccl, const std::function<void(Rank&)>& body) {
  Gate gate(ranks);
  run_thread_ranks(ranks, [&](LocalWorld& world, int r) {
    Rank rank{world, nccl, r, nccl.api(), {}, gate};
    body(rank);
  });
}

// Runs f, which must throw `kind` in time, and returns the message.
template <typename F>
std::string error_of(F&& f, ErrorKind kind, milliseconds within = kNoticed) {
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

}  // namespace certkv
