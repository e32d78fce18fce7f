// Dense attention over 16-bit keys and values: prefill, and the decode step that the certified pass
// is measured against and falls back to.
//
// On a GPU by cuDNN's fused attention (loaded at run time), in emulation by sums in double
// precision. All pointers: the device's memory. Strides count elements.
//
// THREADS: one at a time, as the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/base/dtype.h"
#include "kernels/cuda/device.h"

namespace certkv::cuda {

// Row r of `rows` queries sees keys 0 .. tokens - rows + r: the rows are the last of the tokens.
struct DensePrefill {
  DType dtype = DType::BF16;  // of q, k, v and out: BF16 or F16
  size_t rows = 0, tokens = 0;
  // What q and out, k and v hold at least; 0: rows, tokens. A GPU has one plan for all `rows` and
  // `tokens` up to these, where with 0 each pair has its own, and making one takes long. Beyond
  // rows and tokens q and k may hold anything, v anything finite (it is multiplied by a weight of
  // zero), and out may be written.
  size_t row_capacity = 0, token_capacity = 0;
  size_t heads = 0, kv_heads = 0, head_dim = 0;  // heads a multiple of kv_heads; 64 or 128
  const uint16_t* q = nullptr;                   // [rows, heads, head_dim], after RoPE
  size_t q_row_stride = 0, q_head_stride = 0;
  const uint16_t* k = nullptr;  // [tokens, kv_heads, head_dim], in any order of the first two
  size_t k_token_stride = 0, k_head_stride = 0;
  const uint16_t* v = nullptr;
  size_t v_token_stride = 0, v_head_stride = 0;
  uint16_t* out = nullptr;  // [rows, heads, head_dim]
  size_t out_row_stride = 0, out_head_stride = 0;
};

// One query of each sequence over its cache.
struct DenseDecode {
  DType dtype = DType::BF16;  // of q, k, v and out: BF16 or F16
  size_t batch = 0;
  // Of the longest sequence that the launch serves. A GPU has one plan for each value and works
  // best where lengths are near it.
  size_t tokens = 0;
  size_t heads = 0, kv_heads = 0, head_dim = 0;
  const uint16_t* q = nullptr;  // [batch, heads, head_dim]
  const uint16_t* k = nullptr;  // [batch, kv_heads, tokens, head_dim], tokens head_dim apart
  const uint16_t* v = nullptr;  // as k
  size_t kv_batch_stride = 0, kv_head_stride = 0;
  // [batch], each in 1 .. tokens, read when the work runs; nullptr: all have `tokens`. What lies
  // beyond a length is not used, whatever it is.
  const int32_t* lengths = nullptr;
  uint16_t* out = nullptr;  // [batch, heads, head_dim]
};

class DenseOps {
 public:
  virtual ~DenseOps() = default;
  DenseOps(const DenseOps&) = delete;
  DenseOps& operator=(const DenseOps&) = delete;

  virtual std::string name() const = 0;  // for people: "cuDNN 9.19.0"

  // out = softmax(q k^T / sqrt(head_dim)) v. Scores and sums in float or wider; on a GPU weights
  // are rounded to dtype before they meet the values. Once a shape has its plan nothing is
  // allocated and nothing waited for, and the launch may be captured in a CUDA graph. prepare()
  // makes the plan, and must come before a capture.
  // Pointers are aligned to 16 bytes, strides multiples of 8. Throws InvalidArgument: which
  // argument, and what is wrong with it; DeviceError; OutOfMemory.
  virtual void prefill(const DensePrefill& a) = 0;
  virtual void decode(const DenseDecode& a) = 0;
  virtual void prepare(const DensePrefill& a) = 0;
  virtual void prepare(const DenseDecode& a) = 0;

 protected:
  DenseOps() = default;
};

struct DenseOptions {
  std::string library;  // soname of cuDNN; empty: the one this build was made for
};

// `device` must outlive them. Throws DeviceError where the library is missing or too old.
std::unique_ptr<DenseOps> make_emulated_dense_ops(Device& device);
std::unique_ptr<DenseOps> make_cuda_dense_ops(Device& device, const DenseOptions& options = {});

// What prefill() and decode() refuse. Throws InvalidArgument.
void check_dense(const DensePrefill& a);
void check_dense(const DenseDecode& a);

}  // namespace certkv::cuda
