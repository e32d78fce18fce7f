#include "runtime/certify/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/quantize.h"
#include "kernels/simd.h"

namespace certkv {
namespace {

// What a block's terms are computed from.
uint8_t sources(const BlockRef& block) {
  return uint8_t((block.k != nullptr ? kUsedKey : 0) | (block.v != nullptr ? kUsedValue : 0));
}

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
  ClosingSums x;
  x.head_dim = state.head_dim;
  x.tokens = double(state.tokens);
  x.unit = state.unit;
  x.l = sums.l;
  x.m2 = sums.m2;
  x.s1 = sums.s1;
  x.c_tokens = sums.c_tokens;
  x.score_max = double(sums.score_max);
  for (int i = 0; i < state.head_dim; ++i) {
    const double o = out[i], cast = o - sums.o[size_t(i)] / sums.l;
    x.o2 += o * o;
    x.oa += o * (sums.a[size_t(i)] / sums.l);
    x.cast2 += cast * cast;
  }
  x.nu_max = state.nu_max;
  x.eta_max = state.eta_max;
  x.vbar_max = state.vbar_max;
  x.notes_sound = state.notes_sound;
  x.skips = state.skips;
  x.blocks = sum_blocks(state, head);
  return close_certificate(x, log);
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
