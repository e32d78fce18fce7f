#include "kernels/cuda/linear_ops.h"

#include "kernels/base/error.h"

namespace certkv::cuda {
namespace {

bool aligned(const void* at, size_t bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

}  // namespace

void check_linear(const LinearProduct& p) {
  CERTKV_EXPECT(p.dtype == DType::BF16 || p.dtype == DType::F16 || p.dtype == DType::F32,
                InvalidArgument, "linear: dtype is {}: BF16, F16 or F32 is needed",
                dtype_name(p.dtype));
  const auto positive = [](size_t value, const char* name) {
    CERTKV_EXPECT(value > 0, InvalidArgument, "linear: {} is 0: at least 1 is needed", name);
  };
  positive(p.rows, "rows");
  positive(p.out, "out");
  positive(p.in, "in");
  CERTKV_EXPECT(p.x_stride >= p.in, InvalidArgument,
                "linear: x_stride is {}: at least in, {}, is needed", p.x_stride, p.in);
  CERTKV_EXPECT(p.y_stride >= p.out, InvalidArgument,
                "linear: y_stride is {}: at least out, {}, is needed", p.y_stride, p.out);
  const auto usable = [](const void* at, size_t bytes, const char* name) {
    CERTKV_EXPECT(at != nullptr, InvalidArgument, "linear: {} is null", name);
    CERTKV_EXPECT(aligned(at, bytes), InvalidArgument, "linear: {} is not aligned to {} bytes",
                  name, bytes);
  };
  usable(p.weight, dtype_bytes(p.dtype), "weight");
  usable(p.x, dtype_bytes(p.dtype), "x");
  usable(p.y, sizeof(float), "y");
}

void check_narrow(DType dtype, const float* from, const uint16_t* to, size_t count) {
  CERTKV_EXPECT(dtype == DType::BF16 || dtype == DType::F16, InvalidArgument,
                "narrow: dtype is {}: BF16 or F16 is needed", dtype_name(dtype));
  CERTKV_EXPECT(count == 0 || from != nullptr, InvalidArgument, "narrow: from is null");
  CERTKV_EXPECT(count == 0 || to != nullptr, InvalidArgument, "narrow: to is null");
  CERTKV_EXPECT(aligned(from, sizeof(float)), InvalidArgument,
                "narrow: from is not aligned to 4 bytes");
  CERTKV_EXPECT(aligned(to, sizeof(uint16_t)), InvalidArgument,
                "narrow: to is not aligned to 2 bytes");
}

}  // namespace certkv::cuda
