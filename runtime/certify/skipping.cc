#include "runtime/certify/skipping.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace certkv {
namespace {

// Costs are binned by their exponent and two bits more: bin 0 ends at 1, where a run alone would
// spend all; the last holds everything below 2^-63.
constexpr int kBins = 256;
constexpr uint64_t kOne = std::bit_cast<uint64_t>(1.0) >> 50;

int bin_of(double cost) {  // REQUIRES 0 <= cost < 1
  const uint64_t below = kOne - 1 - (std::bit_cast<uint64_t>(cost) >> 50);
  return int(std::min<uint64_t>(below, kBins - 1));
}
double end_of(int bin) {
  return std::bit_cast<double>((kOne - uint64_t(bin)) << 50);
}

template <typename T>
void raise(T& largest, T x) {  // NaN, once seen, stays
  if (!(x <= largest) && largest == largest) largest = x;
}

}  // namespace

double skipped_cost(const PassState& pass, int head) {
  const HeadSums& sums = pass.head[size_t(head)];
  double cost = 0;
  for (size_t b = 0; b < pass.blocks; ++b) {
    const size_t i = pass.at(head, b);
    if ((pass.used[i] & kSkippedValue) != 0)
      cost += pass.block_sum[i] * std::exp(double(pass.block_ref[i]) - sums.m) * pass.nu[b];
  }
  return cost / sums.l;
}

void guess_skips(const PassState& pass, std::span<const BlockRef> blocks,
                 std::span<const double> spend, SkipGuess* guess) {
  const size_t heads = spend.size();
  guess->cost.assign(kBins * heads, 0.0);
  double share[kMaxGroupHeads], factor[kMaxGroupHeads], run[kMaxGroupHeads];
  float ref[kMaxGroupHeads];
  for (size_t h = 0; h < heads; ++h) {
    share[h] = 1 / (pass.head[h].l * spend[h]);
    ref[h] = std::nanf("");
  }
  for (size_t b = 0; b < blocks.size();) {
    const BlockRef& first = blocks[b];
    std::fill_n(run, heads, 0.0);
    float nu = 0;
    size_t end = b;
    // One page, as the pass's runs: a page of which some blocks have originals makes several.
    do {
      for (size_t h = 0; h < heads; ++h) {
        const size_t i = pass.at(int(h), end);
        if (!(ref[h] == pass.block_ref[i])) {
          ref[h] = pass.block_ref[i];
          factor[h] = std::exp(double(ref[h]) - pass.head[h].m) * share[h];
        }
        run[h] += pass.block_sum[i] * factor[h];
      }
      raise(nu, pass.nu[end]);
      ++end;
    } while (end < blocks.size() && first.page != nullptr && blocks[end].page == first.page &&
             (blocks[end].k == nullptr) == (first.k == nullptr) &&
             (blocks[end].v == nullptr) == (first.v == nullptr));
    b = end;
    if (first.page == nullptr || first.v != nullptr) continue;
    double most = 0;
    for (size_t h = 0; h < heads; ++h) {
      run[h] *= nu;
      raise(most, run[h]);
    }
    if (!(most < 1)) continue;
    double* cost = guess->cost.data() + size_t(bin_of(most)) * heads;
    for (size_t h = 0; h < heads; ++h) cost[h] += run[h];
  }
  int bin = kBins;  // bins from here on are skipped
  double spent[kMaxGroupHeads] = {};
  for (bool fits = true; fits && bin > 0;) {
    const double* cost = guess->cost.data() + size_t(bin - 1) * heads;
    for (size_t h = 0; h < heads; ++h) {
      spent[h] += cost[h];
      fits = fits && spent[h] <= 1;
    }
    if (fits) --bin;
  }
  guess->limits.resize(heads);
  const double largest = bin == kBins ? 0 : end_of(bin);  // of costs; 0: nothing
  for (size_t h = 0; h < heads; ++h)
    guess->limits[h] = pass.head[h].m + std::log(largest / share[h]);
}

void learn_pause(bool wrong, SkipGuess* guess) {
  constexpr int kLeast = 4, kMost = 256;
  if (wrong) guess->pause = guess->next_pause;
  // Twice as long each time; what a long stretch of right guesses has earned is forgotten slowly.
  guess->next_pause =
      wrong ? std::min(guess->next_pause * 2, kMost) : std::max(guess->next_pause - 1, kLeast);
}

}  // namespace certkv
