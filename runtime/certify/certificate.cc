#include "runtime/certify/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/quantize.h"

namespace certkv {
namespace {

double eta_of(const AttendContext& context, const BlockRef& block, uint8_t used) {
  if ((used & kUsedValue) != 0) return 0;
  return page_annotations(*context.format, block.page, block.index).eta;
}

// sum_b c_b w_b of one head, about its reference m.
double weighted_c(const PassState& state, int head) {
  double sum = 0;
  for (size_t b = 0; b < state.blocks; ++b) {
    const size_t i = state.at(head, b);
    sum += double(c_of_delta(state.delta[i])) * state.block_sum[i] *
           std::exp(double(state.block_ref[i]) - state.head[size_t(head)].m);
  }
  return sum;
}

// What a block's terms are computed from.
uint8_t sources(const BlockRef& block) {
  return uint8_t((block.k != nullptr ? kUsedKey : 0) | (block.v != nullptr ? kUsedValue : 0));
}

constexpr double kRoundDown = 1 - 0x1p-40;  // sums of at most 2^12 doubles, rounded to nearest

}  // namespace

void finish_output(const PassState& state, int head, float* out) {
  const HeadSums& s = state.head[size_t(head)];
  for (size_t c = 0; c < s.o.size(); ++c) out[c] = float(double(state.r[c]) + s.o[c] / s.l);
}

Certificate certify(const AttendContext& context, const PassState& state, int head,
                    std::span<const BlockRef> blocks, const CorrectionLog& log, const float* out) {
  const HeadSums& sums = state.head[size_t(head)];
  const int d = state.head_dim;
  const double l = sums.l;
  Certificate c;

  // O, and O - r as accumulated.
  double o2 = 0, u2 = 0, ua = 0, cast2 = 0;
  for (int i = 0; i < d; ++i) {
    const double u = sums.o[size_t(i)] / l;
    const double o = out[i];
    const double cast = o - (double(state.r[size_t(i)]) + u);
    o2 += o * o;
    u2 += u * u;
    ua += u * (sums.a[size_t(i)] / l);
    cast2 += cast * cast;
  }
  c.out_norm = std::sqrt(o2) * (1 + 0x1p-40);
  const double u_norm = std::sqrt(u2);

  // Sums over all blocks. expm1(Delta) = c, exp(-Delta) = 1 / (1 + c).
  double s = 0, h2 = 0, by_sum = 0, den = 0, e_val = 0, nu_max = 0, eta_max = 0;
  double tail = 0, delta_max = 0, v_max = 0, c_tokens = 0, flushed = 0;
  bool nowhere_negative = true;  // a damaged annotation must not pay for others
  double factor = 0, factor_ref = std::numeric_limits<double>::quiet_NaN();
  for (size_t b = 0; b < state.blocks; ++b) {
    const size_t i = state.at(head, b);
    const double ref = state.block_ref[i];
    if (!(ref == factor_ref)) {
      factor = std::exp(ref - sums.m) / l;
      factor_ref = ref;
    }
    const double rho = state.block_sum[i] * factor;
    const double c_b = c_of_delta(state.delta[i]);
    const double nu = blocks[b].nu, eta = eta_of(context, blocks[b], state.used[i]);
    nowhere_negative = nowhere_negative && eta >= 0 && nu >= 0 && c_b >= 0 && rho >= 0;
    s += c_b * rho;
    h2 += c_b * rho * eta * eta;
    by_sum += c_b * rho * (nu + c.out_norm);
    den += rho / (1 + c_b);
    e_val += rho * eta;
    nu_max = nu > nu_max ? nu : (nu <= nu_max ? nu_max : nu);
    eta_max = eta > eta_max ? eta : (eta <= eta_max ? eta_max : eta);
    if ((state.used[i] & kUsedKey) == 0) {
      tail += rho;
      delta_max = std::max(delta_max, double(state.score_bound[i]));
    }
    v_max = std::max(v_max, nu);
    c_tokens += c_b * blocks[b].tokens;
    // A weight that the exponential flushed is below kExpAbsolute exp(ref - m) as scored, and below
    // exp(Delta_b) = 1 + c_b times that in truth: c_b rho'_b above has nothing of it.
    flushed += blocks[b].tokens * (1 + c_b) * (factor * l > 1 ? factor : 1 / l);
  }
  c.den = den * kRoundDown;

  // E2: R about the output, from sums about r. What corrections removed has left its rounding
  // behind, so r_fp counts everything that ever entered m2 and a.
  const bool corrected = log.count > 0;
  const double m2 = sums.m2 / l;
  const double g_m2 = corrected ? log.g_m2 / l : m2, g_s = corrected ? log.g_s / l : s;
  // Beside a value 2^60 times larger, squares of v - r vanish in the pass's unit: at most 2^-149 for
  // each square, product and sum is lost, twice with a's 2 |u| <= 4 sqrt(d) / unit in front.
  const bool any_value = nu_max > 0 || sums.big_a > 0;  // all zero: nothing was rounded
  const double unit = state.unit;
  const double m2_lost =
      any_value ? (d + 64) * 0x1p-146 * (s + (double(state.tokens) + c_tokens) / l) / (unit * unit)
                : 0.0;
  const double r_fp = gamma_n(chain_m2(d) + d + 8 + 2.0 * log.count) *
                          (g_m2 + 2 * u_norm * std::sqrt(g_s * g_m2) + g_s * u2) +
                      m2_lost * (1 + 2.0 * log.count);
  c.r_term = std::sqrt(positive_part(m2 - 2 * ua + s * u2) + r_fp);
  c.h_term = std::sqrt(h2);
  c.s_term = s;
  c.key_sqrt = std::sqrt(s) * (c.r_term + c.h_term);
  c.key_sum = by_sum;

  // E3 / 4b, about r: the accumulated vectors are v^ - r, whose subtraction is one more rounding.
  const double g_l = corrected ? log.g_l : l;
  // A norm whose square vanished is below sqrt(d) 2^-74 units.
  const double norm_lost = any_value ? std::sqrt(double(d)) * 0x1p-74 / unit : 0.0;
  const double g_o = (corrected ? log.g_o : sums.big_a) + norm_lost * g_l;
  const double n_out = kChainOutput + 2.0 * log.count + 3;
  c.e_acc = (gamma_n(n_out) * g_o + gamma_n(n_out) * u_norm * g_l) / l +
            flushed * double(kExpAbsolute) * (nu_max + eta_max + c.out_norm) +
            3 * kUnit * c.out_norm + std::sqrt(cast2);

  // Either is a bound by itself: where a or m2 overflowed, key_sqrt is inf or NaN and the sum counts.
  const double key = c.key_sqrt <= c.key_sum ? c.key_sqrt : c.key_sum;
  const double raise = 1 + 0x1p-10;
  c.bound = raise * (key + e_val + c.e_acc) / c.den;
  c.e_key = key / c.den;
  c.e_val = e_val / c.den;
  c.e_fp = c.bound - c.e_key - c.e_val;
  c.e_key_paper = 2 * v_max * std::exp(2 * delta_max) * tail * std::expm1(2 * delta_max);

  // E5. Every term of S is positive, so its error is relative.
  c.s = sums.s1 / l;
  c.s_lo = c.s * (1 - 2 * gamma_n(kChainOutput + d / 8 + 16)) * kRoundDown;
  if (corrected)  // a sum from which terms were subtracted: absolute error of what passed through
    c.s_lo = c.s - 2 * gamma_n(n_out + d / 8 + 16) * (g_l / l) * (nu_max + eta_max);
  c.relative = c.bound / c.s;
  if (c.bound == 0 && c.s == 0) c.relative = 0;

  const bool sound = std::isfinite(c.bound) && std::isfinite(c.s) && std::isfinite(key) &&
                     std::isfinite(c.out_norm) && std::isfinite(e_val) && nowhere_negative &&
                     l > 0 && c.den > 0;
  if (!sound) c.bound = c.relative = std::numeric_limits<double>::quiet_NaN();
  return c;
}

bool within_tolerance(const Certificate& c, bool relative, double tolerance) {
  if (relative) return c.bound <= tolerance * c.s_lo;
  return c.bound <= tolerance;
}

bool correct_block(const AttendContext& context, const QueryGroup& q, size_t b,
                   const BlockRef& was, const BlockRef& now, uint32_t mask, PassState* state,
                   std::span<CorrectionLog> logs, BlockTerms* before, BlockTerms* after) {
  const int heads = q.heads;
  for (int h = 0; h < heads; ++h) before->ref[h] = state->block_ref[state->at(h, b)];
  block_terms(context, q, was, state->r.data(), state->unit, false, before);
  for (int h = 0; h < heads; ++h) after->ref[h] = before->ref[h];
  block_terms(context, q, now, state->r.data(), state->unit, true, after);

  for (int h = 0; h < heads; ++h) {
    if ((mask >> h & 1) == 0) continue;
    const size_t i = state->at(h, b);
    const HeadSums& s = state->head[size_t(h)];
    if (!(before->sum[h] == state->block_sum[i] && before->delta[h] == state->delta[i])) return false;
    if (sources(was) != state->used[i]) return false;  // other values leave sum and delta as they are
    if (!(double(after->ref[h]) - s.m < 300)) return false;  // doubles would overflow at 709
  }
  const double inv = 1.0 / state->unit;
  for (int h = 0; h < heads; ++h) {
    if ((mask >> h & 1) == 0) continue;
    const size_t i = state->at(h, b);
    HeadSums& s = state->head[size_t(h)];
    CorrectionLog& log = logs[size_t(h)];
    if (log.count == 0) {
      log.g_l = s.l;
      log.g_o = s.big_a;
      log.g_m2 = s.m2;
      log.g_s = weighted_c(*state, h);
    }
    const double minus = std::exp(double(before->ref[h]) - s.m);
    const double plus = std::exp(double(after->ref[h]) - s.m);
    const double c_minus = c_of_delta(before->delta[h]), c_plus = c_of_delta(after->delta[h]);
    s.l += plus * after->sum[h] - minus * before->sum[h];
    const double m2_minus = c_minus * minus * inv * inv * before->m2[h];
    const double m2_plus = c_plus * plus * inv * inv * after->m2[h];
    s.m2 += m2_plus - m2_minus;
    s.big_a += inv * (plus * after->big_a[h] - minus * before->big_a[h]);
    s.s1 += inv * (plus * after->s1[h] - minus * before->s1[h]);
    for (int c = 0; c < state->head_dim; ++c) {
      const double add = inv * plus * after->o[h][c], remove = inv * minus * before->o[h][c];
      s.o[size_t(c)] += add - remove;
      s.a[size_t(c)] += c_plus * add - c_minus * remove;
    }
    log.count += 1;
    log.g_l += minus * before->sum[h] + plus * after->sum[h];
    log.g_o += inv * (minus * before->big_a[h] + plus * after->big_a[h]);
    log.g_s += c_minus * minus * before->sum[h] + c_plus * plus * after->sum[h];
    log.g_m2 += m2_minus + m2_plus;
    state->block_sum[i] = after->sum[h];
    state->block_ref[i] = after->ref[h];
    state->delta[i] = after->delta[h];
    state->score_bound[i] = after->score_bound[h];
    state->used[i] = sources(now);
  }
  return true;
}

bool must_rerun(const PassState& state, int head, const CorrectionLog& log) {
  if (log.count == 0) return false;
  const HeadSums& s = state.head[size_t(head)];
  return !(s.l > 0) || !(log.g_l <= 8 * s.l) || !(log.g_o <= 8 * s.big_a);
}

}  // namespace certkv
