#include "runtime/job_output.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>

#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "runtime/finished_line.h"
#include "runtime/journal.h"
#include "runtime/json_file.h"
#include "runtime/open_answers.h"
#include "runtime/output_file.h"
#include "runtime/record_json.h"
#include "runtime/results.h"
#include "runtime/step_log.h"
#include "runtime/summary.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

bool was_completed(const std::string& folder) {
  const std::string path = folder + "/summary.json";
  if (!fs::exists(path)) return false;
  const nlohmann::json v = load_json_file(path);
  return v.is_object() && v.value("complete", nlohmann::json()) == true;
}

// A journal begins with one line that names its job; what follows are finished lines.
bool has_finished_lines(const std::string& folder) {
  const std::string journals = folder + "/journal";
  if (!fs::is_directory(journals)) return false;
  for (const auto& file : fs::directory_iterator(journals)) {
    std::ifstream lines(file.path(), std::ios::binary);
    std::string line;
    if (std::getline(lines, line) && std::getline(lines, line)) return true;
  }
  return false;
}

void move_aside(const std::string& folder, const char* what) {
  for (int n = 1; n < 100000; ++n) {
    const std::string target = fmt::format("{}.{}", folder, n);
    if (fs::exists(target)) continue;
    std::error_code error;
    fs::rename(folder, target, error);
    CERTKV_EXPECT(!error, IoError, "{}: moving it to {} failed: {}", folder, target,
                  error.message());
    log_info("{}: holds {}; moved to {}", folder, what, target);
    return;
  }
}

// Without --resume: makes room for a new job, or refuses.
void make_room(const std::string& folder, const EarlierJob& earlier) {
  if (!earlier.exists) return;
  if (!was_completed(folder) && !has_finished_lines(folder)) {
    // A job that failed at its start must not stand in the way of the next try.
    { const FolderLock not_running(folder); }
    move_aside(folder, "a job without a finished line");
    return;
  }
  CERTKV_EXPECT(was_completed(folder), InvalidArgument,
                "{}: holds a job that is not finished; continue it with --resume, choose another "
                "folder with --output, or remove it",
                folder);
  move_aside(folder, "a complete job");
}

void check_same_job(const std::string& folder, const JobIdentity& then, const JobIdentity& now) {
  const std::vector<std::string> differ = identity_differences(then, now);
  std::string text;
  for (const std::string& d : differ) text += "\n  " + d;
  CERTKV_EXPECT(differ.empty(), InvalidArgument,
                "{}: --resume continues the same job, but this one has other answers:{}\n"
                "set that right, or start a new job in another folder with --output",
                folder, text);
}

}  // namespace

struct JobOutput::State {
  State(JobOutputOptions o, const BatchSurvey& input)
      : options(std::move(o)),
        lines(input.lines),
        results(options.compare ? options.policies.size() : 1),
        summary(options.policies, options.tolerance, options.compare),
        result_names(result_file_names(options.compare ? options.policies : std::vector<Policy>{})),
        start(Clock::now()),
        last_results(start),
        progress(2, options.terminal, options.progress_seconds, start) {
    summary.lines_total = input.lines;
    summary.audit_sample = options.session.audit_sample;
    summary.audit_folder = options.session.audit_folder;
    summary.tier1_digest = options.tier1_digest;
    progress_state.lines = input.lines;
    progress_state.policy = options.policies.front();
  }

  std::string path(const std::string& name) const { return options.folder + "/" + name; }

  size_t slot_of(Policy policy) const {
    if (!options.compare) return 0;
    const auto at = std::find(options.policies.begin(), options.policies.end(), policy);
    CERTKV_EXPECT(at != options.policies.end(), BadFile,
                  "a line was answered under policy {}, which this job does not compare",
                  policy_name(policy));
    return size_t(at - options.policies.begin());
  }

  void read_journals(const std::string& job);
  void open_journals(const std::string& job, int replicas);
  uint64_t whole_lines() const;
  void write_results();
  void count(const FinishedLine& line);
  void count_step(const StepRecord& record);
  SessionTime time_now() const;

