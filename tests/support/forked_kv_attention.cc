#include "tests/support/forked_kv_attention.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace certkv::test {

void ForkedKvAttention::append(Tokens& to, size_t tokens, const uint16_t* k,
                               const uint16_t* v) const {
  for (size_t i = 0; i < tokens * head_dim_; ++i) {
    to.k.push_back(double(float_from_16(dtype_, k[i])));
    to.v.push_back(double(float_from_16(dtype_, v[i])));
  }
}

void ForkedKvAttention::store_prefill(int64_t, int layer, size_t tokens, const uint16_t* k,
                                      const uint16_t* v, std::span<const float>) {
  std::vector<Tokens>& heads = shared_[layer];
  if (!heads.empty()) throw std::logic_error("a second prompt");
  heads.resize(kv_heads_);
  for (size_t h = 0; h < kv_heads_; ++h) {
    const size_t from = h * tokens * head_dim_;
    append(heads[h], tokens, k + from, v + from);
  }
}

void ForkedKvAttention::decode(int layer, std::span<const DecodeRow> rows, float* flags) {
  std::fill(flags, flags + rows.size(), 0.0f);
  for (const DecodeRow& row : rows) {
    std::vector<Tokens>& heads = own_[{row.sequence, layer}];
    heads.resize(kv_heads_);
    for (size_t h = 0; h < kv_heads_; ++h)
      append(heads[h], 1, row.k + h * head_dim_, row.v + h * head_dim_);
  }
  for (size_t h = 0; h < kv_heads_; ++h) attend(shared_.at(layer)[h], layer, h, rows);
}

void ForkedKvAttention::decode_dense(int, std::span<const DecodeRow>) {
  throw std::logic_error("rung 4 of a cache that never asks for it");
}

// The queries of all rows that read KV head `h`, as one matrix [rows * heads_per_group, head_dim].
void ForkedKvAttention::attend(const Tokens& shared, int layer, size_t h,
                               std::span<const DecodeRow> rows) const {
  const size_t queries = rows.size() * heads_per_group_, tokens = shared.k.size() / head_dim_;
  const int m = int(queries), n = int(tokens), d = int(head_dim_);
  std::vector<double> q, score(queries * tokens), out(queries * head_dim_), mass(queries);
  for (const DecodeRow& row : rows) {
    const float* from = row.q + h * heads_per_group_ * head_dim_;
    q.insert(q.end(), from, from + heads_per_group_ * head_dim_);
  }
  const double scale = 1 / std::sqrt(double(head_dim_));
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, d, scale, q.data(), d, shared.k.data(),
              d, 0.0, score.data(), n);

  std::vector<std::vector<double>> own_score(queries);
  for (size_t i = 0; i < queries; ++i) {
    const Tokens& own = own_.at({rows[i / heads_per_group_].sequence, layer})[h];
    for (size_t t = 0; t < own.k.size(); t += head_dim_) {
      double s = 0;
      for (size_t c = 0; c < head_dim_; ++c) s += q[i * head_dim_ + c] * own.k[t + c];
      own_score[i].push_back(s * scale);
    }
    const std::span<double> seen(score.data() + i * tokens, tokens);
    const double top = std::max(*std::max_element(seen.begin(), seen.end()),
                                *std::max_element(own_score[i].begin(), own_score[i].end()));
    for (double& s : seen) mass[i] += s = std::exp(s - top);
    for (double& s : own_score[i]) mass[i] += s = std::exp(s - top);
  }
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, d, n, 1.0, score.data(), n,
              shared.v.data(), d, 0.0, out.data(), d);

  for (size_t i = 0; i < queries; ++i) {
    const DecodeRow& row = rows[i / heads_per_group_];
    const Tokens& own = own_.at({row.sequence, layer})[h];
    double* o = out.data() + i * head_dim_;
    for (size_t t = 0; t < own_score[i].size(); ++t) {
      for (size_t c = 0; c < head_dim_; ++c) o[c] += own_score[i][t] * own.v[t * head_dim_ + c];
    }
    float* to = row.out + (h * heads_per_group_ + i % heads_per_group_) * head_dim_;
    for (size_t c = 0; c < head_dim_; ++c) to[c] = float(o[c] / mass[i]);
  }
}

}  // namespace certkv::test
