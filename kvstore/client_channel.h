// The rank's end of the control socket: requests with deadlines, and a thread that watches the
// store's life.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/deadline.h"
#include "kvstore/control.h"
#include "kvstore/unique_fd.h"

namespace certkv {

class ClientChannel {
 public:
  struct Reply {
    ControlStatus status = ControlStatus::Ok;
    std::vector<std::byte> payload;
    std::string text() const {
      return {reinterpret_cast<const char*>(payload.data()), payload.size()};
    }
  };

  // Connects to the store's socket and attaches; see StoreClient::attach.
  ClientChannel(const std::string& socket, int rank, std::chrono::milliseconds silence,
                std::chrono::milliseconds heartbeat, Deadline deadline);
  ~ClientChannel();
  ClientChannel(const ClientChannel&) = delete;
  ClientChannel& operator=(const ClientChannel&) = delete;

  const AttachReply& attached() const { return attached_; }
  int take_arena_fd() { return arena_fd_.release(); }

  // Sends and waits for the answer. Throws StoreLost or DeadlineExceeded. THREADS: safe.
  Reply request(ControlOp op, std::span<const std::byte> payload);
  // Sends and does not wait; never throws. THREADS: safe.
  void post(ControlOp op, std::span<const std::byte> payload) noexcept;

  const std::atomic<bool>& lost() const { return lost_; }
  std::string lost_reason() const;
  void stamp_progress() { progress_.fetch_add(1, std::memory_order_relaxed); }

  // Says farewell (best effort), ends the watcher and closes the socket. Idempotent.
  void close() noexcept;

 private:
  struct Waiting {
    ControlOp op = ControlOp::Heartbeat;
    bool done = false;
    Reply reply;
  };
  Reply request(ControlOp op, std::span<const std::byte> payload, std::chrono::milliseconds within);
  void connect(const std::string& socket, Deadline deadline);
  void attach(int rank, Deadline deadline);
  uint64_t send_locked(ControlOp op, std::span<const std::byte> payload);
  void lose_locked(const std::string& reason);
  void watch();
  void receive();
  void take_frame(const FrameHeader& header, std::span<const std::byte> payload);

  std::string name_;
  std::chrono::milliseconds silence_, heartbeat_;
  UniqueFd socket_, wake_, arena_fd_;
  AttachReply attached_;

  mutable std::mutex mutex_;  // guards everything down to `reason_`
  std::condition_variable answered_;
  uint64_t sequence_ = 0;
  std::map<uint64_t, Waiting*> waiting_;
  std::string reason_;
  bool stop_ = false;

  std::atomic<bool> lost_{false};
  std::atomic<uint64_t> progress_{0};
  std::vector<std::byte> inbox_;  // watcher only
  std::thread watcher_;
};

}  // namespace certkv
