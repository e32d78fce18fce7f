// Vectors for the hot loops of the CPU backend: eight floats the compiler maps to whatever the
// machine has, and the mark that builds a function for several machines and picks at load time.
//
// The order of every sum is fixed by the lanes here, never by the machine's vector width, the
// number of threads or the batch: that is what makes results repeatable.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/base/dtype.h"

// Function versions for AVX-512, AVX2 and plain x86-64. Sanitizers instrument the resolver, which runs
// before they are ready: there only the plain version is built.
#if defined(__x86_64__) && !defined(CERTKV_SANITIZED)
#define CERTKV_CPU_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CERTKV_CPU_VERSIONS
#endif

namespace certkv {

using Float8 = float __attribute__((vector_size(32)));
using Int8x32 = int32_t __attribute__((vector_size(32)));
using Half8 = uint16_t __attribute__((vector_size(16)));
using Byte16 = uint8_t __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));
inline constexpr size_t kLanes = 8;

#define CERTKV_SIMD inline __attribute__((always_inline))

CERTKV_SIMD Float8 load8(const float* p) {
  Float8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CERTKV_SIMD void store8(float* p, const Float8& v) {
  std::memcpy(p, &v, sizeof v);
}
CERTKV_SIMD Half8 load_halves(const uint16_t* p) {
  Half8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CERTKV_SIMD Float8 splat8(float x) {
  return Float8{x, x, x, x, x, x, x, x};
}

// Fixed tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
CERTKV_SIMD float sum8(const Float8& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Eight 16-bit floats as floats: what float_from_16 gives of each.
template <DType dtype>
CERTKV_SIMD Float8 widen8(const Half8& h) {
  const Int8x32 bits = __builtin_convertvector(h, Int8x32);
  if (dtype == DType::BF16) return std::bit_cast<Float8>(bits << 16);
  const Int8x32 rest = bits & 0x7fff;
  const Float8 finite = std::bit_cast<Float8>(rest << 13) * 0x1p112f;
  // Infinity and NaN: the exponent's last 112 steps, where it was all ones. No comparison, which
  // compilers take apart where vectors are shorter.
  const Int8x32 beyond = -((rest + 0x400) >> 15) & 112 << 23;
  return std::bit_cast<Float8>((std::bit_cast<Int8x32>(finite) + beyond) | (bits & 0x8000) << 16);
}

template <DType dtype>
CERTKV_SIMD Float8 widen8(const uint16_t* p) {
  return widen8<dtype>(load_halves(p));
}

// Column i of eight rows of eight halves becomes row i.
CERTKV_SIMD void transpose8(Half8 (&x)[8]) {
  for (int round = 0; round < 3; ++round) {  // a perfect shuffle of the rows, three times
    Half8 y[8];
    for (int i = 0; i < 4; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }
}

// Eight doubles, as halves: compilers take comparisons and shuffles of vectors apart, element by
// element, where the machine's are shorter.
struct Double8 {
  Double4 low{}, high{};

  CERTKV_SIMD Double8& operator+=(const Double8& b) {
    low += b.low;
    high += b.high;
    return *this;
  }
};
CERTKV_SIMD Double8 splat8(double x) {
  return {Double4{} + x, Double4{} + x};
}
CERTKV_SIMD Double8 operator+(const Double8& a, const Double8& b) {
  return {a.low + b.low, a.high + b.high};
}
CERTKV_SIMD Double8 operator-(const Double8& a, const Double8& b) {
  return {a.low - b.low, a.high - b.high};
}
CERTKV_SIMD Double8 operator*(const Double8& a, const Double8& b) {
  return {a.low * b.low, a.high * b.high};
}
CERTKV_SIMD Double8 operator/(const Double8& a, const Double8& b) {
  return {a.low / b.low, a.high / b.high};
}
CERTKV_SIMD Double8 load8(const double* p) {
  Double8 v;
  std::memcpy(&v.low, p, sizeof v.low);
  std::memcpy(&v.high, p + 4, sizeof v.high);
  return v;
}
CERTKV_SIMD void store8(double* p, const Double8& v) {
  std::memcpy(p, &v.low, sizeof v.low);
  std::memcpy(p + 4, &v.high, sizeof v.high);
}
CERTKV_SIMD double sum8(const Double8& v) {  // the same tree
  const Double4 s = v.low + v.high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
CERTKV_SIMD Double8 to_double(const Float8& x) {
  return {__builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3), Double4),
          __builtin_convertvector(__builtin_shufflevector(x, x, 4, 5, 6, 7), Double4)};
}
CERTKV_SIMD Double8 to_double(const Int8x32& x) {
  return {__builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3), Double4),
          __builtin_convertvector(__builtin_shufflevector(x, x, 4, 5, 6, 7), Double4)};
}

// Sixteen bytes as numbers. By way of 16 bits: compilers take vectors of eight bytes apart.
CERTKV_SIMD void bytes16(const uint8_t* p, Double8* low, Double8* high) {
  Byte16 b;
  std::memcpy(&b, p, sizeof b);
  const auto lower = __builtin_shufflevector(b, Byte16{}, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                             6, 22, 7, 23);
  const auto upper = __builtin_shufflevector(b, Byte16{}, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                             29, 14, 30, 15, 31);
  *low = to_double(__builtin_convertvector(std::bit_cast<Half8>(lower), Int8x32));
  *high = to_double(__builtin_convertvector(std::bit_cast<Half8>(upper), Int8x32));
}

}  // namespace certkv
