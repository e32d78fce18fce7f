// One reader after the other: this node's arena, then the copies on other nodes.
//
// A block that a reader does not deliver is asked of the next. What none delivers has the worst of
// its statuses: Corrupt before Lost before Absent, so that "it was there, but damaged" and "it may
// be there, but nobody answers" are not taken for "there never was such a block".
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kvstore/reader.h"

namespace certkv {

struct FallbackOptions {
  // For blocks that were asked for as views and had to be fetched: they stay as long as this
  // reader, since a view may be used as long as its reservation is held. What does not fit is not
  // rescued.
  size_t kept_bytes = size_t(256) << 20;
};

struct FallbackCounts {
  uint64_t blocks = 0, first = 0;  // asked for; delivered by the first reader
  uint64_t rescued = 0, failed = 0;
};

class FallbackReader : public BlockReader {
 public:
  // REQUIRES at least one reader; the first may show views. The deadline of a batch is shared: each
  // reader in turn may take an equal part of what is left of it.
  FallbackReader(std::vector<std::shared_ptr<BlockReader>> readers, BlockShape shape,
                 FallbackOptions options = {});
  ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                  Deadline deadline) override;
  FallbackCounts counts() const;  // THREADS: safe

 private:
  class Batch;
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

}  // namespace certkv
