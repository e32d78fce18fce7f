// Every host-and-device function of kernels/arith (and the conversions of kernels/base/dtype.h),
// called on the same inputs. The host compiler, nvcc's host pass and a device each compile this
// text; their results must agree bit for bit.
//
// all_arith_headers.h is written at configure time and includes every header of kernels/arith, so
// that a new one is compiled by nvcc from its first day. Add its functions below.
#pragma once

#include <cstdint>

#include "tests/kernels/cuda/all_arith_headers.h"
#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr int kProbeResults = 10;
inline constexpr int kProbeInputs = 1 << 16;

// Results of one input, as bits. results: [kProbeInputs, kProbeResults]
void probe_arith_by_nvcc(uint64_t* results);
// THREADS: one caller at a time. Returns false if there is no device that can run it.
bool probe_arith_on_device(uint64_t* results);

namespace {  // a copy per translation unit: an inline function would be merged by the linker

// The inputs: the floats whose upper half is i, so signs, zeros, denormals, infinities and NaN too.
CERTKV_INLINE float probe_input(uint32_t i) { return std::bit_cast<float>(i << 16 | (i * 40503u & 0xffffu)); }

CERTKV_INLINE void probe_arith(uint32_t i, uint64_t* out) {
  const float x = probe_input(i);
  out[0] = std::bit_cast<uint32_t>(f16_to_float(uint16_t(i)));
  out[1] = std::bit_cast<uint32_t>(bf16_to_float(uint16_t(i)));
  out[2] = float_to_f16(x);
  out[3] = float_to_bf16(x);
  out[4] = std::bit_cast<uint32_t>(exp_nonpositive(x <= 0 ? x : -float(i) * 0x1p-9f));
  out[5] = std::bit_cast<uint64_t>(gamma_n(double(i + 1)));
  const double positive = positive_part(double(x));
  out[6] = positive == positive ? std::bit_cast<uint64_t>(positive) : ~uint64_t(0);  // any NaN
  out[7] = bound_key(x);
  out[8] = severity(Outcome(i % 5)) * 10 + uint64_t(outcome_of_severity(i % 5));
  VerdictRecord record;
  set_step(record, i);
  record.sum.votes = i % 3;
  out[9] = record.max.step_complement + verdict_agreed(record, 2, i);
}

}  // namespace
}  // namespace certkv
