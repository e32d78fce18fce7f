#include "kernels/sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

ErrorKind error_of(std::span<const float> logits, SampleOptions options, double uniform = 0.5) {
  try {
    sample_token(logits, options, uniform);
  } catch (const Error& e) {
    return e.kind();
  }
  return ErrorKind::Stopped;  // none
}

TEST(Greedy, TakesTheLargestAndTheLowestIdAmongEquals) {
  EXPECT_EQ(sample_greedy(std::array{1.0f, 3.0f, 2.0f}), 1);
  EXPECT_EQ(sample_greedy(std::array{3.0f, 1.0f, 3.0f}), 0);
  EXPECT_EQ(sample_greedy(std::array{-kInf, -5.0f, -5.0f}), 1);
  EXPECT_EQ(sample_greedy(std::array{-0.0f, 0.0f}), 0);
}

TEST(Greedy, TakesWhatWasChosenElsewhereUnlessTheLargestIsNoNumber) {
  EXPECT_EQ(sampled_elsewhere(7, -3.0f), 7);
  EXPECT_EQ(sampled_elsewhere(0, std::numeric_limits<float>::lowest()), 0);
  for (float bad : {kNan, kInf, -kInf}) {
    ErrorKind kind = ErrorKind::Stopped;
    try {
      sampled_elsewhere(7, bad);
    } catch (const Error& e) {
      kind = e.kind();
    }
    EXPECT_EQ(kind, ErrorKind::NonFinite) << bad;
  }
}

TEST(Sample, LogitsThatAreNotNumbersAreAnErrorWhateverTheTemperature) {
  for (double temperature : {0.0, 1.0}) {
    for (const auto& logits : {std::array{1.0f, kNan}, std::array{kNan, 1.0f},
                               std::array{1.0f, kInf}, std::array{-kInf, -kInf}})
      EXPECT_EQ(error_of(logits, {.temperature = temperature}), ErrorKind::NonFinite);
  }
}

TEST(Sample, OptionsOutsideTheirRangeAreRefused) {
  const std::array logits{1.0f, 2.0f};
  for (double bad : {-1.0, double(kNan), double(kInf)})
    EXPECT_EQ(error_of(logits, {.temperature = bad}), ErrorKind::InvalidArgument);
  for (double bad : {0.0, -0.5, 1.5, double(kNan)})
    EXPECT_EQ(error_of(logits, {.temperature = 1, .top_p = bad}), ErrorKind::InvalidArgument);
  EXPECT_EQ(error_of(logits, {.temperature = 1, .top_k = -1}), ErrorKind::InvalidArgument);
  for (double bad : {-0.1, 1.0, double(kNan)})
    EXPECT_EQ(error_of(logits, {.temperature = 1}, bad), ErrorKind::InvalidArgument);
  EXPECT_EQ(error_of({}, {}), ErrorKind::InvalidArgument);
}

// Share of ids drawn when `uniform` runs evenly through [0, 1).
std::vector<double> shares(std::span<const float> logits, SampleOptions options) {
  constexpr int kDraws = 20000;
  std::vector<double> share(logits.size());
  for (int i = 0; i < kDraws; ++i)
    share[size_t(sample_token(logits, options, (i + 0.5) / kDraws))] += 1.0 / kDraws;
  return share;
}
constexpr double kShareTolerance = 2.0 / 20000;  // one draw at either end of a token's interval

TEST(Sample, SharesAreThoseOfTheSoftmaxAtTheTemperature) {
  const std::array logits{0.5f, -1.0f, 2.0f, -kInf, 2.0f};
  for (double temperature : {0.3, 1.0, 2.5}) {
    double total = 0;
    for (float l : logits) total += std::exp(double(l) / temperature);
    const auto share = shares(logits, {.temperature = temperature});
    for (size_t i = 0; i < logits.size(); ++i)
      EXPECT_NEAR(share[i], std::exp(double(logits[i]) / temperature) / total, kShareTolerance);
  }
}

TEST(Sample, TopKKeepsTheLargestAndTheLowestIdsAmongEquals) {
  const std::array logits{1.0f, 2.0f, 0.0f, 2.0f, 2.0f};
  const auto two = shares(logits, {.temperature = 1, .top_k = 2});
  EXPECT_NEAR(two[1], 0.5, kShareTolerance);
  EXPECT_NEAR(two[3], 0.5, kShareTolerance);
  EXPECT_NEAR(shares(logits, {.temperature = 1, .top_k = 1})[1], 1, 1e-9);
  EXPECT_GT(shares(logits, {.temperature = 1, .top_k = 100})[2], 0);
}

