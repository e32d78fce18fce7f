// The thin layer that device code is written against: one warp's 32 lanes as values.
//
// Under nvcc (namespace certkv::cuda) an F is a float in a register of each lane and an operation
// is an instruction. Under any other compiler (namespace certkv::emulated) an F holds the floats of
// all 32 lanes and the same source runs lane by lane on the CPU, so that kernels are tested, also
// under sanitizers, where there is no GPU. What holds for a whole warp (pointers, page numbers) is
// a plain variable in both. Lanes cannot diverge: what differs between them is written as select().
//
// The emulation knows what instructions do, not how fast: fragments lie in lanes and registers as
// the PTX manual says, an asynchronous copy's bytes are poison until its wait, sums of the matrix
// instructions are rounded towards zero.
#pragma once

#if defined(__CUDACC__)
#include "kernels/cuda/lanes_device.cuh"
#define CERTKV_LANES_NAMESPACE cuda
#define CERTKV_LANES_FUNCTION __device__ __forceinline__
#define CERTKV_UNROLL _Pragma("unroll")
#define CERTKV_UNROLL_BY_2 _Pragma("unroll 2")
#define CERTKV_UNROLL_BY_8 _Pragma("unroll 8")
#define CERTKV_NO_UNROLL _Pragma("unroll 1")
#else
#include "kernels/cuda/lanes_emulated.h"
#define CERTKV_LANES_NAMESPACE emulated
#define CERTKV_LANES_FUNCTION inline
#define CERTKV_UNROLL
#define CERTKV_UNROLL_BY_2
#define CERTKV_UNROLL_BY_8
#define CERTKV_NO_UNROLL
#endif

// A loop that is unrolled: registers have no index at run time.
#define CERTKV_EACH(i, count) \
  CERTKV_UNROLL               \
  for (int i = 0; i < (count); ++i)
