// The certificate of one head at one step: the closing arithmetic over a pass, and its corrections.
//
// UNITS: bounds, errors and norms are L2 norms of vectors of values; `relative` and the masses have
// none. Nothing here throws: what is not known is NaN or infinite, or false.
//
// Everything here runs in double precision and is written so that NaN never certifies.
// SOURCE: method sections 4 and 4b; tags beside the formulas in certificate.cc.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attend.h"

namespace certkv {

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

// E4's last factor: all roundings of the closing arithmetic, in double, and of its sums over
// blocks.
inline constexpr double kRaise = 1 + 0x1p-10;

// O = o / l. out: [head_dim]
void finish_output(const PassState& state, int head, float* out);

// Reads the pass alone. `out` as finish_output wrote it. THREADS: any, for one state.
Certificate certify(const PassState& state, int head, const CorrectionLog& corrections,
                    const float* out);

// E5, for a tolerance relative to S or absolute. NaN on either side: false.
bool within_tolerance(const Certificate& c, bool relative, double tolerance);

// Replaces a block's contribution to the heads in `mask` (bit h) by one computed from `now`.
// Returns false if the state cannot be corrected (what would be removed is not bitwise what was
// added, or the new scores are out of reach): then the pass must be run again.
// logs: [heads]. `terms_old` and `terms_new` are left holding both sides, for the canary.
bool correct_block(const AttendContext& context, const QueryGroup& q, size_t b, const BlockRef& was,
                   const BlockRef& now, uint32_t mask, PassState* state,
                   std::span<CorrectionLog> logs, BlockTerms* terms_old, BlockTerms* terms_new);

// Everything of one head from another pass over the same blocks, whose corrections begin anew.
void take_over(const PassState& fresh, int head, PassState* state);

// The rerun rule after corrections (method 4b): true if cancellation has eaten the state.
bool must_rerun(const PassState& state, int head, const CorrectionLog& log);

}  // namespace certkv
