#include "runtime/certify/selector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/quantize.h"

namespace certkv {
namespace {

bool promotable(const BlockRef& b) { return b.page != nullptr; }

// Sorts block numbers by weight, heaviest first; NaN first of all, ties by number.
void sort_by(std::vector<uint32_t>* blocks, const std::vector<double>& weight) {
  std::sort(blocks->begin(), blocks->end(), [&](uint32_t a, uint32_t b) {
    const double x = weight[a], y = weight[b];
    const bool x_nan = !(x == x), y_nan = !(y == y);
    if (x_nan != y_nan) return x_nan;
    if (!x_nan && x != y) return x > y;
    return a < b;
  });
}

// Promotions aim below the limit, so that the estimate's error and the next step's drift fit.
constexpr double kAim = 0.9;

}  // namespace

void block_masses(const PassState& state, int head, std::vector<double>* out) {
  const HeadSums& s = state.head[size_t(head)];
  out->resize(state.blocks);
  for (size_t b = 0; b < state.blocks; ++b) {
    const size_t i = state.at(head, b);
    (*out)[b] = state.block_sum[i] * std::exp(double(state.block_ref[i]) - s.m) / s.l;
  }
}

double block_log_mass(const PassState& state, int head, size_t block) {
  const size_t i = state.at(head, block);
  return double(state.block_ref[i]) + std::log(double(state.block_sum[i]));
}

Promotions select_for_budget(const AttendContext& context, const PassState& state, int head,
                             std::span<const BlockRef> blocks, const Certificate& c, double allowed,
                             double value_share) {
  Promotions out;
  std::vector<double> rho;
  block_masses(state, head, &rho);
  const size_t n = state.blocks;
  std::vector<double> eta(n), key(n), value(n), c_b(n);
  std::vector<uint32_t> key_candidates, value_candidates;
  double e_val = 0;
  for (size_t b = 0; b < n; ++b) {
    const size_t i = state.at(head, b);
    const uint8_t used = state.used[i];
    c_b[b] = c_of_delta(state.delta[i]);
    if (promotable(blocks[b]) && (used & kUsedValue) == 0) {
      eta[b] = page_annotations(*context.format, blocks[b].page, blocks[b].index).eta;
      value[b] = rho[b] * eta[b];
      e_val += value[b];
      value_candidates.push_back(uint32_t(b));
    }
    if (promotable(blocks[b]) && (used & kUsedKey) == 0) {
      key[b] = c_b[b] * rho[b] * (blocks[b].nu + c.out_norm);
      if (!(state.delta[i] <= 8))
        out.keys.push_back(uint32_t(b));  // not servable from tier 1 for this query (method 3)
      else
        key_candidates.push_back(uint32_t(b));
    }
  }
  const size_t forced = out.keys.size();

  // Rung 2: the fewest blocks that bring E_val to its share; more if the keys would need it.
  const double value_limit = kAim * value_share * allowed;
  sort_by(&value_candidates, value);
  for (uint32_t b : value_candidates) {
    if (e_val <= value_limit) break;
    out.values.push_back(b);
    e_val -= value[b];
  }
  e_val = positive_part(e_val);

  // Rung 1: descending contribution until the predicted key term fits what is left. Both forms of
  // the minimum in E4 are predicted; R^2 shrinks about as s does.
  const double left = kAim * allowed - e_val - c.e_acc;
  sort_by(&key_candidates, key);
  double s = c.s_term, h2 = c.h_term * c.h_term, by_sum = c.key_sum;
  const auto remove = [&](uint32_t b) {
    s -= c_b[b] * rho[b];
    h2 -= c_b[b] * rho[b] * eta[b] * eta[b];
    by_sum -= key[b];
  };
  for (size_t i = 0; i < forced; ++i) remove(out.keys[i]);
  const auto fits = [&] {
    const double share = positive_part(s) / c.s_term;
    const double by_sqrt = std::sqrt(positive_part(s)) *
                           (c.r_term * std::sqrt(share) + std::sqrt(positive_part(h2)));
    return by_sqrt <= left || by_sum <= left;
  };
  size_t taken = 0;
  while (taken < key_candidates.size() && !fits()) {
    const uint32_t b = key_candidates[taken++];
    out.keys.push_back(b);
    remove(b);
  }
  out.enough = fits();
  std::sort(out.keys.begin(), out.keys.end());
  std::sort(out.values.begin(), out.values.end());
  return out;
}

std::vector<uint32_t> select_paper_keys(const PassState& state, int head,
                                        std::span<const BlockRef> blocks, const PaperRule& rule) {
  std::vector<double> rho;
  block_masses(state, head, &rho);
  std::vector<uint32_t> order;
  double total = 0;
  for (size_t b = 0; b < state.blocks; ++b) {
    total += rho[b];
    if (promotable(blocks[b])) order.push_back(uint32_t(b));
  }
  sort_by(&order, rho);
  // The open block is exact already: its mass counts as covered.
  double covered = total;
  for (uint32_t b : order) covered -= rho[b];
  const auto take = [&](int64_t k_max) {
    double mass = covered;
    int64_t k = 0;
    while (k < int64_t(order.size()) && k < k_max &&
           (k < rule.k_min || !(mass >= rule.tau_cov * total)))
      mass += rho[order[size_t(k++)]];
    return std::pair{k, total - mass};
  };
  auto [k, tail] = take(rule.k_max);
  if (!(tail <= rule.expand_tail * total)) k = take(2 * rule.k_max).first;
  order.resize(size_t(k));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<uint32_t> select_paper_values(const AttendContext& context, const PassState& state,
                                          int head, std::span<const BlockRef> blocks,
                                          const PaperRule& rule) {
  std::vector<double> rho;
  block_masses(state, head, &rho);
  std::vector<double> error(state.blocks, 0.0);
  std::vector<uint32_t> order, out;
  double sum = 0;
  for (size_t b = 0; b < state.blocks; ++b) {
    if (!promotable(blocks[b])) continue;
    error[b] = rho[b] * page_annotations(*context.format, blocks[b].page, blocks[b].index).eta;
    sum += error[b];
    order.push_back(uint32_t(b));
  }
  sort_by(&order, error);
  for (uint32_t b : order) {
    if (rule.greedy_values ? sum <= rule.v_tol : error[b] <= rule.v_tol) break;
    out.push_back(b);
    sum -= error[b];
  }
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<uint32_t> ranking_unresolved(const AttendContext& context, const QueryGroup& q,
                                         const PassState& state, int head,
                                         std::span<const BlockRef> blocks, int r) {
  std::vector<uint32_t> out;
  if (r <= 0) return out;
  const size_t n = state.blocks;
  std::vector<double> log_mass(n);
  std::vector<uint32_t> inside, outside;
  for (size_t b = 0; b < n; ++b) {
    // A weight below the exponential's flush lies between 0 and it: outside F it counts as if it were
    // at the flush, within F as 0.
    const size_t i = state.at(head, b);
    const bool in_f = (state.used[i] & kUsedKey) != 0;
    const double flushed = in_f ? 0.0 : blocks[b].tokens * double(kExpAbsolute);
    log_mass[b] = double(state.block_ref[i]) + std::log(double(state.block_sum[i]) + flushed);
    (in_f ? inside : outside).push_back(uint32_t(b));
  }
  if (outside.empty()) return out;
  sort_by(&inside, log_mass);
  if (inside.size() < size_t(r)) {
    sort_by(&outside, log_mass);
    outside.resize(std::min(outside.size(), size_t(r) - inside.size()));
    return outside;
  }
  const uint32_t last = inside[size_t(r) - 1];
  const double g = gamma_n(chain_originals(q.head_dim)) * double(q.norm[size_t(head)]) *
                   blocks[last].k_norm * (1 + 4 * kUnit);
  for (uint32_t b : outside) {
    const double eps_l = gamma_n(context.format->block_tokens + 4) +
                         2 * kUnit * std::max(std::abs(log_mass[b]), std::abs(log_mass[last]));
    const double upper = log_mass[b] + state.delta[state.at(head, b)] + eps_l;
    if (!(upper <= log_mass[last] - g - kEpsW - eps_l)) out.push_back(b);
  }
  return out;
}

}  // namespace certkv
