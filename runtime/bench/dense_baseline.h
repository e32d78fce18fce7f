// Dense attention of decode by the device's library, behind the same forward pass as the certified
// cache: what that is measured against. Keys and values of all layers as 16-bit numbers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/device/device_attention.h"
#include "runtime/device/device_backend.h"
#include "runtime/model_config.h"

namespace certkv {

class DenseBaseline : public DeviceAttention {
 public:
  // References must outlive it. Sequences are 0 to batch - 1, of `context` tokens each.
  DenseBaseline(const ModelConfig& config, DType dtype, int batch, int64_t context,
                DeviceBackend& backend);
  // k, v: host memory [kv_heads, context, head_dim].
  void store(int sequence, int layer, const uint16_t* k, const uint16_t* v);
  void end_step() { ++tokens_; }

  void store_prefill(int64_t, int, size_t, const uint16_t*, const uint16_t*, size_t,
                     std::span<const float>) override {}
  void begin_rows(std::span<const int64_t> sequences, float* out) override;
  void decode(int layer, const float* qkv, const Following& following) override;
  uint64_t shape() const override { return 1; }

 private:
  uint16_t* cache(int tensor, int layer) const {
    return kv_[tensor].data() + size_t(layer) * size_t(batch_) * stride_;
  }

  const ModelConfig& config_;
  DType dtype_;
  int batch_;
  size_t capacity_, stride_;  // tokens of a KV head; elements of a sequence
  int64_t context_, tokens_;
  DeviceBackend& backend_;
  cuda::DeviceArray<uint16_t> kv_[2];  // [layers, batch, kv_heads, capacity, head_dim]
  cuda::HostArray<int32_t> lengths_host_;
  cuda::DeviceArray<int32_t> lengths_;
  cuda::HostArray<cuda::AppendItem> append_host_;
  cuda::DeviceArray<cuda::AppendItem> append_;  // [layers, batch * kv_heads]
  cuda::DeviceArray<cuda::PassItem> passes_;    // what an append writes beside keys and values
  cuda::DeviceArray<cuda::PageEntry> entries_;
  cuda::DeviceArray<float> notes_, scaled_;
  uint32_t* flag_ = nullptr;
  float* to_ = nullptr;
  cuda::DeviceArray<uint16_t> q_, out_;  // [batch, heads, head_dim]
};

}  // namespace certkv
