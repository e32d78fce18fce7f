// What the journal keeps of one finished line under one policy, besides its result: enough to make
// the summary of the whole job from the journal alone, also after a resume.
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "runtime/batch_io.h"
#include "runtime/engine.h"

namespace certkv {

// Time spent by one replica in one session (a run, or one of its resumptions) up to now. The last
// note of a session counts for it.
struct SessionTime {
  std::string session;      // unique in the job
  double wall_seconds = 0;  // since its start
  struct Steps {
    double seconds = 0;   // in decode steps of a policy
    uint64_t tokens = 0;  // that these produced
  };
  std::map<Policy, Steps> steps;
};

struct FinishedLine {
  uint64_t index = 0, number = 0;
  std::string custom_id;
  Completion completion;    // without text and tokens
  uint64_t tokens = 0;      // generated
  bool over_asked = false;  // `over` was asked for: a policy that does not enforce, job-wide
  SessionTime time;
};

// True iff `over` under this policy is what the job as a whole asked for by name.
bool over_is_asked_for(Policy policy, bool policy_is_job_wide);

std::string note_of(const FinishedLine& line);
FinishedLine finished_line_of(std::string_view note);  // throws BadFile

// What is wrong with the accounting of a completion, or nothing. A completion for which this is not
// empty must not be returned as a success.
std::string accounting_error(const Completion& completion, const Tolerance& tolerance);

}  // namespace certkv
