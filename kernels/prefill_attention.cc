#include "kernels/prefill_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/arith/exp.h"
#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kernels/blas.h"
#include "kernels/simd.h"

namespace certkv {

namespace {

constexpr size_t kQueryRows = 256;  // rows of a score tile (queries x heads of the group)
constexpr size_t kKeyTile = 256;    // columns; a score tile of 256 KiB stays in the L2 cache
constexpr float kLowest = std::numeric_limits<float>::lowest();

CERTKV_CPU_VERSIONS
void convert_bf16(const uint16_t* from, size_t n, float* to) {
  for (size_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i]);
}
CERTKV_CPU_VERSIONS
void convert_f16(const uint16_t* from, size_t n, float* to) {
  for (size_t i = 0; i < n; ++i) to[i] = f16_to_float(from[i]);
}

CERTKV_CPU_VERSIONS
void scale_row(float* x, size_t n, float factor) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store8(x + i, load8(x + i) * splat8(factor));
  for (; i < n; ++i) x[i] *= factor;
}

// The largest of a row, never below `floor`. A NaN may be passed over: its exponential shows it.
CERTKV_CPU_VERSIONS
float row_max(const float* s, size_t n, float floor) {
  Float8 m0 = splat8(floor), m1 = m0;
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Float8 a = load8(s + i), b = load8(s + i + kLanes);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
  }
  m0 = m1 > m0 ? m1 : m0;
  float m = floor;
  for (size_t l = 0; l < kLanes; ++l) m = m0[l] > m ? m0[l] : m;
  for (; i < n; ++i) m = s[i] > m ? s[i] : m;
  return m;
}

#if defined(__x86_64__) && !defined(CERTKV_SANITIZED)
// row_exp with 16 lanes in one register: the same operations on the same elements, and the same
// sums.
using Float16 = float __attribute__((vector_size(64)));
using Int16x32 = int32_t __attribute__((vector_size(64)));

__attribute__((target("arch=x86-64-v4"))) size_t row_exp_16(float* s, size_t n, float m,
                                                            float* sums) {
  Float16 sum{};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    Float16 x;
    std::memcpy(&x, s + i, sizeof x);
    x = exp_nonpositive<Float16, Int16x32>(x - m);
    std::memcpy(s + i, &x, sizeof x);
    sum += x;
  }
  std::memcpy(sums, &sum, sizeof sum);
  return i;
}

bool has_16_lanes() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  return has;
}
#else
size_t row_exp_16(float*, size_t, float, float*) {
  return 0;
}
bool has_16_lanes() {
  return false;
}
#endif

// s[i] = exp(s[i] - m); returns their sum.
CERTKV_CPU_VERSIONS
float row_exp_8(float* s, size_t n, float m) {
  Float8 sum0{}, sum1{};
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Float8 a = exp_nonpositive<Float8, Int8x32>(load8(s + i) - splat8(m));
    const Float8 b = exp_nonpositive<Float8, Int8x32>(load8(s + i + kLanes) - splat8(m));
    store8(s + i, a);
    store8(s + i + kLanes, b);
    sum0 += a;
    sum1 += b;
  }
  float sum = sum8(sum0 + sum1);
  for (; i < n; ++i) sum += s[i] = exp_nonpositive(s[i] - m);
  return sum;
}

float row_exp(float* s, size_t n, float m) {
  if (!has_16_lanes()) return row_exp_8(s, n, m);
  float sums[16];
  const size_t done = row_exp_16(s, n, m, sums);
  float sum = sum8(load8(sums) + load8(sums + 8));
  for (size_t i = done; i < n; ++i) sum += s[i] = exp_nonpositive(s[i] - m);
  return sum;
}

// What one thread needs for a query tile; kept by the thread between tiles.
struct Workspace {
  std::vector<float> q, o;  // [rows, head_dim]
  std::vector<float> k, v;  // [kKeyTile, head_dim]
  std::vector<float> s;     // [rows, kKeyTile]
  std::vector<float> m, l;  // [rows] running maximum and sum
};

struct QueryTile {
  size_t group, begin, count;  // queries begin .. begin + count - 1, counted from a.first
};

