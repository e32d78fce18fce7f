#include "kvstore/client_channel.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kRetry{20};
constexpr milliseconds kFarewell{300};  // a job that is being stopped has no more time than this
constexpr milliseconds kPaused{1000};   // a turn this late means that this process was stopped

// Waits until the descriptor is readable; false at the deadline.
bool wait_readable(int fd, Deadline deadline) {
  for (;;) {
    pollfd p{fd, POLLIN, 0};
    const auto left = deadline.left();
    const int n = poll(&p, 1, int(std::min(left, milliseconds(60000)).count()));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) CERTKV_THROW(CommError, "poll: {}", std::strerror(errno));
    if (deadline.passed()) return false;
  }
}

// Reads up to `into.size()` bytes; a descriptor that comes along is put into `fd`.
ssize_t receive_with_fd(int socket, std::span<std::byte> into, UniqueFd& fd) {
  iovec part{into.data(), into.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (got < 0) return got;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    if (c->cmsg_len != CMSG_LEN(sizeof(int))) continue;
    int received = -1;
    std::memcpy(&received, CMSG_DATA(c), sizeof received);
    fd.reset(received);
  }
  return got;
}

}  // namespace

ClientChannel::ClientChannel(const std::string& socket, int rank, milliseconds silence,
                             milliseconds heartbeat, Deadline deadline)
    : name_(socket), silence_(silence * kDeadlineFactor), heartbeat_(heartbeat) {
  CERTKV_EXPECT(silence.count() > 0 && heartbeat.count() > 0 && heartbeat < silence,
                InvalidArgument,
                "store deadline of {} ms and heartbeat of {} ms: the heartbeat must be shorter",
                silence.count(), heartbeat.count());
  connect(socket, deadline);
  attach(rank, deadline);
  wake_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  CERTKV_EXPECT(wake_.valid(), CommError, "eventfd: {}", std::strerror(errno));
  watcher_ = std::thread([this] { watch(); });
}

ClientChannel::~ClientChannel() {
  close();
}

void ClientChannel::connect(const std::string& name, Deadline deadline) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  size_t length = 0;
  CERTKV_EXPECT(fill_socket_path(name, address.sun_path, length), InvalidArgument,
                "store socket '{}': expected is '@name' or a path of at most 106 characters, as "
                "the store printed it",
                name);
  for (;;) {
    socket_.reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    CERTKV_EXPECT(socket_.valid(), CommError, "socket: {}", std::strerror(errno));
    const auto* a = reinterpret_cast<const sockaddr*>(&address);
    if (::connect(socket_.get(), a, socklen_t(offsetof(sockaddr_un, sun_path) + length)) == 0)
      break;
    const int error = errno;
    CERTKV_EXPECT(error == ECONNREFUSED || error == ENOENT || error == EAGAIN || error == EINTR,
                  StoreLost, "store socket {}: {}. Does the store run under this user?", name,
                  std::strerror(error));
    CERTKV_EXPECT(!deadline.passed(), StoreLost,
                  "no store answers at {} ({}): start one with `certkv store`, or use store.mode: "
                  "auto",
                  name, std::strerror(error));
    std::this_thread::sleep_for(kRetry);
  }
  CERTKV_FAILPOINT(client_connect);
  ucred peer{};
  socklen_t peer_length = sizeof peer;
  CERTKV_EXPECT(getsockopt(socket_.get(), SOL_SOCKET, SO_PEERCRED, &peer, &peer_length) == 0,
                CommError, "store socket {}: {}", name, std::strerror(errno));
  CERTKV_EXPECT(peer.uid == geteuid(), CommError,
                "store socket {} belongs to user {}, this process to user {}: refused", name,
                peer.uid, geteuid());
}