  JobOutputOptions options;
  uint64_t lines;
  std::string run_id;
  std::unique_ptr<FolderLock> lock;
  std::vector<std::string> journal_paths;  // earlier ones that are not open included
  std::vector<JournalContents> journal_contents;
  std::vector<std::unique_ptr<Journal>> journals;  // by replica
  ResultsIndex results;
  Summary summary;
  std::vector<std::string> result_names;
  std::unique_ptr<OpenAnswers> open;
  std::unique_ptr<StepLog> steps;
  Clock::time_point start, last_results;
  double results_cost = 0;       // seconds, of the last writing
  uint64_t results_written = 0;  // finished lines at the last writing
  uint64_t finished_before = 0;
  std::map<Policy, SessionTime::Steps> step_times;
  Progress progress;
  ProgressState progress_state;
  std::timed_mutex mutex;  // against flush_now
};

// A line is finished when it is answered under every policy.
uint64_t JobOutput::State::whole_lines() const {
  uint64_t least = results.finished(0);
  for (size_t s = 1; s < results.slots(); ++s) least = std::min(least, results.finished(s));
  return least;
}

void JobOutput::State::count(const FinishedLine& line) {
  summary.add(line);
  if (line.completion.failed) ++progress_state.failed;
  progress_state.finished = whole_lines();
}

SessionTime JobOutput::State::time_now() const {
  return {options.session.name, std::chrono::duration<double>(Clock::now() - start).count(),
          step_times};
}

void JobOutput::State::read_journals(const std::string& job) {
  const fs::path folder = path("journal");
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".jsonl") found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  for (const std::string& file : found) {
    const size_t at = journal_paths.size();
    journal_paths.push_back(file);
    journal_contents.push_back(read_journal(
        file, job, [&](std::string_view note, std::string_view, JournalPosition where) {
          const FinishedLine line = finished_line_of(note);
          CERTKV_EXPECT(line.index < lines, BadFile, "{}: line {} of an input of {}", file,
                        line.index, lines);
          if (results.add(slot_of(line.completion.policy), line.index, {at, where})) count(line);
        }));
    const JournalContents& contents = journal_contents.back();
    if (contents.dropped != 0) {
      log_warning("{}: {} damaged or torn line(s) dropped; their requests are done again", file,
                  contents.dropped);
    }
  }
}

void JobOutput::State::open_journals(const std::string& job, int replicas) {
  for (int r = 0; r < replicas; ++r) {
    const std::string file = path(fmt::format("journal/replica-{}.jsonl", r));
    const auto known = std::find(journal_paths.begin(), journal_paths.end(), file);
    JournalContents contents;
    if (known == journal_paths.end()) {
      journal_paths.push_back(file);
    } else {
      contents = journal_contents[size_t(known - journal_paths.begin())];
    }
    journals.push_back(std::make_unique<Journal>(file, job, contents));
  }
}

void JobOutput::State::write_results() {
  CERTKV_FAILPOINT(output_results);
  const auto begin = Clock::now();
  for (size_t s = 0; s < result_names.size(); ++s) {
    certkv::write_results(path(result_names[s]), results, s, journal_paths);
  }
  summary.complete = whole_lines() == lines;
  summary.write(options.folder);
  results_written = progress_state.finished;
  last_results = Clock::now();
  results_cost = std::chrono::duration<double>(last_results - begin).count();
}

JobOutput::JobOutput(JobOutputOptions options, const JobIdentity& identity,
                     const BatchSurvey& input)
    : state_(std::make_unique<State>(std::move(options), input)) {
  State& s = *state_;
  const std::string job = identity_digest(identity);
  s.run_id = job.substr(0, 12);
  EarlierJob earlier = read_manifest(s.options.folder);
  if (!s.options.resume) {
    make_room(s.options.folder, earlier);
    earlier = {};
  } else if (earlier.exists) {
    check_same_job(s.options.folder, earlier.identity, identity);
  } else {
    log_info("{}: nothing to resume; this is a new job", s.options.folder);
  }
  make_folders(s.path("journal"));
  s.lock = std::make_unique<FolderLock>(s.options.folder);
  // The manifest comes first: without it, what follows could not be told apart from another job's.
  write_manifest(s.options.folder, identity, input, s.options.options_echo, s.options.session,
                 earlier);
  s.read_journals(job);
  s.open_journals(job, s.options.replicas);
  s.open = std::make_unique<OpenAnswers>(s.path("open"), job, [&](uint64_t line, Policy policy) {
    const size_t slot = s.options.compare ? s.slot_of(policy) : 0;
    return line >= s.lines || s.results.has(slot, line);
  });
  s.steps = std::make_unique<StepLog>(s.path("steps.jsonl"));
  s.finished_before = s.progress_state.finished_before = s.progress_state.finished =
      s.whole_lines();
  if (s.finished_before != 0) {
    log_info("{}: {} of {} lines are finished; going on", s.options.folder, s.finished_before,
             s.lines);
  }
  if (s.open->found() != 0)
    log_info("{}: {} answers have been begun; they go on from where they were", s.options.folder,
             s.open->found());
  s.summary.complete = s.whole_lines() == s.lines;
}

