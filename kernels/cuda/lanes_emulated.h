// Lanes of a warp as vectors of 32 elements on the CPU. See lanes.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernels/arith/chains.h"
#include "kernels/simd.h"

namespace certkv::emulated {

typedef float F __attribute__((vector_size(128)));
typedef int32_t I __attribute__((vector_size(128)));
typedef uint32_t U __attribute__((vector_size(128)));
typedef double D __attribute__((vector_size(256)));
typedef uint64_t W __attribute__((vector_size(256)));
using B = I;  // 0 or -1

inline constexpr int kLaneCount = 32;

template <typename V, typename Body>
inline V each_lane(Body body) {
  V out{};
  for (int lane = 0; lane < kLaneCount; ++lane) out[lane] = body(lane);
  return out;
}

inline I lane_index() {
  return each_lane<I>([](int lane) { return lane; });
}
inline F splat(float x) {
  return F{} + x;
}
inline U splat_u(uint32_t x) {
  return U{} + x;
}
inline I splat_i(int x) {
  return I{} + x;
}
inline F select(B which, F yes, F no) {
  return which ? yes : no;
}
inline U select(B which, U yes, U no) {
  return which ? yes : no;
}
inline I select(B which, I yes, I no) {
  return which ? yes : no;
}
inline D select(B which, D yes, D no) {
  return each_lane<D>([&](int i) { return which[i] != 0 ? yes[i] : no[i]; });
}
inline bool any(B x) {
  int32_t all = 0;
  for (int lane = 0; lane < kLaneCount; ++lane) all |= x[lane];
  return all != 0;
}
inline void sync_lanes() {}

inline F fma(F a, F b, F c) {
  return each_lane<F>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
inline F magnitude(F x) {
  return each_lane<F>([&](int i) { return std::fabs(x[i]); });
}
inline F larger(F a, F b) {
  return each_lane<F>([&](int i) { return std::fmax(a[i], b[i]); });
}
inline F root(F x) {
  return each_lane<F>([&](int i) { return std::sqrt(x[i]); });
}
inline F exponential(F x) {
  return exp_nonpositive<F, I>(x);
}
inline F c_of_large(F x) {
  return c_of_deltas<F, I>(x);
}
inline F reciprocal(F x) {
  return 1.0f / x;
}
inline double uniform(D x, int lane) {
  return x[lane];
}
inline float uniform(F x, int lane) {
  return x[lane];
}
inline uint32_t uniform(U x, int lane) {
  return x[lane];
}
inline void prefetch(const std::byte*, I) {}
inline D exponential(D x) {
  return each_lane<D>([&](int i) { return std::exp(x[i]); });
}
inline D to_double(F x) {
  return __builtin_convertvector(x, D);
}
inline F to_float(D x) {
  return __builtin_convertvector(x, F);
}
inline D logarithm(D x) {
  return each_lane<D>([&](int i) { return std::log(x[i]); });
}
inline D magnitude(D x) {
  return each_lane<D>([&](int i) { return std::fabs(x[i]); });
}
inline B at_most(D a, D b) {
  return each_lane<B>([&](int i) { return a[i] <= b[i] ? -1 : 0; });
}
inline B beyond(D x, double limit) {  // not within [-limit, limit]; NaN is beyond
  return each_lane<B>([&](int i) { return std::fabs(x[i]) <= limit ? 0 : -1; });
}

inline I index_of(U x) {
  return __builtin_convertvector(x, I);
}
inline U word_of(I x) {
  return __builtin_convertvector(x, U);
}
inline U bits_of(F x) {
  return __builtin_bit_cast(U, x);
}
inline F float_of_bits(U x) {
  return __builtin_bit_cast(F, x);
}
inline F to_float(I x) {
  return __builtin_convertvector(x, F);
}
inline F to_float(U x) {
  return __builtin_convertvector(x, F);
}

inline U pack_halves(F low, F high) {
  return each_lane<U>([&](int i) {
    return uint32_t(float_to_f16(low[i])) | uint32_t(float_to_f16(high[i])) << 16;
  });
}
inline F low_half(U x) {
  return each_lane<F>([&](int i) { return f16_to_float(uint16_t(x[i])); });
}
inline F high_half(U x) {
  return each_lane<F>([&](int i) { return f16_to_float(uint16_t(x[i] >> 16)); });
}
// Rounded once, as the instruction does. REQUIRES a b + c exact in double.
inline uint16_t fma_half(uint16_t a, uint16_t b, uint16_t c) {
  const double exact = double(f16_to_float(a)) * f16_to_float(b) + f16_to_float(c);
  float f = float(exact);
  if (double(f) != exact) {  // to odd: the second rounding then sees what the first lost
    if (std::fabs(double(f)) > std::fabs(exact)) f = std::nextafter(f, 0.0f);
    f = std::bit_cast<float>(std::bit_cast<uint32_t>(f) | 1u);
  }
  return float_to_f16(f);
}
inline U fma_halves(U a, U b, U c) {
  return each_lane<U>([&](int i) {
    const auto half = [&](int shift) {
      return uint32_t(fma_half(uint16_t(a[i] >> shift), uint16_t(b[i] >> shift),
                               uint16_t(c[i] >> shift)))
             << shift;
    };
    return half(0) | half(16);
  });
}
inline U pick_bytes(U a, U b, uint32_t selector) {
  return each_lane<U>([&](int i) {
    const uint64_t eight = uint64_t(b[i]) << 32 | a[i];
    uint32_t out = 0;
    for (int n = 0; n < 4; ++n)
      out |= uint32_t(eight >> (8 * (selector >> 4 * n & 7)) & 0xff) << 8 * n;
    return out;
  });
}

inline F shuffle_xor(F x, int mask) {
  return each_lane<F>([&](int i) { return x[i ^ mask]; });
}
inline U shuffle_xor(U x, int mask) {
  return each_lane<U>([&](int i) { return x[i ^ mask]; });
}
inline U shuffle(U x, I from) {
  return each_lane<U>([&](int i) { return x[from[i] & 31]; });
}
inline D shuffle_xor(D x, int mask) {
  return each_lane<D>([&](int i) { return x[i ^ mask]; });
}
inline F shuffle(F x, I from) {
  return each_lane<F>([&](int i) { return x[from[i]]; });
}

inline U transpose_8x8(U x) {
  const auto element = [&](int row, int column) {
    return x[row * 4 + column / 2] >> (column % 2 * 16) & 0xffffu;
  };
  return each_lane<U>([&](int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    return element(column, row) | element(column + 1, row) << 16;
  });
}

// Element (row, k) of A and (k, n) of B in the fragments of m16n8k32 and m16n8k16.
template <int kBits>
inline uint32_t element_a(const U (&a)[4], int row, int k) {
  constexpr int kEach = 32 / kBits, kHalf = 4 * kEach;
  const int reg = row / 8 + k / kHalf * 2, lane = row % 8 * 4 + k % kHalf / kEach;
  return a[reg][lane] >> (k % kEach * kBits) & ((1u << kBits) - 1);
}
template <int kBits>
inline uint32_t element_b(U b0, U b1, int k, int n) {
  constexpr int kEach = 32 / kBits, kHalf = 4 * kEach;
  const int lane = n * 4 + k % kHalf / kEach;
  const uint32_t word = k < kHalf ? b0[lane] : b1[lane];
  return word >> (k % kEach * kBits) & ((1u << kBits) - 1);
}
template <typename V, typename Body>
inline void each_sum(V (&sum)[4], Body body) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    for (int i = 0; i < 4; ++i)
      sum[i][lane] = body(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, sum[i][lane]);
}
inline void mma_bytes(I (&sum)[4], const U (&a)[4], U b0, U b1) {
  each_sum(sum, [&](int row, int n, int32_t before) {
    for (int k = 0; k < 32; ++k)
      before += int32_t(element_a<8>(a, row, k)) * int8_t(element_b<8>(b0, b1, k, n));
    return before;
  });
}
// convert: of one 16-bit element.
template <typename Convert>
inline void mma_16(F (&sum)[4], const U (&a)[4], U b0, U b1, Convert convert) {
  each_sum(sum, [&](int row, int n, float before) {
    double exact = before;
    for (int k = 0; k < 16; ++k)
      exact += double(convert(uint16_t(element_a<16>(a, row, k)))) *
               convert(uint16_t(element_b<16>(b0, b1, k, n)));
    const float f = float(exact);  // towards zero
    return std::isfinite(f) && std::fabs(double(f)) > std::fabs(exact) ? std::nextafter(f, 0.0f)
                                                                       : f;
  });
}
inline void mma_halves(F (&sum)[4], const U (&a)[4], U b0, U b1) {
  mma_16(sum, a, b0, b1, f16_to_float);
}
inline void mma_brains(F (&sum)[4], const U (&a)[4], U b0, U b1) {
  mma_16(sum, a, b0, b1, bf16_to_float);
}

template <int kWords>
inline void load_words(const std::byte* base, I at, U (&out)[kWords]) {
  for (int lane = 0; lane < kLaneCount; ++lane) {
    uint32_t words[kWords];
    if (reinterpret_cast<uintptr_t>(base + at[lane]) % sizeof words != 0)
      throw std::logic_error("a lane loads from an address that is not a multiple of the size");
    std::memcpy(words, base + at[lane], sizeof words);
    for (int i = 0; i < kWords; ++i) out[i][lane] = words[i];
  }
}
inline void load4(const std::byte* base, I at, U (&out)[4]) {
  load_words(base, at, out);
}
inline void load2(const std::byte* base, I at, U (&out)[2]) {
  load_words(base, at, out);
}
inline U load1(const std::byte* base, I at) {
  return each_lane<U>([&](int i) {
    uint32_t word;
    std::memcpy(&word, base + at[i], sizeof word);
    return word;
  });
}
inline void store4_where(B which, std::byte* base, I at, const U (&in)[4]) {
  for (int lane = 0; lane < kLaneCount; ++lane) {
    if (which[lane] == 0) continue;
    if (reinterpret_cast<uintptr_t>(base + at[lane]) % 16 != 0)
      throw std::logic_error("a lane stores 16 bytes to an address that is not a multiple of 16");
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = in[i][lane];
      std::memcpy(base + at[lane] + 4 * i, &word, sizeof word);
    }
  }
}
inline F load_float(const float* base, I index) {
  return each_lane<F>([&](int i) { return base[index[i]]; });
}
inline F load_float(B which, const float* yes, const float* no, I index) {
  return each_lane<F>([&](int i) { return (which[i] != 0 ? yes : no)[index[i]]; });
}
inline D load_double(const double* base, I index) {
  return each_lane<D>([&](int i) { return base[index[i]]; });
}
inline void store(float* base, I index, F x) {
  for (int lane = 0; lane < kLaneCount; ++lane) base[index[lane]] = x[lane];
}
inline void store(double* base, I index, D x) {
  for (int lane = 0; lane < kLaneCount; ++lane) base[index[lane]] = x[lane];
}
inline void store_where(B which, float* base, I index, F x) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] = x[lane];
}
inline void store_where(B which, double* base, I index, D x) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] = x[lane];
}
inline void store_byte(uint8_t* to, uint8_t byte) {
  *to = byte;
}
inline void store_word(uint32_t* to, uint32_t word) {
  *to = word;
}
inline void raise_flag(uint32_t* flags, uint32_t bit) {
  *flags |= bit;
}

