// What a rank or a store asks of another node's store: bodies of requests and replies over a
// transport. kvstore/FORMAT.md is the specification. The transport authenticates; what an
// authenticated peer says is checked all the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kvstore/block.h"

namespace certkv {

enum class ServerOp : uint32_t {
  Read = 1,
  Replicate = 2,
  Forget = 3,
};

inline constexpr size_t kMaxReadBlocks = 1024;  // of one request

// ---- read ---------------------------------------------------------------------------------------

struct ReadRequestHead {
  uint32_t count = 0;
  uint16_t dtype = 0, block_tokens = 0, head_dim = 0, reserved = 0;
  uint32_t reserved1 = 0;
};
struct ReadRequestEntry {
  BlockId id;
  uint32_t part = 0;  // 1: K, 2: V, 3: both
  uint32_t reserved = 0;
};
struct ReadReplyHead {
  uint32_t count = 0;
  uint32_t reserved = 0;
};
// Followed by one of these per block, u32, padded to 8 bytes in all; then, for every Ok block in
// order, its header (128 bytes) and the parts asked for, each padded to 8 bytes.
enum class WireBlock : uint32_t { Ok = 1, Absent = 2, Corrupt = 3 };

static_assert(sizeof(ReadRequestHead) == 16 && offsetof(ReadRequestHead, dtype) == 4);
static_assert(sizeof(ReadRequestEntry) == 48 && offsetof(ReadRequestEntry, part) == 40);
static_assert(sizeof(ReadReplyHead) == 8);

// ---- replicate and forget -----------------------------------------------------------------------

// One KV head of one layer of one reservation, as it is named everywhere.
struct WireRun {
  uint64_t boot_nonce = 0;  // of the store where it was first sealed
  OwnerId owner;
  uint32_t layer = 0, kv_head = 0;
  uint32_t first_block = 0;
  uint32_t version = 0;
  friend auto operator<=>(const WireRun&, const WireRun&) = default;
  BlockId id(uint32_t block) const { return {boot_nonce, owner, layer, kv_head, block, version}; }
};
// Followed by `count` slots as they lie in the sender's arena. count 0 asks what is there. Forget
// has this alone, with count 0.
struct ReplicateRequest {
  WireRun run;
  uint32_t blocks = 0;  // of the run
  uint32_t first = 0;   // of these, counted from the run's first
  uint32_t count = 0;
  uint32_t reserved = 0;
  uint16_t dtype = 0, block_tokens = 0, head_dim = 0, reserved1 = 0;
};
struct ReplicateReply {
  uint32_t verified = 0;  // so many first blocks of the run lie there, and their digests matched
  uint32_t reserved = 0;
};
static_assert(sizeof(WireRun) == 40 && offsetof(WireRun, first_block) == 32);
static_assert(sizeof(ReplicateRequest) == 64 && offsetof(ReplicateRequest, blocks) == 40);
static_assert(offsetof(ReplicateRequest, dtype) == 56 && sizeof(ReplicateReply) == 8);

constexpr size_t wire_padded(size_t bytes) {
  return (bytes + 7) / 8 * 8;
}
constexpr size_t wire_part_bytes(const BlockShape& shape) {
  return wire_padded(shape.payload_bytes());
}
// The longest reply to `count` blocks with both parts.
constexpr size_t read_reply_bytes(const BlockShape& shape, size_t count) {
  return sizeof(ReadReplyHead) + wire_padded(count * sizeof(uint32_t)) +
         count * (kBlockHeaderBytes + 2 * wire_part_bytes(shape));
}

}  // namespace certkv
