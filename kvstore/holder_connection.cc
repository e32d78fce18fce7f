#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kvstore/holder_state.h"

namespace certkv {
namespace {

// Sends all of `bytes` and a file descriptor in one message. A fresh socket's buffer has room for
// the few bytes of an attach reply, so anything short of that is a failure.
bool send_with_fd(int socket, std::span<const std::byte> bytes, int fd) {
  iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* c = CMSG_FIRSTHDR(&message);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(c), &fd, sizeof fd);
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent == ssize_t(bytes.size());
}

}  // namespace

HolderPeer peer_of(int fd) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return {};
  return {credentials.uid, credentials.pid};
}

void HolderConnection::handle() {
  CERTKV_FAILPOINT_BYTES(holder_payload, payload_.data(), header_.payload_bytes);
  const std::span<const std::byte> payload(payload_.data(), header_.payload_bytes);
  if (!checksum_matches(header_, payload)) return reject("checksum");
  if (header_.sequence != last_sequence_ + 1) return reject("sequence number");
  last_sequence_ = header_.sequence;
  if (header_.session != session_) return reject("session");
  const auto op = ControlOp(header_.op);
  if (op == ControlOp::Attach) return handle_attach(payload);
  if (!attached()) return reject("a request before attaching");
  if (detached_) return reject("a request after detaching");
  switch (op) {
    case ControlOp::Attach:
      break;
    case ControlOp::Allocate:
      return handle_allocate(payload);
    case ControlOp::Adopt:
      return handle_adopt(payload);
    case ControlOp::List:
      return handle_list(payload);
    case ControlOp::Peers:
      if (!payload.empty()) break;
      return reply(ControlStatus::Ok, holder_.peers);
    case ControlOp::Report:
      holder_.peers.assign(payload.begin(), payload.end());
      return reply(ControlStatus::Ok, {});
    case ControlOp::Release:
      return handle_release(payload);
    case ControlOp::Heartbeat:
      return handle_heartbeat(payload);
    case ControlOp::Capacity: {
      if (!payload.empty()) break;
      const ExtentTable& e = holder_.extents;
      const CapacityReply r{e.total_bytes(), e.free_bytes(), e.largest_bytes()};
      return reply(ControlStatus::Ok, payload_of(r));
    }
    case ControlOp::Status:
      if (!payload.empty()) break;
      return reply(ControlStatus::Ok, text_payload(holder_.status()));
    case ControlOp::Detach:
      if (!payload.empty()) break;
      CERTKV_FAILPOINT(holder_detach);
      detached_ = true;
      holder_.extents.release_session(session_, ExtentTable::Clock::now());
      holder_.scrub();
      return reply(ControlStatus::Ok, {});
  }
  reject("unknown operation or wrong payload");
}

void HolderConnection::handle_attach(std::span<const std::byte> payload) {
  AttachRequest request;
  if (attached() || !parse_payload(payload, request) || request.reserved != 0) {
    return reject("attach");
  }
  CERTKV_FAILPOINT(holder_attach);
  rank_ = request.rank;
  session_ = holder_.next_session++;
  is_server_ = holder_.server != nullptr && peer_.pid == holder_.server->pid();
  if (!is_server_) {
    ++holder_.attached;
    holder_.life_timer.cancel();
  }
  const AttachReply answer{holder_.boot_nonce, session_, holder_.arena.bytes(), uint64_t(getpid())};
  out_ = make_frame(uint16_t(header_.op | kReplyBit), ControlStatus::Ok, header_.sequence, session_,
                    payload_of(answer));
  CERTKV_FAILPOINT(holder_handover);
  if (!send_with_fd(socket_.native_handle(), out_, holder_.arena.fd())) {
    return close("the arena could not be handed over");
  }
  lift_limit();
  log_debug("rank {} (pid {}) attached as session {}", rank_, peer_.pid, session_);
  wait();
}

