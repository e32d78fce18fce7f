// Products of few rows with 8-bit weights, for nvcc and for C++, and the two steps around a
// library's product of many rows.
#pragma once

#include <cmath>

#include "kernels/cuda/block_threads.h"
#include "kernels/cuda/int8_args.h"
#include "kernels/cuda/model_body.h"

namespace certkv::cuda {

inline constexpr int kInt8Threads = 256;
inline constexpr int kInt8Outputs = 4;   // of a block
inline constexpr int kInt8Columns = 16;  // that a thread takes at a time: 16 bytes of codes

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Four codes as floats. As an unsigned byte b a code is the last one of 2^23 + b; adding 128 to it
// flips its first bit.
CERTKV_INLINE void floats_of_codes(uint32_t word, float* out) {
  word ^= 0x80808080u;
  for (int k = 0; k < 4; ++k) {
#if defined(__CUDA_ARCH__)
    const uint32_t bits = __byte_perm(word, 0x4b000000u, 0x7440u + uint32_t(k));
#else
    const uint32_t bits = 0x4b000000u | (word >> 8 * k & 0xffu);
#endif
    out[k] = std::bit_cast<float>(bits) - 8388736.0f;  // 2^23 + 128
  }
}

template <DType X>
CERTKV_INLINE float float_of_16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  if constexpr (X == DType::F16) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
#endif
  return float_from_16(X, bits);
}

// A block: kInt8Outputs outputs of up to R rows; its threads share the columns.
template <DType X, int R>
struct Int8Block {
  static constexpr int kItems = kInt8Outputs * R, kParts = kInt8Threads / kItems;
  static constexpr int kHalf = kInt8Columns / 2;
  static constexpr int kStride = kInt8Threads + 1;  // of an item's sums: no two in one bank
  struct Shared {
    float sums[kItems * kStride];
    float parts[kInt8Threads];
  };

  const Int8Product& a;
  size_t first_output, first_row;
  Shared& s;

  // Whether 16 columns can be loaded at once.
  CERTKV_INLINE bool whole() const {
    const size_t x_bytes = X == DType::F32 ? 4 : 2;
    return (a.in % kInt8Columns | reinterpret_cast<size_t>(a.codes) % 16 |
            reinterpret_cast<size_t>(a.x) % 16 | a.x_stride * x_bytes % 16) == 0;
  }
  CERTKV_INLINE Bytes16 codes(size_t output, size_t i, bool all) const {
    const int8_t* from = a.codes + output * a.in + i;
    if (all) return *reinterpret_cast<const Bytes16*>(from);
    Bytes16 bytes{};
    for (int k = 0; k < kInt8Columns; ++k)
      if (i + size_t(k) < a.in) bytes.word[k / 4] |= uint32_t(uint8_t(from[k])) << 8 * (k % 4);
    return bytes;
  }
  // kHalf inputs of a row.
  CERTKV_INLINE void inputs(size_t row, size_t i, bool all, float* out) const {
    const size_t at = row * a.x_stride + i;
    if (!all) {
      for (int k = 0; k < kHalf; ++k)
        out[k] = i + size_t(k) < a.in ? load_as(X, a.x, at + size_t(k)) : 0.0f;
    } else if constexpr (X == DType::F32) {
      for (int k = 0; k < kHalf; ++k) out[k] = static_cast<const float*>(a.x)[at + size_t(k)];
    } else {
      const Bytes16 bytes =
          *reinterpret_cast<const Bytes16*>(static_cast<const uint16_t*>(a.x) + at);
      for (int k = 0; k < kHalf; ++k)
        out[k] = float_of_16<X>(uint16_t(bytes.word[k / 2] >> 16 * (k % 2)));
    }
  }

  CERTKV_INLINE void add(int thread) const {
    float sum[kInt8Outputs][R] = {};
    const bool all = whole();
    for (size_t i = size_t(thread) * kInt8Columns; i < a.in; i += kInt8Threads * kInt8Columns) {
      Bytes16 bytes[kInt8Outputs] = {};
      CERTKV_UNROLLED (o, kInt8Outputs)
        if (first_output + size_t(o) < a.out) bytes[o] = codes(first_output + size_t(o), i, all);
      CERTKV_UNROLLED (half, 2) {  // registers for all 16 columns would cost a block
        float w[kInt8Outputs][kHalf];
        CERTKV_UNROLLED (o, kInt8Outputs)
          CERTKV_UNROLLED (k, 2) floats_of_codes(bytes[o].word[2 * half + k], w[o] + 4 * k);
        CERTKV_UNROLLED (r, R) {
          if (first_row + size_t(r) >= a.rows) continue;
          float x[kHalf];
          inputs(first_row + size_t(r), i + size_t(half * kHalf), all, x);
          CERTKV_UNROLLED (o, kInt8Outputs)
            CERTKV_UNROLLED (k, kHalf) sum[o][r] = fmaf(x[k], w[o][k], sum[o][r]);
        }
      }
    }
    CERTKV_UNROLLED (o, kInt8Outputs)
      CERTKV_UNROLLED (r, R) s.sums[(o * R + r) * kStride + thread] = sum[o][r];
  }
  CERTKV_INLINE void join(int thread) const {
    const int item = thread % kItems, part = thread / kItems;
    float sum = 0;
    for (int k = 0; k < kItems; ++k) sum += s.sums[item * kStride + part * kItems + k];
    s.parts[thread] = sum;
  }
  CERTKV_INLINE void finish(int item) const {
    float sum = 0;
    for (int part = 0; part < kParts; ++part) sum += s.parts[part * kItems + item];
    const size_t output = first_output + size_t(item / R), row = first_row + size_t(item % R);
    if (output < a.out && row < a.rows) a.y[row * a.y_stride + output] = sum * a.scales[output];
  }

  CERTKV_HD void run(const BlockThreads& threads) const {
    threads.each(kInt8Threads, [&](int t) { add(t); });
    threads.each(kInt8Threads, [&](int t) { join(t); });
    threads.each(kItems, [&](int t) { finish(t); });
  }
};

CERTKV_INLINE void unpack_element(const Int8Unpack& a, uint64_t i) {
  store_as(a.dtype, a.to, size_t(i), float(a.codes[i]));
}
CERTKV_INLINE void scale_element(const Int8Scale& a, size_t row, size_t i) {
  a.y[row * a.y_stride + i] *= a.scales[i];
}

// Calls body.template operator()<X, R>(first_row) for each reading of the weights.
template <DType X, typename Body>
void int8_readings(const Int8Product& p, Body body) {
  for (size_t first = 0; first < p.rows; first += kInt8Rows) {
    const size_t rows = p.rows - first;
    if (rows == 1)
      body.template operator()<X, 1>(first);
    else if (rows == 2)
      body.template operator()<X, 2>(first);
    else if (rows <= 4)
      body.template operator()<X, 4>(first);
    else
      body.template operator()<X, int(kInt8Rows)>(first);
  }
}
template <typename Body>
void int8_readings(const Int8Product& p, Body body) {
  if (p.dtype == DType::BF16)
    int8_readings<DType::BF16>(p, body);
  else if (p.dtype == DType::F16)
    int8_readings<DType::F16>(p, body);
  else
    int8_readings<DType::F32>(p, body);
}

}  // namespace certkv::cuda
