#include "parallel/nccl_handle.h"

#include <condition_variable>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "parallel/liveness.h"

namespace certkv {

// Shared with the thread that ends the communicator, which may outlive the handle.
struct NcclHandle::Ending {
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false;
};

NcclHandle::NcclHandle(std::shared_ptr<const NcclApi> api, std::string who)
    : api_(std::move(api)), who_(std::move(who)) {}

NcclHandle::~NcclHandle() {
  abort();
}

NcclComm NcclHandle::need(const char* what) const {
  CERTKV_EXPECT(!aborted_, CommError, "{}: the NCCL communicator of {} has been aborted", what,
                who_);
  CERTKV_EXPECT(comm_ != nullptr, CommError, "{}: {} has no NCCL communicator", what, who_);
  return comm_;
}

void NcclHandle::check(NcclResult result, const char* what, NcclComm comm) const {
  if (result == NcclResult::Success || result == NcclResult::InProgress) return;
  throw Error(ErrorKind::CommError,
              describe_nccl_failure(result, what, who_, api_->last_error(comm), api_->name),
              __FILE__, __LINE__);
}

void NcclHandle::start(int ranks, const NcclUniqueId& id, int rank) {
  const std::lock_guard lock(mutex_);
  CERTKV_EXPECT(!aborted_, CommError, "ncclCommInitRankConfig: {} has given up before", who_);
  NcclComm comm = nullptr;
  const NcclResult result = api_->init_rank(&comm, ranks, id, rank);
  comm_ = comm;  // also of a failed start: it must be aborted
  check(result, "ncclCommInitRankConfig", comm);
  CERTKV_EXPECT(comm != nullptr, CommError, "ncclCommInitRankConfig: {} got no communicator of {}",
                who_, api_->name);
}

bool NcclHandle::settled(const char* what) {
  const std::lock_guard lock(mutex_);
  const NcclComm comm = need(what);
  // Neither is set by a library that fails to answer: that is no success.
  NcclResult state = NcclResult::InternalError;
  check(api_->get_async_error(comm, &state), what, comm);
  check(state, what, comm);
  return state == NcclResult::Success;
}

void NcclHandle::end_with(const std::function<NcclResult(NcclComm)>& call, NcclComm comm) noexcept {
  auto ending = std::make_shared<Ending>();
  ending_ = ending;
  try {
    // Keeps the table, and with it the library, for as long as the call takes.
    std::thread([api = api_, call, comm, ending] {
      (void)call(comm);
      const std::lock_guard lock(ending->mutex);
      ending->over = true;
      ending->changed.notify_all();
    }).detach();
  } catch (const std::exception&) {
    // No thread to be had: the communicator stays as it is, and wait_abort() says so.
  }
}

void NcclHandle::abort() noexcept {
  const std::lock_guard lock(mutex_);
  if (aborted_) return;
  aborted_ = true;
  if (comm_ == nullptr) return;
  end_with(api_->abort, comm_);
  comm_ = nullptr;
}

bool NcclHandle::aborted() const {
  const std::lock_guard lock(mutex_);
  return aborted_;
}

bool NcclHandle::wait_abort(std::chrono::milliseconds limit) noexcept {
  std::shared_ptr<Ending> ending;
  {
    const std::lock_guard lock(mutex_);
    ending = ending_;
  }
  if (!ending) return true;
  std::unique_lock lock(ending->mutex);
  return ending->changed.wait_for(lock, limit * kDeadlineFactor, [&] { return ending->over; });
}

bool NcclHandle::close(std::chrono::milliseconds limit) noexcept {
  try {
    call("ncclCommFinalize", [](const NcclApi& api, NcclComm comm) { return api.finalize(comm); });
    const Deadline deadline = Deadline::after(limit);
    PollPause pause;
    while (!settled("ncclCommFinalize")) {
      if (deadline.passed()) {
        abort();
        return false;
      }
      pause.pause();
    }
  } catch (const std::exception&) {
    abort();
    return false;
  }
  {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return false;  // aborted meanwhile
    end_with(api_->destroy, comm_);
    comm_ = nullptr;
    aborted_ = true;
  }
  return wait_abort(limit);
}

}  // namespace certkv