void HolderConnection::handle_allocate(std::span<const std::byte> payload) {
  AllocateRequest request;
  if (!parse_payload(payload, request)) return reject("allocate");
  if (const std::string defect = allocation_defect(request); !defect.empty()) return refuse(defect);
  CERTKV_FAILPOINT(holder_allocate);
  const auto got = CERTKV_FAILPOINT_FORCED(holder_full)
                       ? std::nullopt
                       : holder_.extents.allocate(session_, request);
  if (!got) {
    const ExtentTable& e = holder_.extents;
    const std::string text =
        fmt::format("{} bytes were asked for, {} of {} are free (largest piece {})",
                    run_bytes(request) * request.layers * request.kv_heads, e.free_bytes(),
                    e.total_bytes(), e.largest_bytes());
    return reply(ControlStatus::NoSpace, text_payload(text));
  }
  CERTKV_FAILPOINT(holder_allocated);
  const AllocateReply head{got->version, uint32_t(got->offsets.size()), got->run_bytes};
  std::vector<std::byte> answer(sizeof head + got->offsets.size() * sizeof(uint64_t));
  std::memcpy(answer.data(), &head, sizeof head);
  std::memcpy(answer.data() + sizeof head, got->offsets.data(), answer.size() - sizeof head);
  reply(ControlStatus::Ok, answer);
}

void HolderConnection::handle_adopt(std::span<const std::byte> payload) {
  AdoptRequest request;
  if (!parse_payload(payload, request) || request.reserved != 0) return reject("adopt");
  if (const std::string defect = allocation_defect(request.ranges); !defect.empty())
    return refuse(defect);
  if (!request.ranges.owner.is_content()) return refuse("a private owner cannot be adopted");
  const auto got = holder_.extents.adopt(session_, request);
  if (!got) return reply(ControlStatus::NotThere, {});
  const AdoptReply head{{got->version, uint32_t(got->offsets.size()), got->run_bytes}, got->fence};
  std::vector<std::byte> answer(sizeof head + got->offsets.size() * sizeof(uint64_t));
  std::memcpy(answer.data(), &head, sizeof head);
  std::memcpy(answer.data() + sizeof head, got->offsets.data(), answer.size() - sizeof head);
  reply(ControlStatus::Ok, answer);
}

void HolderConnection::handle_list(std::span<const std::byte> payload) {
  ListRequest request;
  if (!parse_payload(payload, request) || request.reserved != 0) return reject("list");
  ListReply head;
  std::vector<std::byte> answer(sizeof head);
  const auto append = [&](const void* bytes, size_t n) {
    const auto* b = static_cast<const std::byte*>(bytes);
    answer.insert(answer.end(), b, b + n);
  };
  holder_.extents.list(request.after, [&](const ExtentTable::Listed& r) {
    const size_t need = sizeof(ListEntry) + r.offsets.size() * sizeof(uint64_t);
    head.more = answer.size() + need > kMaxReplyPayload;
    if (head.more != 0) return false;
    const ListEntry entry{r.request, r.fence, r.version, r.orphan ? 1u : 0u};
    append(&entry, sizeof entry);
    append(r.offsets.data(), r.offsets.size() * sizeof(uint64_t));
    ++head.count;
    return true;
  });
  std::memcpy(answer.data(), &head, sizeof head);
  reply(ControlStatus::Ok, answer);
}

void HolderConnection::handle_release(std::span<const std::byte> payload) {
  ReleaseRequest request;
  if (!parse_payload(payload, request) || request.keep > 1) return reject("release");
  CERTKV_FAILPOINT(holder_release);
  if (!holder_.extents.release(session_, request.version, request.keep == 1)) {
    return refuse(fmt::format("this session holds no reservation {}", request.version));
  }
  holder_.scrub();
  reply(ControlStatus::Ok, {});
}

void HolderConnection::handle_heartbeat(std::span<const std::byte> payload) {
  HeartbeatFrame beat;
  if (!parse_payload(payload, beat)) return reject("heartbeat");
  CERTKV_FAILPOINT(holder_heartbeat);
  progress_ = beat.progress;
  const HeartbeatFrame answer{holder_.arena.progress()};
  reply(ControlStatus::Ok, payload_of(answer));
}

void HolderConnection::close(const std::string& why) {
  if (std::exchange(closed_, true)) return;
  const auto self = shared_from_this();
  timer_.cancel();
  ErrorCode ignored;
  socket_.close(ignored);
  holder_.connections.erase(this);
  if (!attached()) {
    if (!holder_.ended) log_warning("connection of pid {} dropped: {}", peer_.pid, why);
    return;
  }
  if (!detached_) {
    CERTKV_FAILPOINT(holder_orphan);
    holder_.extents.orphan_session(session_, ExtentTable::Clock::now());
  }
  if (is_server_) return;  // the holder says its end
  --holder_.attached;
  if (!detached_) {
    ++holder_.dead_ranks;
    if (!holder_.ended) {
      log_error("rank {} (pid {}) is lost: its connection ended without a farewell ({})", rank_,
                peer_.pid, why);
    }
  }
  if (holder_.attached == 0) holder_.last_rank_gone();
}

}  // namespace certkv
