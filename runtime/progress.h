// How far the job is: a bar on a terminal, else a line from time to time.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "runtime/engine.h"

namespace certkv {

struct ProgressState {
  uint64_t lines = 0;            // of the input
  uint64_t finished = 0;         // earlier sessions included
  uint64_t finished_before = 0;  // by earlier sessions
  uint64_t failed = 0;
  uint64_t running = 0, waiting = 0;
  double prefill = -1;        // share of the prompt that is being read; negative: none is
  uint64_t tokens = 0;        // generated in this session
  double worst_relative = 0;  // returned under `policy`, in this session
  Policy policy = Policy::Budget;
  HeadStepCounts counts;  // under `policy`, in this session
};

// "requests 3/10, 1 failed | 41.2 tokens/s | ETA 0:01:30 | worst bound 0.0432 | rungs 0: 97.1 %
// ..." elapsed: seconds of this session; rate: tokens per second.
std::string progress_text(const ProgressState& state, double elapsed, double rate);
std::string progress_bar(uint64_t finished, uint64_t lines, int cells);  // "[####....]"
std::string duration_text(double seconds);  // "0:01:30"; "--" where it is not known

class Progress {
 public:
  using Clock = std::chrono::steady_clock;
  // interval 0: nothing is printed where fd is no terminal.
  Progress(int fd, bool terminal, double interval_seconds, Clock::time_point now);

  // Prints if it is time to. Never throws: a full disk behind standard error is no reason to stop.
  void update(const ProgressState& state, Clock::time_point now) noexcept;
  void close(const ProgressState& state, Clock::time_point now) noexcept;  // a last time

 private:
  void print(const ProgressState& state, Clock::time_point now, bool last);
  int fd_;
  bool terminal_;
  double interval_;
  Clock::time_point start_, last_;
  uint64_t last_tokens_ = 0;
};

}  // namespace certkv
