// Products with weight matrices on a device, and the conversion of their inputs.
//
// On a GPU by cuBLASLt (loaded at run time), in emulation by plain sums in double precision.
//
// THREADS: one at a time, as the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/base/dtype.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/int8_args.h"

namespace certkv::cuda {

// y[r, o] = sum_i x[r, i] weight[o, i], or y[r, o] += of it. All pointers: the device's memory.
// A bias is written to y first, and the product added.
struct LinearProduct {
  const void* weight = nullptr;  // [out, in], row-major, as model files store it
  DType dtype = DType::BF16;     // of weight and x: BF16, F16 or F32
  size_t out = 0, in = 0;
  const void* x = nullptr;  // [rows, in], rows x_stride elements apart
  size_t x_stride = 0;
  float* y = nullptr;  // [rows, out], rows y_stride elements apart
  size_t y_stride = 0;
  size_t rows = 0;
  bool accumulate = false;  // true: y is read, and the product added
  bool beside = false;      // true: at the same time as a product of which this is not true
};

class LinearOps {
 public:
  virtual ~LinearOps() = default;
  LinearOps(const LinearOps&) = delete;
  LinearOps& operator=(const LinearOps&) = delete;

  virtual std::string name() const = 0;  // for people: "cuBLASLt 13.1.0"

  // Sums in float or wider, 16-bit products exact; F32 without TensorFloat-32. Nothing is allocated
  // on the device, nothing waited for, and the launch may be captured in a CUDA graph. The first
  // product of a shape takes longer, on the host: prepare() does that alone.
  // An element of y may have other last bits for another number of rows.
  // REQUIRES x and weight do not overlap y. Throws InvalidArgument: which argument, and what is
  // wrong with it; DeviceError.
  virtual void linear(const LinearProduct& product) = 0;
  virtual void prepare(const LinearProduct& product) = 0;
  // The same with weights in 8 bits; see int8_args.h.
  void linear(const Int8Product& product);

  // to[i] = from[i], rounded to nearest even; NaN stays NaN, what is too large becomes infinity.
  // dtype: BF16 or F16. Throws InvalidArgument, DeviceError.
  virtual void narrow(DType dtype, const float* from, uint16_t* to, size_t count) = 0;

 protected:
  LinearOps() = default;

 private:
  // The parts of linear(const Int8Product&), whose arguments have been checked.
  virtual void int8_rows(const Int8Product& product) = 0;
  virtual void int8_unpack(const Int8Unpack& codes) = 0;
  virtual void int8_scale(const Int8Scale& rows) = 0;
};

struct LinearOptions {
  uint64_t workspace_bytes = uint64_t(32) << 20;  // what NVIDIA advises for sm_90; taken twice
  std::string library;  // soname of cuBLASLt; empty: the one this build was made for
};

// `device` must outlive them. Throws DeviceError where the library is missing or too old,
// OutOfMemory.
std::unique_ptr<LinearOps> make_emulated_linear_ops(Device& device);
std::unique_ptr<LinearOps> make_cuda_linear_ops(Device& device, const LinearOptions& options = {});

// What linear() and narrow() refuse. Throws InvalidArgument.
void check_linear(const LinearProduct& product);
void check_linear(const Int8Product& product);
void check_narrow(DType dtype, const float* from, const uint16_t* to, size_t count);

}  // namespace certkv::cuda
