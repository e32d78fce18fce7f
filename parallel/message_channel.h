// Byte strings from rank to rank, for the job layer: rank 0 deals requests to the leaders of the
// replicas and gathers what they finished. Not for tensors.
//
// Messages from one rank to another arrive in the order sent; nothing is said about the order of
// different senders. Liveness and errors are those of communicator.h.
//
// THREADS: one thread per rank.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace certkv {

struct Message {
  int from = 0;
  std::string bytes;  // may be empty, may hold zeros
};

inline constexpr size_t kMaxMessageBytes = size_t(1) << 30;

class MessageChannel {
 public:
  virtual ~MessageChannel() = default;
  MessageChannel(const MessageChannel&) = delete;
  MessageChannel& operator=(const MessageChannel&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Copies and enqueues; never waits for the receiver. `to` may be this rank itself.
  // InvalidArgument above kMaxMessageBytes or for a rank outside the group.
  virtual void send(int to, std::string_view bytes) = 0;

  // The next message from anybody, if one is here. Never waits; throws if the group is broken. Also
  // moves this rank's own sends along.
  virtual std::optional<Message> try_receive() = 0;

  // Waits for a message from `from`. Messages of others that come meanwhile are kept. A silent
  // sender is DeadlineExceeded.
  virtual Message receive(int from, std::chrono::milliseconds silence) = 0;

  // Returns when everything sent by this rank has left it (its memory is the channel's, so this is
  // needed before the end of the process only).
  virtual void flush(std::chrono::milliseconds silence) = 0;

 protected:
  MessageChannel() = default;
};

}  // namespace certkv
