// Answers other nodes' reads from this node's arena.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "kvstore/server/block_directory.h"
#include "parallel/transport.h"

namespace certkv {

struct BlockServerCounts {
  uint64_t requests = 0, blocks = 0, ok = 0, absent = 0, corrupt = 0, bytes = 0;
};

// Every header is checked, and its block's identity, shape and fence with it, before a byte of the
// block leaves; its digests are checked by whoever asked, after the transfer.
// THREADS: safe.
class BlockServer {
 public:
  explicit BlockServer(std::shared_ptr<BlockDirectory> directory)
      : directory_(std::move(directory)) {}

  // A request of ServerOp::Read. Throws InvalidArgument where it is malformed.
  void read(const TransportRequest& request, TransportReply& reply);
  BlockServerCounts counts() const;

 private:
  std::shared_ptr<BlockDirectory> directory_;
  std::atomic<uint64_t> requests_{0}, blocks_{0}, ok_{0}, absent_{0}, corrupt_{0}, bytes_{0};
};

}  // namespace certkv
