// steps.jsonl: one line per decode step, in the order in which rank 0 learned of them.
//
// A thread of its own writes, so that a slow disk never holds up a step. A disk that stays behind
// by more than the buffer loses lines, and says how many ("dropped"); a disk that fails is told by
// name to whoever calls check(), so that the job ends and can be resumed.
//
// THREADS: any.
#pragma once

#include <chrono>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "runtime/engine.h"

namespace certkv {

// One line of steps.jsonl; keys in launcher/RESULTS.md.
nlohmann::json step_json(const StepRecord& record, int replica, const std::string& session);

class StepLog {
 public:
  // Appends to path. A torn last line, left by a crash, is cut off.
  explicit StepLog(const std::string& path);
  ~StepLog();  // writes what is left, if the disk takes it

  void add(std::string line);                   // without its newline; never waits for the disk
  void check() const;                           // throws IoError once writing has failed
  bool flush(std::chrono::milliseconds limit);  // false: not everything is written

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace certkv
