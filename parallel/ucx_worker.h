// What the owner thread of a UCX transport owns: worker, listener, endpoints, connections. Included
// by parallel/ucx_*.cc alone.
//
// Callbacks of UCX only note what happened; turn() acts on it, outside of them.
#pragma once

#include <ucp/api/ucp.h>

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "parallel/transport_parts.h"
#include "parallel/ucx_context.h"

namespace certkv {

inline constexpr size_t kEagerBytes = 16384;        // larger bodies go by rendezvous
inline constexpr uint32_t kWireMagic = 0x54564b43;  // "CKVT"
inline constexpr uint16_t kWireFormat = 1;

enum class WireKind : uint16_t { Hello = 1, Welcome, Heartbeat, Request, Reply };

// Before every body, as the header of an active message.
struct WireHeader {
  uint32_t magic = kWireMagic;
  uint16_t format = kWireFormat;
  uint16_t kind = 0;
  uint64_t connection = 0;   // the receiver's secret number of it; 0 in Hello
  uint64_t sequence = 0;     // per connection and direction: 0, 1, 2, ..
  uint64_t call = 0;         // of the caller; in requests and replies
  uint32_t op = 0;           // of a request; CallStatus of a reply
  uint32_t deadline_ms = 0;  // of a request: left when it was sent
  uint64_t reply_limit = 0;  // of a request
  uint64_t body_bytes = 0;
  SecureSession::Tag tag{};  // over the bytes before it, then the body; zero in Hello
};
static_assert(sizeof(WireHeader) == 72 && offsetof(WireHeader, connection) == 8);
static_assert(offsetof(WireHeader, op) == 32 && offsetof(WireHeader, reply_limit) == 40);
static_assert(offsetof(WireHeader, tag) == 56);

// Body of Hello and Welcome.
struct WireGreeting {
  SecureSession::Nonce nonce;
  uint64_t connection;  // what the sender wants to be addressed by
};
static_assert(sizeof(WireGreeting) == 40);

// What other threads may know of a connection. THREADS: safe.
struct PeerInfo {
  std::mutex mutex;
  std::condition_variable changed;
  bool established = false;
  std::string lost;  // why; empty while it lives

  void lose(const std::string& why) {
    const std::lock_guard lock(mutex);
    if (lost.empty()) lost = why;
    changed.notify_all();
  }
};

class UcxWorker {
 public:
  // All functions: by the owner thread alone.
  UcxWorker(const JobKey& key, const TransportOptions& options, ucp_context_h context,
            WindowPool pool);
  ~UcxWorker();
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  uint16_t listen(const std::string& host, uint16_t port);  // the port it was given
  void connect(uint64_t number, std::shared_ptr<PeerInfo> info, const sockaddr* address,
               socklen_t length);
  void call(uint64_t number, uint32_t op, Window request, std::shared_ptr<CallState> state);
  void answer(uint64_t number, uint64_t call, CallStatus status, Window reply, size_t bytes);
  void lose(uint64_t number, const std::string& why);
  void close(const std::string& why);  // everything

  // Moves everything on; false where nothing was to be done.
  bool turn();
  // Prepares to sleep on descriptor(); false: there is work, do not.
  bool arm();
  int descriptor() const { return descriptor_; }
  Deadline::Clock::time_point next_tick() const { return next_tick_; }

  // Requests that passed every check. To be set before the first turn.
  std::function<bool(HandlerTask)> on_request;
  std::function<uint64_t(std::shared_ptr<PeerInfo>)> on_accept;  // gives a connection its number

 private:
  using Clock = Deadline::Clock;

  struct Incoming {
    WireHeader header;
    std::vector<std::byte> bytes;
    Window window;
    std::shared_ptr<CallState> call;  // whose window the body of a reply goes to
    std::span<std::byte> body;
    void* descriptor = nullptr;  // of a rendezvous that has not been started
    bool complete = false;
    ucs_status_t status = UCS_OK;
    std::list<std::shared_ptr<Incoming>>::iterator place;  // in receives_
    UcxWorker* worker = nullptr;
  };
  struct Outgoing {
    WireHeader header;
    std::vector<std::byte> bytes;
    Window window;
    UcxWorker* worker = nullptr;
    std::list<std::unique_ptr<Outgoing>>::iterator place;  // in sends_
  };
  struct Call {
    std::shared_ptr<CallState> state;
    bool arriving = false;
  };
  struct Connection {
    uint64_t number = 0, id = 0, remote = 0;
    ucp_ep_h ep = nullptr;
    bool client = false, established = false;
    std::string failed;  // noted by a callback
    SecureSession::Nonce nonce{};
    std::unique_ptr<SecureSession> session;
    std::map<uint64_t, std::shared_ptr<Incoming>> inbox;  // by sequence number
    std::map<uint64_t, Call> calls;
    Clock::time_point heard, sent, begun;
    std::shared_ptr<PeerInfo> info;
  };

  static ucs_status_t on_message(void* self, const void* header, size_t header_bytes, void* data,
                                 size_t bytes, const ucp_am_recv_param_t* param);
  static void on_error(void* self, ucp_ep_h ep, ucs_status_t status);
  static void on_sent(void* request, ucs_status_t status, void* outgoing);
  static void on_received(void* request, ucs_status_t status, size_t bytes, void* incoming);
  static void on_connection(ucp_conn_request_h request, void* self);

  ucs_status_t take(const WireHeader& header, void* data, size_t bytes,
                    const ucp_am_recv_param_t* param);
  ucs_status_t take_hello(const WireHeader& header, const void* data, size_t bytes,
                          const ucp_am_recv_param_t* param);
  Connection& add(uint64_t number, std::shared_ptr<PeerInfo> info, ucp_ep_h ep);
  ucp_ep_h make_endpoint(ucp_ep_params_t& params, ucs_status_t& status);
  void accept_all();
  void send(Connection& c, WireHeader header, Window window, std::vector<std::byte> bytes,
            size_t body_bytes);
  void start_receive(Connection& c, const std::shared_ptr<Incoming>& in);
  bool move(Connection& c);
  bool authentic(Connection& c, Incoming& in);
  bool greet(Connection& c, const Incoming& in);
  void dispatch(Connection& c, Incoming& in);
  void close_endpoint(ucp_ep_h ep);
  void tick();
  size_t strangers() const;

  const JobKey key_;
  const TransportOptions options_;
  WindowPool pool_;
  ucp_context_h context_;
  ucp_mem_h memory_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_listener_h listener_ = nullptr;
  int descriptor_ = -1;
  std::vector<ucp_conn_request_h> arrivals_;
  std::map<uint64_t, Connection> connections_;    // by number
  std::unordered_map<uint64_t, uint64_t> by_id_;  // secret number -> number
  std::unordered_map<ucp_ep_h, uint64_t> by_endpoint_;
  std::vector<std::pair<ucp_ep_h, WireGreeting>> hellos_;
  std::list<std::unique_ptr<Outgoing>> sends_;     // until UCX is done with their memory
  std::list<std::shared_ptr<Incoming>> receives_;  // likewise
  std::vector<void*> closing_;
  uint64_t next_call_ = 1;
  Clock::time_point next_tick_, last_tick_;
};

}  // namespace certkv
