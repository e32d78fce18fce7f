// What implementations of BlockReader share.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "kvstore/reader.h"

namespace certkv {

// A batch that was decided before it was handed out.
class DoneBatch : public ReadBatch {
 public:
  explicit DoneBatch(std::vector<BlockResult> results) : results_(std::move(results)) {}
  bool poll() override { return true; }
  void wait() override {}
  void cancel() override {}
  std::span<const BlockResult> results() const override { return results_; }

 private:
  std::vector<BlockResult> results_;
};

// Throws InvalidArgument where lengths differ, or a destination lacks a buffer that it needs.
void check_destinations(std::span<const BlockId> ids, std::span<const Destination> destinations,
                        bool shows_views);

}  // namespace certkv