JobOutput::~JobOutput() = default;

std::vector<Policy> JobOutput::missing(uint64_t line) const {
  std::vector<Policy> list;
  for (size_t slot = 0; slot < state_->results.slots(); ++slot) {
    if (!state_->results.has(slot, line)) list.push_back(state_->options.policies[slot]);
  }
  return list;
}

void JobOutput::finish(const LineIdentity& line, Completion c, bool policy_is_job_wide,
                       int replica) {
  State& s = *state_;
  const std::string wrong = accounting_error(c, line.tolerance);
  if (!wrong.empty()) {
    log_error("line {} ({}), policy {}: {}", line.number, line.custom_id, policy_name(c.policy),
              wrong);
    Completion failed = failed_completion(c.id, c.policy, ErrorKind::Uncertifiable,
                                          "the certificate's accounts do not add up: " + wrong);
    if (c.failed) {  // its own error is the one to be told
      failed.error_kind = c.error_kind;
      failed.error = c.error + "; besides, " + failed.error;
    }
    failed.prompt_tokens = c.prompt_tokens;
    c = std::move(failed);
  }
  FinishedLine finished;
  finished.index = line.index;
  finished.number = line.number;
  finished.custom_id = line.custom_id;
  finished.tokens = c.tokens.size();
  finished.over_asked = over_is_asked_for(c.policy, policy_is_job_wide);
  finished.completion = c;
  const std::string result = result_line(line, c, s.run_id, int64_t(std::time(nullptr)));

  const std::lock_guard<std::timed_mutex> lock(s.mutex);
  const size_t slot = s.slot_of(c.policy);
  CERTKV_EXPECT(!s.results.has(slot, line.index), InvalidArgument,
                "line {} was answered twice under policy {}", line.number, policy_name(c.policy));
  finished.time = s.time_now();
  const std::string& file = s.journals.at(size_t(replica))->path();
  const JournalPosition where = s.journals[size_t(replica)]->append(note_of(finished), result);
  const auto at = std::find(s.journal_paths.begin(), s.journal_paths.end(), file);
  s.results.add(slot, line.index, {size_t(at - s.journal_paths.begin()), where});
  s.count(finished);
  s.open->finish(line.index, c.policy);
  if (s.options.monitor) s.options.monitor->answered(finished.completion.prompt_tokens);
}

void JobOutput::progress(const AnswerProgress& p) {
  state_->open->add(p);
}

std::vector<AnswerState> JobOutput::open_answers(uint64_t line,
                                                 const std::vector<Policy>& policies) {
  std::vector<AnswerState> list;
  for (const Policy policy : policies)
    if (auto state = state_->open->load(line, policy)) list.push_back(std::move(*state));
  return list;
}

void JobOutput::State::count_step(const StepRecord& r) {
  step_times[r.policy].seconds += r.seconds;
  step_times[r.policy].tokens += r.tokens;
  progress_state.tokens += r.tokens;
  if (r.policy != progress_state.policy) return;
  progress_state.counts.add(r.counts);
  if (options.monitor) options.monitor->step(r);
  const double worst = r.returned.relative_max;
  if (!(worst <= progress_state.worst_relative)) progress_state.worst_relative = worst;
}

void JobOutput::step(const StepRecord& r, int replica) {
  state_->count_step(r);
  state_->steps->add(json_line(step_json(r, replica, state_->options.session.name)));
}

