#include "runtime/certify/canary.h"

#include <fmt/core.h>

#include <cmath>

#include "kernels/quantize.h"

namespace certkv {

CanaryResult canary(const AttendContext& context, int heads, const BlockTerms& before,
                    const BlockTerms& after, const BlockRef& was, const BlockRef& now) {
  if (was.page == nullptr) return {};
  if (was.k == nullptr && now.k != nullptr) {
    for (int h = 0; h < heads; ++h)
      for (int t = 0; t < was.tokens; ++t) {
        const double apart = std::abs(double(before.score[h][t]) - after.score[h][t]);
        // Both deltas hold g_b and eps_w of their side beside D_b.
        const double promised = double(before.delta[h]) + after.delta[h];
        if (!(apart <= promised))
          return {false, fmt::format("score of token {} moved by {:.3g}, promised {:.3g}", t, apart,
                                     promised)};
      }
  }
  if (was.v == nullptr && now.v != nullptr) {
    const BlockAnnotations& note = page_annotations(*context.format, was.page, was.index);
    const ValueErrors seen =
        value_errors(*context.format, was.page, was.index, context.dtype, now.v);
    if (!(seen.error <= note.eta))
      return {false,
              fmt::format("a value is off by {:.3g}, promised {:.3g}", seen.error, note.eta)};
    if (!(seen.norm <= note.nu))
      return {false, fmt::format("a value has norm {:.3g}, promised {:.3g}", seen.norm, note.nu)};
  }
  return {};
}

}  // namespace certkv
