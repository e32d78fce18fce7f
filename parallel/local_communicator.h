// The communicator of thread ranks: the last rank to enqueue an operation carries it out for all.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/liveness.h"

namespace certkv {

class LocalWorld;

// What the members of one group share. THREADS: any.
class LocalGroup {
 public:
  enum class Kind : uint8_t { Sum, Gather, Broadcast, Verdict, Barrier };
  struct Request {
    Kind kind = Kind::Barrier;
    DType dtype = DType::U64;
    size_t count = 0;  // elements of `in`, or verdict records
    int root = 0;
    void* in = nullptr;
    void* out = nullptr;
    // This rank's votes, later the result; the rank itself copies it to its caller in wait().
    std::shared_ptr<std::vector<VerdictRecord>> verdicts;
  };

  LocalGroup(LifeTable& life, std::vector<int> members);

  int size() const { return int(members_.size()); }
  const std::vector<int>& members() const { return members_; }

  void enqueue(int rank, Request request);
  void wait(int rank, std::chrono::milliseconds silence);
  void leave(int rank) noexcept;  // the rank's communicator is being destroyed

  std::atomic<uint64_t>& upper_arrived(int rank) { return upper_arrived_[size_t(rank)]; }

 private:
  struct Operation {
    std::vector<Request> requests;  // by rank
    std::vector<bool> present;
    int missing = 0;
  };
  static const char* name(Kind kind);
  void run(Operation& operation);
  void check_same(const Operation& operation, int rank, const Request& request);
  // Throws what broke the group, after nobody writes to this rank's memory any more.
  [[noreturn]] void throw_broken(std::unique_lock<std::mutex>& lock);

  LifeTable& life_;
  std::vector<int> members_;  // ranks of the world
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Operation> open_;           // operations done_ + 1, done_ + 2, ...
  std::vector<uint64_t> enqueued_;       // by rank
  std::vector<bool> left_;
  std::vector<std::atomic<uint64_t>> upper_arrived_;  // by rank, see GroupLife
  std::atomic<uint64_t> done_{0};
  bool running_ = false;                 // a rank is carrying out open_.front()
};

std::unique_ptr<Communicator> make_local_communicator(std::shared_ptr<LocalWorld> world,
                                                      std::shared_ptr<LocalGroup> group,
                                                      int world_rank);

}  // namespace certkv
