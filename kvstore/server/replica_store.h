// The copies of other nodes' blocks that lie in this node's arena: reservations of the server's
// session. A copy keeps the identity, header, fence and seal of its first.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kvstore/server/block_directory.h"
#include "kvstore/server/wire.h"
#include "parallel/transport.h"

namespace certkv {

struct ReplicaCounts {
  uint64_t runs = 0, blocks = 0, bytes = 0;
  uint64_t refused = 0;  // blocks whose header or digests did not match
};

// THREADS: safe.
class ReplicaStore {
 public:
  // Finds, verifies and holds the copies that a server before this one took in.
  ReplicaStore(std::shared_ptr<StoreClient> client, std::shared_ptr<BlockDirectory> directory);
  ~ReplicaStore();  // leaves the copies with the holder, for a successor

  // ServerOp::Replicate. A block is acknowledged after its digests were computed over what lies in
  // the arena. Blocks that are there already are left as they are; those beyond a gap are not
  // taken. Throws InvalidArgument (malformed), Corrupt (a block is not what its header says) and
  // OutOfMemory (no room in the arena, which the sender sees as Busy).
  void take(const TransportRequest& request, TransportReply& reply);
  // ServerOp::Forget: the run's first is gone, its copy here goes too.
  void forget(const TransportRequest& request, TransportReply& reply);

  ReplicaCounts counts() const;

 private:
  // Blocks [first, first + blocks) of a run, counted from its first. What was adopted is never
  // written.
  struct Part {
    OriginalsSpan span;
    uint32_t first = 0, blocks = 0;
    bool writable = false;
  };
  struct Run {
    BlockShape shape;
    std::vector<Part> parts;  // by first
    uint32_t verified = 0;    // first blocks that are there
  };
  std::byte* writable_slot(const WireRun& key, Run& run, uint32_t index, uint32_t blocks);
  void adopt_all();

  const std::shared_ptr<StoreClient> client_;
  const std::shared_ptr<BlockDirectory> directory_;
  mutable std::mutex mutex_;
  std::map<WireRun, Run> runs_;
  uint64_t blocks_ = 0, bytes_ = 0, refused_ = 0;
};

}  // namespace certkv
