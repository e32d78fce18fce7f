// What nodes tell each other: one shape for every kind of message, and its bytes.
//
// kvstore/FORMAT.md is the specification. Every message carries what a heartbeat does, so any of
// them is a sign of life. Who sent it and that nobody changed it is the frame's business
// (kvstore/cluster/frame.h); a decoded message is well-formed and may still be late, repeated or
// of a former life of its sender, which kvstore/cluster/membership.h sorts out.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvstore/cluster/nodes.h"

namespace certkv::cluster {

enum class MessageKind : uint8_t {
  Hello = 1,      // between nodes of which one does not know the other's boot nonce yet
  Heartbeat = 2,  //
  Propose = 3,    // `proposal`, `members` and `boots`: shall this be the view?
  Vote = 4,       // `proposal`: yes
  Refuse = 5,     // `proposal`: no; `floor` says above which counter to try
  Install = 6,    // `proposal`, `members` and `boots`: a majority has agreed
};

inline constexpr size_t kMaxDataAddress = 128;  // UNITS: bytes

struct Message {
  MessageKind kind = MessageKind::Heartbeat;
  NodeId from = 0, to = 0;
  uint64_t from_boot = 0;   // never 0
  uint64_t to_boot = 0;     // as the sender knows it; 0: not at all
  uint64_t sequence = 0;    // of the sender's messages to this node, growing
  uint64_t stamp = 0;       // the sender's clock, which comes back as `echo`
  uint64_t echo = 0;        // the newest stamp of the receiver's that the sender has seen; 0: none
  uint64_t challenge = 0;   // "prove that you live, by repeating this"; 0: none
  uint64_t answer = 0;      // the newest challenge of the receiver's; 0: none
  uint64_t epoch = 0;       // of the sender's view
  uint32_t floor = 0;       // highest counter that the sender has seen
  NodeSet heard;            // nodes that the sender exchanges messages with
  uint64_t lag_bytes = 0;   // sealed here and not yet copied as often as asked
  uint64_t free_bytes = 0;  // of the sender's arena
  uint64_t proposal = 0;    // epoch; 0 where the kind has none
  NodeSet members;          // of the proposal
  std::array<uint64_t, kMaxNodes> boots{};
  std::array<char, kMaxDataAddress> address{};  // of the sender's data port, as text
  uint8_t address_bytes = 0;

  std::string_view data_address() const { return {address.data(), address_bytes}; }
  friend bool operator==(const Message&, const Message&) = default;
};

inline constexpr size_t kMessageHeadBytes = 120;
inline constexpr size_t kMaxMessageBytes = kMessageHeadBytes + 8 * kMaxNodes + kMaxDataAddress;

// The fixed part of the bytes; after it come the boots of the members in ascending order (8 bytes
// each) and the data address.
struct MessageHead {
  uint8_t kind = 0, from = 0, to = 0, address_bytes = 0;
  uint32_t floor = 0;
  uint64_t from_boot = 0, to_boot = 0;
  uint64_t sequence = 0, stamp = 0, echo = 0;
  uint64_t challenge = 0, answer = 0;
  uint64_t epoch = 0, heard = 0;
  uint64_t lag_bytes = 0, free_bytes = 0;
  uint64_t proposal = 0, members = 0;
  uint64_t reserved = 0;
};
static_assert(sizeof(MessageHead) == kMessageHeadBytes);
static_assert(offsetof(MessageHead, floor) == 4 && offsetof(MessageHead, from_boot) == 8);
static_assert(offsetof(MessageHead, to_boot) == 16 && offsetof(MessageHead, sequence) == 24);
static_assert(offsetof(MessageHead, stamp) == 32 && offsetof(MessageHead, echo) == 40);
static_assert(offsetof(MessageHead, challenge) == 48 && offsetof(MessageHead, answer) == 56);
static_assert(offsetof(MessageHead, epoch) == 64 && offsetof(MessageHead, heard) == 72);
static_assert(offsetof(MessageHead, lag_bytes) == 80 && offsetof(MessageHead, free_bytes) == 88);
static_assert(offsetof(MessageHead, proposal) == 96 && offsetof(MessageHead, members) == 104);
static_assert(offsetof(MessageHead, reserved) == 112);

// Appends the message's bytes to `out`, at most kMaxMessageBytes.
void encode(const Message& message, std::vector<std::byte>& out);

// Nothing where any byte is out of place for a cluster of so many seeds: kind, nodes, lengths,
// reserved bytes, a boot nonce of 0, members beyond the seeds, a body that the kind has not, or an
// address with other than printable ASCII characters.
std::optional<Message> decode(std::span<const std::byte> bytes, size_t seeds);

}  // namespace certkv::cluster
