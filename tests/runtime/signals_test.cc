#include "runtime/signals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "kernels/base/deadline.h"

namespace certkv {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// Runs body in a child process; returns its wait status.
template <typename Body>
int in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    body();
    ::_exit(99);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

TEST(StopSignals, EachOfTheThreeRaisesTheFlagAndRunsTheHook) {
  for (int signal : {SIGINT, SIGTERM, SIGUSR1}) {
    std::atomic<int> seen{0};
    StopSignals signals({.on_signal = [&](int s) { seen = s; }, .on_overdue = {}});
    EXPECT_FALSE(signals.stop());
    ::raise(signal);
    EXPECT_TRUE(signals.stop());
    EXPECT_EQ(signals.signal(), signal);
    EXPECT_TRUE(signals.settled());
    for (const Deadline d = Deadline::after(2s); seen == 0 && !d.passed();) {
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_EQ(seen, signal);
  }
}

TEST(StopSignals, ARankThatIsSettledInTimeIsLeftAlone) {
  std::atomic<bool> overdue{false};
  {
    StopSignals signals({.on_signal = {}, .on_overdue = [&](int) { overdue = true; }}, 50ms);
    ::raise(SIGTERM);
    EXPECT_TRUE(signals.settled());
    std::this_thread::sleep_for(150ms);
  }
  EXPECT_FALSE(overdue);
}

TEST(StopSignals, ARankInALongStepIsEndedByTheThreadWithinHalfASecond) {
  const auto start = Clock::now();
  const int status = in_child([] {
    StopSignals signals({.on_signal = {}, .on_overdue = [](int) { ::_exit(4); }});
    ::raise(SIGTERM);
    for (;;) std::this_thread::sleep_for(10s);  // a step that does not end
  });
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 4);
  EXPECT_LT(Clock::now() - start, 500ms * kDeadlineFactor);
}

TEST(StopSignals, OnceTheThreadEndsTheProcessTheRankIsToldToKeepOut) {
  std::atomic<bool> begun{false}, release{false};
  StopSignals signals({.on_signal = {},
                       .on_overdue =
                           [&](int) {
                             begun = true;
                             while (!release) std::this_thread::sleep_for(1ms);
                           }},
                      20ms);
  ::raise(SIGUSR1);
  for (const Deadline d = Deadline::after(5s); !begun && !d.passed();) {
    std::this_thread::sleep_for(1ms);
  }
  ASSERT_TRUE(begun);
  EXPECT_FALSE(signals.settled());
  release = true;
}

TEST(StopSignals, ASecondSignalEndsTheProcessAtOnce) {
  const int status = in_child([] {
    StopSignals signals({.on_signal = {}, .on_overdue = {}}, 10s);
    ::raise(SIGINT);
    std::this_thread::sleep_for(kSameSignal + 50ms);
    ::raise(SIGINT);
    ::_exit(1);
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 128 + SIGINT);
}

TEST(StopSignals, TheSameSignalSentTwiceAtOnceIsOne) {
  const int status = in_child([] {
    StopSignals signals({.on_signal = {}, .on_overdue = {}}, 10s);
    ::raise(SIGTERM);
    ::raise(SIGTERM);
    signals.settled();
    ::_exit(signals.stop() ? 5 : 6);
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 5);
}

TEST(StopSignals, AFullQuotaIsAnErrorAndNotASignal) {
  const int status = in_child([] {
    StopSignals signals({});
    const struct rlimit none { 0, 0 };
    ::setrlimit(RLIMIT_FSIZE, &none);
    char name[] = "/tmp/certkv-test-XXXXXX";
    const int fd = ::mkstemp(name);
    ::unlink(name);
    ::_exit(::write(fd, "x", 1) == 1 ? 1 : 7);
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace certkv
