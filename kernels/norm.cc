#include "kernels/norm.h"

#include <cmath>
#include <limits>

#include "kernels/simd.h"

namespace certkv {

namespace {

CERTKV_CPU_VERSIONS
float square_sum(const float* x, size_t n) {
  Float8 s0{}, s1{};
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Float8 a = load8(x + i), b = load8(x + i + kLanes);
    s0 += a * a;
    s1 += b * b;
  }
  float sum = sum8(s0 + s1);
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

CERTKV_CPU_VERSIONS
void scale(const float* x, size_t n, const float* weight, float factor, float* y) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store8(y + i, load8(x + i) * splat8(factor) * load8(weight + i));
  for (; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

}  // namespace

void rms_norm(const float* x, size_t x_stride, size_t rows, size_t n, const float* weight,
              float eps, float* y, size_t y_stride) {
  for (size_t r = 0; r < rows; ++r) {
    const float sum = square_sum(x + r * x_stride, n);
    const float factor = std::isfinite(sum) ? 1.0f / std::sqrt(sum / float(n) + eps)
                                            : std::numeric_limits<float>::quiet_NaN();
    scale(x + r * x_stride, n, weight, factor, y + r * y_stride);
  }
}

}  // namespace certkv
