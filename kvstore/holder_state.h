// Inside the holder: what its parts share. Included by holder.cc and holder_connection.cc alone.
#pragma once

#include <fmt/core.h>
#include <sys/types.h>

#include <array>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/asio.h"
#include "kernels/base/failpoint.h"
#include "kvstore/arena.h"
#include "kvstore/control.h"
#include "kvstore/extent_table.h"
#include "kvstore/holder.h"

namespace certkv {

class HolderConnection;
using LocalStream = boost::asio::local::stream_protocol;
using ErrorCode = boost::system::error_code;

// One thread runs everything here, so nothing is locked.
struct HolderState {
  HolderState(Arena a, uint64_t nonce, const HolderOptions& o)
      : options(o),
        arena(std::move(a)),
        boot_nonce(nonce),
        extents(kArenaDataOffset, arena.data_bytes(),
                [this](Piece p) { std::memset(arena.at(p.offset, p.bytes), 0, p.bytes); }),
        acceptor(io),
        signals(io),
        life_timer(io),
        turn_timer(io) {}

  void bind();
  void accept();
  void turn();
  void scrub();
  void watch_signals();
  void end_after(std::chrono::milliseconds d, const std::string& reason);
  void end(const std::string& reason);
  void last_rank_gone();
  std::string status() const;

  HolderOptions options;
  Arena arena;
  uint64_t boot_nonce;
  ExtentTable extents;
  std::string socket_file;  // to remove at the end; empty for an abstract name
  boost::asio::io_context io;
  LocalStream::acceptor acceptor;
  boost::asio::signal_set signals;
  boost::asio::steady_timer life_timer;  // ends the store when nobody needs it
  boost::asio::steady_timer turn_timer;
  std::unique_ptr<ServerChild> server;
  std::map<HolderConnection*, std::shared_ptr<HolderConnection>> connections;
  size_t attached = 0;
  uint64_t next_session = 1;
  uint64_t refused = 0, malformed = 0, dead_ranks = 0;
  std::vector<std::byte> peers;  // what was last reported: the holder keeps it and does not read it
  bool scrubbing = false, ended = false;
  std::string why;
  std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
};

struct HolderPeer {
  uid_t uid = uid_t(-1);
  pid_t pid = 0;
};
HolderPeer peer_of(int fd);  // as the kernel knows it; nobody where it does not

// One client: waits for a frame, reads it within a time limit, answers it, and only then reads the
// next one, so that a client can hold up nobody but itself.
class HolderConnection : public std::enable_shared_from_this<HolderConnection> {
 public:
  HolderConnection(HolderState& holder, LocalStream::socket socket, HolderPeer peer)
      : holder_(holder), socket_(std::move(socket)), timer_(holder.io), peer_(peer) {}

  void start() {
    limit();  // to attach
    wait();
  }
  void close(const std::string& why);

  bool attached() const { return session_ != 0; }
  std::string describe() const {
    return fmt::format("{{\"session\":{},\"rank\":{},\"pid\":{},\"bytes\":{},\"progress\":{}}}",
                       session_, rank_, peer_.pid, holder_.extents.bytes_of(session_), progress_);
  }

 private:
  void limit() {
    timer_.expires_after(holder_.options.stranger);
    timer_.async_wait([self = shared_from_this()](ErrorCode error) {
      // A timer that had fired already when it was called off comes here without an error.
      if (error || self->timer_.expiry() > std::chrono::steady_clock::now()) return;
      self->close(self->attached() ? "a frame did not end in time" : "did not attach in time");
    });
  }
  void lift_limit() { timer_.expires_at(std::chrono::steady_clock::time_point::max()); }
  void wait() {
    socket_.async_wait(LocalStream::socket::wait_read,
                       [self = shared_from_this()](ErrorCode error) {
                         if (error) return self->close(error.message());
                         if (self->attached()) self->limit();
                         self->read_header();
                       });
  }
  void read_header() {
    boost::asio::async_read(socket_, boost::asio::buffer(&header_, sizeof header_),
                            [self = shared_from_this()](ErrorCode error, size_t) {
                              if (error) return self->close(error.message());
                              CERTKV_FAILPOINT_BYTES(holder_header, &self->header_,
                                                     sizeof self->header_);
                              if (const char* defect = header_defect(self->header_, true)) {
                                return self->reject(defect);
                              }
                              self->read_payload();
                            });
  }
  void read_payload() {
    boost::asio::async_read(socket_, boost::asio::buffer(payload_.data(), header_.payload_bytes),
                            [self = shared_from_this()](ErrorCode error, size_t) {
                              if (error) return self->close(error.message());
                              self->handle();
                            });
  }
  void reject(const std::string& what) {
    ++holder_.malformed;
    close("malformed: " + what);
  }
  void reply(ControlStatus status, std::span<const std::byte> payload) {
    out_ =
        make_frame(uint16_t(header_.op | kReplyBit), status, header_.sequence, session_, payload);
    CERTKV_FAILPOINT_BYTES(holder_reply, out_.data(), out_.size());
    boost::asio::async_write(socket_, boost::asio::buffer(out_),
                             [self = shared_from_this()](ErrorCode error, size_t) {
                               if (error) return self->close(error.message());
                               if (self->attached()) self->lift_limit();
                               self->wait();
                             });
  }
  void refuse(const std::string& text) { reply(ControlStatus::BadRequest, text_payload(text)); }

  void handle();
  void handle_attach(std::span<const std::byte> payload);
  void handle_allocate(std::span<const std::byte> payload);
  void handle_adopt(std::span<const std::byte> payload);
  void handle_list(std::span<const std::byte> payload);
  void handle_release(std::span<const std::byte> payload);
  void handle_heartbeat(std::span<const std::byte> payload);

  HolderState& holder_;
  LocalStream::socket socket_;
  boost::asio::steady_timer timer_;
  HolderPeer peer_;
  FrameHeader header_;
  std::array<std::byte, kMaxRequestPayload> payload_{};
  std::vector<std::byte> out_;
  uint64_t last_sequence_ = 0;
  uint64_t session_ = 0;
  uint64_t progress_ = 0;
  uint32_t rank_ = 0;
  bool is_server_ = false;  // the holder's own child: keeps nobody's job alive
  bool closed_ = false, detached_ = false;
};

}  // namespace certkv
