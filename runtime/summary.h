// The figures of a whole job, made from its finished lines: summary.json and summary.csv.
//
// Counted over query heads: head_steps = certified + exact + over + failed = the sum over rungs.
// Every key is described in launcher/RESULTS.md.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "runtime/finished_line.h"

namespace certkv {

// Exit codes of a job that ran.
inline constexpr int kJobSucceeded = 0, kJobHasFailedLines = 3, kJobStopped = 4;

// What one policy did.
struct PolicySummary {
  Policy policy = Policy::Budget;
  uint64_t requests = 0, requests_failed = 0;
  uint64_t requests_certified = 0, requests_exact = 0, requests_over = 0;
  uint64_t requests_over_unasked = 0;
  uint64_t tokens = 0, prompt_tokens = 0, reused_prompt_tokens = 0;
  HeadStepCounts counts;
  Completion::Distribution returned, candidate;
  uint64_t tier1_bytes = 0, dense_bytes = 0;
  double prefill_seconds = 0;
  double step_seconds = 0;  // over replicas and sessions
  uint64_t step_tokens = 0;
  void add(const FinishedLine& line);
};

class Summary {
 public:
  // The policies of `compare`, or the one of the job; lines that ask for another one are counted
  // under theirs as well.
  Summary(std::vector<Policy> policies, Tolerance tolerance, bool compare);

  void add(const FinishedLine& line);

  uint64_t lines_total = 0;           // of the input
  bool complete = false;              // every line is finished
  double audit_sample = 0;            // of the head-steps, by the session that writes this
  std::string audit_folder;           // where their records are
  std::string tier1_digest = "none";  // how tier 1 is watched: none, scrub:<steps>

  const std::map<Policy, PolicySummary>& by_policy() const { return by_policy_; }
  PolicySummary total() const;  // all policies together
  double wall_seconds() const;  // summed over sessions
  uint64_t sessions() const;

  // 0, 3 or 4 (not complete).
  int exit_code() const;

  // The object of summary.json: the figures of the job's policy (of the first one of `compare`) at
  // the top, `policies` with one object for each. Throws Uncertifiable if the counts do not add up.
  nlohmann::json json() const;
  std::string csv() const;  // a header and one row per policy

  void write(const std::string& folder) const;  // both files, atomically

 private:
  std::vector<Policy> policies_;
  Tolerance tolerance_;
  bool compare_;
  std::map<Policy, PolicySummary> by_policy_;
  PolicySummary all_;
  // Last word of each session and replica; see SessionTime.
  std::map<std::string, SessionTime> sessions_;
};

}  // namespace certkv
