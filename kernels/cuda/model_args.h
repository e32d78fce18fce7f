// What the device's operations on rows are told. Plain data: nvcc and C++ see the same. Every
// pointer is memory of the device.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv::cuda {

// A row's fault word before anything was wrong. An operation that meets a NaN or an infinity sets
// the word to the smaller of itself and its code, so that the first fault stays, whatever the order
// of the threads.
inline constexpr uint32_t kNoFault = 0xffffffffu;

// x[r, i] = table[ids[r], i]
struct EmbedRows {
  const void* table = nullptr;   // [vocab, n]
  DType dtype = DType::BF16;     // of the table: F32, F16 or BF16
  const int32_t* ids = nullptr;  // [rows], each in [0, vocab)
  float* x = nullptr;            // [rows, n]
  size_t rows = 0, n = 0;
};

// x[r, i] += y[r, i] + bias[i], then normed[r, i] = x[r, i] / sqrt(mean_i x[r, i]^2 + eps) *
// weight[i]. A row of x whose square sum is not finite comes out of the norm as all NaN.
// SOURCE: as kernels/norm.h.
struct ResidualNorm {
  float* x = nullptr;        // [rows, n], the residual stream
  const float* y = nullptr;  // [rows, n]; nullptr: nothing is added
  // In place of y where the word is not 0, or nullptr both.
  const float* y_again = nullptr;  // [rows, n]
  const uint32_t* again = nullptr;
  const float* bias = nullptr;  // [n], or nullptr; with y only
  uint32_t* fault = nullptr;    // [rows], where y + bias is not finite; with y only
  uint32_t code = 0;
  const float* weight = nullptr;  // [n]; nullptr: no norm
  float eps = 0;
  DType dtype = DType::F32;  // of `normed`: F32, F16 or BF16
  void* normed = nullptr;    // [rows, n]
  size_t rows = 0, n = 0;
  // A step over several ranks; nullptr all where there is one. SOURCE: method section 8.
  // [1 + rows]: 0, or the layer + 1 at which the step has halted, behind which nothing is added any
  // more; then of each row whether that layer is to be repeated for it.
  uint32_t* halted = nullptr;
  // [rows], summed over the ranks: where one is not 0, the step halts here, at `layer`; the other
  // rows are added still.
  const float* fallback = nullptr;
  uint32_t layer = 0;
  const uint32_t* only = nullptr;  // [rows]: y is added where this is not 0
  float* clear = nullptr;          // out [rows]: 0
};

// Bias, head norms and rotation of the rows of a fused qkv product, in place: heads of queries,
// then keys, then values. Values only get their bias. SOURCE: as kernels/norm.h and kernels/rope.h.
struct RotateQkv {
  float* qkv = nullptr;           // [rows, (heads + 2 kv_heads) * head_dim]
  const float* bias = nullptr;    // [(heads + 2 kv_heads) * head_dim], or nullptr
  const float* q_norm = nullptr;  // [head_dim], or nullptr; on every head, before the rotation
  const float* k_norm = nullptr;
  float eps = 0;
  const float* cos = nullptr;  // [positions, head_dim / 2], as RopeTable has them
  const float* sin = nullptr;
  const int32_t* positions = nullptr;  // [rows]; nullptr: row r is at first_position + r
  size_t first_position = 0;
  DType originals = DType::BF16;  // F16 or BF16
  uint32_t* fault = nullptr;  // [rows]: where a key or value, rounded to originals, is not finite
  uint32_t code = 0;
  // Rounded copies (prefill), all or none. Row r of KV head h goes to
  // h * kv_head_stride + (kv_first + r) * head_dim.
  uint16_t* q16 = nullptr;  // [rows, heads, head_dim]
  uint16_t* k16 = nullptr;
  uint16_t* v16 = nullptr;
  size_t kv_head_stride = 0, kv_first = 0;
  size_t rows = 0, heads = 0, kv_heads = 0, head_dim = 0;

  CERTKV_HD size_t width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// y[r, i] = silu(g) * u, g = gate_up[r, i] + bias[i], u = gate_up[r, n + i] + bias[n + i];
// silu(x) = x / (1 + exp(-x)), the exponential within kExpError. NaN stays NaN.
struct GatedRows {
  const float* gate_up = nullptr;  // [rows, 2 n], gates first
  const float* bias = nullptr;     // [2 n], or nullptr
  DType dtype = DType::F32;        // of y: F32, F16 or BF16
  void* y = nullptr;               // [rows, n]
  size_t rows = 0, n = 0;
};

// to[i] = from[i], rounded to nearest even (kernels/base/dtype.h).
struct Conversion {
  const void* from = nullptr;
  DType from_dtype = DType::F32;
  void* to = nullptr;
  DType to_dtype = DType::F32;
  uint64_t count = 0;
};

// An element of a row and its place as one word: of two, the larger is that of the larger element,
// or of the smaller place among equals; -0 equals 0, a NaN is above infinity. Never 0.
CERTKV_HD inline uint64_t argmax_word(float x, uint32_t place) {
  const uint32_t bits = std::bit_cast<uint32_t>(x == 0.0f ? 0.0f : x);
  const uint32_t order = x != x ? ~0u : (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t(order) << 32 | (~0u - place);
}
CERTKV_HD inline uint32_t argmax_place(uint64_t word) {
  return ~0u - uint32_t(word);
}
CERTKV_HD inline float argmax_value(uint64_t word) {  // a NaN where it is one
  const uint32_t order = uint32_t(word >> 32);
  return std::bit_cast<float>((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

// best[r] = the largest argmax_word of row r.
struct ArgmaxRows {
  const float* x = nullptr;  // [rows, n]
  size_t stride = 0;         // floats from a row to the next
  uint64_t* best = nullptr;  // [rows]
  size_t rows = 0, n = 0;
};

}  // namespace certkv::cuda
