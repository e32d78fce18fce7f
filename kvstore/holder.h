// The holder: the process part that owns the arena and answers the ranks of its node.
//
// It has no network port, only a Unix socket for processes of the same user. Connections of other
// users, malformed frames and slow or idle strangers are dropped; nothing a connection sends can
// reach the memory of another session or stop the holder.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kvstore/arena.h"
#include "kvstore/server_child.h"

namespace certkv {

struct HolderOptions {
  std::string socket;                      // "@name", a path, or empty: a random abstract name
  std::chrono::milliseconds linger{2000};  // after the last rank is gone; < 0: for ever
  std::chrono::milliseconds attach_within{10000};  // of the start; < 0: for ever
  std::chrono::milliseconds stranger{5000};  // a connection must attach, and a frame end, in this
  size_t max_connections = 256;
  bool handle_signals = false;  // SIGTERM and SIGINT end run()
  bool quiet_at_end = false;    // let go of standard error when the last rank is gone, so that a
                                // launcher that waits for its end does not wait out the linger time
  // The process that talks to other nodes; "--holder" and the socket's name are appended. None
  // unless its command is given.
  ServerChildOptions server;
};

struct HolderState;

class Holder {
 public:
  // Binds the socket. A path that a dead store of this user left behind is taken over; a live one
  // is not. Throws InvalidArgument (name unusable or in use), IoError.
  Holder(Arena arena, uint64_t boot_nonce, const HolderOptions& options);
  ~Holder();
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;

  const std::string& socket() const;

  // Serves until it ends itself, stop() is called or a signal comes. Returns why it ended.
  std::string run();
  void stop();  // THREADS: from any thread

 private:
  std::unique_ptr<HolderState> state_;
};

}  // namespace certkv
