// The collective operations of a group of ranks, in one shape for threads, MPI and NCCL.
//
// Every operation is only enqueued: it takes views of memory the caller owns and returns at once.
// It is done when wait() has returned; until then its memory may be neither read, written nor
// freed. On the CPU a Stream carries nothing; wait() also stands for its synchronisation.
//
// A wait does not limit how long a peer may compute. It limits how long a peer may show no sign of
// life: every rank stamps alive() from the threads that work, at least once per tile, and enqueuing
// and waiting for a peer that lives are signs as well. A rank that is stopped, hung or gone stamps
// nothing, and the others get DeadlineExceeded with its name. SOURCE: the definition of D in
// "Safety S"; one silence limit serves every wait of a group.
//
// ERRORS
//   InvalidArgument   a view that does not fit (type, size, memory kind, null); found before
//                     anything is enqueued, the group stays whole
//   DeadlineExceeded  a peer showed no life for longer than the limit; it is named
//   CommError         the transport failed, or a peer gave up (its reason is in the message)
// After DeadlineExceeded or CommError all groups of the job are broken on all ranks: whoever waits,
// and whoever calls later, gets the first error. There is no repair: end the job, resume it.
//
// THREADS: one thread per rank calls the operations (the same ones, in the same order, on every
// rank); alive() and abort() may be called from any thread.
#pragma once

#include <chrono>
#include <span>
#include <string>
#include <string_view>

#include "kernels/arith/verdict.h"
#include "kernels/base/tensor_view.h"

namespace certkv {

inline constexpr std::chrono::milliseconds kDefaultSilence{5000};

class GroupLife;

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;  // within this group, [0, size())
  virtual int size() const = 0;

  // inout[i] becomes the sum over the ranks, with the same bits on every rank.
  // F32: the order is the implementation's own. F16, BF16: summed in FP32 in rank order, rounded
  // once. U64: modulo 2^64. Other types: InvalidArgument.
  // REQUIRES the same count and type on every rank.
  virtual void all_reduce_sum(TensorView inout, Stream stream) = 0;

  // out[r * in.count + i] becomes rank r's in[i]. Any type.
  // REQUIRES out.count == size() * in.count; `in` apart from `out` or exactly this rank's part.
  virtual void all_gather(TensorView in, TensorView out, Stream stream) = 0;

  // inout becomes root's. Any type.
  virtual void broadcast(TensorView inout, int root, Stream stream) = 0;

  // One record per sequence: its `max` part becomes the maximum over the ranks, `sum` the sum, word
  // by word as unsigned integers, so that no NaN is lost (method section 8).
  // ENSURES inout may be read at any time: it holds failed_verdict() until wait() returns, and for
  // ever when it throws. Whoever reads a result first asks verdict_agreed(record, size(), step).
  virtual void reduce_verdict(std::span<VerdictRecord> inout, Stream stream) = 0;

  // Done when every rank has enqueued it.
  virtual void barrier(Stream stream) = 0;

  // Returns when everything enqueued on this rank is done.
  // `silence`: no peer waited for may show no sign of life for longer (sanitizer builds wait
  // kDeadlineFactor times as long). It counts from the peer's last sign or from the start of the
  // wait, whichever is later; a waiter that was itself stopped counts anew. Where it is longer than
  // silence() it is the work of peers that may be silent so long; a process that shows no life at all
  // for silence() is found all the same.
  virtual void wait(std::chrono::milliseconds silence) = 0;
  void wait() { wait(silence_); }

  // Throws if the group is already known to be broken; never waits. For long work between waits.
  virtual void poll_error() = 0;

  // A sign of life of this rank, in all its groups. Costs one clock read and one store.
  virtual void alive() noexcept = 0;

  // Breaks all groups of the job: peers get CommError with this rank's name and the reason. For the
  // rank whose own work failed. It does not end the process.
  virtual void abort(std::string_view reason) noexcept = 0;

  // "rank 1 (node-a)": how errors call a rank of this group.
  virtual std::string peer_name(int rank) const = 0;

  // For a communicator laid over this one. Lives as long as this.
  virtual GroupLife& group_life() = 0;

  // Limit of waits that name none: `parallel.deadline_seconds`.
  void set_silence(std::chrono::milliseconds silence) { silence_ = silence; }
  std::chrono::milliseconds silence() const { return silence_; }

 protected:
  Communicator() = default;

 private:
  std::chrono::milliseconds silence_ = kDefaultSilence;
};

}  // namespace certkv