TEST(Sample, TopPKeepsTheSmallestPrefixThatReachesIt) {
  // Masses 0.5, 0.3, 0.2.
  const std::array logits{std::log(0.3f), std::log(0.5f), std::log(0.2f)};
  const auto share = shares(logits, {.temperature = 1, .top_p = 0.7});
  EXPECT_NEAR(share[1], 0.5 / 0.8, kShareTolerance);
  EXPECT_NEAR(share[0], 0.3 / 0.8, kShareTolerance);
  EXPECT_EQ(share[2], 0);
  EXPECT_NEAR(shares(logits, {.temperature = 1, .top_p = 1e-9})[1], 1, 1e-9);
}

// The choice by its definition, in floating point: everything sorted and summed, then the kept ones
// by their ids. Where the sums' last bits decide between two tokens (2^-30 of the draws), either is
// right; none is among these.
int32_t sample_by_sorting(const std::vector<float>& logits, const SampleOptions& o,
                          double uniform) {
  std::vector<std::pair<float, int32_t>> order;
  for (size_t i = 0; i < logits.size(); ++i) order.emplace_back(-logits[i], int32_t(i));
  std::sort(order.begin(), order.end());
  if (o.top_k > 0) order.resize(std::min(order.size(), size_t(o.top_k)));
  const double first = order[0].first;
  const auto mass_of = [&](float minus) { return std::exp((first - minus) / o.temperature); };
  double total = 0, kept = 0;
  for (const auto& one : order) total += mass_of(one.first);
  size_t n = 0;
  while (n < order.size() && (n == 0 || kept < o.top_p * total)) kept += mass_of(order[n++].first);
  order.resize(n);
  std::sort(order.begin(), order.end(), [](auto a, auto b) { return a.second < b.second; });
  double left = uniform * kept;
  size_t i = 0;
  while (i + 1 < n && left >= mass_of(order[i].first)) left -= mass_of(order[i++].first);
  return order[i].second;
}

TEST(Sample, ALargeVocabularyIsChosenFromAsBySortingAllOfIt) {
  std::vector<float> peaked, flat;
  for (uint64_t i = 0; i < 20000; ++i) {
    const double u = uniform_at(1, 2, i);
    peaked.push_back(float(-3 * std::log(u)));       // masses fall like a power of the rank
    flat.push_back(float(std::floor(u * 50) / 50));  // many equals
  }
  for (const auto& logits : {peaked, flat})
    for (const SampleOptions& o :
         {SampleOptions{1, 0, 1}, SampleOptions{0.7, 0, 0.9}, SampleOptions{1, 0, 0.999},
          SampleOptions{2, 500, 0.95}, SampleOptions{1, 19999, 1}, SampleOptions{0.2, 3, 0.5}})
      for (int i = 0; i < 20; ++i) {
        const double uniform = uniform_at(3, 4, uint64_t(i));
        EXPECT_EQ(sample_token(logits, o, uniform), sample_by_sorting(logits, o, uniform))
            << o.temperature << " " << o.top_k << " " << o.top_p << " " << uniform;
      }
}

TEST(Sample, AVanishingTemperatureIsGreedy) {
  EXPECT_EQ(sample_token(std::array{1.0f, 1.001f}, {.temperature = 1e-300}, 0.999), 1);
  EXPECT_EQ(sample_token(std::array{1.001f, 1.0f}, {.temperature = 5e-324}, 0.999), 0);
}

TEST(Sample, ATemperatureBeyondAllLogitsMakesAllFiniteTokensEqual) {
  const std::array logits{-3e38f, -kInf, 3e38f, 0.0f};
  const auto share = shares(logits, {.temperature = 1e300});
  for (size_t i : {0, 2, 3}) EXPECT_NEAR(share[i], 1.0 / 3, kShareTolerance);
  EXPECT_EQ(share[1], 0);
}