void ClientChannel::attach(int rank, Deadline deadline) {
  const AttachRequest request{uint32_t(rank), 0};
  {
    const std::lock_guard lock(mutex_);
    send_locked(ControlOp::Attach, payload_of(request));
    CERTKV_EXPECT(!lost_, StoreLost, "attaching to the store at {}: {}", name_, reason_);
  }
  std::array<std::byte, sizeof(FrameHeader) + sizeof(AttachReply)> bytes{};
  size_t got = 0;
  while (got < bytes.size()) {
    CERTKV_EXPECT(wait_readable(socket_.get(), deadline), DeadlineExceeded,
                  "the store at {} accepted the connection, but did not answer in time", name_);
    const ssize_t n = receive_with_fd(socket_.get(), std::span(bytes).subspan(got), arena_fd_);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    CERTKV_EXPECT(n > 0, StoreLost,
                  "the store at {} closed the connection while this rank attached: it ended, has "
                  "too many connections, or runs under another user",
                  name_);
    got += size_t(n);
  }
  CERTKV_FAILPOINT_BYTES(client_attach, bytes.data(), bytes.size());
  FrameHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  const auto payload = std::span<const std::byte>(bytes).subspan(sizeof header);
  CERTKV_EXPECT(header_defect(header, false) == nullptr &&
                    header.op == (uint16_t(ControlOp::Attach) | kReplyBit) &&
                    header.status == uint32_t(ControlStatus::Ok) && header.sequence == 1 &&
                    checksum_matches(header, payload) && parse_payload(payload, attached_) &&
                    header.session == attached_.session && attached_.session != 0 &&
                    attached_.boot_nonce != 0 && arena_fd_.valid(),
                CommError,
                "what answers at {} is no certkv store of this version: are store and ranks of the "
                "same build?",
                name_);
}

uint64_t ClientChannel::send_locked(ControlOp op, std::span<const std::byte> payload) {
  const uint64_t sequence = ++sequence_;
  [[maybe_unused]] auto frame =
      make_frame(uint16_t(op), ControlStatus::Ok, sequence, attached_.session, payload);
  CERTKV_FAILPOINT_BYTES(client_send, frame.data(), frame.size());
  ssize_t sent;
  do {
    sent = send(socket_.get(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent == ssize_t(frame.size())) return sequence;
  // Requests are a few hundred bytes: a buffer without room for one has not been read for long.
  lose_locked(sent < 0 ? std::strerror(errno) : "it does not read its socket");
  return sequence;
}

void ClientChannel::lose_locked(const std::string& reason) {
  if (lost_ || stop_) return;
  reason_ = fmt::format("the node's store (pid {}, socket {}) is lost: {}", attached_.store_pid,
                        name_, reason);
  lost_.store(true, std::memory_order_release);
  answered_.notify_all();
}

std::string ClientChannel::lost_reason() const {
  const std::lock_guard lock(mutex_);
  return reason_;
}

ClientChannel::Reply ClientChannel::request(ControlOp op, std::span<const std::byte> payload) {
  return request(op, payload, silence_);
}

ClientChannel::Reply ClientChannel::request(ControlOp op, std::span<const std::byte> payload,
                                            milliseconds within) {
  std::unique_lock lock(mutex_);
  Waiting mine;
  mine.op = op;
  CERTKV_EXPECT(!stop_, StoreLost, "this rank has detached from its node's store");
  const uint64_t sequence = lost_ ? 0 : send_locked(op, payload);
  CERTKV_EXPECT(!lost_, StoreLost, "{}", reason_);
  waiting_[sequence] = &mine;
  const auto until = Clock::now() + within;
  answered_.wait_until(lock, until, [&] { return mine.done || lost_ || stop_; });
  waiting_.erase(sequence);
  if (mine.done) return std::move(mine.reply);
  CERTKV_EXPECT(!lost_, StoreLost, "{}", reason_);
  CERTKV_EXPECT(!stop_, StoreLost, "this rank has detached from its node's store");
  CERTKV_THROW(DeadlineExceeded, "the store (pid {}) did not answer a request within {} ms",
               attached_.store_pid, within.count());
}

void ClientChannel::post(ControlOp op, std::span<const std::byte> payload) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (!lost_ && !stop_) send_locked(op, payload);
  } catch (const std::exception& e) {
    log_warning("a message to the store could not be sent: {}", e.what());
  }
}

