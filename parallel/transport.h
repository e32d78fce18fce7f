// Requests and replies between processes that are in no common MPI job: a rank and the stores of
// other nodes, or two stores.
//
// A transport connects to others by "host:port" and may listen itself. A call carries a request of
// up to some MiB to a peer, whose handler answers it with up to some MiB; many calls may be under
// way at once, each with its own deadline. A peer that is silent for too long is lost, even when
// nothing says so: both ends send heartbeats. Every message is authenticated under the job's key
// (secure_session.h).
//
// Bodies lie in windows: memory that is allocated and made known to the network once, at the start.
// All sizes are checked against the limits below before a byte of memory is taken for them.
//
// | what happens                        | what the caller sees                                   |
// |-------------------------------------|--------------------------------------------------------|
// | the call itself is wrong            | InvalidArgument, thrown                                |
// | no window is free                   | OutOfMemory, thrown                                    |
// | the peer's handler refuses or throws| Refused, and why                                       |
// | too many requests at the peer       | Busy                                                   |
// | the reply does not fit reply_bytes  | TooLarge                                               |
// | no answer before the deadline       | Deadline; the connection stays                         |
// | the peer died, is silent, or broke  | PeerLost, and why; so are all its other calls, and     |
// | the protocol                        | every later one with this PeerId                       |
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kernels/base/deadline.h"
#include "parallel/secure_session.h"
#include "parallel/window_pool.h"

namespace certkv {

// A connection. Never means another one: a number that was given out is not given out again.
struct PeerId {
  uint64_t number = 0;  // 0: nobody
  friend auto operator<=>(const PeerId&, const PeerId&) = default;
};

enum class CallStatus : uint8_t {
  Pending = 0,  // never seen after wait()
  Ok,
  Refused,
  Busy,
  TooLarge,
  Deadline,
  PeerLost,
  Cancelled,
};
const char* call_status_name(CallStatus status);

struct TransportLimits {
  size_t request_bytes = size_t(8) << 20;
  size_t reply_bytes = size_t(16) << 20;
  size_t window_bytes = size_t(128) << 20;  // of all messages under way; larger: more host memory
  size_t connections = 256;
  size_t strangers = 16;  // connections that have not yet shown that they know the key
  size_t calls = 64;      // under way on one connection
  size_t queued = 256;    // requests that wait for the handler
  size_t handler_threads = 1;
};

struct TransportOptions {
  std::string listen;  // "host:port", port 0 for any; empty: does not listen
  // What the network must be: "auto" takes what there is, "tcp" that alone, "shm" shared memory or
  // nothing (one node), "rdma" InfiniBand or RoCE or nothing.
  std::string require = "auto";
  std::chrono::milliseconds heartbeat{250};
  std::chrono::milliseconds silence{2000};  // of a peer, until it is lost
  TransportLimits limits;
};

// ---- the side that asks -------------------------------------------------------------------------

struct CallState;

// One call under way. Dropping it cancels the call.
// THREADS: one at a time.
class TransportCall {
 public:
  TransportCall() = default;
  explicit TransportCall(std::shared_ptr<CallState> state) : state_(std::move(state)) {}
  TransportCall(TransportCall&&) noexcept = default;
  TransportCall& operator=(TransportCall&& other) noexcept;
  ~TransportCall() { cancel(); }

  bool valid() const { return state_ != nullptr; }
  CallStatus poll();       // Pending, or how it ended
  CallStatus wait();       // bounded by the call's deadline
  void cancel() noexcept;  // still pending: Cancelled

  // After Ok: the reply, in a window that is this call's until it is dropped. Otherwise empty.
  std::span<const std::byte> reply() const;
  // After anything but Ok: what happened.
  std::string why() const;

 private:
  std::shared_ptr<CallState> state_;
};

// ---- the side that answers ----------------------------------------------------------------------

struct TransportRequest {
  PeerId from;
  uint32_t op = 0;
  std::span<const std::byte> body;
  Deadline deadline = Deadline::never();  // of the caller
};

class TransportReply {
 public:
  TransportReply(WindowPool pool, size_t limit, Deadline deadline)
      : pool_(std::move(pool)), limit_(limit), deadline_(deadline) {}

  // Memory for the reply's body, zeroed nowhere. Waits for a window until the caller's deadline,
  // then throws OutOfMemory; InvalidArgument above what the caller takes (it sees TooLarge).
  std::span<std::byte> reserve(size_t bytes);
  void shrink(size_t bytes);  // REQUIRES bytes <= what was reserved
  size_t limit() const { return limit_; }
  std::span<const std::byte> body() const { return window_.bytes().first(bytes_); }

 private:
  friend class HandlerPool;
  WindowPool pool_;
  size_t limit_;
  Deadline deadline_;
  Window window_;
  size_t bytes_ = 0;
  bool too_large_ = false;
};

// Answers a request; nothing reserved is an empty reply. What it throws reaches the caller as
// Refused. THREADS: called from limits.handler_threads threads of the transport. REQUIRES that it
// returns in bounded time.
using TransportHandler = std::function<void(const TransportRequest&, TransportReply&)>;

// ---- the transport ------------------------------------------------------------------------------

// THREADS: any, unless said otherwise.
class Transport {
 public:
  virtual ~Transport() = default;  // every call under way ends as PeerLost
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  // "host:port" where it listens, with the port it was given; empty where it does not.
  virtual std::string address() const = 0;
  // One line: which networks it uses.
  virtual std::string description() const = 0;

  // Connects and authenticates both ends. Throws InvalidArgument (no such form of address),
  // CommError (nobody there, refused, another key or version) or DeadlineExceeded.
  virtual PeerId connect(const std::string& address, Deadline deadline) = 0;
  virtual void disconnect(PeerId peer) = 0;
  virtual bool alive(PeerId peer) const = 0;
  virtual std::string why_lost(PeerId peer) const = 0;

  // Sends `parts`, one after the other, as the body of a request. They are copied before this
  // returns. `reply_bytes`: the most that the reply may have; its memory is set aside now.
  virtual TransportCall call(PeerId peer, uint32_t op,
                             std::span<const std::span<const std::byte>> parts, size_t reply_bytes,
                             Deadline deadline) = 0;
  TransportCall call(PeerId peer, uint32_t op, std::span<const std::byte> body, size_t reply_bytes,
                     Deadline deadline) {
    return call(peer, op, std::span<const std::span<const std::byte>>(&body, 1), reply_bytes,
                deadline);
  }

 protected:
  Transport() = default;
};

}  // namespace certkv
