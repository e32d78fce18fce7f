// One communicator of NCCL from its making to its end: every call of it, its asynchronous errors,
// and its abort, which happens on a thread of its own because ncclCommAbort can hang.
//
//   made -> starting -> (settled <-> in progress) -> closed
//                \-> aborting -> aborted
//
// THREADS: abort() and wait_abort() from any, all else from the rank's own.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include "parallel/nccl_api.h"

namespace certkv {

class NcclHandle {
 public:
  // who: how errors call this rank.
  NcclHandle(std::shared_ptr<const NcclApi> api, std::string who);
  ~NcclHandle();  // aborts, unless closed; does not wait for it
  NcclHandle(const NcclHandle&) = delete;
  NcclHandle& operator=(const NcclHandle&) = delete;

  // Begins to make the communicator; it is there once settled() says so.
  void start(int ranks, const NcclUniqueId& id, int rank);

  // Makes one call, f(api, comm); it may go on after it has returned, until settled().
  // Throws CommError if it failed, or if the communicator has been aborted.
  template <typename Function>
  void call(const char* what, Function&& f) {
    std::unique_lock lock(mutex_);
    const NcclComm comm = need(what);
    check(f(*api_, comm), what, comm);
  }

  // Whether NCCL has done what it was last called for. Throws CommError: an asynchronous error, or
  // aborted.
  bool settled(const char* what);

  // Starts the abort, once; returns at once. No call of this communicator is made afterwards.
  void abort() noexcept;
  bool aborted() const;  // it has been started
  // Whether ncclCommAbort has returned within `limit`; true if there was nothing to abort.
  bool wait_abort(std::chrono::milliseconds limit) noexcept;

  // The orderly end: finalizes within `limit` and destroys. False, and aborted, if that fails.
  bool close(std::chrono::milliseconds limit) noexcept;

 private:
  struct Ending;
  NcclComm need(const char* what) const;
  void check(NcclResult result, const char* what, NcclComm comm) const;
  void end_with(const std::function<NcclResult(NcclComm)>& call, NcclComm comm) noexcept;

  std::shared_ptr<const NcclApi> api_;
  std::string who_;
  mutable std::mutex mutex_;  // over every call, and comm_
  NcclComm comm_ = nullptr;   // null: not started, or no longer ours
  bool aborted_ = false;
  std::shared_ptr<Ending> ending_;  // the abort or destruction under way
};

}  // namespace certkv