void JobOutput::step(const std::string& line) {
  nlohmann::json v = parse_json(line, "a step of another replica");
  try {
    StepRecord r;
    r.policy = policy_from_name(v.at("policy").get<std::string>()).value_or(Policy::Budget);
    r.tokens = v.at("tokens");
    r.seconds = v.at("seconds").is_null() ? 0 : v.at("seconds").get<double>();
    r.counts.head_steps = v.at("head_steps");
    r.counts.certified = v.at("certified");
    r.counts.exact = v.at("exact");
    r.counts.over = v.at("over");
    r.counts.failed = v.at("failed");
    r.counts.canary = v.at("canary_failures");
    r.counts.digest = v.at("digest_failures");
    r.counts.paged_bytes = v.at("paged_bytes");
    for (size_t i = 0; i < r.counts.rungs.size(); ++i) {
      r.counts.rungs[i] = v.at("rungs").at(std::to_string(i));
    }
    const auto returned = [&v](const char* key) {
      const nlohmann::json& figure = v.at("returned").at(key);
      return figure.is_null() ? std::nan("") : figure.get<double>();
    };
    r.returned.relative_max = returned("relative_max");
    r.returned.relative_p50 = returned("relative_p50");
    r.returned.relative_p95 = returned("relative_p95");
    r.returned.relative_p99 = returned("relative_p99");
    state_->count_step(r);
  } catch (const nlohmann::json::exception& e) {
    CERTKV_THROW(BadFile, "a step of another replica: {}", e.what());
  }
  v["session"] = state_->options.session.name;
  state_->steps->add(json_line(v));
}

void JobOutput::tick(const Engine::Load& load) {
  State& s = *state_;
  s.steps->check();
  s.progress_state.running = load.running;
  s.progress_state.prefill = -1;
  s.progress_state.waiting = load.waiting;
  const auto now = Clock::now();
  s.progress.update(s.progress_state, now);
  if (s.options.monitor) s.options.monitor->tick(s.progress_state, load);
  // Writing the results again costs time in proportion to what is there already.
  const double due = std::max(s.options.results_seconds, 50 * s.results_cost);
  if (s.progress_state.finished == s.results_written ||
      std::chrono::duration<double>(now - s.last_results).count() < due) {
    return;
  }
  const std::lock_guard<std::timed_mutex> lock(s.mutex);
  s.write_results();
}

void JobOutput::prefilling(double share) {
  State& s = *state_;
  s.progress_state.prefill = share;
  if (s.options.monitor) s.options.monitor->tick(s.progress_state);
  s.progress.update(s.progress_state, Clock::now());
}

int JobOutput::close() {
  State& s = *state_;
  s.progress_state.prefill = -1;
  s.progress.close(s.progress_state, Clock::now());
  if (s.options.monitor) s.options.monitor->close(s.progress_state);
  const std::lock_guard<std::timed_mutex> lock(s.mutex);
  s.steps->flush(std::chrono::milliseconds(400));
  s.write_results();
  s.steps->check();
  const int code = s.summary.exit_code();
  if (code == kJobHasFailedLines) {
    const PolicySummary all = s.summary.total();
    log_warning(
        "of {} answers {} failed and {} are over the tolerance without having been asked for: see "
        "error and certkv.outcome of the lines in {}",
        all.requests, all.requests_failed, all.requests_over_unasked, s.options.folder);
  }
  return code;
}

void JobOutput::flush_now(std::chrono::milliseconds limit) noexcept {
  State& s = *state_;
  try {
    const auto begin = Clock::now();
    s.steps->flush(limit / 2);
    const std::unique_lock<std::timed_mutex> lock(s.mutex, limit / 4);
    const double left = std::chrono::duration<double>(limit - (Clock::now() - begin)).count();
    // The results can be written from the journal by whoever resumes; only a short writing is
    // begun.
    if (lock.owns_lock() && 2 * s.results_cost < left) s.write_results();
  } catch (const std::exception& e) {
    log_error("{}", e.what());
  } catch (...) {
  }
}

uint64_t JobOutput::finished_before() const {
  return state_->finished_before;
}
bool JobOutput::complete() const {
  return state_->whole_lines() == state_->lines;
}

}  // namespace certkv
