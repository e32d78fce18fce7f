// Originals of one KV head in the node's store, in whichever of a sequence's spans they lie.
#pragma once

#include <memory>
#include <vector>

#include "kvstore/client.h"
#include "runtime/certify/head_step.h"
#include "runtime/span_list.h"

namespace certkv {

// All that is named must outlive it. reader: nullptr where there is no store; nothing is there
// then.
class SpanOriginals : public HeadOriginals {
 public:
  SpanOriginals(BlockReader* reader, std::chrono::milliseconds deadline, const SpanList& spans,
                uint32_t layer, uint32_t kv_head)
      : reader_(reader), deadline_(deadline), spans_(spans), layer_(layer), kv_head_(kv_head) {}

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
  // Throws InvalidArgument where no span holds the block.
  BlockId id(uint32_t block) const {
    const OriginalsSpan* span = spans_.find(layer_, kv_head_, block);
    CERTKV_EXPECT(span != nullptr, InvalidArgument,
                  "no space was reserved for block {} of layer {} KV head {}", block, layer_,
                  kv_head_);
    return span->id(layer_, kv_head_, block);
  }

 private:
  BlockReader* reader_;
  std::chrono::milliseconds deadline_;
  const SpanList& spans_;
  uint32_t layer_, kv_head_;
};

}  // namespace certkv
