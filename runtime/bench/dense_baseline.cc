#include "runtime/bench/dense_baseline.h"

#include <chrono>

namespace certkv {

using cuda::kPageTokens;

DenseBaseline::DenseBaseline(const ModelConfig& config, DType dtype, int batch, int64_t context,
                             DeviceBackend& backend)
    : config_(config),
      dtype_(dtype),
      batch_(batch),
      capacity_(size_t(context) + 1024),
      stride_(size_t(config.kv_heads) * capacity_ * size_t(config.head_dim)),
      context_(context),
      tokens_(context),
      backend_(backend) {
  cuda::Device& device = *backend.device;
  const size_t items = size_t(batch) * size_t(config.kv_heads), layers = size_t(config.layers);
  for (auto& kv : kv_) {
    kv = {device, layers * size_t(batch) * stride_, "keys and values of dense attention"};
    device.fill(kv.data(), 0, kv.bytes());
  }
  lengths_host_ = {device, size_t(batch), "lengths"};
  lengths_ = {device, size_t(batch), "lengths"};
  append_host_ = {device, layers * items, "rows to append"};
  append_ = {device, layers * items, "rows to append"};
  passes_ = {device, items, "rows to append"};
  device.fill(passes_.data(), 0, passes_.bytes());
  const size_t n = size_t(config.heads_per_group()), d = size_t(config.head_dim);
  entries_ = {device, items * 4, "rows to append"};
  notes_ = {device, items * 2 * 16, "rows to append"};
  scaled_ = {device, items * n * (d + 1) + 1, "rows to append"};
  q_ = {device, size_t(batch) * size_t(config.heads) * d, "queries"};
  out_ = {device, q_.count(), "outputs"};
  // An append raises a flag of its pass where a number is not finite: nobody asks for it here.
  std::vector<cuda::PassItem> passes(items);
  flag_ = reinterpret_cast<uint32_t*>(scaled_.data() + items * n * (d + 1));
  for (cuda::PassItem& p : passes) p.flags = flag_;
  device.copy(passes_.data(), passes.data(), passes_.bytes());
}

void DenseBaseline::store(int sequence, int layer, const uint16_t* k, const uint16_t* v) {
  const size_t head = size_t(context_) * size_t(config_.head_dim);
  for (int tensor = 0; tensor < 2; ++tensor)
    for (size_t h = 0; h < size_t(config_.kv_heads); ++h)
      backend_.device->copy(cache(tensor, layer) + size_t(sequence) * stride_ +
                                h * capacity_ * size_t(config_.head_dim),
                            (tensor == 0 ? k : v) + h * head, head * 2);
}

void DenseBaseline::begin_rows(std::span<const int64_t>, float* out) {
  to_ = out;
  const size_t heads = size_t(config_.kv_heads), d = size_t(config_.head_dim);
  const size_t items = size_t(batch_) * heads, n = size_t(config_.heads_per_group());
  const size_t page = size_t(tokens_) / kPageTokens * kPageTokens;
  for (int b = 0; b < batch_; ++b) lengths_host_[size_t(b)] = int32_t(tokens_ + 1);
  for (size_t layer = 0; layer < size_t(config_.layers); ++layer)
    for (size_t i = 0; i < items; ++i) {
      const size_t at = i / heads * stride_ + (i % heads * capacity_ + page) * d;
      cuda::AppendItem a;
      a.keys = reinterpret_cast<std::byte*>(cache(0, int(layer)) + at);
      a.values = reinterpret_cast<std::byte*>(cache(1, int(layer)) + at);
      a.entries = entries_.data() + i * 4;
      a.k_norm = notes_.data() + i * 32;
      a.open_nu = a.k_norm + 16;
      a.open = int32_t(size_t(tokens_) - page);
      a.scaled = scaled_.data() + i * n * (d + 1);
      a.norm = a.scaled + n * d;
      append_host_[layer * items + i] = a;
    }
  backend_.device->copy(lengths_.data(), lengths_host_.data(), lengths_.bytes());
  backend_.device->copy(append_.data(), append_host_.data(), append_.bytes());
}

void DenseBaseline::decode(int layer, const float* qkv, const Following& following) {
  const size_t heads = size_t(config_.kv_heads), d = size_t(config_.head_dim);
  const size_t items = size_t(batch_) * heads, q_width = size_t(config_.heads) * d;
  const size_t width = q_width + 2 * heads * d;
  backend_.cache->append({.items = append_.data() + size_t(layer) * items,
                          .passes = passes_.data(),
                          .qkv = qkv,
                          .rows = batch_,
                          .kv_heads = int32_t(heads),
                          .heads = int32_t(config_.heads_per_group()),
                          .head_dim = int32_t(d),
                          .dtype = dtype_,
                          .any_failing = flag_,
                          .redone = following.redone});
  for (size_t b = 0; b < size_t(batch_); ++b)
    backend_.model->convert(
        {qkv + b * width, DType::F32, q_.data() + b * q_width, dtype_, q_width});
  backend_.dense->decode({.dtype = dtype_,
                          .batch = size_t(batch_),
                          .tokens = capacity_,
                          .heads = size_t(config_.heads),
                          .kv_heads = heads,
                          .head_dim = d,
                          .q = q_.data(),
                          .k = cache(0, layer),
                          .v = cache(1, layer),
                          .kv_batch_stride = stride_,
                          .kv_head_stride = capacity_ * d,
                          .lengths = lengths_.data(),
                          .out = out_.data()});
  backend_.model->convert({out_.data(), dtype_, to_, DType::F32, size_t(batch_) * q_width});
  if (following.enqueue) following.enqueue(false);
}

}  // namespace certkv
