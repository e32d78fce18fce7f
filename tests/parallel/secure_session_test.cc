// Tags of messages: the derivation and the tag against implementations of their own, and everything
// that an attacker on the wire can do to a message.
#include "parallel/secure_session.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <vector>

#include "tests/support/temp_folder.h"
#include "tests/support/thrown_by.h"

namespace certkv {
namespace {

using testing::HasSubstr;
using testing::Not;
using Part = SecureSession::Part;
using Role = SecureSession::Role;
using Bytes = std::vector<std::byte>;

Bytes from_hex(const std::string& text) {
  Bytes out;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    out.push_back(std::byte(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return out;
}

// One block of AES-256, from the library's plain mode.
using Block = std::array<unsigned char, 16>;
Block aes_block(std::span<const std::byte> key, const Block& in) {
  EVP_CIPHER_CTX* c = EVP_CIPHER_CTX_new();
  Block out{};
  int n = 0;
  EVP_EncryptInit_ex(c, EVP_aes_256_ecb(), nullptr,
                     reinterpret_cast<const unsigned char*>(key.data()), nullptr);
  EVP_CIPHER_CTX_set_padding(c, 0);
  EVP_EncryptUpdate(c, out.data(), &n, in.data(), 16);
  EVP_CIPHER_CTX_free(c);
  return out;
}

// GCM's tag over data that is authenticated alone, bit by bit as NIST SP 800-38D defines it.
Block gmac(std::span<const std::byte> key, std::span<const std::byte> iv, const Bytes& data) {
  const Block h = aes_block(key, {});
  Block y{};
  const auto absorb = [&](const Block& x) {
    for (int i = 0; i < 16; ++i) y[i] ^= x[i];
    Block z{}, v = h;
    for (int bit = 0; bit < 128; ++bit) {
      if ((y[bit / 8] >> (7 - bit % 8) & 1) != 0) {
        for (int i = 0; i < 16; ++i) z[i] ^= v[i];
      }
      const bool low = (v[15] & 1) != 0;
      for (int i = 15; i > 0; --i) v[i] = uint8_t(v[i] >> 1 | v[i - 1] << 7);
      v[0] >>= 1;
      if (low) v[0] ^= 0xe1;
    }
    y = z;
  };
  for (size_t at = 0; at < data.size(); at += 16) {
    Block x{};
    std::memcpy(x.data(), data.data() + at, std::min<size_t>(16, data.size() - at));
    absorb(x);
  }
  Block lengths{};
  for (int i = 0; i < 8; ++i) lengths[i] = uint8_t(uint64_t(data.size()) * 8 >> (56 - 8 * i));
  absorb(lengths);
  Block counter{};
  std::memcpy(counter.data(), iv.data(), 12);
  counter[15] = 1;
  const Block mask = aes_block(key, counter);
  for (int i = 0; i < 16; ++i) y[i] ^= mask[i];
  return y;
}

SecureSession::Nonce nonce_of(uint8_t x) {
  SecureSession::Nonce n;
  n.fill(std::byte(x));
  return n;
}

struct Pair {
  explicit Pair(const JobKey& key, const JobKey& other)
      : client(key, Role::Client, nonce_of(1), nonce_of(2), {}),
        server(other, Role::Server, nonce_of(1), nonce_of(2), {}) {}
  explicit Pair(const JobKey& key) : Pair(key, key) {}
  SecureSession client, server;
};

SecureSession::Tag seal(SecureSession& s, const Bytes& bytes) {
  const Part part(bytes);
  return s.seal({&part, 1});
}
bool open(SecureSession& s, uint64_t number, const Bytes& bytes, const SecureSession::Tag& tag) {
  const Part part(bytes);
  return s.open(number, {&part, 1}, tag);
}

Bytes random_message(std::mt19937_64& random, size_t bytes) {
  Bytes out(bytes);
  for (auto& b : out) b = std::byte(random());
  return out;
}

TEST(SecureSession, KeysAreDerivedAsRfc5869Says) {
  const Bytes key = from_hex("0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b");
  const Bytes salt = from_hex("000102030405060708090a0b0c"),
              info = from_hex("f0f1f2f3f4f5f6f7f8f9");
  Bytes out(42);
  hkdf_sha256(key, salt, info, out);
  EXPECT_EQ(out, from_hex("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
                          "34007208d5b887185865"));
}

TEST(SecureSession, TagsAreThoseOfGcmUnderTheDerivedKey) {
  const JobKey key = JobKey::generate();
  Pair pair(key);
  Bytes salt(64);
  std::fill_n(salt.begin(), 32, std::byte(1));
  std::fill_n(salt.begin() + 32, 32, std::byte(2));
  const std::string info = "certkv session 1 client to server ";
  Bytes derived(36);
  hkdf_sha256(key.bytes(), salt, std::as_bytes(std::span(info)), derived);
  std::mt19937_64 random(5);
  for (uint64_t number = 0; number < 20; ++number) {
    const Bytes message = random_message(random, number * 7);
    Bytes iv(12);
    std::memcpy(iv.data(), derived.data() + 32, 4);
    std::memcpy(iv.data() + 4, &number, 8);
    const Block expected = gmac(std::span(derived).first(32), iv, message);
    const auto tag = seal(pair.client, message);
    EXPECT_EQ(std::memcmp(tag.data(), expected.data(), 16), 0) << "message " << number;
  }
}

TEST(SecureSession, MessagesInOrderAreAcceptedHoweverTheyAreCut) {
  Pair pair(JobKey::generate());
  std::mt19937_64 random(1);
  for (uint64_t i = 0; i < 1000; ++i) {
    const Bytes m = random_message(random, random() % 300);
    const auto tag = seal(pair.client, m);
    const size_t cut = m.empty() ? 0 : random() % m.size();
    const Part parts[] = {Part(m).first(cut), Part(m).subspan(cut)};
    ASSERT_TRUE(pair.server.open(i, parts, tag));
    const auto back = seal(pair.server, m);
    ASSERT_TRUE(open(pair.client, i, m, back));
    EXPECT_NE(tag, back) << "both directions have one key";
  }
}

TEST(SecureSession, AHundredThousandForgedMessagesAreAllRefused) {
  const JobKey key = JobKey::generate();
  Pair pair(key);
  std::mt19937_64 random(2);
  // What really passed, to be replayed and bent.
  std::vector<Bytes> messages;
  std::vector<SecureSession::Tag> tags;
  for (int i = 0; i < 64; ++i) {
    messages.push_back(random_message(random, 1 + random() % 200));
    tags.push_back(seal(pair.client, messages.back()));
  }
  int accepted = 0;
  int kinds[7] = {};
  for (int trial = 0; trial < 100000; ++trial) {
    SecureSession server(key, Role::Server, nonce_of(1), nonce_of(2), {});
    const size_t good = random() % 3;  // how many genuine ones come first
    for (size_t i = 0; i < good; ++i) ASSERT_TRUE(open(server, i, messages[i], tags[i]));
    Bytes m = messages[good];
    auto tag = tags[good];
    uint64_t number = good;
    const int kind = int(random() % 7);
    ++kinds[kind];
    switch (kind) {
      case 0:  // a bit of the message
        m[random() % m.size()] ^= std::byte(1 << random() % 8);
        break;
      case 1:  // a bit of the tag
        tag[random() % 16] ^= std::byte(1 << random() % 8);
        break;
      case 2:  // cut short
        m.resize(random() % m.size());
        break;
      case 3:  // longer
        m.resize(m.size() + 1 + random() % 20);
        break;
      case 4: {  // another message that was really sent, under its own number or this one
        const size_t other = good + 1 + random() % 50;
        m = messages[other];
        tag = tags[other];
        if (random() % 2 == 0) number = other;
        break;
      }
      case 5:  // the same again
        if (good == 0)
          number = 1;
        else
          m = messages[good - 1], tag = tags[good - 1], number = good - 1;
        break;
      case 6:  // made up
        m = random_message(random, 40);
        for (auto& b : tag) b = std::byte(random());
        break;
    }
    accepted += open(server, number, m, tag);
    // And nothing is accepted any more, not even what would have been right.
    accepted += open(server, good, messages[good], tags[good]);
  }
  EXPECT_EQ(accepted, 0);
  for (const int n : kinds) EXPECT_GT(n, 10000);
}

TEST(SecureSession, OneThatWasReflectedOrMadeUnderAnotherKeyNonceOrContextIsRefused) {
  const JobKey key = JobKey::generate();
  const Bytes m = from_hex("00112233");
  {
    Pair pair(key);
    const auto tag = seal(pair.client, m);
    EXPECT_FALSE(open(pair.client, 0, m, tag)) << "its own message came back";
  }
  {
    Pair pair(key, JobKey::generate());
    EXPECT_FALSE(open(pair.server, 0, m, seal(pair.client, m)));
  }
  const auto against = [&](const SecureSession::Nonce& c, const SecureSession::Nonce& s,
                           const std::string& context) {
    SecureSession client(key, Role::Client, nonce_of(1), nonce_of(2), {});
    SecureSession server(key, Role::Server, c, s, std::as_bytes(std::span(context)));
    return open(server, 0, m, seal(client, m));
  };
  EXPECT_TRUE(against(nonce_of(1), nonce_of(2), ""));
  EXPECT_FALSE(against(nonce_of(3), nonce_of(2), ""));
  EXPECT_FALSE(against(nonce_of(1), nonce_of(3), ""));
  EXPECT_FALSE(against(nonce_of(1), nonce_of(2), "x"));
}

// ---- the job's key ------------------------------------------------------------------------------

TEST(JobKey, ComesFromAFileThatIsNobodyElses) {
  const test::TempFolder folder;
  const JobKey key = JobKey::generate();
  const std::string path = folder.write("key", key.hex() + "\n");
  chmod(path.c_str(), 0600);
  const JobKey read = JobKey::from_file(path);
  EXPECT_TRUE(std::equal(key.bytes().begin(), key.bytes().end(), read.bytes().begin()));
  EXPECT_NE(JobKey::generate().hex(), key.hex());

  for (const mode_t mode : {0640, 0604, 0620, 0666}) {
    chmod(path.c_str(), mode);
    EXPECT_THAT(thrown_by([&] { JobKey::from_file(path); }), HasSubstr("others may use it"))
        << mode;
  }
  chmod(path.c_str(), 0600);
  const std::string link = folder / "link";
  ASSERT_EQ(symlink(path.c_str(), link.c_str()), 0);
  EXPECT_THAT(thrown_by([&] { JobKey::from_file(link); }), HasSubstr("BadFile"));
  EXPECT_THAT(thrown_by([&] { JobKey::from_file(folder / "no"); }), HasSubstr("No such file"));
}

TEST(JobKey, ThatIsTooShortTooLongOrNoHexIsNamed) {
  const std::string good = JobKey::generate().hex();
  const auto read = [](const std::string& text) {
    int ends[2];
    EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0);
    EXPECT_EQ(write(ends[1], text.data(), text.size()), ssize_t(text.size()));
    close(ends[1]);
    return JobKey::from_fd(ends[0]);
  };
  EXPECT_EQ(read(good).hex(), good);
  for (const std::string& bad :
       {std::string(), good.substr(1), good + "0", "g" + good.substr(1), std::string(300, '0')}) {
    const std::string error = thrown_by([&] { read(bad); });
    EXPECT_THAT(error, HasSubstr("hexadecimal digits"));
    EXPECT_THAT(error, Not(HasSubstr(good.substr(8, 20)))) << "the key was printed";
  }
}

}  // namespace
}  // namespace certkv
