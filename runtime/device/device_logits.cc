// A device's logits, and the tokens that are chosen from them there.
#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"
#include "runtime/device/device_transformer.h"

namespace certkv {

void DeviceTransformer::project_logits(const Buffers& b, size_t rows) {
  ops_.linear.linear({.weight = weights_.lm_head_values(),
                      .dtype = weights_.dtype,
                      .out = weights_.vocab_rows,
                      .in = hidden_,
                      .x = b.normed.data(),
                      .x_stride = hidden_,
                      .y = logits_.data(),
                      .y_stride = vocab_widest_,
                      .rows = rows});
}

const float* DeviceTransformer::gather_logits(size_t rows) {
  if (group_ == nullptr || ranks_ == 1) return logits_.data();
  group_->gather(logits_.data(), all_logits_.data(), rows * vocab_widest_);
  return all_logits_.data();
}

void DeviceTransformer::fetch_logits(const float* gathered, size_t rows) {
  device_.copy(host_logits_.data(), gathered, ranks_ * rows * vocab_widest_ * sizeof(float));
}

const uint64_t* DeviceTransformer::fetch_best(size_t rows) {
  ops_.model.argmax({.x = logits_.data(),
                     .stride = vocab_widest_,
                     .best = best_.data(),
                     .rows = rows,
                     .n = size_t(vocab_[rank_].count())});
  const uint64_t* from = best_.data();
  if (group_ != nullptr && ranks_ > 1) {
    group_->gather(best_.data(), all_best_.data(), rows * sizeof(uint64_t) / sizeof(uint32_t));
    from = all_best_.data();
  }
  device_.copy(host_best_.data(), from, ranks_ * rows * sizeof(uint64_t));
  return from;
}

// Every rank draws every row: that takes no longer, and no word of it need travel.
void DeviceTransformer::draw_tokens(const float* gathered, const uint64_t* best, size_t rows) {
  device_.copy(draws_.data(), host_draws_.data(), rows * sizeof(SampleDraw));
  ops_.model.sample({.x = gathered,
                     .stride = vocab_widest_,
                     .begins = vocab_begins_.data(),
                     .best = best,
                     .draws = draws_.data(),
                     .scratch = sampler_.data(),
                     .tokens = drawn_.data(),
                     .pieces = ranks_,
                     .rows = rows,
                     .n = size_t(config_.vocab)});
  device_.copy(host_drawn_.data(), drawn_.data(), rows * sizeof(int32_t));
}

// Places of the largest are within a rank's part of the vocabulary.
DecodeOutput::Chosen DeviceTransformer::chosen_of(size_t row, size_t rows) const {
  uint64_t best = 0;
  for (size_t r = 0; r < ranks_; ++r) {
    const uint64_t word = host_best_[r * rows + row];
    const uint32_t place = uint32_t(vocab_[r].begin) + cuda::argmax_place(word);
    best = std::max(best, cuda::argmax_word(cuda::argmax_value(word), place));
  }
  const float largest = cuda::argmax_value(best);
  if (host_draws_[row].temperature == 0 || !std::isfinite(largest))
    return {int32_t(cuda::argmax_place(best)), largest};
  CERTKV_EXPECT(host_drawn_[row] >= 0, DeviceError, "{} has drawn no token of row {}",
                device_.name(), row);
  return {host_drawn_[row], largest};
}

void DeviceTransformer::copy_logits(size_t row, size_t rows, float* out) const {
  for (size_t r = 0; r < ranks_; ++r) {
    const float* from = host_logits_.data() + (r * rows + row) * vocab_widest_;
    std::copy(from, from + vocab_[r].count(), out + vocab_[r].begin);
  }
}

}  // namespace certkv
