// The device's cache, third part: policy `dense` by a library.
#include "parallel/communicator.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

void DeviceCache::use_library(cuda::DenseOps& dense, cuda::ModelOps& model) {
  library_ = &dense;
  conversions_ = &model;
}

bool DeviceCache::by_library() const {
  return library_ != nullptr && audit_ == nullptr && !rows_.empty() && at(rows_[0]).dense();
}

// The step's rows, before the first layer; their items are on the device.
void DeviceCache::begin_library() {
  StepBuffers& b = *step_;
  const size_t items = rows_.size() * size_t(heads_.count()), all = items * size_t(config_.layers);
  for (size_t row = 0; row < rows_.size(); ++row)
    b.lengths_host[row] = int32_t(at(rows_[row]).tokens + 1);
  device_.copy(b.lengths.data(), b.lengths_host.data(), rows_.size() * sizeof(int32_t));
  cuda::LibraryArgs notes;
  notes.passes = b.pass.data();
  notes.appends = b.append.data();
  notes.count = int32_t(all);
  notes.largest = b.largest.data();
  ops_.largest_notes(notes);
}

// Behind the layer's append. A cell's slots are all keys, then all values, token by token.
void DeviceCache::decode_by_library(int layer, const float* qkv) {
  StepBuffers& b = *step_;
  const size_t kv_heads = size_t(heads_.count()), d = size_t(config_.head_dim);
  const size_t n = size_t(config_.heads_per_group()), q_width = kv_heads * n * d;
  const size_t items = rows_.size() * kv_heads;
  for (size_t row = 0; row < rows_.size(); ++row) {
    const Sequence& s = at(rows_[row]);
    const size_t tokens = s.dense_blocks * 16;
    uint16_t* q = b.q16.data() + row * q_width;
    conversions_->convert({qkv + row * (q_width + 2 * kv_heads * d), DType::F32, q, options_.dtype,
                           uint64_t(q_width)});
    const auto* k = reinterpret_cast<const uint16_t*>(
        s.slots.data() + size_t(layer) * kv_heads * s.slots_each * block_bytes_);
    library_->decode({.dtype = options_.dtype,
                      .batch = 1,
                      .tokens = tokens,
                      .heads = kv_heads * n,
                      .kv_heads = kv_heads,
                      .head_dim = d,
                      .q = q,
                      .k = k,
                      .v = k + tokens * d,
                      .kv_batch_stride = kv_heads * 2 * tokens * d,
                      .kv_head_stride = 2 * tokens * d,
                      .lengths = b.lengths.data() + row,
                      .out = b.out16.data() + row * q_width});
  }
  cuda::LibraryArgs judge;
  judge.passes = b.pass.data() + size_t(layer) * items;
  judge.appends = b.append.data() + size_t(layer) * items;
  judge.count = int32_t(items);
  judge.head_dim = int32_t(d);
  judge.heads = int32_t(n);
  judge.dtype = options_.dtype;
  judge.largest = b.largest.data() + size_t(layer) * items * 2;
  judge.q16 = b.q16.data();
  judge.out16 = b.out16.data();
  ops_.judge_library(judge);
  group_.alive();
}

}  // namespace certkv
