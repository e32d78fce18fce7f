#include "parallel/secure_session.h"

#include <fcntl.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr size_t kMaxKeyText = 256;
constexpr size_t kIvBytes = 12;  // 4 derived bytes, then the message's number
constexpr size_t kSaltBytes = kIvBytes - sizeof(uint64_t);
constexpr size_t kPiece = size_t(1) << 30;  // OpenSSL counts in int

struct CloseFd {
  int fd;
  ~CloseFd() {
    if (fd >= 0) close(fd);
  }
};

// Reads to the end; what it holds is wiped by the caller.
std::string read_key_text(int fd, const std::string& where) {
  const Deadline deadline = Deadline::after(std::chrono::milliseconds(5000));
  std::string text(kMaxKeyText, '\0');
  size_t got = 0;
  while (got < text.size()) {
    pollfd p{fd, POLLIN, 0};
    const int ready = poll(&p, 1, int(deadline.left().count()));
    if (ready < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(ready > 0, DeadlineExceeded, "the job's key did not come from {} within 5 s",
                  where);
    const ssize_t n = read(fd, text.data() + got, text.size() - got);
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n >= 0, BadFile, "reading the job's key from {}: {}", where,
                  std::strerror(errno));
    if (n == 0) break;
    got += size_t(n);
  }
  text.resize(got);
  return text;
}

int digit_of(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

void expect_ok(int result, const char* what) {
  CERTKV_EXPECT(result > 0, CommError, "OpenSSL: {} failed", what);
}

}  // namespace

// ---- keys ---------------------------------------------------------------------------------------

void random_bytes(std::span<std::byte> out) {
  while (!out.empty()) {
    const ssize_t n = getrandom(out.data(), out.size(), 0);
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n > 0, IoError, "the kernel gives no random numbers: {}", std::strerror(errno));
    out = out.subspan(size_t(n));
  }
}

JobKey::~JobKey() {
  OPENSSL_cleanse(bytes_.data(), bytes_.size());
}

JobKey JobKey::generate() {
  JobKey key;
  random_bytes(key.bytes_);
  return key;
}

JobKey JobKey::from_hex(const std::string& text, const std::string& where) {
  JobKey key;
  const size_t end = text.find_last_not_of(" \t\r\n");
  const size_t length = end == text.npos ? 0 : end + 1;
  bool sound = length == 2 * kJobKeyBytes;
  for (size_t i = 0; sound && i < kJobKeyBytes; ++i) {
    const int high = digit_of(text[2 * i]), low = digit_of(text[2 * i + 1]);
    sound = high >= 0 && low >= 0;
    key.bytes_[i] = std::byte(unsigned(high) << 4 | unsigned(low));
  }
  CERTKV_EXPECT(sound, BadFile,
                "the job's key in {} is not {} hexadecimal digits (it has {} characters): make one "
                "with `openssl rand -hex 32`",
                where, 2 * kJobKeyBytes, length);
  return key;
}

JobKey JobKey::from_file(const std::string& path) {
  const CloseFd file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)};
  CERTKV_EXPECT(file.fd >= 0, BadFile, "the job's key file {}: {}", path, std::strerror(errno));
  struct stat st {};
  CERTKV_EXPECT(fstat(file.fd, &st) == 0, BadFile, "the job's key file {}: {}", path,
                std::strerror(errno));
  CERTKV_EXPECT(S_ISREG(st.st_mode), BadFile, "the job's key file {} is no regular file", path);
  CERTKV_EXPECT(st.st_uid == geteuid(), BadFile,
                "the job's key file {} belongs to user {}, this process to {}", path, st.st_uid,
                geteuid());
  CERTKV_EXPECT((st.st_mode & 077) == 0, BadFile,
                "the job's key file {} has mode {:04o}: others may use it; chmod 600", path,
                st.st_mode & 07777);
  std::string text = read_key_text(file.fd, path);
  JobKey key = from_hex(text, path);
  OPENSSL_cleanse(text.data(), text.size());
  return key;
}

JobKey JobKey::from_fd(int fd) {
  const CloseFd pipe{fd};
  const std::string where = fmt::format("descriptor {}", fd);
  std::string text = read_key_text(fd, where);
  JobKey key = from_hex(text, where);
  OPENSSL_cleanse(text.data(), text.size());
  return key;
}

std::string JobKey::hex() const {
  std::string text;
  for (const std::byte b : bytes_) text += fmt::format("{:02x}", unsigned(b));
  return text;
}

