// The gate of the MLP. SOURCE: Shazeer, "GLU Variants Improve Transformer", 2020 (SwiGLU).
#pragma once

#include <cstddef>

namespace certkv {

// y[r, i] = silu(gate_up[r, i]) * gate_up[r, n + i], silu(x) = x / (1 + exp(-x)).
// gate_up: [rows, 2 n], gates first; y: [rows, n] with rows `y_stride` floats apart. NaN stays NaN.
void silu_and_multiply(const float* gate_up, size_t rows, size_t n, float* y, size_t y_stride);

// True iff every element is finite. x: [n]
bool all_finite(const float* x, size_t n);

}  // namespace certkv
