#include "runtime/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <limits>

namespace certkv {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using namespace std::chrono_literals;

ProgressState half() {
  ProgressState s;
  s.lines = 10;
  s.finished = 5;
  s.running = 2;
  s.tokens = 100;
  s.worst_relative = 0.04321;
  s.counts.head_steps = 1000;
  s.counts.rungs = {900, 60, 30, 10, 0};
  return s;
}

TEST(Progress, TheLineSaysRequestsSpeedTimeWorstBoundAndRungs) {
  EXPECT_EQ(
      progress_text(half(), 60, 41.25),
      "requests 5/10, 2 running | 41.2 tokens/s | ETA 0:01:00 | worst bound 0.0433 (budget) | "
      "rungs 0: 90.0% 1: 6.0% 2: 3.0% 3: 1.0% 4: 0.0%");
}

TEST(Progress, APromptThatIsBeingReadSaysHowFarItIs) {
  ProgressState s = half();
  EXPECT_THAT(progress_text(s, 60, 0), Not(HasSubstr("prefill")));
  s.prefill = 0.431;
  EXPECT_THAT(progress_text(s, 60, 0), HasSubstr("2 running, prefill 43% |"));
}

TEST(Progress, FailedLinesAndAnUnknownTimeAreSaid) {
  ProgressState s = half();
  s.failed = 3;
  s.finished_before = 5;  // nothing in this session yet
  s.worst_relative = std::numeric_limits<double>::quiet_NaN();
  const std::string text = progress_text(s, 60, 0);
  EXPECT_THAT(text, HasSubstr("requests 5/10, 3 failed"));
  EXPECT_THAT(text, HasSubstr("ETA --"));
  EXPECT_THAT(text, HasSubstr("worst bound nan"));
}

TEST(Progress, TheTimeLeftCountsThisSessionOnly) {
  ProgressState s = half();
  s.finished_before = 4;
  EXPECT_THAT(progress_text(s, 60, 0), HasSubstr("ETA 0:05:00"));
}

TEST(Progress, TheBarFillsWithTheFinishedLines) {
  EXPECT_EQ(progress_bar(0, 10, 5), "[.....]");
  EXPECT_EQ(progress_bar(4, 10, 5), "[##...]");
  EXPECT_EQ(progress_bar(10, 10, 5), "[#####]");
  EXPECT_EQ(progress_bar(0, 0, 5), "[.....]");
  EXPECT_EQ(duration_text(3725.2), "1:02:06");
  EXPECT_EQ(duration_text(std::numeric_limits<double>::infinity()), "--");
}

class Terminal : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(::pipe(pipe_), 0); }
  std::string written() {
    ::close(pipe_[1]);
    char buffer[4096];
    const ssize_t n = ::read(pipe_[0], buffer, sizeof buffer);
    ::close(pipe_[0]);
    return n > 0 ? std::string(buffer, size_t(n)) : "";
  }
  int pipe_[2];
};

TEST_F(Terminal, ABarIsDrawnOverItselfAndEndsWithALineFeed) {
  const auto start = Progress::Clock::now();
  Progress p(pipe_[1], true, 5, start);
  p.update(half(), start + 100ms);  // too early
  p.update(half(), start + 300ms);
  p.close(half(), start + 400ms);
  const std::string text = written();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\r'), 2);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_EQ(text.back(), '\n');
  EXPECT_THAT(text, HasSubstr("[############............]"));
}

TEST_F(Terminal, ALineComesEveryIntervalAndNoneWhereTheIntervalIsZero) {
  const auto start = Progress::Clock::now();
  ::testing::internal::CaptureStderr();
  Progress p(pipe_[1], false, 5, start);
  for (int i = 1; i <= 12; ++i) p.update(half(), start + i * 1s);
  Progress silent(pipe_[1], false, 0, start);
  silent.update(half(), start + 100s);
  silent.close(half(), start + 101s);
  const std::string text = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  EXPECT_EQ(written(), "");
}

}  // namespace
}  // namespace certkv
