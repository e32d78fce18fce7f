// Everything a job writes: manifest, journals, results, steps and summary of one output folder.
//
// A finished line is in the journal, and on the disk, when finish() returns; results.jsonl and the
// summary follow from time to time, and when the job ends or stops. What is in the folder after a
// crash at any moment is enough to go on from. Only rank 0 has one.
//
// THREADS: one, but for flush_now().
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "runtime/batch_io.h"
#include "runtime/engine.h"
#include "runtime/job_monitor.h"
#include "runtime/manifest.h"
#include "runtime/progress.h"

namespace certkv {

struct JobOutputOptions {
  std::string folder;
  bool resume = false;
  std::vector<Policy> policies;  // of compare, or the one of the job
  bool compare = false;
  Tolerance tolerance;
  std::string tier1_digest = "none";
  int replicas = 1;
  std::string options_echo;
  ManifestSession session;
  bool terminal = false;  // of standard error
  double progress_seconds = 5;
  double results_seconds = 10;          // between writings of results.jsonl while the job runs
  std::shared_ptr<JobMonitor> monitor;  // told of everything; may be null
};

class JobOutput {
 public:
  // Opens the folder. Without `resume`: a folder with the results of a complete job is moved aside
  // (FOLDER.1, .2, ...); one with an unfinished job is refused.
  // ERRORS: InvalidArgument (the folder is another job's, naming what differs; it is in use; it
  // holds an unfinished job), IoError, BadFile.
  JobOutput(JobOutputOptions options, const JobIdentity& identity, const BatchSurvey& input);
  ~JobOutput();

  // Policies under which this line is still to be answered.
  std::vector<Policy> missing(uint64_t line) const;

  // Takes a finished line over. A completion whose counts do not add up becomes a failed one.
  void finish(const LineIdentity& line, Completion completion, bool policy_is_job_wide,
              int replica);

  // Of an answer that is being generated; see runtime/open_answers.h.
  void progress(const AnswerProgress& progress);
  // What earlier sessions have left of a line's answers under these policies.
  std::vector<AnswerState> open_answers(uint64_t line, const std::vector<Policy>& policies);

  void step(const StepRecord& record, int replica);
  void step(const std::string& step_line);  // as step_json of another replica made it

  // To be called between steps: progress, results from time to time. Throws IoError once the disk
  // has failed.
  void tick(const Engine::Load& load);

  // While a prompt is prefilled, which may take longer than a line of progress: its share so far.
  void prefilling(double share);

  // Writes everything. Returns the exit code; `complete` is found out by counting.
  int close();

  // What can be written within `limit`, from another thread than the rank's: for a job that must
  // end in the middle of a step. The journals are complete in any case. Never throws.
  void flush_now(std::chrono::milliseconds limit) noexcept;

  uint64_t finished_before() const;  // lines that earlier sessions have finished
  bool complete() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace certkv
