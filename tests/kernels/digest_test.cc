// The digest against an oracle written from its definition, with committed vectors, and the
// properties that its header promises.
#include "kernels/digest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

namespace certkv {
namespace {

// ---- oracle: the definition, one bit at a time, no 64-bit multiplication ------------------------

uint64_t slow_multiply(uint64_t a, uint64_t b) {
  uint64_t sum = 0;
  for (int bit = 0; bit < 64; ++bit) {
    if ((b >> bit & 1) != 0) sum += a << bit;
  }
  return sum;
}

// SplitMix64 as its author states it: a counter that grows by the golden ratio, then a mixer.
uint64_t oracle_key(uint32_t index) {
  uint64_t state = 0;
  uint64_t z = 0;
  for (uint32_t i = 0; i <= index; ++i) state += 0x9e3779b97f4a7c15;
  z = state;
  z = slow_multiply(z ^ (z >> 30), 0xbf58476d1ce4e5b9);
  z = slow_multiply(z ^ (z >> 27), 0x94d049bb133111eb);
  z = z ^ (z >> 31);
  return z % 2 == 1 ? z : z + 1;
}

const std::vector<uint64_t>& oracle_keys() {
  static const std::vector<uint64_t> keys = [] {
    std::vector<uint64_t> k(4096);
    for (uint32_t i = 0; i < 4096; ++i) k[i] = oracle_key(i);
    return k;
  }();
  return keys;
}

uint64_t oracle_digest(std::vector<unsigned char> bytes) {
  const size_t length = bytes.size();
  while (bytes.size() % 4 != 0) bytes.push_back(0);
  uint64_t digest = 0x243f6a8885a308d3 + slow_multiply(length, 0x9e3779b97f4a7c15);
  uint64_t power = 1;
  for (size_t word = 0; word < bytes.size() / 4; ++word) {
    if (word > 0 && word % 4096 == 0) power = slow_multiply(power, 0xd1342543de82ef95);
    uint64_t m = 0;
    for (size_t j = 4; j-- > 0;) m = m * 256 + bytes[4 * word + j];
    digest += slow_multiply(power, slow_multiply(oracle_keys()[word % 4096], m));
  }
  return digest;
}

std::vector<unsigned char> random_bytes(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<unsigned char> bytes(count);
  for (auto& b : bytes) b = static_cast<unsigned char>(random());
  return bytes;
}

TEST(Digest, EqualsItsDefinition_AtEveryLengthAroundEdges) {
  for (const size_t length :
       {0,  1,   2,    3,    4,    5,     7,     8,     31,    32,    33,   63,
        64, 100, 4095, 4096, 4100, 16380, 16383, 16384, 16385, 16388, 40000}) {
    const auto bytes = random_bytes(length, length + 1);
    const uint64_t expected = oracle_digest(bytes);
    EXPECT_EQ(payload_digest(bytes.data(), length), expected) << length;
    for (const DigestVersion& version : digest_versions())
      EXPECT_EQ(version.digest(bytes.data(), length), expected) << version.isa << " " << length;
  }
}

TEST(Digest, DoesNotDependOnAlignment) {
  const auto bytes = random_bytes(4096, 3);
  const uint64_t expected = payload_digest(bytes.data(), bytes.size());
  std::vector<unsigned char> shifted(4096 + 64);
  for (size_t by = 1; by < 40; ++by) {
    std::copy(bytes.begin(), bytes.end(), shifted.begin() + std::ptrdiff_t(by));
    for (const DigestVersion& version : digest_versions())
      EXPECT_EQ(version.digest(shifted.data() + by, bytes.size()), expected)
          << version.isa << " " << by;
  }
}

// Vectors for other implementations. byte i of a payload is (i * i + 7) mod 256.
TEST(Digest, MatchesTheCommittedVectors) {
  struct Vector {
    size_t length;
    uint64_t digest;
  };
  for (const Vector& v : {Vector{0, 0x243f6a8885a308d3}, Vector{1, 0xf15b7dd462be24b1},
                          Vector{4, 0xa36dddfc959010f0}, Vector{37, 0x91f136a8216c166e},
                          Vector{4096, 0x78a1b9fd6a38a0a3}, Vector{8192, 0xed810d49c65a3367},
                          Vector{16384, 0x58347d94e383a72b}, Vector{20000, 0x2a837ea839aebf29}}) {
    std::vector<unsigned char> bytes(v.length);
    for (size_t i = 0; i < v.length; ++i) bytes[i] = static_cast<unsigned char>(i * i + 7);
    EXPECT_EQ(payload_digest(bytes.data(), v.length), v.digest) << v.length;
    EXPECT_EQ(oracle_digest(bytes), v.digest) << v.length;
  }
}

TEST(Digest, NoticesEverySingleFlippedBit) {
  for (const unsigned char fill : {0x00, 0xff, 0x5a}) {
    std::vector<unsigned char> bytes(4096, fill);
    const uint64_t clean = payload_digest(bytes.data(), bytes.size());
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      bytes[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
      ASSERT_NE(payload_digest(bytes.data(), bytes.size()), clean) << "bit " << bit;
      bytes[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
    }
  }
}

// Item 2 of the header: with these residues all different, any two flipped bits of a chunk show.
TEST(Digest, KeysAndTheirNegativesDifferModulo2To33) {
  std::vector<uint64_t> residues;
  for (uint32_t i = 0; i < kDigestChunkWords; ++i) {
    const uint64_t key = digest_key(i);
    ASSERT_EQ(key % 2, 1u) << i;
    ASSERT_EQ(key, oracle_keys()[i]) << i;
    residues.push_back(key & 0x1ffffffff);
    residues.push_back(-key & 0x1ffffffff);
  }
  std::sort(residues.begin(), residues.end());
  EXPECT_EQ(std::adjacent_find(residues.begin(), residues.end()), residues.end());
}

TEST(Digest, NoticesPairsOfFlippedSignBits) {
  std::vector<unsigned char> bytes(2048, 0);
  const uint64_t clean = payload_digest(bytes.data(), bytes.size());
  for (size_t i = 1; i < bytes.size(); i += 2) {
    bytes[i] ^= 0x80;
    for (size_t j = i + 2; j < std::min(bytes.size(), i + 200); j += 2) {
      bytes[j] ^= 0x80;
      ASSERT_NE(payload_digest(bytes.data(), bytes.size()), clean) << i << " " << j;
      bytes[j] ^= 0x80;
    }
    bytes[i] ^= 0x80;
  }
}

TEST(Digest, NoticesSwappedWordsRowsAndLengths) {
  auto bytes = random_bytes(4096, 9);
  const uint64_t clean = payload_digest(bytes.data(), bytes.size());
  for (const size_t stride : {4, 16, 256, 2048}) {
    auto swapped = bytes;
    std::swap_ranges(swapped.begin(), swapped.begin() + std::ptrdiff_t(stride),
                     swapped.begin() + std::ptrdiff_t(stride));
    EXPECT_NE(payload_digest(swapped.data(), swapped.size()), clean) << stride;
  }
  const std::vector<unsigned char> zeros(4096, 0);
  EXPECT_NE(payload_digest(zeros.data(), 4096), payload_digest(zeros.data(), 4092));
  EXPECT_NE(payload_digest(zeros.data(), 4096), 0u);
}

TEST(Digest, OfACopyIsThatOfTheDestination) {
  const auto bytes = random_bytes(4096, 10);
  std::vector<unsigned char> to(4096);
  EXPECT_EQ(copy_and_digest(to.data(), bytes.data(), bytes.size()),
            payload_digest(bytes.data(), bytes.size()));
  EXPECT_EQ(to, bytes);
}

}  // namespace
}  // namespace certkv
