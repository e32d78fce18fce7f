#include "kernels/activation.h"

#include <cmath>

#include "kernels/arith/exp.h"
#include "kernels/simd.h"

namespace certkv {

namespace {

CERTKV_CPU_VERSIONS
void silu_row(const float* gate, const float* up, size_t n, float* y) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Float8 x = load8(gate + i);
    // exp of -|x| never overflows; the sigmoid is its share on either side of zero.
    const Float8 e = exp_nonpositive<Float8, Int8x32>(x < 0.0f ? x : -x);
    const Float8 numerator = x < 0.0f ? e : splat8(1.0f);
    store8(y + i, x * (numerator / (splat8(1.0f) + e)) * load8(up + i));
  }
  for (; i < n; ++i) {
    const float x = gate[i];
    const float e = exp_nonpositive(x < 0.0f ? x : -x);
    y[i] = x * ((x < 0.0f ? e : 1.0f) / (1.0f + e)) * up[i];
  }
}

}  // namespace

void silu_and_multiply(const float* gate_up, size_t rows, size_t n, float* y, size_t y_stride) {
  for (size_t r = 0; r < rows; ++r)
    silu_row(gate_up + r * 2 * n, gate_up + r * 2 * n + n, n, y + r * y_stride);
}

// x * 0 is 0 for every finite x and NaN for the others; a sum keeps the NaN.
CERTKV_CPU_VERSIONS
bool all_finite(const float* x, size_t n) {
  Float8 sum{};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load8(x + i) * splat8(0.0f);
  float rest = sum8(sum);
  for (; i < n; ++i) rest += x[i] * 0.0f;
  return rest == 0.0f;
}

}  // namespace certkv
