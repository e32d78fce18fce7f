// The canary: wherever both representations of a block are at hand, the codes must lie as close to
// the originals as their annotations promise. SOURCE: method section 7.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/attend.h"

namespace certkv {

struct CanaryResult {
  bool ok = true;
  std::string what;  // when not ok: which promise was broken, with the figures
};

// before, after: the block's terms under `was` and `now`, for the same `heads` queries. What `now`
// reads from originals and `was` from codes is compared: scores with the two Delta_b (natural
// logarithms), values with eta_b, their norms with nu_b (units of the values). NaN is not ok.
// Throws nothing of its own.
CanaryResult canary(const AttendContext& context, int heads, const BlockTerms& before,
                    const BlockTerms& after, const BlockRef& was, const BlockRef& now);

}  // namespace certkv
