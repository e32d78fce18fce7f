#include "kernels/linear.h"

#include <algorithm>
#include <vector>

#include "kernels/base/thread_pool.h"
#include "kernels/blas.h"
#include "kernels/simd.h"

namespace certkv {

namespace {

constexpr size_t kOutputBlock = 32;       // outputs per task of linear_rows
constexpr size_t kSerialMacs = 1u << 18;  // below this, waking threads costs more than it saves

CERTKV_SIMD float dot_inline(const float* a, const float* b, size_t n) {
  Float8 s0{}, s1{}, s2{}, s3{};
  size_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += load8(a + i) * load8(b + i);
    s1 += load8(a + i + 8) * load8(b + i + 8);
    s2 += load8(a + i + 16) * load8(b + i + 16);
    s3 += load8(a + i + 24) * load8(b + i + 24);
  }
  float sum = sum8((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

CERTKV_CPU_VERSIONS
void rows_block(const LinearRows& p, size_t rows, size_t begin, size_t end) {
  for (size_t o = begin; o < end; ++o) {
    const float* weight = p.w.weight + o * p.w.in;
    const float bias = p.w.bias ? p.w.bias[o] : 0.0f;
    for (size_t r = 0; r < rows; ++r)
      p.y[r * p.y_stride + o] = dot_inline(p.x + r * p.x_stride, weight, p.w.in) + bias;
  }
}

}  // namespace

void linear_tile(const LinearWeight& w, const float* x, size_t x_stride, size_t rows, float* y,
                 size_t y_stride) {
  if (rows == 0 || w.out == 0) return;
  if (w.bias)
    for (size_t r = 0; r < rows; ++r) std::copy(w.bias, w.bias + w.out, y + r * y_stride);
  blas_product_nt(rows, w.out, w.in, x, x_stride, w.weight, w.in, w.bias != nullptr, y, y_stride);
}

void linear_rows(std::span<const LinearRows> products, size_t rows, ThreadPool& pool) {
  struct Task {
    const LinearRows* product;
    size_t begin, end;
  };
  std::vector<Task> tasks;
  size_t macs = 0;
  for (const LinearRows& p : products) {
    macs += p.w.out * p.w.in * rows;
    for (size_t o = 0; o < p.w.out; o += kOutputBlock)
      tasks.push_back({&p, o, std::min(o + kOutputBlock, p.w.out)});
  }
  const auto body = [&](size_t i) {
    rows_block(*tasks[i].product, rows, tasks[i].begin, tasks[i].end);
  };
  if (macs < kSerialMacs) {
    for (size_t i = 0; i < tasks.size(); ++i) body(i);
  } else {
    pool.parallel_for(tasks.size(), body);
  }
}

CERTKV_CPU_VERSIONS
float dot(const float* a, const float* b, size_t n) {
  return dot_inline(a, b, n);
}

}  // namespace certkv
