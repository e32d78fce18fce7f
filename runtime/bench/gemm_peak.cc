#include "runtime/bench/gemm_peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernels/base/thread_pool.h"
#include "kernels/blas.h"

namespace certkv {

double sgemm_peak_gflops(size_t n, int repeats, ThreadPool& pool) {
  const size_t threads = size_t(pool.threads());
  std::vector<std::vector<float>> c(threads);
  const std::vector<float> a(n * n, 0.5f), b(n * n, 0.25f);
  for (auto& x : c) x.resize(n * n);
  double best = 0;
  for (int i = 0; i <= repeats; ++i) {  // the first one warms up
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(threads, [&](size_t t) {
      blas_product_nn(n, n, n, a.data(), n, b.data(), n, false, c[t].data(), n);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (i > 0)
      best = std::max(best,
                      2.0 * double(threads) * double(n * n) * double(n) / seconds.count() * 1e-9);
  }
  return best;
}

}  // namespace certkv
