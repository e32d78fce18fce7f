#include "tests/support/certificate_terms.h"

#include <algorithm>
#include <cmath>

namespace certkv::oracle {
namespace {

// Rows of one block as the snapshot says they are served, and what is measured on them.
struct Rows {
  std::vector<double> k, v;  // [tokens, d]
  Measured notes;            // of codes where there are any
  std::vector<double> step,
      largest;  // [d] of a page: key step, and |base| + largest code * step
};

Rows rows_of(const SealedHead& head, const BlockRef& block, size_t b) {
  const PageFormat& f = *head.format;
  const size_t d = head.dim(), first = b * size_t(f.block_tokens) * d, n = size_t(block.tokens) * d;
  Rows rows;
  const std::vector<double>& value_of = decoded(head.x.dtype);
  for (size_t i = first; i < first + n; ++i) {
    rows.k.push_back(value_of[head.x.k[i]]);
    rows.v.push_back(value_of[head.x.v[i]]);
  }
  for (size_t t = 0; t < size_t(block.tokens); ++t) {
    double v2 = 0, k2 = 0;
    for (size_t c = 0; c < d; ++c) {
      v2 += rows.v[t * d + c] * rows.v[t * d + c];
      k2 += rows.k[t * d + c] * rows.k[t * d + c];
    }
    rows.notes.nu = std::max(rows.notes.nu, std::sqrt(v2));
    rows.notes.k_norm = std::max(rows.notes.k_norm, std::sqrt(k2));
  }
  if (block.page == nullptr) return rows;
  const Served served = decode_page(f, block.page);
  const size_t group = b / size_t(f.blocks()) * size_t(f.group_tokens) * d;
  Originals own{.dtype = head.x.dtype, .head_dim = head.x.head_dim, .k = {}, .v = {}};
  const auto copy = [&](const std::vector<uint16_t>& from, std::vector<uint16_t>* to) {
    to->assign(from.begin() + long(group), from.begin() + long(group + served.k.size()));
  };
  copy(head.x.k, &own.k);
  copy(head.x.v, &own.v);
  rows.notes = measure(f, served, own, block.index);
  const size_t at = size_t(block.index) * size_t(f.block_tokens) * d;
  if (block.k == nullptr) std::copy_n(served.k.begin() + long(at), n, rows.k.begin());
  if (block.v == nullptr) std::copy_n(served.v.begin() + long(at), n, rows.v.begin());
  rows.step = served.key_step;
  rows.largest = served.key_bar;
  return rows;
}

double norm(std::span<const double> x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

}  // namespace

ScoreError score_error(const SealedHead& head, const BlockRef& block, size_t b, const float* q) {
  const Rows rows = rows_of(head, block, b);
  const double root = std::sqrt(double(head.dim()));
  double q2 = 0, by_channel = 0, charged = 0, largest = 0;
  for (size_t c = 0; c < head.dim(); ++c) {
    q2 += double(q[c]) * q[c];
    if (block.k != nullptr) continue;
    by_channel += std::abs(double(q[c])) * rows.step[c];
    charged += std::abs(double(q[c])) * rows.largest[c];
    largest = std::max(largest, std::abs(double(q[c])) * rows.step[c]);
  }
  const double q_norm = std::sqrt(q2) / root;
  if (block.k != nullptr) return {0, q_norm * rows.notes.k_norm, q_norm * rows.notes.k_norm, 0};
  const bool fine = head.format->layout.key.read_residual;  // never scored from 16 bits
  const double lost = 64 * double(head.dim()) * largest / root / 0x1.fcp14;
  return {std::min(rows.notes.kappa * by_channel / root, q_norm * rows.notes.e), charged / root,
          q_norm * norm(rows.largest), fine ? 0 : lost, fine ? 16 * lost : lost};
}

Terms terms(const SealedHead& head, std::span<const BlockRef> blocks, const float* q,
            std::span<const float> delta, std::span<const float> out) {
  const size_t d = head.dim();
  Terms x;
  x.out_norm = norm(std::vector<double>(out.begin(), out.end()));

  std::vector<Rows> all;
  std::vector<std::vector<double>> score(blocks.size());
  x.m = -INFINITY;
  for (size_t b = 0; b < blocks.size(); ++b) {
    all.push_back(rows_of(head, blocks[b], b));
    for (size_t t = 0; t < size_t(blocks[b].tokens); ++t) {
      double sum = 0;
      for (size_t c = 0; c < d; ++c) sum += double(q[c]) * all[b].k[t * d + c];
      score[b].push_back(sum / std::sqrt(double(d)));
      x.m = std::max(x.m, score[b].back());
    }
  }
  double r2 = 0, h2 = 0, originals = 0;
  for (size_t b = 0; b < blocks.size(); ++b) {
    const double c_b = std::expm1(double(delta[b]));
    const double eta = blocks[b].v == nullptr ? all[b].notes.eta : 0, nu = all[b].notes.nu;
    const double bar = blocks[b].v == nullptr ? all[b].notes.vbar : nu;
    const bool quantised = blocks[b].k == nullptr;
    double mass = 0, size = 0;
    for (size_t t = 0; t < size_t(blocks[b].tokens); ++t) {
      const double w = std::exp(score[b][t] - x.m);
      std::vector<double> from_out(d);
      for (size_t c = 0; c < d; ++c) from_out[c] = all[b].v[t * d + c] - double(out[c]);
      const double v_norm = norm(std::span(all[b].v).subspan(t * d, d));
      mass += w;
      size += w * v_norm;
      if (!quantised) continue;
      r2 += c_b * w * norm(from_out) * norm(from_out);
      x.m2 += c_b * w * v_norm * v_norm;
    }
    x.mass.push_back(mass);
    x.size.push_back(size);
    x.bar.push_back(mass * bar);
    x.z += mass;
    if (quantised) {
      x.s += c_b * mass;
      h2 += c_b * mass * eta * eta;
      x.a_bar += c_b * mass * bar;
    } else {
      originals += c_b * mass * (nu + x.out_norm);
    }
    x.key_sum += c_b * mass * (nu + x.out_norm);
    x.den += mass * std::exp(-double(delta[b]));
    x.e_val += mass * eta;
    x.big_s += size;
    x.g_o += mass * bar;
    x.nu_max = std::max(x.nu_max, nu);
    x.eta_max = std::max(x.eta_max, eta);
  }
  for (double* sum : {&x.s, &h2, &r2, &originals, &x.key_sum, &x.den, &x.e_val, &x.big_s, &x.g_o,
                      &x.m2, &x.a_bar})
    *sum /= x.z;
  x.h = std::sqrt(h2);
  x.r = std::sqrt(r2);
  x.key_sqrt = std::sqrt(x.s) * (x.r + x.h) + originals;
  return x;
}

}  // namespace certkv::oracle
