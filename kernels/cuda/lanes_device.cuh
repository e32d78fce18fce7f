// Lanes of a warp as a GPU has them. See lanes.h.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels/arith/chains.h"

namespace certkv::cuda {

#define CERTKV_LANE __device__ __forceinline__

using F = float;
using I = int32_t;
using U = uint32_t;
using B = bool;
using D = double;
using W = uint64_t;

inline constexpr unsigned kAllLanes = 0xffffffffu;

CERTKV_LANE I lane_index() {
  return I(threadIdx.x);
}
CERTKV_LANE F splat(float x) {
  return x;
}
CERTKV_LANE U splat_u(uint32_t x) {
  return x;
}
CERTKV_LANE I splat_i(int x) {
  return x;
}
CERTKV_LANE F select(B which, F yes, F no) {
  return which ? yes : no;
}
CERTKV_LANE U select(B which, U yes, U no) {
  return which ? yes : no;
}
CERTKV_LANE I select(B which, I yes, I no) {
  return which ? yes : no;
}
CERTKV_LANE D select(B which, D yes, D no) {
  return which ? yes : no;
}
CERTKV_LANE bool any(B x) {
  return __any_sync(kAllLanes, x) != 0;
}
CERTKV_LANE void sync_lanes() {
  __syncwarp();
}

CERTKV_LANE F fma(F a, F b, F c) {
  return __fmaf_rn(a, b, c);
}
CERTKV_LANE F magnitude(F x) {
  return fabsf(x);
}
CERTKV_LANE F larger(F a, F b) {  // a NaN loses
  return fmaxf(a, b);
}
CERTKV_LANE F root(F x) {
  return __fsqrt_rn(x);
}
// Of x <= 0, as kernels/arith/exp.h says of its own. The hardware's 2^t is within 2^-22; the
// product with log2 e is corrected for its rounding. gpu_lanes_test tries every float.
CERTKV_LANE F exponential(F x) {
  const float t = x * 1.44269504088896341f;
  const float lost = __fmaf_rn(x, 1.44269504088896341f, -t);
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  // log2 e is 1.92596e-8 larger than its float.
  const float rest = __fmaf_rn(x, 1.92596303e-8f, lost);
  const float y = __fmaf_rn(power, rest * 0.693147181f, power);
  return x < kExpFlush ? 0.0f : y;
}
CERTKV_LANE F c_of_large(F x) {
  return c_of_deltas<float, int32_t>(x);
}
CERTKV_LANE F reciprocal(F x) {  // within 2^-22
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CERTKV_LANE double uniform(D x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
CERTKV_LANE float uniform(F x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
CERTKV_LANE uint32_t uniform(U x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
CERTKV_LANE void prefetch(const std::byte* base, I at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(base + at));
}
CERTKV_LANE double exponential(double x) {
  return ::exp(x);
}
CERTKV_LANE D to_double(F x) {
  return x;
}
CERTKV_LANE F to_float(D x) {
  return __double2float_rn(x);
}
CERTKV_LANE D logarithm(D x) {
  return log(x);
}
CERTKV_LANE D magnitude(D x) {
  return fabs(x);
}
CERTKV_LANE B at_most(D a, D b) {
  return a <= b;
}
CERTKV_LANE B beyond(D x, double limit) {  // not within [-limit, limit]; NaN is beyond
  return !(fabs(x) <= limit);
}

CERTKV_LANE I index_of(U x) {
  return I(x);
}
CERTKV_LANE U word_of(I x) {
  return U(x);
}
CERTKV_LANE U bits_of(F x) {
  return __float_as_uint(x);
}
CERTKV_LANE F float_of_bits(U x) {
  return __uint_as_float(x);
}
CERTKV_LANE F to_float(I x) {
  return __int2float_rn(x);
}
CERTKV_LANE F to_float(U x) {
  return __uint2float_rn(x);
}

// Two halves in a word, the first one low.
CERTKV_LANE U pack_halves(F low, F high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const U*>(&h);
}
CERTKV_LANE F low_half(U x) {
  return __low2float(*reinterpret_cast<const __half2*>(&x));
}
CERTKV_LANE F high_half(U x) {
  return __high2float(*reinterpret_cast<const __half2*>(&x));
}
CERTKV_LANE U fma_halves(U a, U b, U c) {  // subnormal halves are kept
  U out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
// Byte i of the result is byte (selector >> 4 i & 7) of the eight in (b, a).
CERTKV_LANE U pick_bytes(U a, U b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

CERTKV_LANE F shuffle_xor(F x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
CERTKV_LANE U shuffle_xor(U x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
CERTKV_LANE U shuffle(U x, I from) {
  return __shfl_sync(kAllLanes, x, from);
}
CERTKV_LANE D shuffle_xor(D x, int mask) {
  return __shfl_xor_sync(kAllLanes, x, mask);
}
CERTKV_LANE F shuffle(F x, I from) {
  return __shfl_sync(kAllLanes, x, from);
}

// An 8 x 8 matrix of 16-bit elements, transposed: lane 4 r + c holds row r, columns 2 c and 2 c
// + 1.
CERTKV_LANE U transpose_8x8(U x) {
  U out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}
// m16n8k32: unsigned bytes times signed bytes, exact.
CERTKV_LANE void mma_bytes(I (&sum)[4], const U (&a)[4], U b0, U b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// m16n8k16: halves; error at most kMatrixUnits u of the sum of magnitudes (kernels/cuda/chains.h).
CERTKV_LANE void mma_halves(F (&sum)[4], const U (&a)[4], U b0, U b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bfloat16.
CERTKV_LANE void mma_brains(F (&sum)[4], const U (&a)[4], U b0, U b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Memory: `base` is the warp's, `at` each lane's, in bytes.
CERTKV_LANE void load4(const std::byte* base, I at, U (&out)[4]) {  // 16-byte aligned
  const uint4 x = *reinterpret_cast<const uint4*>(base + at);
  out[0] = x.x;
  out[1] = x.y;
  out[2] = x.z;
  out[3] = x.w;
}
CERTKV_LANE void load2(const std::byte* base, I at, U (&out)[2]) {  // 8-byte aligned
  const uint2 x = *reinterpret_cast<const uint2*>(base + at);
  out[0] = x.x;
  out[1] = x.y;
}
CERTKV_LANE U load1(const std::byte* base, I at) {
  return *reinterpret_cast<const U*>(base + at);
}
CERTKV_LANE void store4_where(B which, std::byte* base, I at, const U (&in)[4]) {
  if (which) *reinterpret_cast<uint4*>(base + at) = make_uint4(in[0], in[1], in[2], in[3]);
}
CERTKV_LANE F load_float(const float* base, I index) {
  return base[index];
}
CERTKV_LANE F load_float(B which, const float* yes, const float* no, I index) {
  return (which ? yes : no)[index];
}
CERTKV_LANE D load_double(const double* base, I index) {
  return base[index];
}
CERTKV_LANE void store(float* base, I index, F x) {
  base[index] = x;
}
CERTKV_LANE void store(double* base, I index, D x) {
  base[index] = x;
}
CERTKV_LANE void store_where(B which, float* base, I index, F x) {
  if (which) base[index] = x;
}
CERTKV_LANE void store_byte(uint8_t* to, uint8_t byte) {  // one for the warp
  if (threadIdx.x == 0) *to = byte;
}
CERTKV_LANE void store_word(uint32_t* to, uint32_t word) {  // one for the warp
  if (threadIdx.x == 0) *to = word;
}
CERTKV_LANE void store_where(B which, double* base, I index, D x) {
  if (which) base[index] = x;
}
CERTKV_LANE void raise_flag(uint32_t* flags, uint32_t bit) {
  if (threadIdx.x == 0) atomicOr(flags, bit);
}

template <typename Entry>
CERTKV_LANE F load_note_of(const Entry* entries, I entry, I index, uint32_t offset) {
  const std::byte* page = entries[entry].page;
  return page == nullptr ? 0.0f : reinterpret_cast<const float*>(page + offset)[index];
}
CERTKV_LANE uint32_t ballot(B x) {
  return __ballot_sync(kAllLanes, x);
}
CERTKV_LANE I rank_in(uint32_t mask) {
  return __popc(mask & ((1u << threadIdx.x) - 1));
}
CERTKV_LANE int population(uint32_t mask) {
  return __popc(mask);
}
CERTKV_LANE W splat_w(uint64_t x) {
  return x;
}
CERTKV_LANE W widen(U x) {
  return x;
}
CERTKV_LANE B below(W x, uint64_t limit) {
  return x < limit;
}
CERTKV_LANE uint64_t sum_lanes(W x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}
CERTKV_LANE I load_int(const int32_t* base, I index) {
  return base[index];
}
CERTKV_LANE void store_where(B which, int32_t* base, I index, I x) {
  if (which) base[index] = x;
}
CERTKV_LANE void or_where(B which, uint32_t* base, I index, U bits) {
  if (which) atomicOr(base + index, bits);
}
CERTKV_LANE void and_where(B which, uint32_t* base, I index, U bits) {
  if (which) atomicAnd(base + index, bits);
}
CERTKV_LANE void add_where(B which, uint64_t* base, I index, D amount) {
  if (which)
    atomicAdd(reinterpret_cast<unsigned long long*>(base + index),
              static_cast<unsigned long long>(amount));
}
CERTKV_LANE void add_count(uint32_t* to, uint32_t count) {
  if (threadIdx.x == 0) atomicAdd(to, count);
}
CERTKV_LANE void keep_largest(uint32_t* to, uint32_t x) {
  if (threadIdx.x == 0) atomicMax(to, x);
}

// A kernel that was launched to begin early has done what needs nothing of its predecessor: waits
// for all of that one's work. Elsewhere there is nothing to wait for.
CERTKV_LANE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may begin, if it was launched so, once all blocks have come here.
CERTKV_LANE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
CERTKV_LANE float load_fresh(const float* from) {  // what another kernel has written meanwhile
  return *reinterpret_cast<const volatile float*>(from);
}
CERTKV_LANE void set_condition(bool armed, uint64_t handle) {
  if (armed && threadIdx.x == 0) cudaGraphSetConditional(handle, 1);
}

// One asynchronous copy at a time into one place of shared memory. All calls by the whole warp.
struct CopyState {
  unsigned long long barrier;
  unsigned long long unused[5];  // the emulation needs more
};
static_assert(sizeof(CopyState) == 48);

CERTKV_LANE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
CERTKV_LANE void copy_init(CopyState* state) {
  if (threadIdx.x == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state->barrier)));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
    asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_address(&state->barrier)));
#endif
  }
  __syncwarp();
}
// What the warp has read from `to` before is not needed any more. bytes: a multiple of 16.
CERTKV_LANE void copy_begin(CopyState* state, std::byte* to, const std::byte* from,
                            uint32_t bytes) {
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&state->barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
#else
  for (uint32_t at = threadIdx.x * 16; at < bytes; at += 32 * 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to + at)),
                 "l"(from + at)
                 : "memory");
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&state->barrier))
      : "memory");
#endif
}
// parity: 0 for the first copy through this state, then 1, 0, ...
CERTKV_LANE void copy_wait(CopyState* state, uint32_t parity) {
  const uint32_t barrier = shared_address(&state->barrier);
  uint32_t done = 0;
  while (done == 0) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#endif
  }
  __syncwarp();
}

#undef CERTKV_LANE

}  // namespace certkv::cuda
