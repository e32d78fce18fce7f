#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {

namespace {

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

}  // namespace

double uniform_at(uint64_t seed, uint64_t request, uint64_t position) {
  uint64_t z = mix(seed + kGolden);
  z = mix(z ^ (request + 2 * kGolden));
  z = mix(z ^ (position + 3 * kGolden));
  return double(z >> 11) * 0x1p-53;
}

int32_t sample_greedy(std::span<const float> logits) {
  CERTKV_EXPECT(!logits.empty(), InvalidArgument, "no logits to choose a token from");
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    CERTKV_EXPECT(logits[i] < INFINITY, NonFinite, "logit of token {} is {}", i, logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  CERTKV_EXPECT(logits[best] > -INFINITY, NonFinite, "all {} logits are -inf", logits.size());
  return int32_t(best);
}

int32_t sample_token(std::span<const float> logits, const SampleOptions& options, double uniform) {
  CERTKV_EXPECT(options.temperature >= 0 && std::isfinite(options.temperature), InvalidArgument,
                "temperature is {}: a finite number of at least 0 is needed", options.temperature);
  CERTKV_EXPECT(options.top_k >= 0, InvalidArgument, "top_k is {}: at least 0 is needed",
                options.top_k);
  CERTKV_EXPECT(options.top_p > 0 && options.top_p <= 1, InvalidArgument,
                "top_p is {}: a number above 0 and up to 1 is needed", options.top_p);
  CERTKV_EXPECT(uniform >= 0 && uniform < 1, InvalidArgument,
                "uniform is {}: a number in [0, 1) is needed", uniform);
  const int32_t best = sample_greedy(logits);
  if (options.temperature == 0 || options.top_k == 1) return best;

  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) {
    return logits[size_t(a)] > logits[size_t(b)] ||
           (logits[size_t(a)] == logits[size_t(b)] && a < b);
  };
  const size_t k =
      options.top_k == 0 ? order.size() : std::min(order.size(), size_t(options.top_k));
  std::partial_sort(order.begin(), order.begin() + ptrdiff_t(k), order.end(), before);
  order.resize(k);

  std::vector<double> mass(k);
  double total = 0;
  for (size_t i = 0; i < k; ++i) {
    const double below = double(logits[size_t(order[i])]) - double(logits[size_t(best)]);
    total += mass[i] = std::exp(below / options.temperature);
  }
  // The prefix that reaches top_p of the mass; the largest token is always in it.
  size_t kept = k;
  double sum = 0;
  if (options.top_p < 1) {
    for (kept = 0; kept < k && (kept == 0 || sum < options.top_p * total); ++kept)
      sum += mass[kept];
  } else {
    sum = total;
  }
  double left = uniform * sum;
  for (size_t i = 0; i < kept; ++i) {
    if (left < mass[i]) return order[i];
    left -= mass[i];
  }
  // Rounding used up the whole mass: the last token that has any.
  while (kept > 1 && mass[kept - 1] == 0) --kept;
  return order[kept - 1];
}

}  // namespace certkv
