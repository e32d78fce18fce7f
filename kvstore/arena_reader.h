// The reader of this node's arena: everything is decided before read() returns.
//
// Copies are verified after they were made, in the destination; views are verified where they lie,
// at hand-out. Cost of a batch: one allocation for its results, none per block, no system call.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "kvstore/reader.h"
#include "kvstore/span_directory.h"

namespace certkv {

class ArenaReader : public BlockReader {
 public:
  // `gone`: set once the space must not be read any more, because the session has ended.
  // `lost`: the store has ended: what is not found is lost, not absent. Both outlive the reader, as
  // the directory does, through `keep`.
  ArenaReader(std::shared_ptr<const void> keep, const SpanDirectory& directory,
              const std::atomic<bool>& gone, const std::atomic<bool>& lost)
      : keep_(std::move(keep)), directory_(directory), gone_(gone), lost_(lost) {}

  ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                  Deadline deadline) override;

 private:
  std::shared_ptr<const void> keep_;
  const SpanDirectory& directory_;
  const std::atomic<bool>& gone_;
  const std::atomic<bool>& lost_;
};

}  // namespace certkv