// Rows of a tile are ordered [head][query], so that a head's rows are contiguous.
void load_queries(const PrefillAttention& a, const QueryTile& t, Workspace& w) {
  const float scale = 1.0f / std::sqrt(float(a.head_dim));
  const size_t rows = t.count * a.heads_per_group;
  w.q.resize(rows * a.head_dim);
  w.o.assign(rows * a.head_dim, 0.0f);
  w.m.assign(rows, kLowest);
  w.l.assign(rows, 0.0f);
  w.k.resize(kKeyTile * a.head_dim);
  w.v.resize(kKeyTile * a.head_dim);
  w.s.resize(rows * kKeyTile);
  for (size_t j = 0; j < a.heads_per_group; ++j) {
    for (size_t i = 0; i < t.count; ++i) {
      const float* from =
          a.q + t.group * a.q_group_stride + (t.begin + i) * a.q_row_stride + j * a.head_dim;
      float* to = w.q.data() + (j * t.count + i) * a.head_dim;
      std::copy(from, from + a.head_dim, to);
      scale_row(to, a.head_dim, scale);
    }
  }
}

void add_key_tile(const PrefillAttention& a, const QueryTile& t, size_t key, size_t keys,
                  Workspace& w) {
  const size_t d = a.head_dim, rows = t.count * a.heads_per_group;
  const auto convert = a.dtype == DType::BF16 ? convert_bf16 : convert_f16;
  const size_t offset = t.group * a.kv_head_stride + key * d;
  convert(a.k + offset, keys * d, w.k.data());
  convert(a.v + offset, keys * d, w.v.data());
  blas_product_nt(rows, keys, d, w.q.data(), d, w.k.data(), d, false, w.s.data(), kKeyTile);
  for (size_t r = 0; r < rows; ++r) {
    const size_t position = a.first + t.begin + r % t.count;
    const size_t visible = position < key ? 0 : std::min(keys, position - key + 1);
    float* s = w.s.data() + r * kKeyTile;
    if (visible > 0) {
      const float m = row_max(s, visible, w.m[r]);
      const float sum = row_exp(s, visible, m);
      if (m > w.m[r]) {
        const float shrink = exp_nonpositive(w.m[r] - m);  // 0 at the first tile
        w.l[r] *= shrink;
        scale_row(w.o.data() + r * d, d, shrink);
        w.m[r] = m;
      }
      w.l[r] += sum;
    }
    std::fill(s + visible, s + keys, 0.0f);
  }
  blas_product_nn(rows, d, keys, w.s.data(), kKeyTile, w.v.data(), d, true, w.o.data(), d);
}

void attend_tile(const PrefillAttention& a, const QueryTile& t, const std::function<void()>& tick) {
  thread_local Workspace w;
  load_queries(a, t, w);
  const size_t end = a.first + t.begin + t.count;  // keys the tile's last query sees
  for (size_t key = 0; key < end; key += kKeyTile) {
    add_key_tile(a, t, key, std::min(kKeyTile, end - key), w);
    if (tick) tick();
  }
  for (size_t j = 0; j < a.heads_per_group; ++j) {
    for (size_t i = 0; i < t.count; ++i) {
      const size_t r = j * t.count + i;
      float* to =
          a.out + t.group * a.out_group_stride + (t.begin + i) * a.out_row_stride + j * a.head_dim;
      const float* from = w.o.data() + r * a.head_dim;
      for (size_t c = 0; c < a.head_dim; ++c) to[c] = from[c] / w.l[r];
    }
  }
}

}  // namespace

size_t prefill_query_tile(size_t heads_per_group) {
  // A power of two, so that tile boundaries fall on the transformer's chunk boundaries.
  size_t tile = kQueryRows;
  while (tile > 16 && tile * heads_per_group > kQueryRows) tile /= 2;
  return tile;
}

void prefill_attention(const PrefillAttention& a, ThreadPool& pool,
                       const std::function<void()>& tick) {
  const size_t tile = prefill_query_tile(a.heads_per_group);
  CERTKV_EXPECT(a.first % tile == 0, InvalidArgument,
                "prefill attention from position {}: a multiple of {} is needed", a.first, tile);
  CERTKV_EXPECT(a.dtype == DType::BF16 || a.dtype == DType::F16, InvalidArgument,
                "originals of type {}: BF16 or F16 is needed", dtype_name(a.dtype));
  std::vector<QueryTile> tiles;
  for (size_t begin = 0; begin < a.rows; begin += tile)
    for (size_t g = 0; g < a.kv_heads; ++g)
      tiles.push_back({g, begin, std::min(tile, a.rows - begin)});
  // Later tiles see more keys: start with the longest.
  pool.parallel_for(tiles.size(),
                    [&](size_t i) { attend_tile(a, tiles[tiles.size() - 1 - i], tick); });
}

}  // namespace certkv
