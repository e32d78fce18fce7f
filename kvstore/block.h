// The bytes of a block of originals, of the arena that holds it and of its identity.
//
// kvstore/FORMAT.md is the specification; every offset there is asserted here. All integers are
// little-endian. Nothing read from shared memory or a socket is trusted: it is copied first, the
// copy is checked, and only the copy is used.
#pragma once

#include <bit>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/base/dtype.h"

namespace certkv {

static_assert(std::endian::native == std::endian::little, "kvstore/FORMAT.md is little-endian");

// Whose context the tokens are: a name that others can know and ask for (kvstore/content_owner.h),
// or a private random id. Bit 63 of `hi` tells them apart. {0, 0} is nobody.
struct OwnerId {
  uint64_t hi = 0;
  uint64_t lo = 0;
  bool is_content() const { return hi >> 63 != 0; }
  bool is_nobody() const { return hi == 0 && lo == 0; }
  friend auto operator<=>(const OwnerId&, const OwnerId&) = default;
};

// Identity of one block for ever: no two contents ever share one. A difference in any field means
// that this is another block, which is a miss, never an approximation.
struct BlockId {
  uint64_t boot_nonce = 0;  // of the store that holds it: random per start of the store
  OwnerId owner;
  uint32_t layer = 0;
  uint32_t kv_head = 0;  // global index, whatever the number of ranks
  uint32_t block = 0;    // index in the context: tokens [block * block_tokens, ...)
  uint32_t version = 0;  // number of the reservation, counted by the store: no two share one
  friend auto operator<=>(const BlockId&, const BlockId&) = default;
};
static_assert(sizeof(BlockId) == 40 && std::is_trivially_copyable_v<BlockId>);
static_assert(offsetof(BlockId, owner) == 8 && offsetof(BlockId, layer) == 24);
static_assert(offsetof(BlockId, kv_head) == 28 && offsetof(BlockId, block) == 32);
static_assert(offsetof(BlockId, version) == 36);

inline constexpr uint32_t kBlockMagic = 0x4b564b43;  // "CKVK"
inline constexpr uint16_t kFormatVersion = 1;
inline constexpr size_t kBlockHeaderBytes = 128;
inline constexpr size_t kBlockAlignment = 64;

// `seal` is 0 until the block is sealed, and then the XXH3 of the 120 bytes before it (1 where that
// is 0). It is written last, once, by a release store; whoever loads it with acquire and finds it
// set may read the rest. A sealed block is never changed, only freed.
struct BlockHeader {
  uint32_t magic = 0;
  uint16_t format = 0;
  uint16_t header_bytes = 0;
  BlockId id;
  uint64_t fence = 0;  // session of the writer: the store's fencing token
  uint8_t dtype = 0;   // DType of the elements: F16 or BF16
  uint8_t reserved0 = 0;
  uint16_t tokens = 0;  // rows in use, 1 .. block_tokens; the other rows are zero
  uint16_t block_tokens = 0;
  uint16_t head_dim = 0;
  uint64_t k_digest = 0;      // kernels/digest.h, over all block_tokens * head_dim elements of K
  uint64_t v_digest = 0;      // the same of V, so that keys can be fetched and checked alone
  uint64_t reserved[5] = {};  // zero
  uint64_t seal = 0;
};
static_assert(sizeof(BlockHeader) == kBlockHeaderBytes && alignof(BlockHeader) == 8);
static_assert(std::is_trivially_copyable_v<BlockHeader>);
static_assert(offsetof(BlockHeader, format) == 4 && offsetof(BlockHeader, header_bytes) == 6);
static_assert(offsetof(BlockHeader, id) == 8 && offsetof(BlockHeader, fence) == 48);
static_assert(offsetof(BlockHeader, dtype) == 56 && offsetof(BlockHeader, tokens) == 58);
static_assert(offsetof(BlockHeader, block_tokens) == 60 && offsetof(BlockHeader, head_dim) == 62);
static_assert(offsetof(BlockHeader, k_digest) == 64 && offsetof(BlockHeader, v_digest) == 72);
static_assert(uint8_t(DType::F16) == 1 && uint8_t(DType::BF16) == 2);
static_assert(offsetof(BlockHeader, reserved) == 80 && offsetof(BlockHeader, seal) == 120);

// Shape of the blocks of one model. All blocks of one reservation have the same.
struct BlockShape {
  DType dtype = DType::BF16;
  uint16_t block_tokens = 16;
  uint16_t head_dim = 128;

  constexpr size_t elements() const { return size_t(block_tokens) * head_dim; }  // of K; V alike
  constexpr size_t payload_bytes() const { return elements() * 2; }              // of K; V alike
  constexpr size_t payload_stride() const {
    return (payload_bytes() + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
  }
  constexpr size_t k_offset() const { return kBlockHeaderBytes; }  // from the slot's first byte
  constexpr size_t v_offset() const { return kBlockHeaderBytes + payload_stride(); }
  constexpr size_t slot_bytes() const { return kBlockHeaderBytes + 2 * payload_stride(); }
  constexpr bool valid() const {
    return (dtype == DType::BF16 || dtype == DType::F16) && block_tokens >= 1 &&
           block_tokens <= kMaxBlockTokens && head_dim >= 1 && head_dim <= kMaxHeadDim;
  }
  static constexpr uint16_t kMaxBlockTokens = 256;
  static constexpr uint16_t kMaxHeadDim = 1024;
  friend bool operator==(const BlockShape&, const BlockShape&) = default;
};
static_assert(BlockShape{}.slot_bytes() == 8320);

inline constexpr uint64_t kArenaMagic = 0x414e455241564b43;  // "CKVARENA"
inline constexpr size_t kArenaDataOffset = 4096;             // first byte that extents may use
inline constexpr size_t kArenaGranule = 4096;                // extents start and end on these

// The first bytes of the arena. `progress` counts the store's turns and lives in a cache line of
// its own, outside `checksum` (XXH3 of the 56 bytes before it).
struct ArenaHeader {
  uint64_t magic = 0;
  uint16_t format = 0;
  uint16_t header_bytes = 0;
  uint32_t uid = 0;
  uint64_t boot_nonce = 0;
  uint64_t arena_bytes = 0;  // of the whole mapping, this header's page included
  uint64_t data_offset = 0;
  uint64_t store_pid = 0;
  uint64_t reserved = 0;
  uint64_t checksum = 0;
  uint64_t progress = 0;
  // Written by the node's server, outside the checksum as well; 0 while none runs.
  uint64_t replication_lag = 0;    // bytes that are sealed here and not yet copied as asked
  uint64_t replication_limit = 0;  // who seals waits while the lag is above it; 0: nobody waits
  uint64_t reserved1[5] = {};
};
static_assert(sizeof(ArenaHeader) == 128 && std::is_trivially_copyable_v<ArenaHeader>);
static_assert(offsetof(ArenaHeader, uid) == 12 && offsetof(ArenaHeader, boot_nonce) == 16);
static_assert(offsetof(ArenaHeader, arena_bytes) == 24 && offsetof(ArenaHeader, checksum) == 56);
static_assert(offsetof(ArenaHeader, progress) == 64);
static_assert(offsetof(ArenaHeader, replication_lag) == 72);
static_assert(offsetof(ArenaHeader, replication_limit) == 80);

}  // namespace certkv
