// What a process that plays the store answers to a rank. Whatever it is, the rank ends up with a
// store that is lost, an error's name, or space that lies in the arena; it never believes an answer
// to another question.
//   input: first byte: bit 0 set: the answer to attach is right, and an arena comes along
//          then records of [damage, n, n bytes], each an answer to one request of the rank, right
//          but for the damage: 1 sequence, 2 session, 4 checksum, 8 length, 16 operation, 32
//          status, 64 cut in the middle, 128 the bytes as they are; after any but 32 it is the end
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/arena.h"
#include "kvstore/client.h"
#include "kvstore/control.h"
#include "kvstore/unique_fd.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;
using std::chrono::milliseconds;

constexpr uint64_t kNonce = 7, kSession = 5, kArenaBytes = 65536;

class HostileStore {
 public:
  HostileStore() : name_(random_socket_name()), arena_(Arena::create(kArenaBytes, kNonce)) {
    fd_.reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    size_t length = 0;
    require(fill_socket_path(name_, address.sun_path, length), "a socket's name");
    require(bind(fd_.get(), reinterpret_cast<const sockaddr*>(&address),
                 socklen_t(offsetof(sockaddr_un, sun_path) + length)) == 0 &&
                listen(fd_.get(), 8) == 0,
            "no socket");
  }
  const std::string& name() const { return name_; }

  void serve(const uint8_t* data, size_t size) {
    const UniqueFd peer(accept(fd_.get(), nullptr, nullptr));
    size_t at = 1;
    for (bool first = true;; first = false) {
      FrameHeader request;
      if (!receive(peer.get(), &request, sizeof request)) return;
      std::byte payload[kMaxRequestPayload];
      if (request.payload_bytes > sizeof payload ||
          !receive(peer.get(), payload, request.payload_bytes))
        return;
      if (first && (data[0] & 1) != 0) {
        const AttachReply right{kNonce, kSession, kArenaBytes, uint64_t(getpid())};
        send_all(
            peer.get(),
            make_frame(request.op | kReplyBit, ControlStatus::Ok, 1, kSession, payload_of(right)),
            arena_.fd());
        continue;
      }
      if (at + 2 > size) return;
      const uint8_t damage = data[at];
      const size_t n = std::min<size_t>(data[at + 1], size - at - 2);
      const std::span body(reinterpret_cast<const std::byte*>(data + at + 2), n);
      at += 2 + n;
      std::vector<std::byte> frame(body.begin(), body.end());
      if ((damage & 128) == 0) frame = answer(request, damage, body);
      if ((damage & 64) != 0) frame.resize(frame.size() / 2);
      send_all(peer.get(), frame, first ? arena_.fd() : -1);
      if ((damage & ~32) != 0) return;  // nothing more comes, or the rank would wait for it
    }
  }

 private:
  static std::vector<std::byte> answer(const FrameHeader& request, uint8_t damage,
                                       std::span<const std::byte> body) {
    const uint64_t session = request.session == 0 ? kSession : request.session;
    const auto status = ControlStatus((damage & 32) != 0 ? 1 + damage % 3 : 0);
    const auto op =
        uint16_t((damage & 16) != 0 ? (request.op + 1) | kReplyBit : request.op | kReplyBit);
    std::vector<std::byte> frame = make_frame(op, status, request.sequence + (damage & 1),
                                              session ^ ((damage & 2) != 0 ? 1 : 0), body);
    FrameHeader h;
    std::memcpy(static_cast<void*>(&h), frame.data(), sizeof h);
    if ((damage & 4) != 0) h.checksum ^= 4;
    if ((damage & 8) != 0) h.payload_bytes += 1000000;
    std::memcpy(frame.data(), &h, sizeof h);
    return frame;
  }
  static bool receive(int fd, void* to, size_t bytes) {
    for (size_t got = 0; got < bytes;) {
      const ssize_t n = recv(fd, static_cast<char*>(to) + got, bytes - got, 0);
      if (n <= 0) return false;
      got += size_t(n);
    }
    return true;
  }
  static void send_all(int fd, std::span<const std::byte> bytes, int with) {
    if (bytes.empty()) return;
    iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (with >= 0) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* c = CMSG_FIRSTHDR(&message);
      c->cmsg_level = SOL_SOCKET;
      c->cmsg_type = SCM_RIGHTS;
      c->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(c), &with, sizeof with);
    }
    if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0) return;  // the rank has given up
  }

  std::string name_;
  Arena arena_;
  UniqueFd fd_;
};

void use(const std::string& name) {
  StoreClientOptions o;
  o.socket = name;
  o.deadline = milliseconds(400);
  o.heartbeat = milliseconds(390);  // none comes between
  const auto client = StoreClient::attach(o, Deadline::after(o.deadline));
  ReserveRequest r;
  r.owner = {1, 2};
  r.shape = {DType::BF16, 16, 16};
  r.kv_heads = 2;
  OriginalsSpan span = client->reserve(r);
  ++certkv::fuzz::accepted;
  const std::vector<uint16_t> rows(r.shape.elements(), 3);
  const std::span<const std::byte> arena = client->arena();
  for (uint32_t h = 0; h < 2; ++h) {
    const std::byte* run = span.run(0, h);
    require(run >= arena.data() && run + r.shape.slot_bytes() <= arena.data() + arena.size(),
            "space outside the arena");
    if (!span.sealed(0, h, 0)) span.seal_block(0, h, 0, rows.data(), rows.data());
  }
  const StoreCapacity c = client->capacity();
  static_cast<void>(c);
  static_cast<void>(client->status_json());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static HostileStore store;
  static const bool quiet = (log_set_level(LogLevel::Error), true);
  static_cast<void>(quiet);
  if (size == 0) return 0;
  std::thread server([&] { store.serve(data, size); });
  try {
    use(store.name());
  } catch (const Error& e) {
    require(std::strlen(e.what()) > 10, "an error that says nothing");
    require(e.kind() != ErrorKind::Stopped && e.kind() != ErrorKind::NonFinite,
            "refused with an unexpected kind of error");
  }
  server.join();
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const auto record = [](uint8_t damage, std::string body) {
    return std::string{char(damage), char(body.size())} + body;
  };
  const auto bytes = [](const auto& value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const uint64_t slot = BlockShape{DType::BF16, 16, 16}.slot_bytes();
  std::string offsets;
  for (const uint64_t o : {uint64_t(kArenaDataOffset), uint64_t(kArenaDataOffset + 8192)})
    offsets += bytes(o);
  const std::string allocated = record(0, bytes(AllocateReply{1, 2, slot}) + offsets);
  const std::string attached =
      record(0, bytes(AttachReply{kNonce, kSession, kArenaBytes, uint64_t(1)}));
  const std::string capacity = record(0, bytes(CapacityReply{1, 1, 1}));
  return {"StoreReplyFuzz",
          {"\1" + allocated + capacity + record(0, "{}"), "\1" + allocated,
           std::string(1, '\0') + attached + allocated},
          {allocated, capacity, record(32, "no"), record(128, std::string(40, '\0')), "\x01",
           "\x40", std::string(4, '\xff'), std::string(8, '\0'), std::string("\0\x10", 2)},
          150};
}
