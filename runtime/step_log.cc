#include "runtime/step_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "kernels/base/error.h"
#include "runtime/output_file.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr size_t kBufferBytes = size_t(64) << 20;

uint64_t end_of_last_line(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  off_t end = ::lseek(fd, 0, SEEK_END);
  char last = 0;
  while (end > 0 && ::pread(fd, &last, 1, end - 1) == 1 && last != '\n') --end;
  ::close(fd);
  return uint64_t(end < 0 ? 0 : end);
}

json bounds_json(const StepRecord::Bounds& b) {
  json v = json::object();
  put_figure(v, "bound_max", b.max);
  put_figure(v, "bound_p50", b.p50);
  put_figure(v, "bound_p95", b.p95);
  put_figure(v, "bound_p99", b.p99);
  put_figure(v, "relative_max", b.relative_max);
  put_figure(v, "relative_p50", b.relative_p50);
  put_figure(v, "relative_p95", b.relative_p95);
  put_figure(v, "relative_p99", b.relative_p99);
  return v;
}

}  // namespace

json step_json(const StepRecord& r, int replica, const std::string& session) {
  json v = {{"session", session},       {"replica", replica},
            {"step", r.step},           {"policy", policy_name(r.policy)},
            {"sequences", r.sequences}, {"tokens", r.tokens},
            {"f_blocks", r.f_blocks},   {"x_blocks", r.x_blocks},
            {"skipped_blocks", r.skipped_blocks}};
  if (r.classes != decltype(r.classes){}) {
    json classes = json::object();
    for (int i = 0; i < kClasses; ++i) classes[class_label(i)] = r.classes[size_t(i)];
    v["classes"] = classes;
  }
  put_figure(v, "seconds", r.seconds);
  put_figure(v, "tokens_per_second", r.seconds > 0 ? double(r.tokens) / r.seconds : 0);
  put_counts(v, r.counts);
  v["candidate"] = bounds_json(r.candidate);
  v["returned"] = bounds_json(r.returned);
  put_figure(v, "e_key_max", r.e_key_max);
  put_figure(v, "e_val_max", r.e_val_max);
  put_figure(v, "e_fp_max", r.e_fp_max);
  put_figure(v, "e_key_paper_max", r.e_key_paper_max);
  const StepRecord::Phases& p = r.phase_seconds;
  json phases = json::object();
  put_figure(phases, "projections", p.projections);
  put_figure(phases, "append", p.append);
  put_figure(phases, "attention", p.attention);
  put_figure(phases, "judge", p.judge);
  put_figure(phases, "ladder", p.ladder);
  put_figure(phases, "balance", p.balance);
  put_figure(phases, "communicate", p.communicate);
  put_figure(phases, "sample", p.sample);
  put_figure(phases, "scrub", p.scrub);
  put_figure(phases, "record", p.record);
  put_figure(phases, "other", p.other);
  v["phase_seconds"] = phases;
  return v;
}

struct StepLog::State {
  explicit State(const std::string& path) : file(path, end_of_last_line(path)) {}

  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return !waiting.empty() || closing; });
      if (waiting.empty()) return;
      std::string batch;
      batch.swap(waiting);
      writing = true;
      lock.unlock();
      std::optional<Error> failure;
      try {
        file.append(batch);
      } catch (const Error& e) {
        failure = e;
      }
      lock.lock();
      writing = false;
      if (failure && !error) error = failure;
      if (error) waiting.clear();  // the job is told, and does these steps again
      written.notify_all();
    }
  }

  AppendFile file;
  mutable std::mutex mutex;
  std::condition_variable wake, written;
  std::string waiting;
  uint64_t dropped = 0;
  bool writing = false, closing = false;
  std::optional<Error> error;
  std::thread thread;
};

StepLog::StepLog(const std::string& path) : state_(std::make_unique<State>(path)) {
  state_->thread = std::thread([s = state_.get()] { s->run(); });
}

StepLog::~StepLog() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->closing = true;
  }
  state_->wake.notify_one();
  state_->thread.join();
}

void StepLog::add(std::string line) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->error) return;
  if (state_->waiting.size() + line.size() > kBufferBytes) {
    ++state_->dropped;
    return;
  }
  if (state_->dropped != 0) {
    state_->waiting += json{{"dropped", state_->dropped}}.dump() + "\n";
    state_->dropped = 0;
  }
  state_->waiting += line;
  state_->waiting += '\n';
  state_->wake.notify_one();
}

void StepLog::check() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->error) throw Error(*state_->error);
}

bool StepLog::flush(std::chrono::milliseconds limit) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  const bool idle = state_->written.wait_for(
      lock, limit, [&] { return state_->waiting.empty() && !state_->writing; });
  return idle && !state_->error;
}

}  // namespace certkv
