// Control frames between a rank and its node's store: bytes, building and checking.
//
// kvstore/FORMAT.md is the specification. A frame that fails any check ends its connection; what it
// says is never acted upon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kvstore/block.h"

namespace certkv {

inline constexpr uint32_t kFrameMagic = 0x43564b43;  // "CKVC"
inline constexpr size_t kFrameHeaderBytes = 40;
inline constexpr size_t kMaxRequestPayload = 4096;
inline constexpr size_t kMaxReplyPayload = 256 * 1024;
inline constexpr uint64_t kMaxRuns = 16384;  // of one reservation
inline constexpr uint64_t kMaxRunBlocks = uint64_t(1) << 24;

enum class ControlOp : uint16_t {
  Attach = 1,
  Allocate = 2,
  Release = 3,
  Capacity = 4,
  Status = 5,
  Heartbeat = 6,
  Detach = 7,
  List = 8,
  Adopt = 9,
  Peers = 10,
  Report = 11,
};
inline constexpr uint16_t kReplyBit = 0x8000;  // set in `op` of a reply

enum class ControlStatus : uint32_t {
  Ok = 0,
  BadRequest = 1,  // payload: text
  NoSpace = 2,     // payload: text
  NotThere = 3,    // adopt: no such reservation
};

struct FrameHeader {
  uint32_t magic = kFrameMagic;
  uint16_t format = kFormatVersion;
  uint16_t op = 0;
  uint32_t payload_bytes = 0;
  uint32_t status = 0;  // ControlStatus of a reply, 0 in requests
  uint64_t sequence =
      0;                 // requests of a connection count 1, 2, 3 ..; a reply repeats its request's
  uint64_t session = 0;  // fencing token; 0 in Attach
  uint64_t checksum = 0;  // XXH3 of bytes 0 .. 31, seeded with the XXH3 of the payload
};
static_assert(sizeof(FrameHeader) == kFrameHeaderBytes);
static_assert(offsetof(FrameHeader, op) == 6 && offsetof(FrameHeader, payload_bytes) == 8);
static_assert(offsetof(FrameHeader, status) == 12 && offsetof(FrameHeader, sequence) == 16);
static_assert(offsetof(FrameHeader, session) == 24 && offsetof(FrameHeader, checksum) == 32);

struct AttachRequest {
  uint32_t rank = 0;
  uint32_t reserved = 0;
};
struct AttachReply {  // travels with the arena's file descriptor (SCM_RIGHTS)
  uint64_t boot_nonce = 0;
  uint64_t session = 0;
  uint64_t arena_bytes = 0;
  uint64_t store_pid = 0;
};
struct AllocateRequest {
  OwnerId owner;
  uint32_t first_layer = 0, layers = 0;
  uint32_t first_kv_head = 0, kv_heads = 0;
  uint32_t first_block = 0, blocks = 0;
  uint16_t dtype = 0, block_tokens = 0, head_dim = 0, reserved = 0;
};
// Followed by `runs` offsets (8 bytes each) into the arena: run (layer_i * kv_heads + head_i) is
// `blocks` slots one after the other.
struct AllocateReply {
  uint32_t version = 0;
  uint32_t runs = 0;
  uint64_t run_bytes = 0;
};
struct ReleaseRequest {
  uint32_t version = 0;
  uint32_t keep = 0;  // 1: of a name that others can ask for; stays as an orphan
};
// Which reservation, and which part of it: the newest one of `ranges.owner` and its shape that
// covers the ranges and, where older_than is not 0, whose version is below that.
struct AdoptRequest {
  AllocateRequest ranges;
  uint32_t older_than = 0, reserved = 0;
};
// Followed by the offsets of the asked part's runs, as after AllocateReply.
struct AdoptReply {
  AllocateReply part;
  uint64_t fence = 0;  // session that reserved and writes it
};
struct ListRequest {  // reservations whose version is above `after`, in the order of versions
  uint32_t after = 0;
  uint32_t reserved = 0;
};
// Followed by `count` entries, each by the offsets (8 bytes each) of its runs.
struct ListReply {
  uint32_t count = 0;
  uint32_t more = 0;  // 1: there are more; ask again after the last version
};
struct ListEntry {
  AllocateRequest ranges;  // as reserved
  uint64_t fence = 0;      // session that reserved and writes it
  uint32_t version = 0;
  uint32_t orphan = 0;  // 1: nobody holds it
};
struct CapacityReply {
  uint64_t total_bytes = 0, free_bytes = 0, largest_bytes = 0;
};
struct HeartbeatFrame {  // request: the rank's counter; reply: the store's
  uint64_t progress = 0;
};
static_assert(sizeof(AttachRequest) == 8 && sizeof(AttachReply) == 32);
static_assert(sizeof(AllocateRequest) == 48 && offsetof(AllocateRequest, first_layer) == 16);
static_assert(offsetof(AllocateRequest, dtype) == 40 && offsetof(AllocateRequest, head_dim) == 44);
static_assert(sizeof(AllocateReply) == 16 && offsetof(AllocateReply, run_bytes) == 8);
static_assert(sizeof(AdoptRequest) == 56 && offsetof(AdoptRequest, older_than) == 48);
static_assert(sizeof(AdoptReply) == 24 && offsetof(AdoptReply, fence) == 16);
static_assert(sizeof(ListRequest) == 8 && sizeof(ListReply) == 8 && sizeof(ListEntry) == 64);
static_assert(offsetof(ListEntry, fence) == 48 && offsetof(ListEntry, version) == 56);
// Whatever the largest reservation, a page has room for it.
static_assert(sizeof(ListReply) + sizeof(ListEntry) + kMaxRuns * 8 <= kMaxReplyPayload);
static_assert(sizeof(ReleaseRequest) == 8 && sizeof(CapacityReply) == 24);
static_assert(sizeof(HeartbeatFrame) == 8);

// Header and payload as they are sent.
std::vector<std::byte> make_frame(uint16_t op, ControlStatus status, uint64_t sequence,
                                  uint64_t session, std::span<const std::byte> payload);

template <typename T>
std::span<const std::byte> payload_of(const T& value) {
  static_assert(std::has_unique_object_representations_v<T>);  // no padding leaves the process
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}
inline std::span<const std::byte> text_payload(std::string_view text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

// What is wrong with the fixed part of a header (magic, format, payload length, status in a
// request), or null. To be called before the payload is read.
const char* header_defect(const FrameHeader& header, bool is_request);
bool checksum_matches(const FrameHeader& header, std::span<const std::byte> payload);

// Exact-length parse; false where the length differs.
template <typename T>
bool parse_payload(std::span<const std::byte> payload, T& out) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (payload.size() != sizeof(T)) return false;
  __builtin_memcpy(&out, payload.data(), sizeof(T));
  return true;
}

// What is wrong with an allocation request, or an empty string. After it all products of its fields
// fit 64 bits: run_bytes(request) and run_bytes(request) * runs.
std::string allocation_defect(const AllocateRequest& request);
BlockShape shape_of(const AllocateRequest& request);
inline uint64_t run_bytes(const AllocateRequest& r) {
  return uint64_t(r.blocks) * shape_of(r).slot_bytes();
}

// Names of control sockets: "@name" is abstract, anything else a path. Fills sun_path; false where
// the name is empty or too long.
bool fill_socket_path(std::string_view name, char (&path)[108], size_t& length);
std::string random_socket_name();  // "@certkv-<uid>-<32 hex digits>"

uint64_t random_u64();  // from the kernel; throws IoError where it has none

// Sets and checks BlockHeader::seal and ArenaHeader::checksum.
uint64_t block_seal(const BlockHeader& header);
uint64_t arena_checksum(const ArenaHeader& header);

}  // namespace certkv
