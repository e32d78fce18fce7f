#include "runtime/job_monitor.h"

#include <utility>

namespace certkv {
namespace {

constexpr std::chrono::seconds kRateWindow{2};

}  // namespace

JobMonitor::JobMonitor(std::string name, std::string version, Tolerance tolerance) {
  own_.role = "job";
  own_.name = std::move(name);
  own_.version = std::move(version);
  own_.reason = "weights and store are being set up";
  own_.job.emplace();
  own_.job->tolerance = tolerance.value;
  own_.job->tolerance_is_relative = tolerance.is_relative;
  rate_.at = start_;
  shown_ = own_;
}

void JobMonitor::set_ready() {
  own_.ready = true;
  own_.reason.clear();
  const std::lock_guard lock(mutex_);  // once, before the first step
  shown_ = own_;
}

void JobMonitor::step(const StepRecord& r) {
  StatusReport::Job& j = *own_.job;
  ++j.steps;
  j.relative_p50 = r.returned.relative_p50;
  j.relative_p95 = r.returned.relative_p95;
  j.relative_p99 = r.returned.relative_p99;
  j.relative_max = r.returned.relative_max;
}

void JobMonitor::answered(uint64_t prompt_tokens) {
  own_.job->prompt_tokens += prompt_tokens;
}

void JobMonitor::tick(const ProgressState& s) {
  StatusReport::Job& j = *own_.job;
  j.lines = s.lines;
  j.finished = s.finished;
  j.failed = s.failed;
  j.running = s.running;
  j.waiting = s.waiting;
  j.generation_tokens = s.tokens;
  j.prefill_share = s.prefill;
  j.certified = s.counts.certified;
  j.exact = s.counts.exact;
  j.over = s.counts.over;
  j.failed_head_steps = s.counts.failed;
  j.rungs = s.counts.rungs;
  j.canary_failures = s.counts.canary;
  j.digest_failures = s.counts.digest;
  j.paged_bytes = s.counts.paged_bytes;
  j.worst_relative = s.worst_relative;
  const Clock::time_point now = Clock::now();
  if (now - rate_.at >= kRateWindow) {
    j.tokens_per_second =
        double(s.tokens - rate_.tokens) / std::chrono::duration<double>(now - rate_.at).count();
    rate_ = {now, s.tokens};
  }
  publish();
}

void JobMonitor::tick(const ProgressState& state, const Engine::Load& load) {
  own_.memory = {{"arena", load.arena_bytes, load.arena_capacity},
                 {"tier1", load.tier1_bytes, load.tier1_capacity}};
  tick(state);
}

void JobMonitor::close(const ProgressState& state) {
  tick(state);
  const std::lock_guard lock(mutex_);  // a reader holds it for a copy
  shown_ = own_;
}

void JobMonitor::publish() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock.owns_lock()) shown_ = own_;
}

StatusReport JobMonitor::report() const {
  StatusReport r;
  {
    const std::lock_guard lock(mutex_);
    r = shown_;
  }
  r.uptime_seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  return r;
}

}  // namespace certkv
