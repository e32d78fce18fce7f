// The originals of one page as one stretch, verified: to seal it anew from them.
// SOURCE: method sections 5b and 7.
#pragma once

#include <string>
#include <vector>

#include "runtime/certify/head_step.h"

namespace certkv {

struct PageOriginals {
  std::vector<uint16_t> k, v;  // [group_tokens, head_dim]
  // Reads those of page `page`, counted from the sequence's first. False where a block's are not to
  // be had; `error` then says which.
  bool read(const PageFormat& format, size_t page, HeadOriginals& originals);
  std::string error;

 private:
  std::vector<uint32_t> wanted_;
  std::vector<Destination> destinations_;
  std::vector<BlockResult> results_;
};

}  // namespace certkv
