// Products with weight matrices. A weight is row-major [out, in], as model files store it.
//
// Both functions give every output element the same value whatever the batch, the number of threads
// or of ranks: `linear_tile` is one OpenBLAS call whose shape the caller fixes, and `linear_rows`
// sums each element in an order that depends on `in` alone.
#pragma once

#include <cstddef>
#include <span>

namespace certkv {

class ThreadPool;

struct LinearWeight {
  const float* weight = nullptr;  // [out, in]
  const float* bias = nullptr;    // [out], or nullptr
  size_t out = 0;
  size_t in = 0;
};

// y[r, o] = bias[o] + sum_i x[r, i] weight[o, i] as one single-threaded sgemm (prefill).
// x: [rows, in] with rows `x_stride` floats apart; y: [rows, out] with rows `y_stride` apart.
// REQUIRES x and y do not overlap. Throws InvalidArgument where blas_product_nt does.
// THREADS: any number of callers at once.
void linear_tile(const LinearWeight& w, const float* x, size_t x_stride, size_t rows, float* y,
                 size_t y_stride);

// One product of a decode step: the same, for few rows.
struct LinearRows {
  LinearWeight w;
  const float* x = nullptr;  // [rows, w.in], rows x_stride floats apart
  size_t x_stride = 0;
  float* y = nullptr;  // [rows, w.out], rows y_stride floats apart
  size_t y_stride = 0;
};

// All products at once, each over `rows` rows, shared between the pool's threads by blocks of
// outputs. A weight is read from memory once for all rows.
// REQUIRES outputs do not overlap each other or any input.
void linear_rows(std::span<const LinearRows> products, size_t rows, ThreadPool& pool);

// The sum that linear_rows forms: 32 interleaved partial sums, joined in a fixed tree, then the
// rest in order. a, b: [n]. Exposed for tests.
float dot(const float* a, const float* b, size_t n);

}  // namespace certkv
