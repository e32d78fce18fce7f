#include "kernels/blas.h"

#include <cblas.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "kernels/base/error.h"

namespace certkv {

namespace {

blasint to_blas(size_t value, const char* what) {
  CERTKV_EXPECT(value <= size_t(INT_MAX), InvalidArgument,
                "{} of a matrix product is {}: OpenBLAS takes at most {}", what, value, INT_MAX);
  return blasint(value);
}

// OpenBLAS maps so much for each thread that multiplies, once, and where it is refused asks again
// for ever; so it is asked for beforehand.
constexpr size_t kThreadBuffer = size_t(160) << 20;
bool expect_buffer() {
  void* p = mmap(nullptr, kThreadBuffer, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CERTKV_EXPECT(
      p != MAP_FAILED, OutOfMemory,
      "OpenBLAS needs {} MiB of address space for each thread of a rank, and no more can be "
      "had ({}): raise ulimit -v, or lower parallel.threads",
      kThreadBuffer >> 20, std::strerror(errno));
  munmap(p, kThreadBuffer);
  return true;
}

void product(CBLAS_TRANSPOSE transpose_b, size_t m, size_t n, size_t k, const float* a,
             size_t a_stride, const float* b, size_t b_stride, bool add, float* c,
             size_t c_stride) {
  if (k == 0) {  // OpenBLAS would refuse the strides of empty matrices
    for (size_t r = 0; r < m && !add; ++r) std::fill(c + r * c_stride, c + r * c_stride + n, 0.0f);
    return;
  }
  static const bool single_threaded = (openblas_set_num_threads(1), true);
  thread_local const bool has_buffer = expect_buffer();
  (void)single_threaded;
  (void)has_buffer;
  cblas_sgemm(CblasRowMajor, CblasNoTrans, transpose_b, to_blas(m, "rows"), to_blas(n, "columns"),
              to_blas(k, "depth"), 1.0f, a, to_blas(a_stride, "stride"), b,
              to_blas(b_stride, "stride"), add ? 1.0f : 0.0f, c, to_blas(c_stride, "stride"));
}

}  // namespace

const char* blas_core() {
  return openblas_get_corename();
}

void blas_product_nt(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b,
                     size_t b_stride, bool add, float* c, size_t c_stride) {
  product(CblasTrans, m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
}

void blas_product_nn(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b,
                     size_t b_stride, bool add, float* c, size_t c_stride) {
  product(CblasNoTrans, m, n, k, a, a_stride, b, b_stride, add, c, c_stride);
}

}  // namespace certkv
