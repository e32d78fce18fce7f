#include "kvstore/control.h"

#include <sys/random.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>

#include "kernels/base/error.h"

namespace certkv {
namespace {

uint64_t frame_checksum(const FrameHeader& header, std::span<const std::byte> payload) {
  const uint64_t seed = XXH3_64bits(payload.data(), payload.size());
  return XXH3_64bits_withSeed(&header, offsetof(FrameHeader, checksum), seed);
}

}  // namespace

std::vector<std::byte> make_frame(uint16_t op, ControlStatus status, uint64_t sequence,
                                  uint64_t session, std::span<const std::byte> payload) {
  FrameHeader header;
  header.op = op;
  header.payload_bytes = uint32_t(payload.size());
  header.status = uint32_t(status);
  header.sequence = sequence;
  header.session = session;
  header.checksum = frame_checksum(header, payload);
  std::vector<std::byte> frame(sizeof header + payload.size());
  std::memcpy(frame.data(), &header, sizeof header);
  if (!payload.empty()) std::memcpy(frame.data() + sizeof header, payload.data(), payload.size());
  return frame;
}

const char* header_defect(const FrameHeader& header, bool is_request) {
  if (header.magic != kFrameMagic) return "wrong magic";
  if (header.format != kFormatVersion) return "another format version";
  const size_t limit = is_request ? kMaxRequestPayload : kMaxReplyPayload;
  if (header.payload_bytes > limit) return "payload too long";
  if (((header.op & kReplyBit) == 0) != is_request) return "request and reply confused";
  if (is_request && header.status != 0) return "status in a request";
  return nullptr;
}

bool checksum_matches(const FrameHeader& header, std::span<const std::byte> payload) {
  return header.payload_bytes == payload.size() &&
         header.checksum == frame_checksum(header, payload);
}

BlockShape shape_of(const AllocateRequest& request) {
  BlockShape shape;
  shape.dtype = request.dtype <= uint16_t(DType::U64) ? DType(request.dtype) : DType::U64;
  shape.block_tokens = request.block_tokens;
  shape.head_dim = request.head_dim;
  return shape;
}

std::string allocation_defect(const AllocateRequest& r) {
  if (r.owner.is_nobody()) return "the owner is {0, 0}";
  if (r.reserved != 0) return "a reserved field is not zero";
  if (!shape_of(r).valid()) {
    return fmt::format(
        "block shape: dtype {}, {} tokens, head_dim {}; needed are F16 or BF16, "
        "1 .. {} tokens, 1 .. {} elements",
        r.dtype, r.block_tokens, r.head_dim, BlockShape::kMaxBlockTokens, BlockShape::kMaxHeadDim);
  }
  const uint64_t runs = uint64_t(r.layers) * r.kv_heads;
  if (runs < 1 || runs > kMaxRuns) {
    return fmt::format("{} layers x {} KV heads: 1 .. {} runs fit one reservation", r.layers,
                       r.kv_heads, kMaxRuns);
  }
  if (r.blocks < 1 || r.blocks > kMaxRunBlocks) {
    return fmt::format("{} blocks: 1 .. {} fit one reservation", r.blocks, kMaxRunBlocks);
  }
  const auto ends = [](uint32_t first, uint32_t count) {
    return uint64_t(first) + count <= UINT32_MAX;
  };
  if (!ends(r.first_layer, r.layers) || !ends(r.first_kv_head, r.kv_heads) ||
      !ends(r.first_block, r.blocks)) {
    return "an index range goes beyond 32 bits";
  }
  // slot_bytes < 2^21, blocks <= 2^24, runs <= 2^14: the product stays below 2^59.
  static_assert(2 * uint64_t(BlockShape::kMaxBlockTokens) * BlockShape::kMaxHeadDim * 2 + 1024 <
                uint64_t(1) << 21);
  return {};
}

bool fill_socket_path(std::string_view name, char (&path)[108], size_t& length) {
  if (name.size() < 2 || name.size() >= sizeof path) return false;
  if (name.find('\0') != std::string_view::npos) return false;
  std::memset(path, 0, sizeof path);
  std::memcpy(path, name.data(), name.size());
  length = name.size();
  if (path[0] == '@') {
    path[0] = '\0';
  } else {
    ++length;  // with its terminator
  }
  return true;
}

uint64_t random_u64() {
  uint64_t x = 0;
  ssize_t got;
  do {
    got = getrandom(&x, sizeof x, 0);
  } while (got < 0 && errno == EINTR);
  CERTKV_EXPECT(got == ssize_t(sizeof x), IoError, "the kernel gives no random numbers: {}",
                std::strerror(errno));
  return x;
}

std::string random_socket_name() {
  return fmt::format("@certkv-{}-{:016x}{:016x}", getuid(), random_u64(), random_u64());
}

uint64_t block_seal(const BlockHeader& header) {
  const uint64_t h = XXH3_64bits(&header, offsetof(BlockHeader, seal));
  return h == 0 ? 1 : h;
}

uint64_t arena_checksum(const ArenaHeader& header) {
  return XXH3_64bits(&header, offsetof(ArenaHeader, checksum));
}

}  // namespace certkv
