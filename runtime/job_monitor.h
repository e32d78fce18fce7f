// A running job's figures for whoever asks over HTTP, without a step ever waiting for it.
//
// The rank's thread keeps its own record and hands over a copy; where a reader holds the copy just
// then, it tries again at the next step.
//
// THREADS: set_*, step, tick, answered and close by the rank's thread; report by any.
#pragma once

#include <chrono>
#include <mutex>
#include <string>

#include "kvstore/http/status_report.h"
#include "runtime/engine.h"
#include "runtime/progress.h"

namespace certkv {

class JobMonitor {
 public:
  using Clock = std::chrono::steady_clock;
  // name: "rank 0 of 4". Not ready until set_ready().
  JobMonitor(std::string name, std::string version, Tolerance tolerance);

  void set_ready();
  void step(const StepRecord& record);    // of any replica, under the job's policy
  void answered(uint64_t prompt_tokens);  // a line was finished
  void tick(const ProgressState& state);  // between steps, and while a prompt is read
  void tick(const ProgressState& state, const Engine::Load& load);
  void close(const ProgressState& state);  // after the last step: this one is shown for sure

  StatusReport report() const;

 private:
  void publish();

  const Clock::time_point start_ = Clock::now();
  StatusReport own_;
  struct Rate {
    Clock::time_point at;
    uint64_t tokens = 0;
  } rate_;
  mutable std::mutex mutex_;  // guards shown_
  StatusReport shown_;
};

}  // namespace certkv
