// One end of one connection between nodes, without the connection: frames go in, messages and
// frames to send come out.
//
// THREADS: one.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvstore/cluster/frame.h"

namespace certkv::cluster {

// What a node is to all its connections.
struct ChannelIdentity {
  JobKey key;
  NodeId self = 0;
  uint64_t boot = 0;    // of this process
  uint64_t digest = 0;  // of the seed list
  size_t seeds = 0;
};

class Channel {
 public:
  using Bytes = std::vector<std::byte>;
  // dialled: the peer whom this side has called; none where this side was called. `identity`
  // outlives the channel.
  Channel(const ChannelIdentity& identity, std::optional<NodeId> dialled);

  // Who calls greets first. Appends to `out`.
  void greet(Bytes& out);

  // What is wrong with a header, or null; then as many bytes of payload are to be read.
  const char* defect(const ClusterFrame& header) const {
    return frame_defect(header, session_ != nullptr);
  }
  // Takes a frame whose header has no defect. Returns null and appends what is to be sent, or what
  // is wrong: then the connection is to be ended, and no message was taken from the frame.
  // `message`: what came, if it was one.
  const char* take(const ClusterFrame& header, std::span<const std::byte> payload, Bytes& out,
                   std::optional<Message>& message);

  // REQUIRES authenticated().
  void seal(const Message& message, Bytes& out);

  // The peer has shown that it holds the key.
  bool authenticated() const { return authenticated_; }
  // As dialled, or as the peer's hello says: not to be believed before authenticated().
  std::optional<NodeId> peer() const { return peer_; }

 private:
  const char* hello_defect() const;
  void begin_session();
  void seal(FrameKind kind, std::span<const std::byte> payload, Bytes& out);

  const ChannelIdentity& own_;
  const bool dialled_;
  std::optional<NodeId> peer_;
  SecureSession::Nonce nonce_{};
  ClusterHello hello_;  // the other side's
  std::unique_ptr<SecureSession> session_;
  Bytes body_;
  bool authenticated_ = false;
};

}  // namespace certkv::cluster
