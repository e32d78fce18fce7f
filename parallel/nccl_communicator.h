// The communicator over NCCL: one process per GPU, everything in the stream of the rank's device.
//
// Device views are used where they lie; host views are carried through pinned and device memory of
// the communicator's own, which grows to the largest need between two waits and is kept, so that
// what a CUDA graph has captured stays true. A Stream given to an operation must be the device's,
// or null, which means the same.
//
// Operations on device views may be captured in graphs, which belong to the communicator: NCCL
// neither finalizes nor gives up a communicator that a graph still refers to. Between a capture and
// its launches nothing of the communicator changes: it stays non-blocking, a call that NCCL goes on
// with by itself is waited for before the capture goes on, and what is launched is watched, timed
// and aborted as everything else of the stream.
//
// NCCL itself has no time-outs, no names and no way back from an error. Peers are watched through
// the group that this one was set up over, as over MPI: a rank that is stopped, hung or gone is
// named within the silence limit. Then NCCL is aborted on a thread of its own, because the abort
// can hang as well; what came first is thrown by this and every later call. If the abort does not
// return, its memory is left alone, the log says so, and only the end of the process frees the GPU.
//
// After all ranks have come to a wait, the work of the stream may take the silence limit, and a
// millisecond more for every 16 KiB moved: enqueue no more than that between two waits.
//
// Verdicts are reduced as unsigned integers (ncclUint64: ncclMax, ncclSum), so that no NaN is lost.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "parallel/communicator.h"
#include "parallel/nccl_api.h"

namespace certkv {

class NcclDevice;

struct NcclOptions {
  // For the making of the communicator, beyond the silence limit; on large clusters it takes long.
  std::chrono::milliseconds init_time{60000};
  std::chrono::milliseconds abort_time{1000};  // what ncclCommAbort may take before it is left
};

class NcclCommunicator : public Communicator {
 public:
  // Captures what `work` enqueues on the device's stream, this communicator's operations on device
  // views included, under a number of the caller's; nothing of it is done yet. The same
  // operations must have been done outside of a capture before: `work` must neither allocate nor
  // wait. NCCL asks that all ranks capture an operation or none, and launch the same graph.
  // Returns "", or why NCCL or the device refused: then this communicator is good for nothing more,
  // and discard() is to follow on all ranks. Throws as operations do, where a peer failed or `work`
  // did something else wrong.
  // REQUIRES no operation under way.
  virtual std::string capture(uint64_t number, const std::function<void()>& work) = 0;
  // One operation: all that was captured under this number, once more.
  virtual void launch(uint64_t number) = 0;
  // What was captured under this number, if anything, is not needed any more.
  virtual void forget(uint64_t number) noexcept = 0;
  // Aborts NCCL without a failure of the group. Only the destructor may follow.
  virtual void discard() noexcept = 0;
};

// Collective over `control`, which is used for the set-up and then only for signs of life, names
// and failures. The ranks must have one version of NCCL (CommError names two that differ). `device`
// outlives the communicator and is the current device of the calling thread.
// Throws as Communicator's operations do.
std::unique_ptr<NcclCommunicator> make_nccl_communicator(std::unique_ptr<Communicator> control,
                                                         std::shared_ptr<const NcclApi> api,
                                                         NcclDevice& device,
                                                         const NcclOptions& options = {});

}  // namespace certkv
