// How fast OpenBLAS multiplies large matrices here: the scale for prefill.
#pragma once

#include <cstddef>

namespace certkv {

class ThreadPool;

// Every thread of the pool multiplies square FP32 matrices of its own, as prefill's tiles do; the
// best of `repeats`. UNITS: 1e9 floating-point operations a second, of all threads
double sgemm_peak_gflops(size_t n, int repeats, ThreadPool& pool);

}  // namespace certkv
