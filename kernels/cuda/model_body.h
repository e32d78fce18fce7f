// Bodies of the operations on rows, for nvcc and for C++. What a block does together is cut into
// phases: all its threads finish one (with a barrier, or one after another in emulation) before any
// begins the next. No operation may be fused, so both compilers give the same bits.
#pragma once

#include <cmath>

#include "kernels/arith/exp.h"
#include "kernels/cuda/model_args.h"

namespace certkv::cuda {

inline constexpr int kRowThreads = 1024;  // of a block that does one row
inline constexpr int kHeadThreads = 128;  // of a block that does one head
inline constexpr int kSumParts = 32;
inline constexpr size_t kArgmaxPart = 4096;  // elements of a row that one block looks at
// Elements that a thread asks for before it stores any: a compiler may not move a load over a
// store.
inline constexpr int kAhead = 4;

CERTKV_INLINE float load_as(DType t, const void* from, size_t i) {
  return t == DType::F32 ? static_cast<const float*>(from)[i]
                         : float_from_16(t, static_cast<const uint16_t*>(from)[i]);
}
CERTKV_INLINE void store_as(DType t, void* to, size_t i, float x) {
  if (t == DType::F32)
    static_cast<float*>(to)[i] = x;
  else
    static_cast<uint16_t*>(to)[i] = float_to_16(t, x);
}
CERTKV_INLINE bool finite_float(float x) {
  return (std::bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
}
CERTKV_INLINE void mark_fault(uint32_t* word, uint32_t code) {
#if defined(__CUDA_ARCH__)
  atomicMin(word, code);
#else
  if (code < *word) *word = code;
#endif
}

CERTKV_INLINE void embed_element(const EmbedRows& a, size_t row, size_t i) {
  a.x[row * a.n + i] = load_as(a.dtype, a.table, size_t(a.ids[row]) * a.n + i);
}

CERTKV_INLINE void convert_element(const Conversion& a, uint64_t i) {
  store_as(a.to_dtype, a.to, size_t(i), load_as(a.from_dtype, a.from, size_t(i)));
}

CERTKV_INLINE void gate_element(const GatedRows& a, size_t row, size_t i) {
  float gate = a.gate_up[row * 2 * a.n + i], up = a.gate_up[row * 2 * a.n + a.n + i];
  if (a.bias != nullptr) {
    gate += a.bias[i];
    up += a.bias[a.n + i];
  }
  // exp of -|gate| never overflows; the sigmoid is its share on either side of zero.
  const float e = exp_nonpositive(gate < 0.0f ? gate : -gate);
  store_as(a.dtype, a.y, row * a.n + i, gate * ((gate < 0.0f ? e : 1.0f) / (1.0f + e)) * up);
}

// The sum of a block's `threads` numbers in an order that depends on nothing else: part(t), a
// barrier, join(t) for t below kSumParts, a barrier, total().
struct BlockSum {
  float* shared;  // [threads + kSumParts]
  int threads;    // a multiple of kSumParts

  CERTKV_INLINE void part(int thread, float x) const { shared[thread] = x; }
  CERTKV_INLINE void join(int thread) const {
    float sum = 0;
    for (int i = thread; i < threads; i += kSumParts) sum += shared[i];
    shared[threads + thread] = sum;
  }
  CERTKV_INLINE float total() const {
    float sum = 0;
    for (int i = 0; i < kSumParts; ++i) sum += shared[threads + i];
    return sum;
  }
};

// 1 / root mean square; NaN where the sum is not finite.
CERTKV_INLINE float norm_factor(float square_sum, size_t n, float eps) {
  return finite_float(square_sum) ? 1.0f / sqrtf(square_sum / float(n) + eps)
                                  : std::bit_cast<float>(0x7fc00000u);
}

// One row by one block.
struct ResidualNormRow {
  const ResidualNorm& a;
  size_t row;
  BlockSum sum;

  // Calls body(first) for all of a thread's batches: elements first + j * sum.threads, j < kAhead.
  template <typename Body>
  CERTKV_INLINE void batches(int thread, Body body) const {
    for (size_t first = size_t(thread); first < a.n; first += kAhead * size_t(sum.threads))
      body(first);
  }
  CERTKV_INLINE size_t element(size_t first, int j) const {
    return first + size_t(j) * size_t(sum.threads);
  }

  // Whether y counts for this row; every block sees the same flags, and no other's mark matters.
  CERTKV_INLINE bool adds(int thread) const {
    if (a.only != nullptr && a.only[row] == 0) return false;
    if (a.halted == nullptr) return true;
    const uint32_t at = *a.halted;
    if (at != 0 && (a.fallback == nullptr || at != a.layer + 1)) return false;
    if (a.fallback == nullptr) return true;
    bool any = false;
    for (size_t r = 0; r < a.rows; ++r) any = any || !(a.fallback[r] == 0);
    if (!any) return true;
    const bool own = !(a.fallback[row] == 0);
    if (thread == 0) {
      a.halted[1 + row] = own ? 1 : 0;
      if (row == 0) *a.halted = a.layer + 1;
    }
    return !own;
  }
  CERTKV_INLINE void add(int thread) const {
    if (thread == 0 && a.clear != nullptr) a.clear[row] = 0;
    float* x = a.x + row * a.n;
    const float* y = a.again != nullptr && *a.again != 0 ? a.y_again : a.y;
    y = y != nullptr && adds(thread) ? y + row * a.n : nullptr;
    float square = 0;
    bool finite = true;
    batches(thread, [&](size_t first) {
      float value[kAhead] = {}, added[kAhead] = {};
      for (int j = 0; j < kAhead; ++j) {
        const size_t i = element(first, j);
        if (i >= a.n) continue;
        value[j] = x[i];
        if (y != nullptr) added[j] = a.bias != nullptr ? y[i] + a.bias[i] : y[i];
      }
      for (int j = 0; j < kAhead; ++j) {
        const size_t i = element(first, j);
        finite = finite && finite_float(added[j]);
        if (y != nullptr) value[j] += added[j];
        if (y != nullptr && i < a.n) x[i] = value[j];
        square += value[j] * value[j];
      }
    });
    if (!finite) mark_fault(a.fault + row, a.code);
    sum.part(thread, square);
  }
  CERTKV_INLINE void scale(int thread) const {
    const float* x = a.x + row * a.n;
    const float factor = norm_factor(sum.total(), a.n, a.eps);
    batches(thread, [&](size_t first) {
      float value[kAhead] = {};
      for (int j = 0; j < kAhead; ++j) {
        const size_t i = element(first, j);
        if (i < a.n) value[j] = x[i] * factor * a.weight[i];
      }
      for (int j = 0; j < kAhead; ++j) {
        const size_t i = element(first, j);
        if (i < a.n) store_as(a.dtype, a.normed, row * a.n + i, value[j]);
      }
    });
  }
};

// One head of one row by one block. `head` counts queries, then keys, then values.
struct RotateHead {
  const RotateQkv& a;
  size_t row, head;
  BlockSum sum;

  CERTKV_INLINE bool is_query() const { return head < a.heads; }
  CERTKV_INLINE bool is_value() const { return head >= a.heads + a.kv_heads; }
  CERTKV_INLINE const float* norm() const {
    return is_value() ? nullptr : is_query() ? a.q_norm : a.k_norm;
  }
  CERTKV_INLINE float* elements() const { return a.qkv + row * a.width() + head * a.head_dim; }

  // With its bias.
  CERTKV_INLINE float element(size_t i) const {
    const float x = elements()[i];
    return a.bias != nullptr ? x + a.bias[head * a.head_dim + i] : x;
  }

  // For a head with a norm: its sum of squares.
  CERTKV_INLINE void square(int thread) const {
    float all = 0;
    for (size_t i = size_t(thread); i < a.head_dim; i += size_t(sum.threads)) {
      const float x = element(i);
      all += x * x;
    }
    sum.part(thread, all);
  }
  CERTKV_INLINE void turn(int thread) const {
    const float* weight = norm();
    const float factor = weight != nullptr ? norm_factor(sum.total(), a.head_dim, a.eps) : 1.0f;
    const size_t pairs = a.head_dim / 2;
    const size_t position =
        a.positions != nullptr ? size_t(a.positions[row]) : a.first_position + row;
    float* x = elements();
    bool finite = true;
    for (size_t m = size_t(thread); m < pairs; m += size_t(sum.threads)) {
      float first = element(m), second = element(m + pairs);
      if (weight != nullptr) {
        first = first * factor * weight[m];
        second = second * factor * weight[m + pairs];
      }
      if (!is_value()) {
        const float cos = a.cos[position * pairs + m], sin = a.sin[position * pairs + m];
        const float before = first;
        first = before * cos - second * sin;
        second = second * cos + before * sin;
      }
      x[m] = first;
      x[m + pairs] = second;
      finite = keep(m, first) && finite;
      finite = keep(m + pairs, second) && finite;
    }
    if (!finite) mark_fault(a.fault + row, a.code);
  }
  // Rounds an element and stores it where it is wanted; false for a key or value that is not finite
  // then.
  CERTKV_INLINE bool keep(size_t i, float x) const {
    const uint16_t bits = float_to_16(a.originals, x);
    if (is_query()) {
      if (a.q16 != nullptr) a.q16[(row * a.heads + head) * a.head_dim + i] = bits;
      return true;
    }
    const size_t h = is_value() ? head - a.heads - a.kv_heads : head - a.heads;
    uint16_t* to = is_value() ? a.v16 : a.k16;
    if (to != nullptr) to[h * a.kv_head_stride + (a.kv_first + row) * a.head_dim + i] = bits;
    return finite_float(float_from_16(a.originals, bits));
  }
};

// One part of a row by one block.
struct ArgmaxPart {
  const ArgmaxRows& a;
  size_t row, part;
  uint64_t* shared;  // [threads + kSumParts]
  int threads;

  CERTKV_INLINE void best(int thread) const {
    const size_t first = part * kArgmaxPart;
    const size_t end = a.n - first < kArgmaxPart ? a.n : first + kArgmaxPart;
    uint64_t top = 0;
    for (size_t i = first + size_t(thread); i < end; i += size_t(threads)) {
      const uint64_t word = argmax_word(a.x[row * a.stride + i], uint32_t(i));
      if (word > top) top = word;
    }
    shared[thread] = top;
  }
  CERTKV_INLINE void join(int thread) const {
    uint64_t top = 0;
    for (int i = thread; i < threads; i += kSumParts)
      if (shared[i] > top) top = shared[i];
    shared[threads + thread] = top;
  }
  // Parts meet in any order: the largest of whole numbers does not depend on it.
  CERTKV_INLINE void finish() const {
    uint64_t top = 0;
    for (int i = 0; i < kSumParts; ++i)
      if (shared[threads + i] > top) top = shared[threads + i];
#if defined(__CUDA_ARCH__)
    atomicMax(reinterpret_cast<unsigned long long*>(a.best + row), (unsigned long long)(top));
#else
    if (top > a.best[row]) a.best[row] = top;
#endif
  }
};

}  // namespace certkv::cuda
