#include "kernels/cuda/dense_ops.h"

#include <limits>

#include "kernels/base/error.h"

namespace certkv::cuda {
namespace {

constexpr size_t kAlignBytes = 16, kAlignElements = 8;

// Checks of one operation, which every message names.
struct Checks {
  const char* operation;

  void positive(size_t value, const char* name) const {
    CERTKV_EXPECT(value > 0, InvalidArgument, "{}: {} is 0: at least 1 is needed", operation, name);
    CERTKV_EXPECT(value <= size_t(std::numeric_limits<int32_t>::max()), InvalidArgument,
                  "{}: {} is {}: at most 2^31 - 1 is possible", operation, name, value);
  }
  void heads(DType dtype, size_t heads, size_t kv_heads, size_t head_dim) const {
    CERTKV_EXPECT(dtype == DType::BF16 || dtype == DType::F16, InvalidArgument,
                  "{}: dtype is {}: BF16 or F16 is needed", operation, dtype_name(dtype));
    positive(heads, "heads");
    positive(kv_heads, "kv_heads");
    CERTKV_EXPECT(heads % kv_heads == 0, InvalidArgument,
                  "{}: heads is {}: a multiple of kv_heads, {}, is needed", operation, heads,
                  kv_heads);
    CERTKV_EXPECT(head_dim == 64 || head_dim == 128, InvalidArgument,
                  "{}: head_dim is {}: 64 or 128 is needed", operation, head_dim);
  }
  void array(const void* at, const char* name) const {
    CERTKV_EXPECT(at != nullptr, InvalidArgument, "{}: {} is null", operation, name);
    CERTKV_EXPECT(reinterpret_cast<uintptr_t>(at) % kAlignBytes == 0, InvalidArgument,
                  "{}: {} is not aligned to {} bytes", operation, name, kAlignBytes);
  }
  void stride(size_t value, size_t least, const char* name) const {
    CERTKV_EXPECT(value >= least, InvalidArgument, "{}: {} is {}: at least {} is needed", operation,
                  name, value, least);
    CERTKV_EXPECT(value % kAlignElements == 0, InvalidArgument,
                  "{}: {} is {}: a multiple of {} is needed", operation, name, value,
                  kAlignElements);
  }
};

}  // namespace

void check_dense(const DensePrefill& a) {
  const Checks check{"dense prefill"};
  check.heads(a.dtype, a.heads, a.kv_heads, a.head_dim);
  check.positive(a.rows, "rows");
  check.positive(a.tokens, "tokens");
  CERTKV_EXPECT(a.tokens >= a.rows, InvalidArgument,
                "dense prefill: tokens is {}: at least rows, {}, is needed", a.tokens, a.rows);
  const auto capacity = [&](size_t value, size_t least, const char* name) {
    if (value == 0) return;
    check.positive(value, name);
    CERTKV_EXPECT(value >= least, InvalidArgument, "dense prefill: {} is {}: at least {} is needed",
                  name, value, least);
  };
  capacity(a.row_capacity, a.rows, "row_capacity");
  capacity(a.token_capacity, a.tokens, "token_capacity");
  check.array(a.q, "q");
  check.array(a.k, "k");
  check.array(a.v, "v");
  check.array(a.out, "out");
  check.stride(a.q_row_stride, a.head_dim, "q_row_stride");
  check.stride(a.q_head_stride, a.head_dim, "q_head_stride");
  check.stride(a.k_token_stride, a.head_dim, "k_token_stride");
  check.stride(a.k_head_stride, a.head_dim, "k_head_stride");
  check.stride(a.v_token_stride, a.head_dim, "v_token_stride");
  check.stride(a.v_head_stride, a.head_dim, "v_head_stride");
  check.stride(a.out_row_stride, a.head_dim, "out_row_stride");
  check.stride(a.out_head_stride, a.head_dim, "out_head_stride");
}

void check_dense(const DenseDecode& a) {
  const Checks check{"dense decode"};
  check.heads(a.dtype, a.heads, a.kv_heads, a.head_dim);
  check.positive(a.batch, "batch");
  check.positive(a.tokens, "tokens");
  check.array(a.q, "q");
  check.array(a.k, "k");
  check.array(a.v, "v");
  check.array(a.out, "out");
  check.stride(a.kv_head_stride, a.tokens * a.head_dim, "kv_head_stride");
  check.stride(a.kv_batch_stride, a.tokens * a.head_dim, "kv_batch_stride");
  CERTKV_EXPECT(reinterpret_cast<uintptr_t>(a.lengths) % sizeof(int32_t) == 0, InvalidArgument,
                "dense decode: lengths is not aligned to {} bytes", sizeof(int32_t));
}

}  // namespace certkv::cuda
