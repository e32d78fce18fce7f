// Every operation of kernels/cuda/lanes.h that is an instruction of its own, on the same words: the
// emulation's results must be the device's.
#pragma once

#include <cstdint>

#include "kernels/cuda/lanes.h"

namespace certkv {

inline constexpr int kProbeWords = 8;   // of each lane, in
inline constexpr int kProbeExact = 12;  // words of each lane, out: the same bits
inline constexpr int kProbeSums = 8;    // floats of each lane, out: within kMatrixUnits

// in: [warps, kProbeWords, 32]; exact: [warps, kProbeExact, 32]; sums: [warps, kProbeSums, 32].
void probe_lanes_emulated(const uint32_t* in, int warps, uint32_t* exact, float* sums);
// Host memory. Returns false if there is no device that can run it.
bool probe_lanes_on_device(const uint32_t* in, int warps, uint32_t* exact, float* sums);

// Of the device's exponential on every float of [kExpFlush, 0]: the largest relative error, and the
// largest value below kExpFlush. Returns false if there is no device that can run it.
bool probe_exponential_on_device(double* worst, float* below);

namespace CERTKV_LANES_NAMESPACE {

CERTKV_LANES_FUNCTION U brains(U x) {  // bfloat16 between 1/8 and 1/2
  return (x & 0x81ff81ffu) | 0x3e003e00u;
}

CERTKV_LANES_FUNCTION void probe_lanes(const uint32_t* in, uint32_t* exact, float* sums) {
  const I lane = lane_index();
  U w[kProbeWords];
  for (int i = 0; i < kProbeWords; ++i)
    w[i] = load1(reinterpret_cast<const std::byte*>(in), lane * 4 + i * 128);
  int n = 0;
  const auto put = [&](U x) {
    store(reinterpret_cast<float*>(exact), lane + 32 * n++, float_of_bits(x));
  };
  put(transpose_8x8(w[0]));
  put(pick_bytes(w[0], w[1], 0x5410));
  put(pick_bytes(w[0], w[1], 0x0051));
  // Halves whose product and sum a double holds: code words, steps, bases below 16.
  const U code = w[0] & 0x00f000f0u, step = w[1] & 0x7bff7bffu, base = w[2] & 0xcbffcbffu;
  put(fma_halves(code, step, base));
  put(fma_halves(w[0] & 0x000f000fu, step, base));
  const F x = to_float(w[3] & 0xffffu) * 0x1p-12f, y = to_float(w[4] >> 16) * -0x1p-30f;
  put(pack_halves(x, y));
  put(bits_of(low_half(w[5] & 0x7bff7bffu) + high_half(w[5] & 0x7bff7bffu)));
  put(bits_of(fma(x, y, x)));
  I sum[4] = {splat_i(1), splat_i(-2), splat_i(3), splat_i(-4)};
  const U a[4] = {w[0], w[1], w[2], w[3]};
  mma_bytes(sum, a, w[4], w[5]);
  for (int i = 0; i < 4; ++i) put(bits_of(to_float(sum[i])));
  // Halves of all sizes below 2^4, of both signs in A and B.
  F s[4] = {x, y, -x, splat(0)};
  const U h[4] = {w[0] & 0xcbffcbffu, w[1] & 0xcbffcbffu, w[2] & 0xcbffcbffu, w[3] & 0xcbffcbffu};
  mma_halves(s, h, w[6] & 0xcbffcbffu, w[7] & 0xcbffcbffu);
  for (int i = 0; i < 4; ++i) store(sums, lane + 32 * i, s[i]);
  F t[4] = {splat(0), x, y, x};
  const U m[4] = {brains(w[0]), brains(w[1]), brains(w[2]), brains(w[3])};
  mma_brains(t, m, brains(w[6]), brains(w[7]));
  for (int i = 0; i < 4; ++i) store(sums, lane + 32 * (4 + i), t[i]);
}

}  // namespace CERTKV_LANES_NAMESPACE
}  // namespace certkv
