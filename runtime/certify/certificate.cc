#include "runtime/certify/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/quantize.h"
#include "kernels/simd.h"

namespace certkv {
namespace {

constexpr double kMaxBlockTokens = 32;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kRoundDown =
    1 - 0x1p-40;  // sums of at most 2^12 doubles a lane, rounded to nearest

// What a block's terms are computed from.
uint8_t sources(const BlockRef& block) {
  return uint8_t((block.k != nullptr ? kUsedKey : 0) | (block.v != nullptr ? kUsedValue : 0));
}

// Sums over blocks of one head, weights about the pass's reference m. T: blocks with quantised
// keys.
struct BlockSums {
  double s = 0, h2 = 0, a_bar = 0, t_nu = 0;  // over T: c w times 1, eta^2, vbar, nu
  double f_sum = 0, f_nu = 0;                 // over the rest: c w times 1, nu
  double den = 0;                             // w exp(-Delta)
  double value = 0, g_o = 0;                  // w times eta, vbar, of the values used
  double tail = 0;                            // over T: w
  // What flushed weights may be in truth, over kExpAbsolute: a weight that the exponential flushed
  // is below kExpAbsolute exp(ref - m) as scored, and below exp(Delta_b) = 1 + c_b times that in
  // truth; c_b rho'_b has nothing of it.
  double flushed = 0;
  bool sound = true;  // every weight and c is a number >= 0
};

typedef double Lanes __attribute__((vector_size(64)));
typedef int64_t Masks __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef uint8_t Flags __attribute__((vector_size(8)));

CERTKV_SIMD void widen(const float* p, Lanes* out) {
  Floats f;
  __builtin_memcpy(&f, p, sizeof f);
  *out = __builtin_convertvector(f, Lanes);
}
CERTKV_SIMD double sum_of(const Lanes& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The cells of one stretch of blocks that share a reference.
struct Cells {
  const float *sum, *c, *keep, *nu, *eta, *vbar;
  const uint8_t* used;
};
struct LaneSums {
  Lanes s{}, h2{}, a_bar{}, t_nu{}, f_sum{}, f_nu{}, den{}, value{}, g_o{}, tail{}, c{};
  Masks bad{};
};

CERTKV_SIMD void add_eight(const Cells& x, size_t b, double factor, LaneSums* to) {
  Lanes w, c, keep, nu, eta, bar;
  widen(x.sum + b, &w);
  widen(x.c + b, &c);
  widen(x.keep + b, &keep);
  widen(x.nu + b, &nu);
  widen(x.eta + b, &eta);
  widen(x.vbar + b, &bar);
  w *= factor;
  Lanes cw = c * w, tail = w;
  to->bad |= ~(cw >= 0);
  uint64_t any;
  __builtin_memcpy(&any, x.used + b, sizeof any);
  if (any != 0) {
    Flags flags;
    __builtin_memcpy(&flags, x.used + b, sizeof flags);
    const Masks used = __builtin_convertvector(flags, Masks);
    const Masks codes = (used & int64_t(kUsedKey)) == 0;
    const Masks values = (used & int64_t(kUsedValue)) == 0;
    eta = values ? eta : Lanes{};
    const Masks skipped = (used & int64_t(kSkippedValue)) != 0;
    bar = values ? bar : nu;
    eta = skipped ? nu : eta;  // v^ = 0
    bar = skipped ? Lanes{} : bar;
    const Lanes cw_f = codes ? Lanes{} : cw;
    cw = codes ? cw : Lanes{};
    tail = codes ? w : Lanes{};
    to->f_sum += cw_f;
    to->f_nu += cw_f * nu;
  }
  to->s += cw;
  to->h2 += cw * eta * eta;
  to->a_bar += cw * bar;
  to->t_nu += cw * nu;
  to->den += w * keep;
  to->value += w * eta;
  to->g_o += w * bar;
  to->tail += tail;
  to->c += c;
}

CERTKV_CPU_VERSIONS void add_blocks(const Cells& x, size_t count, double factor, BlockSums* out) {
  LaneSums sums;
  size_t b = 0;
  for (; b + 8 <= count; b += 8) add_eight(x, b, factor, &sums);
  if (b < count) {  // the last few, with zeros beyond the end
    float rest[6][8] = {};
    uint8_t used[8] = {};
    for (size_t i = 0; b + i < count; ++i) {
      const float* from[6] = {x.sum, x.c, x.keep, x.nu, x.eta, x.vbar};
      for (size_t n = 0; n < 6; ++n) rest[n][i] = from[n][b + i];
      used[i] = x.used[b + i];
    }
    add_eight({rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], used}, 0, factor, &sums);
  }
  out->s += sum_of(sums.s);
  out->h2 += sum_of(sums.h2);
  out->a_bar += sum_of(sums.a_bar);
  out->t_nu += sum_of(sums.t_nu);
  out->f_sum += sum_of(sums.f_sum);
  out->f_nu += sum_of(sums.f_nu);
  out->den += sum_of(sums.den);
  out->value += sum_of(sums.value);
  out->g_o += sum_of(sums.g_o);
  out->tail += sum_of(sums.tail);
  out->flushed += kMaxBlockTokens * (double(count) + sum_of(sums.c)) * (factor > 1 ? factor : 1.0);
  for (int i = 0; i < 8; ++i) out->sound = out->sound && sums.bad[i] == 0;
}

BlockSums sum_blocks(const PassState& state, int head) {
  BlockSums out;
  const double m = state.head[size_t(head)].m;
  for (size_t b = 0; b < state.blocks;) {
    const size_t i = state.at(head, b);
    const float ref = state.block_ref[i];
    size_t n = 1;
    while (b + n < state.blocks && state.block_ref[i + n] == ref) ++n;
    add_blocks(
        {state.block_sum.data() + i, state.c.data() + i, state.keep.data() + i, state.nu.data() + b,
         state.eta.data() + b, state.vbar.data() + b, state.used.data() + i},
        n, std::exp(double(ref) - m), &out);
    b += n;
  }
  return out;
}

}  // namespace

void finish_output(const PassState& state, int head, float* out) {
  const HeadSums& s = state.head[size_t(head)];
  for (size_t c = 0; c < s.o.size(); ++c) out[c] = float(s.o[c] / s.l);
}

Certificate certify(const PassState& state, int head, const CorrectionLog& log, const float* out) {
  const HeadSums& sums = state.head[size_t(head)];
  const int d = state.head_dim;
  const double l = sums.l;
  Certificate c;

  double o2 = 0, oa = 0, cast2 = 0;
  for (int i = 0; i < d; ++i) {
    const double o = out[i], cast = o - sums.o[size_t(i)] / l;
    o2 += o * o;
    oa += o * (sums.a[size_t(i)] / l);
    cast2 += cast * cast;
  }
  c.out_norm = std::sqrt(o2) * (1 + 0x1p-40);

  // Sums over all blocks. expm1(Delta) = c, exp(-Delta) = 1 / (1 + c).
  const BlockSums b = sum_blocks(state, head);
  const double s = b.s / l, e_val = b.value / l;
  c.den = b.den / l * kRoundDown;

  // E2 over T; what has original keys enters by the sum over its blocks. What corrections removed
  // has left its rounding behind, so r_fp counts everything that ever entered m2 and a.
  const bool corrected = log.count > 0;
  const double m2 = sums.m2 / l;
  const double g_s = corrected ? log.g_s / l : s, g_m2 = corrected ? log.g_m2 / l : m2;
  const double g_a = (corrected ? log.g_a : b.a_bar) / l;
  // Beside a value 2^60 times larger, squares vanish in the pass's unit, and products of steps, codes
  // and weights do beside one 2^120 times larger: at most 2^-149 is lost by each square, product and
  // sum, and 2^8 times that where a step is lost before its code.
  const bool any_value = state.nu_max > 0 || state.vbar_max > 0;  // all zero: nothing was rounded
  const double unit = state.unit;
  const double lost = any_value ? (d + 64) * 0x1p-138 * (1 + 2.0 * log.count) : 0.0;
  const double tokens_l = double(state.tokens) / l;
  // Skipped values count with their norm where the largest eta is asked for.
  const double eta_max = std::max(state.eta_max, state.skips ? state.nu_max : 0.0f);
  const double m2_lost = lost * (s + tokens_l + sums.c_tokens / l) / (unit * unit);
  const double n_m2 = kChainOutput + chain_norm(d) + d + 8 + 2.0 * log.count;
  const double r_fp = gamma_n(n_m2) * (g_m2 + 2 * c.out_norm * g_a + g_s * o2) + m2_lost;
  c.r_term = std::sqrt(positive_part(m2 - 2 * oa + s * o2) + r_fp);
  c.h_term = std::sqrt(b.h2 / l);
  c.s_term = s;
  const double originals = (b.f_nu + b.f_sum * c.out_norm) / l;
  c.key_sqrt = std::sqrt(s) * (c.r_term + c.h_term) + originals;
  c.key_sum = (b.t_nu + b.s * c.out_norm) / l + originals;

  // E3 / 4b. The sums run over |base| + code step where values are codes.
  const double g_l = corrected ? log.g_l : l, g_o = corrected ? log.g_o : b.g_o;
  const double n_out = kChainOutput + 2.0 * log.count + 3;
  c.e_acc = (gamma_n(n_out) * (g_o + c.out_norm * g_l) +
             b.flushed * double(kExpAbsolute) * (state.nu_max + eta_max + c.out_norm)) /
                l +
            lost * tokens_l / unit + 3 * kUnit * c.out_norm + std::sqrt(cast2);

  // Either is a bound by itself: where a or m2 overflowed, key_sqrt is inf or NaN and the sum
  // counts.
  const double key = c.key_sqrt <= c.key_sum ? c.key_sqrt : c.key_sum;
  c.bound = kRaise * (key + e_val + c.e_acc) / c.den;
  c.e_key = key / c.den;
  c.e_val = e_val / c.den;
  c.e_fp = c.bound - c.e_key - c.e_val;
  const double score_max = double(sums.score_max);
  c.e_key_paper =
      2 * state.nu_max * std::exp(2 * score_max) * (b.tail / l) * std::expm1(2 * score_max);

  // E5. Every term of S is positive, so its error is relative.
  c.s = sums.s1 / l;
  c.s_lo = c.s * (1 - 2 * gamma_n(kChainOutput + 16)) * kRoundDown;
  if (corrected)  // a sum from which terms were subtracted: absolute error of what passed through
    c.s_lo = c.s - 2 * gamma_n(n_out + 16) * (g_l / l) * (state.nu_max + state.eta_max);
  // Squares below 2^-126 round to multiples of 2^-149, which may be more than they are.
  if (any_value) c.s_lo -= std::sqrt(double(d)) * 0x1p-74 / unit * (g_l / l);
  c.relative = c.bound / c.s;
  if (c.bound == 0 && c.s == 0) c.relative = 0;

  const bool finite = std::isfinite(c.bound) && std::isfinite(c.s) && std::isfinite(key) &&
                      std::isfinite(c.out_norm) && std::isfinite(e_val) && std::isfinite(c.den);
  if (!(finite && b.sound && state.notes_sound && l > 0 && c.den > 0)) c.bound = c.relative = kNaN;
  return c;
}

bool within_tolerance(const Certificate& c, bool relative, double tolerance) {
  if (relative) return c.bound <= tolerance * c.s_lo;
  return c.bound <= tolerance;
}

bool correct_block(const AttendContext& context, const QueryGroup& q, size_t b, const BlockRef& was,
                   const BlockRef& now, uint32_t mask, PassState* state,
                   std::span<CorrectionLog> logs, BlockTerms* before, BlockTerms* after) {
  const int heads = q.heads;
  for (int h = 0; h < heads; ++h) before->ref[h] = state->block_ref[state->at(h, b)];
  block_terms(context, q, was, state->unit, false, before);
  for (int h = 0; h < heads; ++h) after->ref[h] = before->ref[h];
  block_terms(context, q, now, state->unit, true, after);

  for (int h = 0; h < heads; ++h) {
    if ((mask >> h & 1) == 0) continue;
    const size_t i = state->at(h, b);
    const HeadSums& s = state->head[size_t(h)];
    // A block alone has at most the Delta that its run was charged.
    if (!(before->sum[h] == state->block_sum[i] && before->delta[h] <= state->delta[i]))
      return false;
    if (sources(was) != state->used[i])
      return false;  // other values leave sum and delta as they are
    if (!(double(after->ref[h]) - s.m < 300)) return false;  // doubles would overflow at 709
  }
  const double inv = 1.0 / state->unit;
  const bool codes_before = was.k == nullptr, codes_after = now.k == nullptr;
  const double bar_before = was.v == nullptr ? state->vbar[b] : state->nu[b];
  const double bar_after = now.v == nullptr ? state->vbar[b] : state->nu[b];
  for (int h = 0; h < heads; ++h) {
    if ((mask >> h & 1) == 0) continue;
    const size_t i = state->at(h, b);
    HeadSums& s = state->head[size_t(h)];
    CorrectionLog& log = logs[size_t(h)];
    if (log.count == 0) {
      const BlockSums sums = sum_blocks(*state, h);
      log.g_l = s.l;
      log.g_o = sums.g_o;
      log.g_m2 = s.m2;
      log.g_s = sums.s;
      log.g_a = sums.a_bar;
    }
    // c of the run, which the pass used; promoted values alone leave it as it is.
    const double c_minus = codes_before ? state->c[i] : 0, c_plus = codes_after ? state->c[i] : 0;
    if (codes_before && !codes_after) {
      state->delta[i] = after->delta[h];
      state->c[i] = c_of_delta(after->delta[h]);
      state->keep[i] = keep_of(state->c[i]);
    }
    const double minus = std::exp(double(before->ref[h]) - s.m);
    const double plus = std::exp(double(after->ref[h]) - s.m);
    const double w_minus = minus * before->sum[h], w_plus = plus * after->sum[h];
    const double m2_minus = c_minus * minus * inv * inv * before->m2[h];
    const double m2_plus = c_plus * plus * inv * inv * after->m2[h];
    s.l += w_plus - w_minus;
    s.m2 += m2_plus - m2_minus;
    s.s1 += inv * (plus * after->s1[h] - minus * before->s1[h]);
    for (int c = 0; c < state->head_dim; ++c) {
      const double add = inv * plus * after->o[h][c], remove = inv * minus * before->o[h][c];
      s.o[size_t(c)] += add - remove;
      s.a[size_t(c)] += c_plus * add - c_minus * remove;
    }
    log.count += 1;
    log.g_l += w_minus + w_plus;
    log.g_o += w_minus * bar_before + w_plus * bar_after;
    log.g_s += c_minus * w_minus + c_plus * w_plus;
    log.g_m2 += m2_minus + m2_plus;
    log.g_a += c_minus * w_minus * bar_before + c_plus * w_plus * bar_after;
    state->block_sum[i] = after->sum[h];
    state->block_ref[i] = after->ref[h];
    state->used[i] = sources(now);
  }
  return true;
}

void take_over(const PassState& fresh, int head, PassState* state) {
  const size_t first = state->at(head, 0), end = first + state->blocks;
  for (size_t i = first; i < end; ++i) {
    state->block_sum[i] = fresh.block_sum[i];
    state->block_ref[i] = fresh.block_ref[i];
    state->delta[i] = fresh.delta[i];
    state->c[i] = fresh.c[i];
    state->keep[i] = fresh.keep[i];
    state->score_bound[i] = fresh.score_bound[i];
    state->used[i] = fresh.used[i];
  }
  state->head[size_t(head)] = fresh.head[size_t(head)];
}

bool must_rerun(const PassState& state, int head, const CorrectionLog& log) {
  if (log.count == 0) return false;
  const HeadSums& s = state.head[size_t(head)];
  return !(s.l > 0) || !(log.g_l <= 8 * s.l) || !(log.g_o <= 8 * sum_blocks(state, head).g_o);
}

}  // namespace certkv
