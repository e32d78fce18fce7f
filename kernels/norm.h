// RMS normalisation of rows. SOURCE: Zhang and Sennrich, "Root Mean Square Layer Normalization",
// 2019.
#pragma once

#include <cstddef>

namespace certkv {

// y[r, i] = x[r, i] / sqrt(mean_i x[r, i]^2 + eps) * weight[i]; y may be x.
// x, y: [rows, n] with rows `x_stride`, `y_stride` floats apart; weight: [n].
// ENSURES a row with a NaN, an infinity or a square sum beyond float comes out as all NaN, so that
// it cannot pass for a row of zeros. Each row depends on itself alone.
void rms_norm(const float* x, size_t x_stride, size_t rows, size_t n, const float* weight,
              float eps, float* y, size_t y_stride);

}  // namespace certkv
