// What a step leaves behind for the next: which originals stay near the compute.
// SOURCE: method section 5.4.
#pragma once

#include <span>
#include <vector>

#include "runtime/certify/head_step.h"

namespace certkv {

// Scores every resident block by what it would have contributed to the bound had its codes been
// used, as a share of what each head may spend (`allowed`: [heads], numerators of E4), lets the
// others age out, and unpins all. by_mass (policy paper): resident blocks only serve as a cache, so
// they are kept by recency alone and the next pass starts from codes again.
void learn(const AttendContext& context, const PassState& pass, std::span<const BlockRef> blocks,
           std::span<const double> allowed, bool by_mass, HeadState* state);

// What a step's numbers for the blocks of a KV head are drawn from, with mix_counter().
uint64_t counter_seed(uint64_t seed, const StepWhere& where);
// Uniform in [0, 1) from a counter: the same on every machine and for every number of ranks.
double counter_uniform(uint64_t seed, const StepWhere& where, uint32_t block);

// The r heaviest blocks whose keys are original have the same order under their codes (method 6).
// scored: [blocks] log masses of the scoring phase.
bool same_order_under_codes(const PassState& pass, int head, std::span<const double> scored, int r);

}  // namespace certkv