void ClientChannel::watch() {
  auto last_sign = Clock::now(), last_turn = last_sign, next_beat = last_sign + heartbeat_;
  for (;;) {
    CERTKV_FAILPOINT(client_beat);
    auto now = Clock::now();
    const auto pause =
        std::chrono::ceil<milliseconds>(std::max(next_beat - now, Clock::duration(0)));
    pollfd p[2] = {{socket_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    poll(p, 2, int(pause.count()));
    now = Clock::now();
    if (now - last_turn > heartbeat_ + kPaused) last_sign = now;  // silent were we, not the store
    last_turn = now;
    if ((p[0].revents & (POLLIN | POLLHUP | POLLERR)) != 0) {
      last_sign = now;
      receive();
    }
    const std::lock_guard lock(mutex_);
    if (stop_) return;
    if (now - last_sign > silence_) {
      lose_locked(fmt::format("no sign of life for {} ms", silence_.count()));
    }
    if (lost_) return;
    if (now >= next_beat) {
      next_beat = now + heartbeat_;
      const HeartbeatFrame beat{progress_.load(std::memory_order_relaxed)};
      send_locked(ControlOp::Heartbeat, payload_of(beat));
    }
  }
}

void ClientChannel::receive() {
  std::array<std::byte, 16384> chunk;
  const ssize_t n = recv(socket_.get(), chunk.data(), chunk.size(), MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  const auto lose = [this](const std::string& why) {
    const std::lock_guard lock(mutex_);
    lose_locked(why);
  };
  if (n <= 0) return lose(n == 0 ? "it ended (its socket was closed)" : std::strerror(errno));
  CERTKV_FAILPOINT_BYTES(client_receive, chunk.data(), size_t(n));
  inbox_.insert(inbox_.end(), chunk.begin(), chunk.begin() + n);
  size_t used = 0;
  while (inbox_.size() - used >= sizeof(FrameHeader)) {
    FrameHeader header;
    std::memcpy(&header, inbox_.data() + used, sizeof header);
    if (const char* defect = header_defect(header, false)) {
      return lose(fmt::format("it sent a malformed frame: {}", defect));
    }
    if (inbox_.size() - used - sizeof header < header.payload_bytes) break;
    const std::span<const std::byte> payload(inbox_.data() + used + sizeof header,
                                             header.payload_bytes);
    if (!checksum_matches(header, payload) || header.session != attached_.session) {
      return lose("it sent a malformed frame: checksum or session");
    }
    take_frame(header, payload);
    used += sizeof header + header.payload_bytes;
  }
  inbox_.erase(inbox_.begin(), inbox_.begin() + std::ptrdiff_t(used));
}

void ClientChannel::take_frame(const FrameHeader& header, std::span<const std::byte> payload) {
  const std::lock_guard lock(mutex_);
  const auto it = waiting_.find(header.sequence);
  if (it == waiting_.end()) return;  // a heartbeat, a posted message, or its caller gave up
  Waiting& w = *it->second;
  if (header.op != (uint16_t(w.op) | kReplyBit)) {
    return lose_locked("it answered another question than was asked");
  }
  w.reply.status = ControlStatus(header.status);
  w.reply.payload.assign(payload.begin(), payload.end());
  w.done = true;
  answered_.notify_all();
}

void ClientChannel::close() noexcept {
  try {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
    }
    CERTKV_FAILPOINT(client_detach);
    if (!lost_) request(ControlOp::Detach, {}, std::min(silence_, kFarewell));
  } catch (const std::exception& e) {
    log_debug("detaching from the store: {}", e.what());
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    answered_.notify_all();
  }
  const uint64_t one = 1;
  if (wake_.valid() && write(wake_.get(), &one, sizeof one) < 0) log_debug("eventfd: full");
  if (watcher_.joinable()) watcher_.join();
  const std::lock_guard lock(mutex_);
  socket_.reset();
}

}  // namespace certkv
