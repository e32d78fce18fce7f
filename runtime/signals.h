// SIGINT, SIGTERM and SIGUSR1 (Slurm's warning before its limit) ask the job to stop; a second one
// ends the process at once.
//
// The handler only raises a flag and wakes a thread. The rank's own thread looks at stop() between
// steps and then says settled(): it ends the job itself. If it is in the middle of a long step and
// has not said so within the grace, the thread runs on_overdue, which drops the step: it writes
// what is to be written and ends the process. mpirun grants 1 s between its signal and SIGKILL.
//
// SIGXFSZ is ignored while an object lives, so that a full quota is an error of write().
//
// THREADS: one object per process at a time. stop() may be called from any thread.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

namespace certkv {

inline constexpr std::chrono::milliseconds kStopGrace{250};
// Signals this close together are one: a launcher and a terminal may both send the same.
inline constexpr std::chrono::milliseconds kSameSignal{100};

class StopSignals {
 public:
  struct Hooks {
    std::function<void(int signal)> on_signal;   // at once, in the thread
    std::function<void(int signal)> on_overdue;  // in the thread, at most once
  };
  explicit StopSignals(Hooks hooks, std::chrono::milliseconds grace = kStopGrace);
  ~StopSignals();  // the former handlers are back
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  bool stop() const noexcept;
  int signal() const noexcept;  // the first one, 0 none

  // The rank's thread takes care of the end. False: on_overdue has begun and ends the process; do
  // nothing more.
  bool settled() noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

const char* signal_name(int signal);  // "SIGTERM"

}  // namespace certkv