// A float of the page that a lane names, `offset` bytes and `index` floats into it.
template <typename Entry>
inline F load_note_of(const Entry* entries, I entry, I index, uint32_t offset) {
  return each_lane<F>([&](int i) {
    const std::byte* page = entries[entry[i]].page;
    if (page == nullptr) return 0.0f;
    float x;
    std::memcpy(&x, page + offset + 4 * index[i], sizeof x);
    return x;
  });
}
// Bit l: lane l's.
inline uint32_t ballot(B x) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLaneCount; ++lane) bits |= uint32_t(x[lane] != 0) << lane;
  return bits;
}
inline I rank_in(uint32_t mask) {  // bits below the lane's own
  return each_lane<I>([&](int i) { return std::popcount(mask & ((1u << i) - 1)); });
}
inline int population(uint32_t mask) {
  return std::popcount(mask);
}
inline W splat_w(uint64_t x) {
  return W{} + x;
}
inline W widen(U x) {
  return __builtin_convertvector(x, W);
}
inline B below(W x, uint64_t limit) {
  return each_lane<B>([&](int i) { return x[i] < limit ? -1 : 0; });
}
inline uint64_t sum_lanes(W x) {
  uint64_t sum = 0;
  for (int lane = 0; lane < kLaneCount; ++lane) sum += x[lane];
  return sum;
}
inline I load_int(const int32_t* base, I index) {
  return each_lane<I>([&](int i) { return base[index[i]]; });
}
inline void store_where(B which, int32_t* base, I index, I x) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] = x[lane];
}
inline void or_where(B which, uint32_t* base, I index, U bits) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] |= bits[lane];
}
inline void and_where(B which, uint32_t* base, I index, U bits) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] &= bits[lane];
}
// Adds whole numbers: in any order the same. REQUIRES 0 <= amount < 2^63
inline void add_where(B which, uint64_t* base, I index, D amount) {
  for (int lane = 0; lane < kLaneCount; ++lane)
    if (which[lane] != 0) base[index[lane]] += uint64_t(amount[lane]);
}
inline void add_count(uint32_t* to, uint32_t count) {
  *to += count;
}
inline void keep_largest(uint32_t* to, uint32_t x) {
  *to = *to > x ? *to : x;
}

