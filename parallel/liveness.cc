#include "parallel/liveness.h"

#include <sched.h>

#include <algorithm>
#include <thread>

#include "kernels/base/deadline.h"

namespace certkv {

int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

LifeTable::LifeTable(std::vector<std::string> names) : names_(std::move(names)), rows_(names_.size()) {
  const int64_t now = steady_ns();
  for (int r = 0; r < ranks(); ++r) {
    stamp_work(r, now);
    stamp_beat(r, now);
  }
}

void LifeTable::set_waits_for(int rank, int other) noexcept {
  rows_[size_t(rank)].waits_for.store(other, std::memory_order_relaxed);
}
int LifeTable::waits_for(int rank) const {
  return rows_[size_t(rank)].waits_for.load(std::memory_order_relaxed);
}
void LifeTable::set_arrived(int rank, int group, uint64_t operations) noexcept {
  rows_[size_t(rank)].arrived[group].store(operations, std::memory_order_relaxed);
}
uint64_t LifeTable::arrived(int rank, int group) const {
  return rows_[size_t(rank)].arrived[group].load(std::memory_order_relaxed);
}

bool LifeTable::break_with(ErrorKind kind, std::string message) noexcept {
  const std::lock_guard lock(mutex_);
  if (failure_) return false;
  failure_.emplace(kind, std::move(message), __FILE__, __LINE__);
  broken_.store(true, std::memory_order_release);
  return true;
}
void LifeTable::throw_if_broken() const {
  if (!broken()) return;
  const std::lock_guard lock(mutex_);
  throw Error(*failure_);
}
std::string LifeTable::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_ ? failure_->what() : "";
}

SilenceWatch::SilenceWatch(LifeTable& table, int self, std::chrono::milliseconds silence,
                           const char* what)
    : table_(table),
      self_(self),
      silence_ns_(std::chrono::nanoseconds(silence).count() * kDeadlineFactor),
      what_(what),
      from_ns_(steady_ns()),
      looked_ns_(from_ns_) {
  table_.stamp_work(self_, from_ns_);
}

SilenceWatch::~SilenceWatch() {
  table_.set_waits_for(self_, -1);
  table_.alive(self_);
}

bool SilenceWatch::due() const {
  return steady_ns() - looked_ns_ >= std::chrono::nanoseconds(kTick).count();
}

void SilenceWatch::check(std::span<const Peer> peers, std::chrono::milliseconds transfer) {
  const int64_t now = steady_ns();
  // Whoever was stopped itself has seen nobody's signs meanwhile: it may not judge by them.
  if (now - looked_ns_ > silence_ns_ / 4) {
    from_ns_ = now;
    all_come_ns_ = 0;
  }
  looked_ns_ = now;
  table_.stamp_beat(self_, now);

  int oldest = -1;         // of all peers: who is blamed
  int64_t oldest_ns = INT64_MAX;
  int64_t passed_on = INT64_MAX;  // the life of those that are missing
  for (const Peer& peer : peers) {
    const int64_t sign = peer.has_come ? table_.beat(peer.rank) : table_.work(peer.rank);
    if (!peer.has_come) passed_on = std::min(passed_on, sign);
    if (sign < oldest_ns) {
      oldest_ns = sign;
      oldest = peer.rank;
    }
  }
  const bool missing = passed_on != INT64_MAX;
  if (missing) table_.stamp_work(self_, passed_on);
  table_.set_waits_for(self_, missing ? oldest : -1);

  const int64_t silent_ns = oldest < 0 ? 0 : now - std::max(oldest_ns, from_ns_);
  if (silent_ns > silence_ns_) {
    // Follow the chain, at most once around; what a stopped rank waited for is its own affair.
    const auto runs = [&](int rank) { return now - table_.beat(rank) < silence_ns_ / 2; };
    int culprit = oldest;
    for (int hop = 0; hop < table_.ranks() && runs(culprit) && table_.waits_for(culprit) >= 0; ++hop) {
      culprit = table_.waits_for(culprit);
    }
    if (culprit == self_) culprit = oldest;
    const bool process_runs = runs(culprit);
    CERTKV_THROW(DeadlineExceeded,
                 "{}: no sign of life of {} for {:.1f} s (parallel.deadline_seconds) as seen by {}{}",
                 what_, table_.name(culprit), double(silent_ns) * 1e-9, table_.name(self_),
                 process_runs ? "; its process runs, but its work stands still" : "");
  }
  if (missing) {
    all_come_ns_ = 0;
    return;
  }
  if (all_come_ns_ == 0) all_come_ns_ = now;
  const int64_t transfer_ns = std::chrono::nanoseconds(transfer).count() * kDeadlineFactor;
  if (now - all_come_ns_ > silence_ns_ + transfer_ns) {
    CERTKV_THROW(DeadlineExceeded,
                 "{}: every rank has come and lives, but the operation is not done after {:.1f} s as "
                 "seen by {}: look for a broken network path",
                 what_, double(now - all_come_ns_) * 1e-9, table_.name(self_));
  }
}

void PollPause::pause() {
  ++polls_;
  if (polls_ <= yields_) {  // a yield costs peers on the same core nothing
    sched_yield();
  } else if (polls_ <= yields_ + 20000) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  } else {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

}  // namespace certkv
