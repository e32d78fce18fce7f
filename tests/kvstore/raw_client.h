// A client of the store made of a bare socket: it sends what it is told to, kept to the protocol or
// not, and shares nothing with the product's client.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "kvstore/control.h"
#include "kvstore/unique_fd.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {

class RawClient {
 public:
  explicit RawClient(const std::string& name)
      : fd_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, name.data(), name.size());
    if (name[0] == '@') address.sun_path[0] = '\0';
    const size_t length = offsetof(sockaddr_un, sun_path) + name.size() + (name[0] == '@' ? 0 : 1);
    connected_ = connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), socklen_t(length)) == 0;
  }
  bool connected() const { return connected_; }
  bool send_bytes(std::span<const std::byte> bytes) {
    return send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == ssize_t(bytes.size());
  }
  // Waits for the end of the connection, dropping what comes; false at the end of patience.
  bool closed_by_peer() {
    const Deadline deadline = patience();
    std::array<char, 4096> chunk;
    for (;;) {
      pollfd p{fd_.get(), POLLIN, 0};
      if (poll(&p, 1, int(deadline.left().count())) <= 0) return false;
      const ssize_t n = recv(fd_.get(), chunk.data(), chunk.size(), 0);
      if (n <= 0) return true;
    }
  }
  // Reads one frame; false where the peer closed or sent something else.
  bool receive_frame(FrameHeader& header, std::vector<std::byte>& payload) {
    if (!receive_exactly(&header, sizeof header)) return false;
    malformed_ = true;  // until the rest has been seen
    if (header_defect(header, false) != nullptr) return false;
    payload.resize(header.payload_bytes);
    if (!receive_exactly(payload.data(), payload.size())) return false;
    malformed_ = !checksum_matches(header, payload);
    return !malformed_;
  }
  // Whether something came that is no frame, a part of one, or nothing at all for kPatience.
  bool malformed() const { return malformed_; }
  void finish_sending() { shutdown(fd_.get(), SHUT_WR); }
  // A correct attach; the session it was given, 0 where it failed.
  uint64_t attach() {
    const AttachRequest request{3, 0};
    send_bytes(
        make_frame(uint16_t(ControlOp::Attach), ControlStatus::Ok, 1, 0, payload_of(request)));
    FrameHeader h;
    std::vector<std::byte> payload;
    return receive_frame(h, payload) ? h.session : 0;
  }

 private:
  bool receive_exactly(void* to, size_t bytes) {
    size_t got = 0;
    while (got < bytes) {
      pollfd p{fd_.get(), POLLIN, 0};
      const bool ready = poll(&p, 1, int(kPatience.count())) > 0;
      const ssize_t n =
          ready ? recv(fd_.get(), static_cast<char*>(to) + got, bytes - got, 0) : ssize_t(0);
      if (n <= 0) {
        malformed_ = malformed_ || !ready || got > 0;
        return false;
      }
      got += size_t(n);
    }
    return true;
  }
  UniqueFd fd_;
  bool connected_ = false, malformed_ = false;
};

}  // namespace certkv::test
