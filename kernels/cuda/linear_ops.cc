#include "kernels/cuda/linear_ops.h"

#include <algorithm>

#include "kernels/base/error.h"

namespace certkv::cuda {
namespace {

bool aligned(const void* at, size_t bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

}  // namespace

namespace {

// What the two kinds of product share.
template <typename Product>
void check_shape(const Product& p) {
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
}

void check_usable(const void* at, size_t bytes, const char* name) {
  CERTKV_EXPECT(at != nullptr, InvalidArgument, "linear: {} is null", name);
  CERTKV_EXPECT(aligned(at, bytes), InvalidArgument, "linear: {} is not aligned to {} bytes", name,
                bytes);
}

}  // namespace

void check_linear(const LinearProduct& p) {
  check_shape(p);
  check_usable(p.weight, dtype_bytes(p.dtype), "weight");
  check_usable(p.x, dtype_bytes(p.dtype), "x");
  check_usable(p.y, sizeof(float), "y");
}

void check_linear(const Int8Product& p) {
  check_shape(p);
  check_usable(p.codes, 1, "codes");
  check_usable(p.scales, sizeof(float), "scales");
  check_usable(p.x, dtype_bytes(p.dtype), "x");
  check_usable(p.y, sizeof(float), "y");
  if (p.rows <= kInt8MostRows) return;
  check_usable(p.workspace, 16, "workspace");
  CERTKV_EXPECT(p.workspace_bytes >= p.in * dtype_bytes(p.dtype), InvalidArgument,
                "linear: a workspace of {} bytes: {} are needed for one output's weights",
                p.workspace_bytes, p.in * dtype_bytes(p.dtype));
}

void LinearOps::linear(const Int8Product& p) {
  check_linear(p);
  if (p.rows <= kInt8MostRows) return int8_rows(p);
  constexpr size_t kTile = 128;  // of a library's outputs
  size_t most = std::min(p.out, p.workspace_bytes / (p.in * dtype_bytes(p.dtype)));
  if (most < p.out && most > kTile) most -= most % kTile;
  for (size_t first = 0; first < p.out; first += most) {
    const size_t count = std::min(most, p.out - first);
    int8_unpack({p.codes + first * p.in, p.dtype, p.workspace, uint64_t(count) * p.in});
    linear({.weight = p.workspace,
            .dtype = p.dtype,
            .out = count,
            .in = p.in,
            .x = p.x,
            .x_stride = p.x_stride,
            .y = p.y + first,
            .y_stride = p.y_stride,
            .rows = p.rows,
            .beside = p.beside});
  }
  int8_scale({p.scales, p.y, p.y_stride, p.rows, p.out});
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