TEST(SampleWeight, IsTheExponentialAsAWholeNumberWithinItsError) {
  for (uint64_t n : {2, 1000, 32000, 128256, 1 << 24}) {
    const int bits = weight_bits(n);
    EXPECT_LE(bits, 48);
    EXPECT_LE(bits + int(std::bit_width(n)), 63);
    EXPECT_EQ(sample_weight(3.5f, 3.5f, 0.1, bits), uint64_t(1) << bits);
    for (double temperature : {1e-3, 0.7, 1.0, 3.0, 1e6})
      for (uint64_t i = 0; i < 2000; ++i) {
        const float largest = float(20 * uniform_at(5, n, i) - 5);
        const double distance = 40 * temperature * uniform_at(6, n, i);
        const float logit = std::min(largest, float(double(largest) - distance));
        const long double exact = std::exp2(static_cast<long double>(bits)) *
                                  std::exp((static_cast<long double>(logit) - largest) /
                                           static_cast<long double>(temperature));
        const uint64_t got = sample_weight(logit, largest, temperature, bits);
        ASSERT_LE(got, uint64_t(1) << bits);
        ASSERT_LE(std::abs(static_cast<long double>(got) - exact), 0.5L + kWeightError * exact)
            << logit << " below " << largest << " at " << temperature;
      }
  }
}

TEST(SampleWeight, OfWhatIsNoNumberIsNothing) {
  for (const auto& [logit, largest] :
       {std::pair{-kInf, 1.0f}, std::pair{1.0f, kNan}, std::pair{kNan, kNan}, std::pair{1.0f, kInf},
        std::pair{kInf, kInf}, std::pair{-kInf, -kInf}})
    EXPECT_EQ(sample_weight(logit, largest, 1, 40), 0u) << logit << " " << largest;
}

TEST(SampleShares, AreThoseOfExactArithmetic) {
  for (uint64_t i = 0; i < 20000; ++i) {
    const auto number = [&](uint64_t which) { return uint64_t(uniform_at(which, 9, i) * 0x1p53); };
    const uint64_t total = (number(1) << 10 | number(2) >> 43) >> (number(3) % 63);
    const uint64_t share = i % 7 == 0 ? kWholeShare : number(4) >> (number(5) % 53);
    const unsigned __int128 product = static_cast<unsigned __int128>(total) * share;
    ASSERT_EQ(place_in_mass(total, share), uint64_t(product >> 53)) << total << " " << share;
    const uint64_t up = uint64_t((product + (kWholeShare - 1)) >> 53);
    ASSERT_EQ(mass_to_reach(total, share), std::max<uint64_t>(up, 1)) << total << " " << share;
  }
  EXPECT_EQ(mass_to_reach((uint64_t(1) << 63) - 1, kWholeShare), (uint64_t(1) << 63) - 1);
  EXPECT_EQ(equals_to_reach(10, 5), 2u);
  EXPECT_EQ(equals_to_reach(11, 5), 3u);
}

TEST(Sample, TheDeviceIsToldWhatTheOptionsSay) {
  const SampleDraw draw = draw_of({0.5, 7, 0.25}, 0.75);
  EXPECT_EQ(draw.temperature, 0.5);
  EXPECT_EQ(draw.top_k, 7u);
  EXPECT_EQ(draw.top_p, kWholeShare / 4);
  EXPECT_EQ(draw.uniform, kWholeShare / 4 * 3);
  EXPECT_EQ(draw_of({1, 0, 1}, 0).top_p, kWholeShare);
  EXPECT_EQ(draw_of({1, 0, 1e-300}, 0).top_p, 1u);
  EXPECT_LT(draw_of({1, 0, std::nextafter(1.0, 0.0)}, 0).top_p, kWholeShare);
  EXPECT_EQ(draw_of({1, 1, 0.5}, 0).temperature, 0) << "one token is no choice";
}

TEST(UniformAt, DependsOnEveryPartAndIsSpreadEvenly) {
  EXPECT_EQ(uniform_at(1, 2, 3), uniform_at(1, 2, 3));
  std::set<double> seen;
  std::array<int, 16> bins{};
  for (uint64_t seed = 0; seed < 20; ++seed)
    for (uint64_t request = 0; request < 20; ++request)
      for (uint64_t position = 0; position < 40; ++position) {
        const double u = uniform_at(seed, request, position);
        ASSERT_GE(u, 0);
        ASSERT_LT(u, 1);
        seen.insert(u);
        ++bins[size_t(u * 16)];
      }
  EXPECT_EQ(seen.size(), 16000u);  // 2^53 values: a collision has probability 1.4e-8
  for (int b : bins) EXPECT_NEAR(b, 1000, 5 * std::sqrt(1000.0));  // five standard deviations
}

}  // namespace
}  // namespace certkv
