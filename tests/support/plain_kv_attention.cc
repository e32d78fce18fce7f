#include "tests/support/plain_kv_attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace certkv::test {

PlainKvAttention::Head& PlainKvAttention::head(int64_t sequence, int layer, size_t h) {
  std::vector<Head>& heads = layers_[{sequence, layer}];
  heads.resize(kv_heads_);
  return heads[h];
}

const PlainKvAttention::Head& PlainKvAttention::head(int64_t sequence, int layer, size_t h) const {
  return layers_.at({sequence, layer}).at(h);
}

size_t PlainKvAttention::tokens(int64_t sequence, int layer) const {
  return head(sequence, layer, 0).k.size() / head_dim_;
}

const std::vector<uint16_t>& PlainKvAttention::keys(int64_t sequence, int layer, size_t h) const {
  return head(sequence, layer, h).k;
}

const std::vector<uint16_t>& PlainKvAttention::values(int64_t sequence, int layer, size_t h) const {
  return head(sequence, layer, h).v;
}

void PlainKvAttention::store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                                     const uint16_t* v, std::span<const float>) {
  for (size_t h = 0; h < kv_heads_; ++h) {
    Head& to = head(sequence, layer, h);
    if (!to.k.empty()) throw std::logic_error("prefill of a sequence that is not empty");
    to.k.assign(k + h * tokens * head_dim_, k + (h + 1) * tokens * head_dim_);
    to.v.assign(v + h * tokens * head_dim_, v + (h + 1) * tokens * head_dim_);
  }
}

void PlainKvAttention::decode(int layer, std::span<const DecodeRow> rows, float* flags) {
  for (size_t r = 0; r < rows.size(); ++r) {
    const DecodeRow& row = rows[r];
    for (size_t h = 0; h < kv_heads_; ++h) {
      Head& to = head(row.sequence, layer, h);
      to.k.insert(to.k.end(), row.k + h * head_dim_, row.k + (h + 1) * head_dim_);
      to.v.insert(to.v.end(), row.v + h * head_dim_, row.v + (h + 1) * head_dim_);
    }
    flags[r] = 0;
    if (broken && broken(layer, row.sequence)) {
      flags[r] = 1;
      std::fill(row.out, row.out + kv_heads_ * heads_per_group_ * head_dim_, 1e3f);
    } else {
      attend(layer, row);
    }
  }
}

void PlainKvAttention::decode_dense(int layer, std::span<const DecodeRow> rows) {
  for (const DecodeRow& row : rows) {
    dense_calls.push_back({layer, row.sequence});
    attend(layer, row);
  }
}

void PlainKvAttention::attend(int layer, const DecodeRow& row) const {
  for (size_t qh = 0; qh < kv_heads_ * heads_per_group_; ++qh) {
    const Head& from = head(row.sequence, layer, qh / heads_per_group_);
    const size_t count = from.k.size() / head_dim_;
    const float* q = row.q + qh * head_dim_;
    std::vector<double> score(count);
    double top = -INFINITY;
    for (size_t t = 0; t < count; ++t) {
      double s = 0;
      for (size_t c = 0; c < head_dim_; ++c)
        s += double(q[c]) * double(float_from_16(dtype_, from.k[t * head_dim_ + c]));
      score[t] = s / std::sqrt(double(head_dim_));
      top = std::max(top, score[t]);
    }
    std::vector<double> o(head_dim_, 0.0);
    double mass = 0;
    for (size_t t = 0; t < count; ++t) {
      const double p = std::exp(score[t] - top);
      mass += p;
      for (size_t c = 0; c < head_dim_; ++c)
        o[c] += p * double(float_from_16(dtype_, from.v[t * head_dim_ + c]));
    }
    for (size_t c = 0; c < head_dim_; ++c) row.out[qh * head_dim_ + c] = float(o[c] / mass);
  }
}

}  // namespace certkv::test
