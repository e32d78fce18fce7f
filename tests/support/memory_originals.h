// Originals of one KV head in memory, as a reader would serve them, with faults on demand.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "runtime/certify/head_step.h"
#include "tests/support/oracle.h"

namespace certkv {

class MemoryOriginals : public HeadOriginals {
 public:
  // `originals` may grow between reads.
  MemoryOriginals(const oracle::Originals& originals, int block_tokens)
      : originals_(originals), block_tokens_(block_tokens) {}

  void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
            std::vector<BlockResult>* results) override;

  // Every later read of the block ends with this status; Ok takes the fault back.
  void fail(uint32_t block, BlockStatus status);
  void fail_all(BlockStatus status) { all_ = status; }

  uint64_t reads() const { return reads_; }  // blocks asked for

 private:
  const oracle::Originals& originals_;
  int block_tokens_;
  BlockStatus all_ = BlockStatus::Ok;
  std::map<uint32_t, BlockStatus> faults_;
  uint64_t reads_ = 0;
};

}  // namespace certkv
