// Frames between the control ports of two nodes: bytes and the checks that come before anything is
// believed. kvstore/FORMAT.md is the specification.
//
// A connection begins with a hello from each side, which anybody can write. All that follows
// carries a number and a tag (parallel/secure_session.h) under keys of this connection and
// direction alone; who has not sent a frame with a right tag is a stranger, whatever its hello
// says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kvstore/cluster/message.h"
#include "parallel/secure_session.h"

namespace certkv::cluster {

inline constexpr uint32_t kClusterMagic = 0x4e564b43;  // "CKVN"
inline constexpr uint16_t kClusterFormat = 1;
inline constexpr size_t kClusterHeaderBytes = 40;

enum class FrameKind : uint8_t {
  Hello = 1,    // payload: ClusterHello; no tag
  Confirm = 2,  // no payload: "I have the key"
  Message = 3,  // payload: a message
};

struct ClusterFrame {
  uint32_t magic = kClusterMagic;
  uint16_t format = kClusterFormat;
  uint8_t kind = 0;
  uint8_t reserved = 0;
  uint32_t payload_bytes = 0;
  uint32_t reserved1 = 0;
  uint64_t number = 0;       // of the frames of one direction from Confirm on, which has 0
  SecureSession::Tag tag{};  // over the 24 bytes before it and the payload; a hello's is zero
};
static_assert(sizeof(ClusterFrame) == kClusterHeaderBytes);
static_assert(offsetof(ClusterFrame, kind) == 6 && offsetof(ClusterFrame, payload_bytes) == 8);
static_assert(offsetof(ClusterFrame, number) == 16 && offsetof(ClusterFrame, tag) == 24);

struct ClusterHello {
  uint8_t from = 0, to = 0;  // places in the seed list
  uint16_t reserved = 0;
  uint32_t reserved1 = 0;
  uint64_t boot = 0;
  uint64_t seeds = 0;  // digest of the seed list
  SecureSession::Nonce nonce{};
};
static_assert(sizeof(ClusterHello) == 56 && offsetof(ClusterHello, boot) == 8);
static_assert(offsetof(ClusterHello, seeds) == 16 && offsetof(ClusterHello, nonce) == 24);
static_assert(std::is_trivially_copyable_v<ClusterFrame> &&
              std::has_unique_object_representations_v<ClusterHello>);

// What is wrong with a header, or null. To be called before its payload is read. `greeted`: whether
// the hello of this side of the connection has come.
inline const char* frame_defect(const ClusterFrame& f, bool greeted) {
  if (f.magic != kClusterMagic) return "wrong magic";
  if (f.format != kClusterFormat) return "another format version";
  if (f.reserved != 0 || f.reserved1 != 0) return "a reserved field is not zero";
  if (!greeted) {
    if (f.kind != uint8_t(FrameKind::Hello)) return "no hello";
    if (f.payload_bytes != sizeof(ClusterHello)) return "a hello of another length";
    if (f.number != 0 || f.tag != SecureSession::Tag{}) return "a hello with number or tag";
    return nullptr;
  }
  switch (FrameKind(f.kind)) {
    case FrameKind::Hello:
      return "a second hello";
    case FrameKind::Confirm:
      return f.payload_bytes == 0 ? nullptr : "a payload too long";
    case FrameKind::Message:
      if (f.payload_bytes < kMessageHeadBytes) return "a payload too short";
      return f.payload_bytes <= kMaxMessageBytes ? nullptr : "a payload too long";
  }
  return "unknown kind";
}

}  // namespace certkv::cluster
