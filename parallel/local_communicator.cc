#include "parallel/local_communicator.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "kernels/base/failpoint.h"
#include "parallel/group_life.h"
#include "parallel/local_world.h"
#include "parallel/ordered_sum.h"
#include "parallel/verdict_reduce.h"
#include "parallel/view_checks.h"

namespace certkv {

LocalGroup::LocalGroup(LifeTable& life, std::vector<int> members)
    : life_(life),
      members_(std::move(members)),
      enqueued_(members_.size()),
      left_(members_.size()),
      upper_arrived_(members_.size()) {}

const char* LocalGroup::name(Kind kind) {
  switch (kind) {
    case Kind::Sum: return "all_reduce_sum";
    case Kind::Gather: return "all_gather";
    case Kind::Broadcast: return "broadcast";
    case Kind::Verdict: return "reduce_verdict";
    case Kind::Barrier: return "barrier";
  }
  return "?";
}

void LocalGroup::check_same(const Operation& operation, int rank, const Request& request) {
  for (int r = 0; r < size(); ++r) {
    if (!operation.present[size_t(r)]) continue;
    const Request& other = operation.requests[size_t(r)];
    if (other.kind == request.kind && other.dtype == request.dtype &&
        other.count == request.count && other.root == request.root) {
      return;  // the others were compared when they came
    }
    life_.break_with(
        ErrorKind::CommError,
        fmt::format("ranks disagree on an operation: {} calls {} of {} {}, root {}; {} calls {} of "
                    "{} {}, root {}",
                    life_.name(members_[size_t(r)]), name(other.kind), other.count,
                    dtype_name(other.dtype), other.root, life_.name(members_[size_t(rank)]),
                    name(request.kind), request.count, dtype_name(request.dtype), request.root));
    return;
  }
}

void LocalGroup::throw_broken(std::unique_lock<std::mutex>& lock) {
  changed_.notify_all();
  changed_.wait(lock, [&] { return !running_; });
  lock.unlock();
  life_.throw_if_broken();
  CERTKV_THROW(CommError, "the group is broken");
}

void LocalGroup::enqueue(int rank, Request request) {
  life_.alive(members_[size_t(rank)]);
  std::unique_lock lock(mutex_);
  if (life_.broken()) throw_broken(lock);
  const uint64_t index = enqueued_[size_t(rank)] - done_.load(std::memory_order_relaxed);
  if (index == open_.size()) {
    open_.push_back({std::vector<Request>(members_.size()), std::vector<bool>(members_.size()),
                     size()});
  }
  Operation& operation = open_[index];
  check_same(operation, rank, request);
  if (life_.broken()) throw_broken(lock);
  operation.requests[size_t(rank)] = std::move(request);
  operation.present[size_t(rank)] = true;
  ++enqueued_[size_t(rank)];
  if (--operation.missing > 0) return;

  // The last to come. Operations are enqueued in order, so this one is at the front; a deque keeps
  // it in place while others enqueue behind it.
  running_ = true;
  lock.unlock();
  run(operation);
  lock.lock();
  running_ = false;
  open_.pop_front();
  done_.fetch_add(1, std::memory_order_release);
  lock.unlock();
  changed_.notify_all();
}

void LocalGroup::run(Operation& operation) {
  std::vector<Request>& requests = operation.requests;
  const Request& first = requests[0];
  switch (first.kind) {
    case Kind::Sum: {
      std::vector<const void*> parts;
      for (const Request& r : requests) parts.push_back(r.in);
      ordered_sum(first.dtype, parts.data(), parts.size(), first.count, first.out);
      for (const Request& r : requests) {
        if (r.out != first.out && first.count > 0)
          std::memcpy(r.out, first.out, first.count * dtype_bytes(first.dtype));
      }
      break;
    }
    case Kind::Gather: {
      const size_t bytes = first.count * dtype_bytes(first.dtype);
      for (const Request& to : requests) {
        for (size_t r = 0; r < requests.size() && bytes > 0; ++r) {
          std::memmove(static_cast<char*>(to.out) + r * bytes, requests[r].in, bytes);
        }
      }
      break;
    }
    case Kind::Broadcast: {
      const void* root = requests[size_t(first.root)].in;
      for (const Request& to : requests) {
        if (to.out != root && first.count > 0) {
          std::memcpy(to.out, root, first.count * dtype_bytes(first.dtype));
        }
      }
      break;
    }
    case Kind::Verdict: {
      std::vector<VerdictRecord>& merged = *first.verdicts;
      for (size_t r = 1; r < requests.size(); ++r) {
        for (size_t i = 0; i < merged.size(); ++i) {
          merge_verdict(merged[i], (*requests[r].verdicts)[i]);
        }
      }
      for (size_t r = 1; r < requests.size(); ++r) *requests[r].verdicts = merged;
      break;
    }
    case Kind::Barrier: break;
  }
}

void LocalGroup::wait(int rank, std::chrono::milliseconds silence) {
#if CERTKV_FAILPOINTS
  try {
    CERTKV_FAILPOINT(ranks_wait);
  } catch (const Error& error) {  // as a wait that fails: nobody touches this rank's memory any more
    life_.break_with(error.kind(), error.what());
    std::unique_lock lock(mutex_);
    throw_broken(lock);
  }
#endif
  const int self = members_[size_t(rank)];
  const uint64_t target = enqueued_[size_t(rank)];  // written by this thread alone
  const auto is_done = [&] { return done_.load(std::memory_order_acquire) >= target; };
  for (int spin = 0; spin < 20 && !is_done(); ++spin) std::this_thread::yield();
  if (is_done()) return life_.alive(self);

  std::unique_lock lock(mutex_);
  const char* what = is_done() ? "" : name(open_.front().requests[size_t(rank)].kind);
  SilenceWatch watch(life_, self, silence, what);
  std::vector<SilenceWatch::Peer> missing;
  while (!is_done()) {
    if (life_.broken()) throw_broken(lock);
    missing.clear();
    for (int r = 0; r < size(); ++r) {
      if (enqueued_[size_t(r)] >= target) continue;
      missing.push_back({members_[size_t(r)], false});
      if (left_[size_t(r)]) {
        life_.break_with(ErrorKind::CommError,
                         fmt::format("{}: {} has left the group", what, life_.name(members_[size_t(r)])));
        throw_broken(lock);
      }
    }
    try {
      const size_t bytes = open_.front().requests[size_t(rank)].count * 8;
      watch.check(missing, std::chrono::milliseconds(bytes >> 14));
    } catch (const Error& error) {
      life_.break_with(error.kind(), error.what());
      throw_broken(lock);
    }
    changed_.wait_for(lock, SilenceWatch::kTick);
  }
}

void LocalGroup::leave(int rank) noexcept {
  std::unique_lock lock(mutex_);
  left_[size_t(rank)] = true;
  if (enqueued_[size_t(rank)] > done_.load(std::memory_order_relaxed)) {
    // Its memory is about to go: nobody may carry out what it enqueued.
    life_.break_with(ErrorKind::CommError,
                     fmt::format("{} left with operations under way", life_.name(members_[size_t(rank)])));
    changed_.wait(lock, [&] { return !running_; });
  }
  lock.unlock();
  changed_.notify_all();
}

namespace {

class LocalCommunicator final : public Communicator, private GroupLife {
 public:
  LocalCommunicator(std::shared_ptr<LocalWorld> world, std::shared_ptr<LocalGroup> group,
                    int world_rank)
      : world_(std::move(world)), group_(std::move(group)), world_rank_(world_rank) {
    const auto& members = group_->members();
    rank_ = int(std::find(members.begin(), members.end(), world_rank) - members.begin());
  }
  ~LocalCommunicator() override { group_->leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }

