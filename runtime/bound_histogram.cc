#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/engine.h"

namespace certkv {
namespace {

// Bin i holds (edge(i - 1), edge(i)]; bin 0 everything down to 0, the last bin everything above
// edge(kBins - 2), infinity and NaN included.
constexpr int kBinsPerOctave = 16;
constexpr int kLowestOctave = -40;  // 9e-13: far below the rounding term of any bound

double edge(int bin) {
  return std::exp2(double(bin) / kBinsPerOctave + kLowestOctave);
}

int bin_of(double x) {
  if (!(x <= edge(BoundHistogram::kBins - 2))) return BoundHistogram::kBins - 1;
  if (x <= edge(0)) return 0;
  int bin = int(std::ceil((std::log2(x) - kLowestOctave) * kBinsPerOctave));
  bin = std::clamp(bin, 1, BoundHistogram::kBins - 2);
  while (edge(bin) < x) ++bin;  // the logarithm is rounded; the edge must not lie below x
  while (bin > 0 && edge(bin - 1) >= x) --bin;
  return bin;
}

double nan_propagating_max(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  return a > b ? a : b;
}

}  // namespace

void BoundHistogram::add(double x) {
  if (!(x >= 0)) x = std::numeric_limits<double>::quiet_NaN();
  if (bins.empty()) bins.resize(kBins);
  ++bins[size_t(bin_of(x))];
  max = nan_propagating_max(max, x);
  sum += x;
  ++count;
}

void BoundHistogram::merge(const BoundHistogram& other) {
  if (other.count == 0) return;
  if (bins.empty()) bins.resize(kBins);
  for (size_t i = 0; i < other.bins.size() && i < bins.size(); ++i) bins[i] += other.bins[i];
  max = nan_propagating_max(max, other.max);
  sum += other.sum;
  count += other.count;
}

double BoundHistogram::quantile(double p) const {
  if (count == 0) return 0;
  if (!(p >= 0 && p <= 1)) return std::numeric_limits<double>::quiet_NaN();
  const double wanted = std::max(1.0, std::ceil(p * double(count)));
  double seen = 0;
  for (size_t i = 0; i + 1 < bins.size(); ++i) {
    seen += double(bins[i]);
    if (seen >= wanted) {
      const double upper = edge(int(i));
      return max < upper ? max : upper;  // a NaN maximum leaves the edge, which is right below it
    }
  }
  return max;
}

}  // namespace certkv
