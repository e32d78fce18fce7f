// Originals of one KV head in the node's store, wherever in a sequence's two spans they lie.
#pragma once

#include <memory>
#include <vector>

#include "kvstore/client.h"
#include "runtime/certify/head_step.h"

namespace certkv {

// All that is named must outlive it. reader: nullptr where there is no store; nothing is there
// then.
class SpanOriginals : public HeadOriginals {
 public:
  // prefix_blocks: blocks of the prompt's span; those of `own` follow.
  SpanOriginals(BlockReader* reader, std::chrono::milliseconds deadline,
                const OriginalsSpan& prefix, uint32_t prefix_blocks, const OriginalsSpan& own,
                uint32_t layer, uint32_t kv_head)
      : reader_(reader),
        deadline_(deadline),
        prefix_(prefix),
        own_(own),
        prefix_blocks_(prefix_blocks),
        layer_(layer),
        kv_head_(kv_head) {}

  void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
            std::vector<BlockResult>* results) override {
    BlockResult absent;
    absent.status = BlockStatus::Absent;
    results->assign(blocks.size(), absent);
    if (blocks.empty() || reader_ == nullptr) return;
    std::vector<BlockId> ids(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) ids[i] = id(blocks[i]);
    ReadTicket ticket = reader_->read(ids, destinations, Deadline::after(deadline_));
    const auto got = BlockReader::wait(ticket);
    results->assign(got.begin(), got.end());
  }
  BlockId id(uint32_t block) const {
    return (block < prefix_blocks_ ? prefix_ : own_).id(layer_, kv_head_, block);
  }

 private:
  BlockReader* reader_;
  std::chrono::milliseconds deadline_;
  const OriginalsSpan &prefix_, &own_;
  uint32_t prefix_blocks_, layer_, kv_head_;
};

}  // namespace certkv
