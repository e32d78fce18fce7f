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
  bool before(int32_t a, int32_t b) const {
    const float x = logits_[size_t(a)], y = logits_[size_t(b)];
    return x > y || (x == y && a < b);
  }

 private:
  void extend() {
    const auto earlier = [this](int32_t a, int32_t b) { return before(a, b); };
    const size_t to = std::min(ids_.size(), std::max<size_t>(64, 8 * sorted_));
    const auto first = ids_.begin() + ptrdiff_t(sorted_), last = ids_.begin() + ptrdiff_t(to);
    if (to < ids_.size()) std::nth_element(first, last, ids_.end(), earlier);
    std::sort(first, last, earlier);
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

int32_t sampled_elsewhere(int32_t token, float largest) {
  CERTKV_EXPECT(token >= 0, InvalidArgument, "token {} has no logit", token);
  CERTKV_EXPECT(largest < INFINITY, NonFinite, "logit of token {} is {}", token, largest);
  CERTKV_EXPECT(largest > -INFINITY, NonFinite, "all logits are -inf");
  return token;
}

SampleDraw draw_of(const SampleOptions& options, double uniform) {
  CERTKV_EXPECT(options.temperature >= 0 && std::isfinite(options.temperature), InvalidArgument,
                "temperature is {}: a finite number of at least 0 is needed", options.temperature);
  CERTKV_EXPECT(options.top_k >= 0, InvalidArgument, "top_k is {}: at least 0 is needed",
                options.top_k);
  CERTKV_EXPECT(options.top_p > 0 && options.top_p <= 1, InvalidArgument,
                "top_p is {}: a number above 0 and up to 1 is needed", options.top_p);
  CERTKV_EXPECT(uniform >= 0 && uniform < 1, InvalidArgument,
                "uniform is {}: a number in [0, 1) is needed", uniform);
  return {.temperature = options.top_k == 1 ? 0 : options.temperature,
          .top_k = uint64_t(options.top_k),
          .top_p = uint64_t(std::ceil(std::ldexp(options.top_p, kShareBits))),
          .uniform = uint64_t(std::ldexp(uniform, kShareBits))};
}

int32_t sample_token(std::span<const float> logits, const SampleOptions& options, double uniform) {
  const SampleDraw draw = draw_of(options, uniform);
  const int32_t best = sample_greedy(logits);
  if (draw.temperature == 0) return best;

  const size_t n = logits.size();
  const int bits = weight_bits(n);
  std::vector<uint64_t> weights(n);
  uint64_t mass = 0;
  for (size_t id = 0; id < n; ++id) {
    weights[id] = sample_weight(logits[id], logits[size_t(best)], draw.temperature, bits);
    mass += weights[id];
  }
  Descending order(logits);
  size_t kept = n;
  if (draw.top_k > 0 && draw.top_k < n) {
    kept = size_t(draw.top_k);
    mass = 0;
    for (size_t i = 0; i < kept; ++i) mass += weights[size_t(order[i])];
  }
  if (draw.top_p < kWholeShare) {
    const uint64_t enough = mass_to_reach(mass, draw.top_p);
    mass = 0;
    for (kept = 0; mass < enough; ++kept) mass += weights[size_t(order[kept])];
  }
  const int32_t last = kept < n ? order[kept - 1] : -1;
  uint64_t place = place_in_mass(mass, draw.uniform);
  for (size_t id = 0; id < n; ++id) {
    if (last >= 0 && order.before(last, int32_t(id))) continue;
    if (place < weights[id]) return int32_t(id);
    place -= weights[id];
  }
  CERTKV_THROW(NonFinite, "no token holds the draw {} of a mass of {}", uniform, mass);
}

}  // namespace certkv