  void all_reduce_sum(TensorView inout, Stream) override {
    check_sum(inout);
    group_->enqueue(rank_, {.kind = LocalGroup::Kind::Sum, .dtype = inout.dtype,
                            .count = inout.count, .in = inout.data, .out = inout.data,
                            .verdicts = {}});
  }
  void all_gather(TensorView in, TensorView out, Stream) override {
    check_gather(in, out, rank_, size());
    group_->enqueue(rank_, {.kind = LocalGroup::Kind::Gather, .dtype = in.dtype,
                            .count = in.count, .in = in.data, .out = out.data, .verdicts = {}});
  }
  void broadcast(TensorView inout, int root, Stream) override {
    check_broadcast(inout, root, size());
    group_->enqueue(rank_, {.kind = LocalGroup::Kind::Broadcast, .dtype = inout.dtype,
                            .count = inout.count, .root = root, .in = inout.data,
                            .out = inout.data, .verdicts = {}});
  }
  void reduce_verdict(std::span<VerdictRecord> inout, Stream) override {
    auto votes = std::make_shared<std::vector<VerdictRecord>>(inout.begin(), inout.end());
    std::fill(inout.begin(), inout.end(), failed_verdict());
    group_->enqueue(rank_, {.kind = LocalGroup::Kind::Verdict, .count = inout.size(),
                            .verdicts = votes});
    verdicts_.emplace_back(std::move(votes), inout);
  }
  void barrier(Stream) override { group_->enqueue(rank_, {.verdicts = {}}); }

  using Communicator::wait;
  void wait(std::chrono::milliseconds silence) override {
    group_->wait(rank_, silence);
    for (auto& [result, inout] : verdicts_) std::copy(result->begin(), result->end(), inout.begin());
    verdicts_.clear();
  }
  void poll_error() override { world_->life().throw_if_broken(); }
  void alive() noexcept override { world_->life().alive(world_rank_); }
  void abort(std::string_view reason) noexcept override { world_->abort(world_rank_, reason); }
  std::string peer_name(int rank) const override {
    return world_->life().name(group_->members()[size_t(rank)]);
  }
  GroupLife& group_life() override { return *this; }

 private:
  LifeTable& life() override { return world_->life(); }
  const std::vector<int>& members() const override { return group_->members(); }
  void set_upper_arrived(uint64_t operations) noexcept override {
    group_->upper_arrived(rank_).store(operations, std::memory_order_relaxed);
  }
  uint64_t upper_arrived(int rank) const override {
    return group_->upper_arrived(rank).load(std::memory_order_relaxed);
  }
  void fail(ErrorKind kind, const std::string& message) noexcept override {
    world_->life().break_with(kind, message);
  }

  std::shared_ptr<LocalWorld> world_;
  std::shared_ptr<LocalGroup> group_;
  int world_rank_, rank_ = 0;
  std::vector<std::pair<std::shared_ptr<std::vector<VerdictRecord>>, std::span<VerdictRecord>>>
      verdicts_;  // under way, and where they belong
};

}  // namespace

std::unique_ptr<Communicator> make_local_communicator(std::shared_ptr<LocalWorld> world,
                                                      std::shared_ptr<LocalGroup> group,
                                                      int world_rank) {
  return std::make_unique<LocalCommunicator>(std::move(world), std::move(group), world_rank);
}

}  // namespace certkv
