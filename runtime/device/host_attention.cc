#include "runtime/device/host_attention.h"

#include <algorithm>
#include <chrono>

#include "kernels/base/error.h"

namespace certkv {
namespace {

float original(DType dtype, uint16_t x) {
  return dtype == DType::BF16 ? bf16_to_float(x) : f16_to_float(x);
}

}  // namespace

void HostAttention::decode(int layer, std::span<const DecodeRow> rows, float* flags) {
  const size_t q = heads_ * head_dim_, kv = kv_heads_ * head_dim_, width = q + 2 * kv;
  if (qkv_.count() < rows.size() * width) {
    qkv_host_ = {device_, rows.size() * width, "rows of a step"};
    qkv_ = {device_, rows.size() * width, "rows of a step"};
    out_host_ = {device_, rows.size() * q, "rows of a step"};
    out_ = {device_, rows.size() * q, "rows of a step"};
  }
  if (layer == 0) {
    sequences_.clear();
    for (const DecodeRow& row : rows) sequences_.push_back(row.sequence);
    attention_.begin_rows(sequences_, out_.data());
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    float* to = qkv_host_.data() + r * width;
    std::copy_n(rows[r].q, q, to);
    for (size_t i = 0; i < kv; ++i) {
      to[q + i] = original(originals_, rows[r].k[i]);
      to[q + kv + i] = original(originals_, rows[r].v[i]);
    }
    flags[r] = 0;
  }
  device_.copy(qkv_.data(), qkv_host_.data(), rows.size() * width * sizeof(float));
  attention_.decode(layer, qkv_.data());
  device_.copy(out_host_.data(), out_.data(), rows.size() * q * sizeof(float));
  device_.synchronize(Deadline::after(std::chrono::seconds(60)));
  for (size_t r = 0; r < rows.size(); ++r) std::copy_n(out_host_.data() + r * q, q, rows[r].out);
}

void HostAttention::decode_dense(int, std::span<const DecodeRow>) {
  CERTKV_THROW(DeviceError, "the device's cache was asked for rung 4, which it never asks for");
}

}  // namespace certkv
