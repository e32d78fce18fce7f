// The only door to OpenBLAS. It runs on the calling thread alone: threads are the ThreadPool's.
#pragma once

#include <cstddef>

namespace certkv {

// c[m, n] (+)= a[m, k] b[n, k]^T. Strides are floats between rows; `add` keeps what c holds.
// Throws InvalidArgument where a size or stride does not fit OpenBLAS's 32-bit integers.
void blas_product_nt(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b,
                     size_t b_stride, bool add, float* c, size_t c_stride);

// c[m, n] (+)= a[m, k] b[k, n]. Strides and errors as above.
void blas_product_nn(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b,
                     size_t b_stride, bool add, float* c, size_t c_stride);

// The instruction set that OpenBLAS chose when it was loaded, by the name of a core: "Haswell",
// "SkylakeX", ...
const char* blas_core();

}  // namespace certkv
