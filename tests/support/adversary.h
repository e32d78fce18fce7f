// An optimiser that pushes originals against the bounds of their own codes.
//
// A bound holds for every original that a code may stand for. Drawn originals leave most of it
// unused, because their errors cancel; here the originals are chosen, within the cells of codes
// that stay as they are, such that the distance between exact attention over them and attention
// over the codes grows: keys so that the scores of tokens on one side of a direction g rise and
// those of the others fall (method D1, E2), values so that all of them err along g (E1), and g
// itself as the error that came out (alternating maximisation). It knows the method's text and the
// codes, not the bounds.
#pragma once

#include <cstdint>

#include "kernels/layout.h"
#include "tests/support/oracle.h"

namespace certkv {

struct Attack {
  int rounds = 0;            // of the alternation, from each start
  bool flip_values = false;  // first give values signs such that half of the mass lies on each side
};

struct AttackResult {
  double before = 0, after = 0;  // ||O_ref - O^|| of attention over all codes
  size_t codes = 0,
         changed = 0;  // codes of all sealed blocks, and how many differ after the attack
};

// q: [head_dim]. x is replaced by the worst originals found.
AttackResult attack(const PageFormat& format, const Attack& how, const float* q,
                    oracle::Originals* x);

}  // namespace certkv
