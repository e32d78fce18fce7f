#include "tests/support/plain_device_attention.h"

#include <chrono>
#include <stdexcept>

namespace certkv::test {

PlainDeviceAttention::PlainDeviceAttention(cuda::Device& device, size_t kv_heads,
                                           size_t heads_per_group, size_t head_dim, DType originals)
    : device_(device),
      kv_heads_(kv_heads),
      heads_per_group_(heads_per_group),
      head_dim_(head_dim),
      originals_(originals),
      cache_(kv_heads, heads_per_group, head_dim, originals) {}

void PlainDeviceAttention::store_prefill(int64_t sequence, int layer, size_t tokens,
                                         const uint16_t* k, const uint16_t* v, size_t head_stride,
                                         std::span<const float> queries) {
  const size_t head = tokens * head_dim_;
  std::vector<uint16_t> keys(kv_heads_ * head), values(keys.size());
  for (size_t h = 0; h < kv_heads_; ++h) {
    device_.copy(keys.data() + h * head, k + h * head_stride, head * sizeof(uint16_t));
    device_.copy(values.data() + h * head, v + h * head_stride, head * sizeof(uint16_t));
  }
  device_.synchronize(Deadline::after(std::chrono::seconds(60)));
  cache_.store_prefill(sequence, layer, tokens, keys.data(), values.data(), queries);
  last_q[{sequence, layer}].assign(queries.begin(), queries.end());
}

void PlainDeviceAttention::begin_rows(std::span<const int64_t> sequences, float* out) {
  out_ = out;
  ++steps_;
  sequences_.assign(sequences.begin(), sequences.end());
}

void PlainDeviceAttention::decode(int layer, const float* qkv, const Following& following) {
  const size_t rows = sequences_.size(), kv = kv_heads_ * head_dim_, q = kv * heads_per_group_;
  const size_t width = q + 2 * kv;
  std::vector<float> from(rows * width), answers(rows * q), flags(rows);
  uint32_t halted = 0;
  device_.copy(from.data(), qkv, from.size() * sizeof(float));
  if (agreement_.halted != nullptr) device_.copy(&halted, agreement_.halted, sizeof halted);
  device_.synchronize(Deadline::after(std::chrono::seconds(60)));
  if (halted != 0 && halted <= uint32_t(layer)) {  // whatever the outputs are
    device_.fill(out_, 0xff, answers.size() * sizeof(float));
    return;
  }
  layer_ = layer;
  asked_ = from;
  std::vector<uint16_t> originals(rows * 2 * kv);
  std::vector<DecodeRow> asked;
  for (size_t r = 0; r < rows; ++r) {
    const float* row = from.data() + r * width;
    uint16_t* rounded = originals.data() + r * 2 * kv;
    for (size_t i = 0; i < 2 * kv; ++i) rounded[i] = float_to_16(originals_, row[q + i]);
    asked.push_back({sequences_[r], row, rounded, rounded + kv, answers.data() + r * q});
  }
  cache_.decode(layer, asked, flags.data());
  device_.copy(out_, answers.data(), answers.size() * sizeof(float));
  for (size_t r = 0; r < rows && agreement_.fallback != nullptr; ++r)
    if (flags[r] != 0) device_.copy(agreement_.fallback + r, &flag, sizeof flag);
  if (following.redone != nullptr) device_.fill(following.redone, 0, sizeof *following.redone);
  if (following.enqueue) following.enqueue(false);
}

void PlainDeviceAttention::decode_dense(int layer, const uint32_t* repeated) {
  if (layer != layer_) throw std::logic_error("rung 4 of a layer that is not the last one");
  const size_t rows = sequences_.size(), q = kv_heads_ * heads_per_group_ * head_dim_;
  std::vector<uint32_t> repeats(rows);
  device_.copy(repeats.data(), repeated, rows * sizeof(uint32_t));
  device_.synchronize(Deadline::after(std::chrono::seconds(60)));
  device_.fill(out_, 0xff, rows * q * sizeof(float));
  for (size_t r = 0; r < rows; ++r) {
    if (repeats[r] == 0) continue;
    std::vector<float> answer(q);
    const float* asked = asked_.data() + r * (asked_.size() / rows);
    cache_.decode_dense(
        layer, std::vector<DecodeRow>{{sequences_[r], asked, nullptr, nullptr, answer.data()}});
    device_.copy(out_ + r * q, answer.data(), q * sizeof(float));
  }
  device_.synchronize(Deadline::after(std::chrono::seconds(60)));
}

}  // namespace certkv::test
