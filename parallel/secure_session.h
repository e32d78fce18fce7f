// Who may talk to whom between processes: a key of the job, and a tag on every message.
//
// Both ends of a connection derive one key per direction from the job's key and a nonce of each. A
// message carries an AES-256-GCM tag over all of its bytes, and its number. Nothing is encrypted:
// what is protected is that no message is forged, altered, repeated, left out or reordered.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace certkv {

inline constexpr size_t kJobKeyBytes = 32;

// A secret that all processes of one job hold. Wiped when it goes. It never stands on a command
// line nor in the environment, where other users and core dumps show it.
class JobKey {
 public:
  static JobKey generate();  // from the kernel; IoError where it has no random numbers
  // 64 hexadecimal digits, then at most white space. BadFile unless it is a regular file of this
  // user that nobody else may read or write (mode 0600 or less).
  static JobKey from_file(const std::string& path);
  // The same text from an inherited descriptor, up to its end. Closes it. Waits at most 5 s.
  static JobKey from_fd(int fd);

  JobKey(const JobKey&) = default;
  JobKey& operator=(const JobKey&) = default;
  ~JobKey();

  std::span<const std::byte, kJobKeyBytes> bytes() const { return bytes_; }
  std::string hex() const;  // to hand it on through a descriptor

 private:
  JobKey() = default;
  static JobKey from_hex(const std::string& text, const std::string& where);
  std::array<std::byte, kJobKeyBytes> bytes_{};
};

// HKDF-SHA-256 into `out`. SOURCE: RFC 5869.
void hkdf_sha256(std::span<const std::byte> key, std::span<const std::byte> salt,
                 std::span<const std::byte> info, std::span<std::byte> out);

void random_bytes(std::span<std::byte> out);  // from the kernel; IoError

// One end of one connection.
// THREADS: one at a time.
class SecureSession {
 public:
  static constexpr size_t kNonceBytes = 32;
  static constexpr size_t kTagBytes = 16;
  using Nonce = std::array<std::byte, kNonceBytes>;
  using Tag = std::array<std::byte, kTagBytes>;
  using Part = std::span<const std::byte>;
  enum class Role : uint8_t { Client, Server };

  // REQUIRES nonces that were drawn for this connection alone, each by its own end.
  // `context`: what else both ends must agree upon (a version, connection numbers).
  SecureSession(const JobKey& key, Role role, const Nonce& client, const Nonce& server,
                Part context);
  ~SecureSession();
  SecureSession(const SecureSession&) = delete;
  SecureSession& operator=(const SecureSession&) = delete;

  // The number that the next message sent has; the first has 0.
  uint64_t next_to_send() const { return sent_; }
  // The tag over `parts`, one after the other, of the message with that number. Counts on.
  Tag seal(std::span<const Part> parts);

  uint64_t next_to_open() const { return opened_; }
  // True when `parts` are the bytes of the next message of the other end. Any false is for good:
  // the connection is to be ended, and nothing more will be accepted.
  bool open(uint64_t number, std::span<const Part> parts, const Tag& tag);
  bool broken() const { return broken_; }

 private:
  struct Direction;
  std::unique_ptr<Direction> out_, in_;
  uint64_t sent_ = 0, opened_ = 0;
  bool broken_ = false;
};

}  // namespace certkv
