// The reader of another node's store.
//
// A batch is cut into requests of at most kMaxReadBlocks blocks, several of them under way at once.
// Of what comes back nothing is believed: header, identity, shape and digest are checked on this
// side, the digest over the copy in the destination.
//
// | status  | when                                                                              |
// |---------|-----------------------------------------------------------------------------------|
// | Ok      | everything asked for is there and was verified here                               |
// | Absent  | the store has no such block, or what came is another block                        |
// | Corrupt | header, shape or digest do not match, or the answer has the wrong form            |
// | Lost    | no answer before the deadline, no connection, or no retry left in the budget      |
#pragma once

#include <memory>

#include "kvstore/reader.h"
#include "kvstore/remote_peer.h"

namespace certkv {

struct RemoteReaderOptions {
  size_t blocks = 256;  // of one request: larger costs latency, smaller throughput
  size_t requests = 4;  // under way at once
  int attempts = 4;     // of one request
};

class RemoteReader : public BlockReader {
 public:
  // All blocks have this shape.
  RemoteReader(std::shared_ptr<RemotePeer> peer, BlockShape shape,
               RemoteReaderOptions options = {});

  // Cannot show views: a destination needs buffers for what it asks.
  ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                  Deadline deadline) override;

 private:
  class Batch;
  const std::shared_ptr<RemotePeer> peer_;
  const BlockShape shape_;
  const RemoteReaderOptions options_;
};

}  // namespace certkv
