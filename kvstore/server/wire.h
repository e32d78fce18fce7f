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
