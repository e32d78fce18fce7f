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

// Token ids by descending logit, lowest id first among equals; sorted only as far as is asked for,
// which seldom is far in a vocabulary of 100,000.
class Descending {
 public:
  explicit Descending(std::span<const float> logits) : logits_(logits), ids_(logits.size()) {
    std::iota(ids_.begin(), ids_.end(), 0);
  }
  int32_t operator[](size_t i) {
    while (i >= sorted_) extend();
    return ids_[i];
  }

 private:
  void extend() {
    const auto before = [this](int32_t a, int32_t b) {
      const float x = logits_[size_t(a)], y = logits_[size_t(b)];
      return x > y || (x == y && a < b);
    };
    const size_t to = std::min(ids_.size(), std::max<size_t>(64, 8 * sorted_));
    const auto first = ids_.begin() + ptrdiff_t(sorted_), last = ids_.begin() + ptrdiff_t(to);
    if (to < ids_.size()) std::nth_element(first, last, ids_.end(), before);
    std::sort(first, last, before);
    sorted_ = to;
  }

  std::span<const float> logits_;
  std::vector<int32_t> ids_;
  size_t sorted_ = 0;
};

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

int32_t sample_greedy(int32_t token, float logit) {
  CERTKV_EXPECT(token >= 0, InvalidArgument, "token {} has no logit", token);
  CERTKV_EXPECT(logit < INFINITY, NonFinite, "logit of token {} is {}", token, logit);
  CERTKV_EXPECT(logit > -INFINITY, NonFinite, "all logits are -inf");
  return token;
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

  Descending order(logits);
  const size_t k =
      options.top_k == 0 ? logits.size() : std::min(logits.size(), size_t(options.top_k));
  const auto mass_of = [&](int32_t id) {
    return std::exp((double(logits[size_t(id)]) - double(logits[size_t(best)])) /
                    options.temperature);
  };
  double total = 0;
  if (k == logits.size()) {
    for (size_t id = 0; id < k; ++id) total += mass_of(int32_t(id));
  } else {
    for (size_t i = 0; i < k; ++i) total += mass_of(order[i]);
  }
  // The prefix that reaches top_p of the mass; the largest token is always in it.
  size_t kept = k;
  double sum = total;
  if (options.top_p < 1) {
    sum = 0;
    for (kept = 0; kept < k && (kept == 0 || sum < options.top_p * total); ++kept)
      sum += mass_of(order[kept]);
  }
  double left = uniform * sum;
  for (size_t i = 0; i < kept; ++i) {
    const double mass = mass_of(order[i]);
    if (left < mass) return order[i];
    left -= mass;
  }
  // Rounding used up the whole mass: the last token that has any.
  while (kept > 1 && mass_of(order[kept - 1]) == 0) --kept;
  return order[kept - 1];
}

}  // namespace certkv
