// Vectors for the hot loops of the CPU backend: eight floats the compiler maps to whatever the
// machine has, and the mark that builds a function for several machines and picks at load time.
//
// The order of every sum is fixed by the lanes here, never by the machine's vector width, the
// number of threads or the batch: that is what makes results repeatable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
CERTKV_SIMD Float8 splat8(float x) {
  return Float8{x, x, x, x, x, x, x, x};
}

// Fixed tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
CERTKV_SIMD float sum8(const Float8& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

}  // namespace certkv
