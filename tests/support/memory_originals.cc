#include "tests/support/memory_originals.h"

#include <algorithm>

namespace certkv {

void MemoryOriginals::fail(uint32_t block, BlockStatus status) {
  if (status == BlockStatus::Ok)
    faults_.erase(block);
  else
    faults_[block] = status;
}

void MemoryOriginals::read(std::span<const uint32_t> blocks,
                           std::span<const Destination> destinations,
                           std::vector<BlockResult>* results) {
  const size_t elements = size_t(block_tokens_) * size_t(originals_.head_dim);
  results->assign(blocks.size(), {});
  for (size_t i = 0; i < blocks.size(); ++i) {
    ++reads_;
    BlockResult& r = (*results)[i];
    const Destination& to = destinations[i];
    const size_t first = blocks[i] * elements;
    const auto fault = faults_.find(blocks[i]);
    r.status = fault != faults_.end()                      ? fault->second
               : first + elements > originals_.k.size() ? BlockStatus::Absent
                                                           : all_;
    if (r.status != BlockStatus::Ok) {
      // What a failed read leaves in a buffer is unspecified: leave something that would be noticed.
      if (to.k != nullptr) std::fill_n(to.k, elements, uint16_t(0x4200));
      if (to.v != nullptr) std::fill_n(to.v, elements, uint16_t(0x4200));
      continue;
    }
    r.tokens = uint16_t(block_tokens_);
    const auto serve = [&](const std::vector<uint16_t>& from, uint16_t* buffer) {
      if (to.view) return static_cast<const uint16_t*>(from.data() + first);
      return static_cast<const uint16_t*>(
          std::copy_n(from.data() + first, elements, buffer) - elements);
    };
    if (wants_k(to.part)) r.k = serve(originals_.k, to.k);
    if (wants_v(to.part)) r.v = serve(originals_.v, to.v);
  }
}

}  // namespace certkv