void hkdf_sha256(std::span<const std::byte> key, std::span<const std::byte> salt,
                 std::span<const std::byte> info, std::span<std::byte> out) {
  const std::unique_ptr<EVP_KDF, decltype(&EVP_KDF_free)> kdf(
      EVP_KDF_fetch(nullptr, "HKDF", nullptr), EVP_KDF_free);
  CERTKV_EXPECT(kdf != nullptr, CommError, "OpenSSL has no HKDF: version 3 is needed");
  const std::unique_ptr<EVP_KDF_CTX, decltype(&EVP_KDF_CTX_free)> context(
      EVP_KDF_CTX_new(kdf.get()), EVP_KDF_CTX_free);
  CERTKV_EXPECT(context != nullptr, OutOfMemory, "OpenSSL: no memory for HKDF");
  char digest[] = "SHA256";
  const auto octets = [](const char* name, std::span<const std::byte> s) {
    return OSSL_PARAM_construct_octet_string(name, const_cast<std::byte*>(s.data()), s.size());
  };
  const OSSL_PARAM parameters[] = {
      OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
      octets(OSSL_KDF_PARAM_KEY, key), octets(OSSL_KDF_PARAM_SALT, salt),
      octets(OSSL_KDF_PARAM_INFO, info), OSSL_PARAM_construct_end()};
  expect_ok(EVP_KDF_derive(context.get(), reinterpret_cast<unsigned char*>(out.data()), out.size(),
                           parameters),
            "HKDF");
}

// ---- sessions -----------------------------------------------------------------------------------

struct SecureSession::Direction {
  Direction(const JobKey& key, Role sender, const Nonce& client, const Nonce& server, Part context,
            bool encrypts)
      : cipher(EVP_CIPHER_CTX_new()) {
    CERTKV_EXPECT(cipher != nullptr, OutOfMemory, "OpenSSL: no memory for a cipher");
    std::array<std::byte, 2 * kNonceBytes> nonces;
    std::copy(client.begin(), client.end(), nonces.begin());
    std::copy(server.begin(), server.end(), nonces.begin() + kNonceBytes);
    std::string info = "certkv session 1 ";
    info += sender == Role::Client ? "client to server " : "server to client ";
    info.append(reinterpret_cast<const char*>(context.data()), context.size());
    std::array<std::byte, 32 + kSaltBytes> derived;
    hkdf_sha256(key.bytes(), nonces, std::as_bytes(std::span(info.data(), info.size())), derived);
    std::memcpy(iv.data(), derived.data() + 32, kSaltBytes);
    const auto* k = reinterpret_cast<const unsigned char*>(derived.data());
    const int ok = encrypts ? EVP_EncryptInit_ex(cipher, EVP_aes_256_gcm(), nullptr, k, nullptr)
                            : EVP_DecryptInit_ex(cipher, EVP_aes_256_gcm(), nullptr, k, nullptr);
    OPENSSL_cleanse(derived.data(), derived.size());
    if (ok <= 0) EVP_CIPHER_CTX_free(cipher);
    expect_ok(ok, "setting an AES-256-GCM key");
  }
  ~Direction() { EVP_CIPHER_CTX_free(cipher); }  // wipes its key
  Direction(const Direction&) = delete;
  Direction& operator=(const Direction&) = delete;

  const unsigned char* iv_of(uint64_t number) {
    std::memcpy(iv.data() + kSaltBytes, &number, sizeof number);
    return iv.data();
  }

  EVP_CIPHER_CTX* cipher;
  std::array<unsigned char, kIvBytes> iv{};
};

SecureSession::SecureSession(const JobKey& key, Role role, const Nonce& client, const Nonce& server,
                             Part context)
    : out_(std::make_unique<Direction>(key, role, client, server, context, true)),
      in_(std::make_unique<Direction>(key, role == Role::Client ? Role::Server : Role::Client,
                                      client, server, context, false)) {}

SecureSession::~SecureSession() = default;

SecureSession::Tag SecureSession::seal(std::span<const Part> parts) {
  EVP_CIPHER_CTX* c = out_->cipher;
  expect_ok(EVP_EncryptInit_ex(c, nullptr, nullptr, nullptr, out_->iv_of(sent_)), "a GCM nonce");
  int n = 0;
  for (Part part : parts) {
    for (; !part.empty(); part = part.subspan(std::min(part.size(), kPiece))) {
      expect_ok(
          EVP_EncryptUpdate(c, nullptr, &n, reinterpret_cast<const unsigned char*>(part.data()),
                            int(std::min(part.size(), kPiece))),
          "GCM");
    }
  }
  Tag tag;
  unsigned char none[16];
  expect_ok(EVP_EncryptFinal_ex(c, none, &n), "GCM");
  expect_ok(EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, int(kTagBytes), tag.data()), "a GCM tag");
  ++sent_;
  return tag;
}

bool SecureSession::open(uint64_t number, std::span<const Part> parts, const Tag& tag) {
  if (broken_) return false;
  broken_ = true;  // until all has been seen to be right
  if (number != opened_) return false;
  EVP_CIPHER_CTX* c = in_->cipher;
  Tag copy = tag;
  if (EVP_DecryptInit_ex(c, nullptr, nullptr, nullptr, in_->iv_of(number)) <= 0) return false;
  int n = 0;
  for (Part part : parts) {
    for (; !part.empty(); part = part.subspan(std::min(part.size(), kPiece))) {
      if (EVP_DecryptUpdate(c, nullptr, &n, reinterpret_cast<const unsigned char*>(part.data()),
                            int(std::min(part.size(), kPiece))) <= 0) {
        return false;
      }
    }
  }
  if (EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_SET_TAG, int(kTagBytes), copy.data()) <= 0) return false;
  unsigned char none[16];
  if (EVP_DecryptFinal_ex(c, none, &n) <= 0) return false;
  ++opened_;
  broken_ = false;
  return true;
}

}  // namespace certkv
