// One KV head with its tier, for micro benches. Small enough for the caches: what is measured is
// the work on a block or a page; certkv bench attention measures what memory gives.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kvstore/device_tier.h"
#include "runtime/bench/synthetic_heads.h"

namespace certkv::bench {

inline constexpr int kHeads = 4, kHeadDim = 128, kBlock = 16;
inline constexpr size_t kTokens = 2048;

struct Data {
  explicit Data(const char* layout)
      : format(std::make_shared<const PageFormat>(
            make_page_format(layout_by_name(layout), kHeadDim, kBlock))),
        head(make_synthetic_head({.query_heads = kHeads, .head_dim = kHeadDim, .tokens = kTokens},
                                 1)),
        tier(format, DType::F16, std::make_shared<TierAccount>()),
        query(make_query_group(kHeads, kHeadDim, head.q.data())),
        centre(kHeadDim, 0.0f) {
    tier.append(head.k.data(), head.v.data(), kTokens, {});
    for (size_t b = 0; b < kTokens / kBlock; ++b) {
      const size_t at = b * kBlock * kHeadDim;
      const BlockRef& sealed = tier.blocks()[b];
      originals.push_back({.page = nullptr,
                           .index = 0,
                           .tokens = kBlock,
                           .k = head.k.data() + at,
                           .v = head.v.data() + at,
                           .nu = sealed.nu,
                           .k_norm = sealed.k_norm});
    }
  }
  AttendContext context() const { return {format.get(), DType::F16}; }

  std::shared_ptr<const PageFormat> format;
  SyntheticHead head;
  DeviceTier tier;
  QueryGroup query;
  std::vector<float> centre;
  std::vector<BlockRef> originals;  // the same blocks, served from originals alone
};

inline const char* layout_of(int64_t i) {
  static constexpr const char* kLayouts[] = {"compact", "balanced", "paper"};
  return kLayouts[i];
}

}  // namespace certkv::bench
