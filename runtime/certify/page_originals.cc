#include "runtime/certify/page_originals.h"

#include <fmt/core.h>

namespace certkv {

bool PageOriginals::read(const PageFormat& f, size_t page, HeadOriginals& originals) {
  const size_t n = size_t(f.blocks()), block = size_t(f.block_tokens) * size_t(f.head_dim);
  k.resize(n * block);
  v.resize(n * block);
  wanted_.resize(n);
  destinations_.resize(n);
  for (size_t b = 0; b < n; ++b) {
    wanted_[b] = uint32_t(page * n + b);
    destinations_[b] = {.part = BlockPart::Both, .k = &k[b * block], .v = &v[b * block]};
  }
  originals.read(wanted_, destinations_, &results_);
  results_.resize(n);  // an answer that is missing is not Ok
  for (size_t b = 0; b < n; ++b) {
    if (results_[b].status == BlockStatus::Ok) continue;
    error = fmt::format("the originals of block {} are {} and no copy is left", wanted_[b],
                        block_status_name(results_[b].status));
    return false;
  }
  return true;
}

}  // namespace certkv
