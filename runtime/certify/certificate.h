// The certificate of one head at one step from the CPU's pass, and the corrections of that pass.
// Nothing here throws: what is not known is NaN or infinite, or false.
// SOURCE: method sections 4 and 4b; the closing formulas are in kernels/arith/certificate.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/arith/certificate.h"
#include "kernels/attend.h"

namespace certkv {

// O = o / l. out: [head_dim]
void finish_output(const PassState& state, int head, float* out);

// Reads the pass alone. `out` as finish_output wrote it. THREADS: any, for one state.
Certificate certify(const PassState& state, int head, const CorrectionLog& corrections,
                    const float* out);

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