// Kernels of the emulation run one after the other, and no graph has conditions of its own.
inline void wait_for_previous() {}
inline void let_next_begin() {}
inline float load_fresh(const float* from) {
  return *from;
}
inline void set_condition(bool, uint64_t) {}

struct CopyState {
  std::byte* to;
  const std::byte* from;
  uint64_t bytes;  // 0: nothing under way
  uint32_t begun, waited;
  uint64_t unused[2];
};
static_assert(sizeof(CopyState) == 48);

inline void copy_init(CopyState* state) {
  *state = {};
}
inline void copy_begin(CopyState* state, std::byte* to, const std::byte* from, uint32_t bytes) {
  if (state->bytes != 0) throw std::logic_error("a copy begins where another is under way");
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(from) % 16 != 0)
    throw std::logic_error("a copy is not of whole, aligned 16-byte pieces");
  std::memset(to, 0xff, bytes);  // NaN as a float, half or norm
  *state = {to, from, bytes, state->begun + 1, state->waited, {}};
}
inline void copy_wait(CopyState* state, uint32_t parity) {
  if (state->bytes == 0) throw std::logic_error("a wait for a copy that was never begun: a hang");
  if (state->waited % 2 != parity) throw std::logic_error("a wait for the wrong phase: a hang");
  std::memcpy(state->to, state->from, state->bytes);
  state->bytes = 0;
  ++state->waited;
}

}  // namespace certkv::emulated
