// A DeviceAttention that does exact attention on the host: keys, values and queries are copied from
// the device, which is waited for. For tests of the forward pass alone.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "kernels/cuda/device.h"
#include "runtime/device/device_attention.h"
#include "tests/support/plain_kv_attention.h"

namespace certkv::test {

class PlainDeviceAttention : public DeviceAttention {
 public:
  PlainDeviceAttention(cuda::Device& device, size_t kv_heads, size_t heads_per_group,
                       size_t head_dim, DType originals);

  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, size_t head_stride, std::span<const float> last_q) override;
  void begin_rows(std::span<const int64_t> sequences, float* out) override;
  void agree_through(const Agreement& agreement) override { agreement_ = agreement; }
  void decode(int layer, const float* qkv, const Following& following) override;
  void decode_dense(int layer, const uint32_t* rows) override;
  uint64_t shape() const override { return steps_; }  // waits: no step is like another

  PlainKvAttention& cache() { return cache_; }
  float flag = 1;  // what a row that `cache().broken` names raises
  std::map<std::pair<int64_t, int>, std::vector<float>> last_q;  // by sequence and layer

 private:
  cuda::Device& device_;
  size_t kv_heads_, heads_per_group_, head_dim_;
  DType originals_;
  PlainKvAttention cache_;
  std::vector<int64_t> sequences_;
  uint64_t steps_ = 0;
  float* out_ = nullptr;
  Agreement agreement_;
  // Of the layer that was answered last, [rows]: as it was asked for.
  int layer_ = -1;
  std::vector<float> asked_;
};

}  // namespace certkv::test
