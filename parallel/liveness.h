// Who lives: the signs of life of all ranks of a job as one process knows them, and the watch that a
// waiting rank keeps over the ranks it waits for.
//
// A rank has two signs. `work` is stamped by the threads that work; `beat` says that its process
// runs, and is all that can be asked of a rank that is itself waiting for the same operation. A
// rank that waits for others passes their life on: its `work` becomes the oldest of theirs if that
// is newer. Signs are points in time and are only ever passed on, never renewed, so that ranks
// which wait for each other in a circle do not keep each other alive.
//
// Among threads all ranks share one table. Among processes every rank has its own, which the
// heartbeat fills (parallel/mpi_heart.h).
//
// THREADS: all of LifeTable may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {

// Nanoseconds of the steady clock: the unit of all stamps.
int64_t steady_ns();

class LifeTable {
 public:
  static constexpr int kGroups = 8;  // groups a rank can be in, see arrived()

  // names[r]: how errors call rank r, for instance "rank 1 (node-a)". All ranks live now.
  explicit LifeTable(std::vector<std::string> names);

  int ranks() const { return int(names_.size()); }
  const std::string& name(int rank) const { return names_[size_t(rank)]; }

  void alive(int rank) noexcept { stamp_work(rank, steady_ns()); }
  void stamp_work(int rank, int64_t at_ns) noexcept { raise(rows_[size_t(rank)].work, at_ns); }
  void stamp_beat(int rank, int64_t at_ns) noexcept { raise(rows_[size_t(rank)].beat, at_ns); }
  int64_t work(int rank) const { return rows_[size_t(rank)].work.load(std::memory_order_relaxed); }
  int64_t beat(int rank) const { return rows_[size_t(rank)].beat.load(std::memory_order_relaxed); }

  // The rank this one waits for longest, -1 none: lets an error name the end of a chain.
  void set_waits_for(int rank, int other) noexcept;
  int waits_for(int rank) const;

  // Operations of a group that this rank has begun to wait for, or finished.
  void set_arrived(int rank, int group, uint64_t operations) noexcept;
  uint64_t arrived(int rank, int group) const;

  // The first failure breaks the job; later ones are ignored. Returns whether it was the first.
  bool break_with(ErrorKind kind, std::string message) noexcept;
  bool broken() const { return broken_.load(std::memory_order_acquire); }
  void throw_if_broken() const;
  // The message of the first failure, "" if there is none.
  std::string failure() const;

 private:
  struct alignas(64) Row {
    std::atomic<int64_t> work{0}, beat{0};
    std::atomic<int> waits_for{-1};
    std::atomic<uint64_t> arrived[kGroups] = {};
  };
  static void raise(std::atomic<int64_t>& stamp, int64_t at_ns) noexcept {
    int64_t seen = stamp.load(std::memory_order_relaxed);
    while (seen < at_ns &&
           !stamp.compare_exchange_weak(seen, at_ns, std::memory_order_relaxed)) {
    }
  }

  std::vector<std::string> names_;
  std::vector<Row> rows_;
  std::atomic<bool> broken_{false};
  mutable std::mutex mutex_;
  std::optional<Error> failure_;
};

// One wait of one rank.
class SilenceWatch {
 public:
  struct Peer {
    int rank = 0;           // in the table
    bool has_come = false;  // waits for the same operation or is past it: only its beat counts
  };

  // `what`: the operation, for the error. kDeadlineFactor is applied here.
  SilenceWatch(LifeTable& table, int self, std::chrono::milliseconds silence, const char* what);
  ~SilenceWatch();  // the rank works again: stamps its life
  SilenceWatch(const SilenceWatch&) = delete;
  SilenceWatch& operator=(const SilenceWatch&) = delete;

  // True when check() is worth calling again (every kTick).
  bool due() const;

  // Throws DeadlineExceeded naming a peer that has been silent for longer than allowed. With every
  // peer come and alive, the operation itself may take `transfer` beyond the limit.
  void check(std::span<const Peer> peers, std::chrono::milliseconds transfer);

  static constexpr std::chrono::milliseconds kTick{5};

 private:
  LifeTable& table_;
  int self_;
  int64_t silence_ns_;
  const char* what_;
  int64_t from_ns_;        // silence counts from here at the earliest
  int64_t looked_ns_;      // the last check
  int64_t all_come_ns_ = 0;  // since when nobody has been missing, 0: somebody is
};

// How a rank waits without burning a core that its peers may need: a few yields, then short sleeps
// that grow with the wait.
class PollPause {
 public:
  // The first 500 yields take under a millisecond.
  explicit PollPause(int yields = 500) : yields_(yields) {}
  void pause();

 private:
  int yields_;
  int polls_ = 0;
};

}  // namespace certkv
