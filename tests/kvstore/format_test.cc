// Bytes as FORMAT.md states them, written out by hand here: a change of a field breaks a test, not
// a store that is running.
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <vector>

#include "kernels/base/error.h"
#include "kvstore/block.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

// A little writer of its own, so that the struct under test is not compared with itself.
class Bytes {
 public:
  Bytes& put(uint64_t value, int count) {
    for (int i = 0; i < count; ++i) bytes_.push_back(static_cast<unsigned char>(value >> (8 * i)));
    return *this;
  }
  const std::vector<unsigned char>& get() const { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

template <typename T>
std::vector<unsigned char> raw(const T& x) {
  std::vector<unsigned char> bytes(sizeof x);
  std::memcpy(bytes.data(), &x, sizeof x);
  return bytes;
}

TEST(Format, ABlockHeaderIsTheseBytes) {
  BlockHeader h;
  h.magic = kBlockMagic;
  h.format = kFormatVersion;
  h.header_bytes = 128;
  h.id = {0x1112131415161718, {0x2122232425262728, 0x3132333435363738}, 41, 42, 43, 44};
  h.fence = 0x5152535455565758;
  h.dtype = uint8_t(DType::BF16);
  h.tokens = 15;
  h.block_tokens = 16;
  h.head_dim = 128;
  h.k_digest = 0x6162636465666768;
  h.v_digest = 0x7172737475767778;
  Bytes expected;
  for (const char c : {'C', 'K', 'V', 'K'}) expected.put(uint64_t(c), 1);
  expected.put(1, 2).put(128, 2);
  expected.put(0x1112131415161718, 8).put(0x2122232425262728, 8).put(0x3132333435363738, 8);
  expected.put(41, 4).put(42, 4).put(43, 4).put(44, 4);
  expected.put(0x5152535455565758, 8).put(2, 1).put(0, 1).put(15, 2).put(16, 2).put(128, 2);
  expected.put(0x6162636465666768, 8).put(0x7172737475767778, 8);
  for (int i = 0; i < 40; ++i) expected.put(0, 1);
  EXPECT_EQ(block_seal(h), XXH3_64bits(expected.get().data(), 120));
  h.seal = block_seal(h);
  expected.put(h.seal, 8);
  EXPECT_EQ(raw(h), expected.get());
}

TEST(Format, AnArenaHeaderIsTheseBytes) {
  ArenaHeader h;
  h.magic = kArenaMagic;
  h.format = kFormatVersion;
  h.header_bytes = 128;
  h.uid = 1000;
  h.boot_nonce = 77;
  h.arena_bytes = 8192;
  h.data_offset = 4096;
  h.store_pid = 4321;
  Bytes expected;
  for (const char c : {'C', 'K', 'V', 'A', 'R', 'E', 'N', 'A'}) expected.put(uint64_t(c), 1);
  expected.put(1, 2).put(128, 2).put(1000, 4).put(77, 8).put(8192, 8).put(4096, 8);
  expected.put(4321, 8).put(0, 8);
  EXPECT_EQ(arena_checksum(h), XXH3_64bits(expected.get().data(), 56));
  h.checksum = arena_checksum(h);
  h.progress = 5;
  expected.put(h.checksum, 8).put(5, 8);
  for (int i = 0; i < 56; ++i) expected.put(0, 1);
  EXPECT_EQ(raw(h), expected.get());
}

TEST(Format, AControlFrameIsTheseBytes) {
  const HeartbeatFrame beat{0x0807060504030201};
  const auto frame =
      make_frame(uint16_t(ControlOp::Heartbeat), ControlStatus::Ok, 9, 7, payload_of(beat));
  Bytes payload, expected;
  payload.put(0x0807060504030201, 8);
  for (const char c : {'C', 'K', 'V', 'C'}) expected.put(uint64_t(c), 1);
  expected.put(1, 2).put(6, 2).put(8, 4).put(0, 4).put(9, 8).put(7, 8);
  const uint64_t seed = XXH3_64bits(payload.get().data(), 8);
  expected.put(XXH3_64bits_withSeed(expected.get().data(), 32, seed), 8);
  expected.put(0x0807060504030201, 8);
  ASSERT_EQ(frame.size(), expected.get().size());
  EXPECT_EQ(std::memcmp(frame.data(), expected.get().data(), frame.size()), 0);
}

TEST(Format, AnAllocateRequestIsTheseBytes) {
  const AllocateRequest r{{1, 2}, 3, 4, 5, 6, 7, 8, uint16_t(DType::F16), 16, 128, 0};
  Bytes expected;
  expected.put(1, 8).put(2, 8);
  for (const uint64_t x : {3, 4, 5, 6, 7, 8}) expected.put(x, 4);
  for (const uint64_t x : {1, 16, 128, 0}) expected.put(x, 2);
  EXPECT_EQ(raw(r), expected.get());
}

TEST(Format, AListEntryIsTheseBytes) {
  const ListEntry e{{{1, 2}, 3, 4, 5, 6, 7, 8, uint16_t(DType::F16), 16, 128, 0}, 9, 10, 1};
  Bytes expected;
  expected.put(1, 8).put(2, 8);
  for (const uint64_t x : {3, 4, 5, 6, 7, 8}) expected.put(x, 4);
  for (const uint64_t x : {1, 16, 128, 0}) expected.put(x, 2);
  expected.put(9, 8).put(10, 4).put(1, 4);
  EXPECT_EQ(raw(e), expected.get());
  EXPECT_EQ(raw(ListRequest{7, 0}), Bytes().put(7, 4).put(0, 4).get());
  EXPECT_EQ(raw(ListReply{2, 1}), Bytes().put(2, 4).put(1, 4).get());
}

TEST(Format, TheLagOfCopiesStandsBehindTheProgressCounter) {
  ArenaHeader h;
  h.replication_lag = 0x0807060504030201;
  h.replication_limit = 9;
  const auto bytes = raw(h);
  const std::vector<uint8_t> there(bytes.begin() + 72, bytes.begin() + 88);
  EXPECT_EQ(there, Bytes().put(0x0807060504030201, 8).put(9, 8).get());
  const uint64_t before = arena_checksum(h);
  h.replication_lag = 1;
  EXPECT_EQ(arena_checksum(h), before);
}

TEST(Format, SlotsAreAlignedForEveryShape) {
  for (const int tokens : {1, 3, 16, 32, 255, 256}) {
    for (const int dim : {1, 64, 96, 128, 256, 1024}) {
      const BlockShape s{DType::F16, uint16_t(tokens), uint16_t(dim)};
      ASSERT_TRUE(s.valid());
      EXPECT_EQ(s.k_offset() % 64, 0u);
      EXPECT_EQ(s.v_offset() % 64, 0u);
      EXPECT_EQ(s.slot_bytes() % 64, 0u);
      EXPECT_GE(s.v_offset(), s.k_offset() + size_t(tokens) * size_t(dim) * 2);
      EXPECT_GE(s.slot_bytes(), s.v_offset() + size_t(tokens) * size_t(dim) * 2);
    }
  }
}

TEST(Format, EveryFlippedBitOfAFrameIsNoticed) {
  const AllocateRequest r{{1, 2}, 0, 4, 0, 2, 0, 8, uint16_t(DType::F16), 16, 128, 0};
  auto frame = make_frame(uint16_t(ControlOp::Allocate), ControlStatus::Ok, 3, 1, payload_of(r));
  for (size_t bit = 0; bit < frame.size() * 8; ++bit) {
    frame[bit / 8] ^= std::byte(1 << bit % 8);
    FrameHeader h;
    std::memcpy(&h, frame.data(), sizeof h);
    const auto payload = std::span<const std::byte>(frame).subspan(sizeof h);
    EXPECT_TRUE(header_defect(h, true) != nullptr || !checksum_matches(h, payload)) << bit;
    frame[bit / 8] ^= std::byte(1 << bit % 8);
  }
}

TEST(Format, HostileAllocationsAreNamedBeforeAnythingIsMultiplied) {
  const AllocateRequest good{{1, 2}, 0, 4, 0, 2, 0, 8, uint16_t(DType::F16), 16, 128, 0};
  EXPECT_EQ(allocation_defect(good), "");
  const auto bad = [&](auto change) {
    AllocateRequest r = good;
    change(r);
    return !allocation_defect(r).empty();
  };
  EXPECT_TRUE(bad([](auto& r) { r.owner = {}; }));
  EXPECT_TRUE(bad([](auto& r) { r.layers = 0; }));
  EXPECT_TRUE(bad([](auto& r) { r.layers = UINT32_MAX, r.kv_heads = UINT32_MAX; }));
  EXPECT_TRUE(bad([](auto& r) { r.first_layer = UINT32_MAX - 1; }));
  EXPECT_TRUE(bad([](auto& r) { r.first_block = UINT32_MAX; }));
  EXPECT_TRUE(bad([](auto& r) { r.kv_heads = 0; }));
  EXPECT_TRUE(bad([](auto& r) { r.blocks = 0; }));
  EXPECT_TRUE(bad([](auto& r) { r.blocks = (1u << 24) + 1; }));
  EXPECT_TRUE(bad([](auto& r) { r.dtype = uint16_t(DType::F32); }));
  EXPECT_TRUE(bad([](auto& r) { r.dtype = 0xffff; }));
  EXPECT_TRUE(bad([](auto& r) { r.dtype = 256 + 1; }));
  EXPECT_TRUE(bad([](auto& r) { r.block_tokens = 0; }));
  EXPECT_TRUE(bad([](auto& r) { r.head_dim = 65535; }));
  EXPECT_TRUE(bad([](auto& r) { r.reserved = 1; }));
}

TEST(Format, SocketNamesThatDoNotFitAreRefused) {
  char path[108];
  size_t length = 0;
  EXPECT_TRUE(fill_socket_path("@name", path, length));
  EXPECT_EQ(length, 5u);
  EXPECT_EQ(path[0], '\0');
  EXPECT_TRUE(fill_socket_path("/tmp/x", path, length));
  EXPECT_EQ(length, 7u);
  EXPECT_TRUE(fill_socket_path(std::string(107, 'x'), path, length));
  EXPECT_FALSE(fill_socket_path(std::string(108, 'x'), path, length));
  EXPECT_FALSE(fill_socket_path("", path, length));
  EXPECT_FALSE(fill_socket_path("@", path, length));
  EXPECT_FALSE(fill_socket_path(std::string("a\0b", 3), path, length));
  EXPECT_NE(random_socket_name(), random_socket_name());
}

}  // namespace
}  // namespace certkv
