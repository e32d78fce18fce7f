// Which blocks to promote. Pure functions over a pass and its certificate, without errors of their
// own: a NaN counts as the heaviest. Spans of blocks are the pass's.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/certify/certificate.h"

namespace certkv {

// Mass of each block under the pass: rho'_b of method section 4. out: [blocks]
void block_masses(const PassState& state, int head, std::vector<double>* out);

// l_b: natural log of a block's unnormalised mass, ref + log(sum). SOURCE: method section 5.1.
double block_log_mass(const PassState& state, int head, size_t block);

struct Promotions {
  std::vector<uint32_t> keys, values;  // ascending
  bool enough = true;  // false: even promoting all that may be promoted is not predicted to do
};

// Policy `budget`, rungs 1 and 2. SOURCE: method section 5.3.
// allowed: the largest numerator of E4 that would be certified, (tolerance * S_lo) * den /
// (1+2^-10). value_share: of `allowed` that E_val may use before values are promoted.
Promotions select_for_budget(const PassState& state, int head, std::span<const BlockRef> blocks,
                             const Certificate& certificate, double allowed, double value_share);

// Policy `paper`. SOURCE: method section 5, "Policies".
struct PaperRule {
  double tau_cov, expand_tail, v_tol;
  int64_t k_min, k_max;
  bool greedy_values;
};
// Blocks by INT8-estimated mass, descending: the smallest K that reaches tau_cov, clamped; once
// more with 2 k_max where the tail left exceeds expand_tail. Only quantised blocks count.
std::vector<uint32_t> select_paper_keys(const PassState& state, int head,
                                        std::span<const BlockRef> blocks, const PaperRule& rule);
std::vector<uint32_t> select_paper_values(const AttendContext& context, const PassState& state,
                                          int head, std::span<const BlockRef> blocks,
                                          const PaperRule& rule);

// Ranking consistency. SOURCE: method section 6. Returns the blocks outside F that leave the r-th
// place undecided, ascending; empty when resolved. When |F| < r and F is not everything: the
// heaviest blocks outside F, as many as are lacking.
// eps_l uses block_tokens + 4 terms. NaN anywhere counts as unresolved.
std::vector<uint32_t> ranking_unresolved(const AttendContext& context, const QueryGroup& q,
                                         const PassState& state, int head,
                                         std::span<const BlockRef> blocks, int r);

}  // namespace certkv
