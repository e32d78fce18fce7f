#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/base/error.h"

namespace certkv {

std::vector<double> rope_frequencies(double theta, size_t head_dim) {
  CERTKV_EXPECT(theta > 1 && std::isfinite(theta), InvalidArgument,
                "rope theta is {}: a number above 1 is needed", theta);
  CERTKV_EXPECT(head_dim >= 2 && head_dim % 2 == 0, InvalidArgument,
                "head_dim is {}: an even number is needed", head_dim);
  std::vector<double> frequency(head_dim / 2);
  for (size_t m = 0; m < frequency.size(); ++m)
    frequency[m] = std::pow(theta, -double(2 * m) / double(head_dim));
  return frequency;
}

void rope_scale_linear(std::span<double> frequency, double factor) {
  for (double& f : frequency) f /= factor;
}

void rope_scale_llama3(std::span<double> frequency, double factor, double low_freq_factor,
                       double high_freq_factor, double original_positions) {
  for (double& f : frequency) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength > original_positions / low_freq_factor) {
      f /= factor;
    } else if (wavelength >= original_positions / high_freq_factor) {
      const double kept = (original_positions / wavelength - low_freq_factor) /
                          (high_freq_factor - low_freq_factor);
      f = (1 - kept) * f / factor + kept * f;
    }
  }
}

void rope_scale_yarn(std::span<double> frequency, double theta, double factor, double beta_fast,
                     double beta_slow, bool truncate, double original_positions) {
  const double head_dim = 2.0 * double(frequency.size());
  // The (fractional) pair whose frequency makes `turns` turns over the original positions.
  const auto pair_turning = [&](double turns) {
    return head_dim * std::log(original_positions / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(theta));
  };
  double low = pair_turning(beta_fast), high = pair_turning(beta_slow);
  if (truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1);
  if (low == high) high += 0.001;  // as the reference does: a step instead of a division by zero
  for (size_t m = 0; m < frequency.size(); ++m) {
    const double ramp = std::clamp((double(m) - low) / (high - low), 0.0, 1.0);
    frequency[m] = frequency[m] / factor * ramp + frequency[m] * (1 - ramp);
  }
}

void RopeTable::fill(std::span<const double> frequency, double magnitude, int64_t first,
                     size_t positions) {
  pairs = frequency.size();
  cos.resize(positions * pairs);
  sin.resize(positions * pairs);
  for (size_t p = 0; p < positions; ++p) {
    for (size_t m = 0; m < pairs; ++m) {
      const double angle = double(first + int64_t(p)) * frequency[m];
      cos[p * pairs + m] = float(std::cos(angle) * magnitude);
      sin[p * pairs + m] = float(std::sin(angle) * magnitude);
    }
  }
}

void rope_rotate(const RopeTable& table, size_t row, float* x, size_t heads) {
  const size_t pairs = table.pairs;
  const float* cos = table.cos.data() + row * pairs;
  const float* sin = table.sin.data() + row * pairs;
  for (size_t h = 0; h < heads; ++h, x += 2 * pairs) {
    float* a = x;
    float* b = x + pairs;
    for (size_t m = 0; m < pairs; ++m) {
      const float am = a[m], bm = b[m];
      a[m] = am * cos[m] - bm * sin[m];
      b[m] = bm * cos[m] + am * sin[m];
    }
  }
}

}  // namespace certkv
