// The closing arithmetic of a certificate: one head's sums in, its bound out. Every backend's.
//
// Everything here runs in double precision and is written so that NaN never certifies.
// SOURCE: method sections 4 and 4b, and E6 where values were skipped; tags beside the formulas.
#pragma once

#include <cmath>

#include "kernels/arith/chains.h"

namespace certkv {

// UNITS: bounds, errors and norms are L2 norms of vectors of values; `relative` and the masses have
// none.
struct Certificate {
  double bound = 0;        // E4: ||O_ref - O||_2 at most this; NaN or inf: nothing is known
  double e_key = 0;        // the minimum in E4, over den
  double e_val = 0;        // E1, over den
  double e_fp = 0;         // the rest: bound - e_key - e_val
  double e_key_paper = 0;  // telemetry: the published key term
  double s = 0;            // S of E5: mean norm of the served values under the served weights
  double s_lo = 0;         // S rounded down by its own accumulation error
  double relative = 0;     // bound / S; 0/0 is 0
  double den = 0;          // E2
  double e_acc = 0;        // E_acc of 4b, before den
  double key_sqrt = 0, key_sum = 0;           // the two candidates of the minimum in E4, before den
  double r_term = 0, h_term = 0, s_term = 0;  // R, H and s of E2
  double out_norm = 0;                        // ||O||
};

// What corrections have done to one head's sums since its pass (method 4b).
struct CorrectionLog {
  int count = 0;
  // All mass that ever passed through the sums: of the pass, plus everything removed and added.
  double g_l = 0;   // weights (G_l of 4b)
  double g_o = 0;   // weights times vbar_b (G_o)
  double g_s = 0;   // c_b times weights: what the key bound's sums a and m2 were built from
  double g_m2 = 0;  // c_b times weights times ||v^||^2
  double g_a = 0;   // c_b times weights times vbar_b
};

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
inline constexpr double kMaxBlockTokens = 32;

// One head's pass: its sums about m (see HeadSums), products of its output, notes of its blocks.
struct ClosingSums {
  int head_dim = 0;
  double tokens = 0, unit = 1;
  double l = 0, m2 = 0, s1 = 0, c_tokens = 0, score_max = 0;
  double o2 = 0;     // ||O||^2 of the output as written
  double oa = 0;     // O . a / l
  double cast2 = 0;  // ||O - o / l||^2: what writing it as float has cost
  double nu_max = 0, eta_max = 0, vbar_max = 0;
  bool notes_sound = true;
  bool skips = false;
  double s_share = 1;  // of blocks.s, of what was summed: under E2's root r_fp charges its rounding
  BlockSums blocks;
};

// E4's last factor: all roundings of the closing arithmetic, in double, and of its sums over
// blocks.
inline constexpr double kRaise = 1 + 0x1p-10;
inline constexpr double kRoundDown =
    1 - 0x1p-40;  // sums of at most 2^12 doubles a lane, rounded to nearest

// The published formula for the key part, about l: for comparison, nothing depends on it.
CERTKV_HD inline double published_key_bound(double nu_max, double score_max, double tail,
                                            double l) {
  return 2 * nu_max * std::exp(2 * score_max) * (tail / l) * std::expm1(2 * score_max);
}

// All but e_key_paper, which is 0.
CERTKV_HD inline Certificate close_bounds(const ClosingSums& x, const CorrectionLog& log) {
  const BlockSums& b = x.blocks;
  const double l = x.l, d = x.head_dim;
  const double over_l =
      1 / l;  // one rounding more each; a division costs a device a hundred cycles
  Certificate c;
  c.out_norm = std::sqrt(x.o2) * (1 + 0x1p-40);

  // Sums over all blocks. expm1(Delta) = c, exp(-Delta) = 1 / (1 + c).
  const double s = b.s * over_l, e_val = b.value * over_l;
  c.den = b.den * over_l * kRoundDown;

  // E2 over T; what has original keys enters by the sum over its blocks. What corrections removed
  // has left its rounding behind, so r_fp counts everything that ever entered m2 and a.
  const bool corrected = log.count > 0;
  const double m2 = x.m2 * over_l;
  const double g_s = corrected ? log.g_s * over_l : s, g_m2 = corrected ? log.g_m2 * over_l : m2;
  const double g_a = (corrected ? log.g_a : b.a_bar) * over_l;
  // Beside a value 2^60 times larger, squares vanish in the pass's unit, and products of steps,
  // codes and weights do beside one 2^120 times larger: at most 2^-149 is lost by each square,
  // product and sum, and 2^8 times that where a step is lost before its code.
  const bool any_value = x.nu_max > 0 || x.vbar_max > 0;  // all zero: nothing was rounded
  const double lost = any_value ? (d + 64) * 0x1p-138 * (1 + 2.0 * log.count) : 0.0;
  const double tokens_l = x.tokens * over_l;
  // Skipped values count with their norm where the largest eta is asked for.
  const double eta_max = x.skips && x.nu_max > x.eta_max ? x.nu_max : x.eta_max;
  const double m2_lost = lost * (s + tokens_l + x.c_tokens * over_l) / (x.unit * x.unit);
  const double n_m2 = kChainOutput + chain_norm(x.head_dim) + d + 8 + 2.0 * log.count;
  const double r_fp = gamma_n(n_m2) * (g_m2 + 2 * c.out_norm * g_a + g_s * x.o2) + m2_lost;
  c.r_term = std::sqrt(positive_part(m2 - 2 * x.oa + s * x.s_share * x.o2) + r_fp);
  c.h_term = std::sqrt(b.h2 * over_l);
  c.s_term = s;
  const double originals = (b.f_nu + b.f_sum * c.out_norm) * over_l;
  c.key_sqrt = std::sqrt(s) * (c.r_term + c.h_term) + originals;
  c.key_sum = (b.t_nu + b.s * c.out_norm) * over_l + originals;

  // E3 / 4b. The sums run over |base| + code step where values are codes.
  const double g_l = corrected ? log.g_l : l, g_o = corrected ? log.g_o : b.g_o;
  const double n_out = kChainOutput + 2.0 * log.count + 3;
  c.e_acc = (gamma_n(n_out) * (g_o + c.out_norm * g_l) +
             b.flushed * double(kExpAbsolute) * (x.nu_max + eta_max + c.out_norm)) *
                over_l +
            lost * tokens_l / x.unit + 3 * kUnit * c.out_norm + std::sqrt(x.cast2);

  // Either is a bound by itself: where a or m2 overflowed, key_sqrt is inf or NaN and the sum
  // counts.
  const double key = c.key_sqrt <= c.key_sum ? c.key_sqrt : c.key_sum;
  c.bound = kRaise * (key + e_val + c.e_acc) / c.den;
  c.e_key = key / c.den;
  c.e_val = e_val / c.den;
  c.e_fp = c.bound - c.e_key - c.e_val;

  // E5. Every term of S is positive, so its error is relative.
  c.s = x.s1 * over_l;
  c.s_lo = c.s * (1 - 2 * gamma_n(kChainOutput + 16)) * kRoundDown;
  if (corrected)  // a sum from which terms were subtracted: absolute error of what passed through
    c.s_lo = c.s - 2 * gamma_n(n_out + 16) * (g_l * over_l) * (x.nu_max + x.eta_max);
  // Squares below 2^-126 round to multiples of 2^-149, which may be more than they are.
  if (any_value) c.s_lo -= std::sqrt(d) * 0x1p-74 / x.unit * (g_l * over_l);
  c.relative = c.bound / c.s;
  if (c.bound == 0 && c.s == 0) c.relative = 0;

  const bool finite = std::isfinite(c.bound) && std::isfinite(c.s) && std::isfinite(key) &&
                      std::isfinite(c.out_norm) && std::isfinite(e_val) && std::isfinite(c.den);
  if (!(finite && b.sound && x.notes_sound && l > 0 && c.den > 0))
    c.bound = c.relative = std::numeric_limits<double>::quiet_NaN();
  return c;
}

CERTKV_HD inline Certificate close_certificate(const ClosingSums& x, const CorrectionLog& log) {
  Certificate c = close_bounds(x, log);
  c.e_key_paper = published_key_bound(x.nu_max, x.score_max, x.blocks.tail, x.l);
  return c;
}

// E5, for a tolerance relative to S or absolute. NaN on either side: false.
CERTKV_HD inline bool within_tolerance(const Certificate& c, bool relative, double tolerance) {
  if (relative) return c.bound <= tolerance * c.s_lo;
  return c.bound <= tolerance;
}

// The largest numerator of E4 that would be certified.
CERTKV_HD inline double allowed_error(const Certificate& c, bool relative, double tolerance) {
  return tolerance * (relative ? c.s_lo : 1.0) * c.den / kRaise;
}

}  // namespace certkv
