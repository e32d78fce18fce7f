// The reservations that hold one sequence's originals, on this rank: segments of its prompt, which
// others may share, the rest of it, and its answer.
#pragma once

#include <algorithm>
#include <vector>

#include "kvstore/client.h"

namespace certkv {

// Spans are added in the order of their first blocks; those that begin at the same block are of
// different KV heads and end at the same block.
class SpanList {
 public:
  void add(OriginalsSpan span) {
    if (!span.empty()) spans_.push_back(std::move(span));
  }
  // Null where no span holds the block.
  OriginalsSpan* find(uint32_t layer, uint32_t kv_head, uint32_t block) {
    auto at = std::upper_bound(
        spans_.begin(), spans_.end(), block,
        [](uint32_t b, const OriginalsSpan& s) { return b < s.request().first_block; });
    if (at == spans_.begin()) return nullptr;
    const uint32_t first = std::prev(at)->request().first_block;
    while (at != spans_.begin() && (--at)->request().first_block == first)
      if (at->contains(layer, kv_head, block)) return &*at;
    return nullptr;
  }
  const OriginalsSpan* find(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    return const_cast<SpanList*>(this)->find(layer, kv_head, block);
  }
  // The store keeps them, for whoever asks for their owners, until it needs the room.
  void keep() {
    for (OriginalsSpan& s : spans_) s.keep();
  }
  bool empty() const { return spans_.empty(); }
  const std::vector<OriginalsSpan>& spans() const { return spans_; }

 private:
  std::vector<OriginalsSpan> spans_;
};

}  // namespace certkv
