// Forged, replayed and reordered frames on the holder's socket, in the number that an attacker has.
//
// The attacker runs as the same user (another one is refused before the first byte,
// control_test.cc), has seen all frames of a victim's connection and knows how checksums are made.
// What he sends in the victim's name ends his own connection, and changes nothing that the victim
// has.
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "kernels/base/log.h"
#include "tests/kvstore/raw_client.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

#if defined(CERTKV_SANITIZED)
constexpr int kFrames = 5000;
#else
constexpr int kFrames = 100000;
#endif

using Bytes = std::vector<std::byte>;

// All that a victim sends in a life: attach, two reservations, a release, heartbeats, detach.
std::vector<Bytes> recorded_life(uint64_t session) {
  AllocateRequest a;
  a.owner = {3, 4};
  a.layers = a.kv_heads = 2;
  a.blocks = 3;
  a.dtype = uint16_t(DType::BF16);
  a.block_tokens = 16;
  a.head_dim = 64;
  const AttachRequest attach{0, 0};
  const ReleaseRequest release{1, 0};
  const HeartbeatFrame beat{9};
  uint64_t sequence = 0;
  std::vector<Bytes> life;
  const auto add = [&](ControlOp op, std::span<const std::byte> payload) {
    ++sequence;
    life.push_back(make_frame(uint16_t(op), ControlStatus::Ok, sequence,
                              sequence == 1 ? 0 : session, payload));
  };
  add(ControlOp::Attach, payload_of(attach));
  add(ControlOp::Allocate, payload_of(a));
  add(ControlOp::Heartbeat, payload_of(beat));
  add(ControlOp::Release, payload_of(release));
  add(ControlOp::Allocate, payload_of(a));
  add(ControlOp::Capacity, {});
  add(ControlOp::Status, {});
  add(ControlOp::Detach, {});
  return life;
}

// The frame in the victim's name, with one thing changed and the checksum made anew.
Bytes forged(const std::vector<Bytes>& life, std::mt19937_64& random) {
  const Bytes& from = life[1 + random() % (life.size() - 1)];
  FrameHeader h;
  std::memcpy(static_cast<void*>(&h), from.data(), sizeof h);
  Bytes payload(from.begin() + sizeof h, from.end());
  uint64_t sequence = h.sequence, session = h.session;
  uint16_t op = h.op;
  switch (random() % 4) {
    case 0:
      sequence = random() % 12;
      break;
    case 1:
      session = random() % 6;
      break;
    case 2:
      op = uint16_t(random() % 12);
      break;
    default:
      if (!payload.empty()) payload[random() % payload.size()] ^= std::byte(1u << random() % 8);
  }
  Bytes frame = make_frame(op, ControlStatus::Ok, sequence, session, payload);
  if (random() % 8 == 0) frame[random() % frame.size()] ^= std::byte(1u << random() % 8);
  return frame;
}

struct Account {
  uint64_t reservations, free_bytes, dead_ranks;
  bool operator==(const Account&) const = default;
};
Account account(StoreClient& client) {
  const auto v = nlohmann::json::parse(client.status_json());
  return {v.at("reservations"), v.at("free_bytes"), v.at("dead_ranks")};
}

TEST(Forgery, ForgedAndReplayedFramesEndTheirConnectionsAndChangeNothing) {
  log_set_level(LogLevel::Error);
  HolderOptions options;
  options.max_connections = 8;
  const ThreadHolder holder(uint64_t(1) << 20, options);
  const auto victim = holder.attach();
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  r.blocks = 2;
  OriginalsSpan span = victim->reserve(r);
  seal_known(span, 0, 0, 0);
  const Account before = account(*victim);
  const std::vector<Bytes> life = recorded_life(victim->session());
  std::mt19937_64 random(20261125);
  int answered = 0;
  for (int i = 0; i < kFrames; ++i) {
    RawClient attacker(holder.socket());
    ASSERT_TRUE(attacker.connected()) << i;
    // A third are the victim's own frames again: later ones first, or one of them alone.
    const Bytes frame =
        random() % 3 == 0 ? life[1 + random() % (life.size() - 1)] : forged(life, random);
    attacker.send_bytes(frame);
    attacker.finish_sending();
    FrameHeader h;
    Bytes payload;
    if (attacker.receive_frame(h, payload)) ++answered;
    ASSERT_FALSE(attacker.malformed()) << i;
  }
  // Only an attach is answered on a fresh connection, and none was sent with session 0 but by
  // forging operation 1 into a frame of its length.
  EXPECT_LE(answered, kFrames / 100);
  EXPECT_FALSE(victim->lost());
  EXPECT_EQ(read_copy(*victim->reader(), span.id(0, 0, 0), r.shape).k,
            known_rows(r.shape, 0, 0, 0, false));
  Account after = account(*victim);
  EXPECT_EQ(after.reservations, before.reservations);
  EXPECT_EQ(after.free_bytes, before.free_bytes);
  seal_known(span, 0, 0, 1);
}

// In a session of his own an attacker has what a rank has, and no more: frames of his own life
// again, out of order, end it, and then his space is an orphan.
TEST(Forgery, AFrameThatIsRepeatedOrOutOfOrderEndsItsSession) {
  log_set_level(LogLevel::Error);
  const ThreadHolder holder(uint64_t(1) << 20);
  const auto victim = holder.attach();
  std::mt19937_64 random(7);
  for (int i = 0; i < kFrames / 100; ++i) {
    RawClient attacker(holder.socket());
    const uint64_t session = attacker.attach();
    ASSERT_NE(session, 0u);
    const std::vector<Bytes> life = recorded_life(session);
    const size_t played = random() % 4;  // in order, so far
    FrameHeader h;
    Bytes payload;
    for (size_t f = 1; f <= played; ++f) {
      attacker.send_bytes(life[f]);
      ASSERT_TRUE(attacker.receive_frame(h, payload)) << i;
    }
    size_t next = random() % life.size();
    if (next == played + 1) next = 0;
    attacker.send_bytes(life[next]);
    ASSERT_FALSE(attacker.receive_frame(h, payload))
        << i << ": frame " << next << " after " << played;
  }
  EXPECT_FALSE(victim->lost());
  EXPECT_EQ(nlohmann::json::parse(victim->status_json()).at("frames_malformed"),
            uint64_t(kFrames / 100));
}

}  // namespace
}  // namespace certkv::test
