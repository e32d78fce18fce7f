// Products with weights in 8 bits (kernels/arith/int8_weight.h): what a device is told. Plain data:
// nvcc and C++ see the same. Every pointer is memory of the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv::cuda {

// y[r, o] = scales[o] sum_i x[r, i] codes[o, i].
//
// Up to kInt8MostRows rows: a kernel of our own, for what a CUDA toolkit offers of 8-bit weights
// wants 8-bit inputs too. Every weight is read once for kInt8Rows rows; sums are in float, in an
// order that depends on `in` and on the rows' number up to the next power of 2. More rows: codes
// are made numbers of x's type in the workspace, which is exact, some outputs at a time, and
// multiplied there by LinearProduct's ways; the scales come last. So both have the same weights.
struct Int8Product {
  const int8_t* codes = nullptr;  // [out, in]
  const float* scales = nullptr;  // [out]
  DType dtype = DType::BF16;      // of x: BF16, F16 or F32
  size_t out = 0, in = 0;
  const void* x = nullptr;  // [rows, in], rows x_stride elements apart
  size_t x_stride = 0;
  float* y = nullptr;  // [rows, out], rows y_stride elements apart
  size_t y_stride = 0;
  size_t rows = 0;
  bool beside = false;         // as LinearProduct's; the workspace is then another one
  void* workspace = nullptr;   // for more than kInt8MostRows rows
  size_t workspace_bytes = 0;  // at least of one output's weights in dtype
};

inline constexpr size_t kInt8Rows = 8;
inline constexpr size_t kInt8MostRows = 16;

// to[i] = codes[i], exactly.
struct Int8Unpack {
  const int8_t* codes = nullptr;
  DType dtype = DType::BF16;
  void* to = nullptr;
  uint64_t count = 0;
};

// y[r, o] *= scales[o]
struct Int8Scale {
  const float* scales = nullptr;
  float* y = nullptr;
  size_t y_stride = 0, rows = 0, out = 0;
};

}  // namespace certkv::cuda
