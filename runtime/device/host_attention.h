// The device's cache behind the CPU's forward pass: rows travel to the device and back, layer by
// layer.
#pragma once

#include <span>
#include <vector>

#include "kernels/cuda/device.h"
#include "runtime/device/device_attention.h"
#include "runtime/kv_attention.h"
#include "runtime/model_config.h"

namespace certkv {

class HostAttention : public KvAttention {
 public:
  // kv_heads: local. References must outlive this object.
  HostAttention(const ModelConfig& config, int64_t kv_heads, DType originals,
                DeviceAttention& attention, cuda::Device& device)
      : heads_(size_t(config.heads_per_group() * kv_heads)),
        kv_heads_(size_t(kv_heads)),
        head_dim_(size_t(config.head_dim)),
        originals_(originals),
        attention_(attention),
        device_(device) {}

  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, std::span<const float> last_q) override {
    attention_.store_prefill(sequence, layer, tokens, k, v, last_q);
  }
  void decode(int layer, std::span<const DecodeRow> rows, float* flags) override;
  // The device answers rung 4's question itself: no row is ever flagged.
  void decode_dense(int layer, std::span<const DecodeRow> rows) override;

 private:
  size_t heads_, kv_heads_, head_dim_;
  DType originals_;
  DeviceAttention& attention_;
  cuda::Device& device_;
  std::vector<int64_t> sequences_;
  cuda::HostArray<float> qkv_host_, out_host_;
  cuda::DeviceArray<float> qkv_, out_;
};

}  // namespace certkv
