// Every term of the certificate in float64, straight from the method's text (sections 3, 4, 4b and
// 12): token by token from served values, R as the weighted distance that it is and not as the
// quadratic form that a pass can afford. Nothing of the product is called; its snapshot says which
// blocks were read as codes and which as originals.
#pragma once

#include <span>
#include <vector>

#include "tests/support/sealed_head.h"

namespace certkv::oracle {

// D1 and g_b of one block for one query, with annotations measured by this oracle.
struct ScoreError {
  double d = 0;  // D_b; 0 where keys are original
  // What gamma_n goes with: sum |q_c| kbar_bc / sqrt(d), and ||q|| ||kbar_b|| / sqrt(d) above it
  // (||q|| K_b / sqrt(d) where keys are original), of all codes there are.
  double least = 0, most = 0;
  double query = 0;  // what 16 bits of q_c step_c can lose: 128 d / 2 last places of the largest
  double any_query = 0;  // the same where keys of 12 bits, of 2048 d / 2, are scored like that too
};
ScoreError score_error(const SealedHead& head, const BlockRef& block, size_t b, const float* q);

// T: blocks with quantised keys.
struct Terms {
  std::vector<double> mass;    // [blocks] sum of exp(score used - m), m the largest score used
  std::vector<double> size;    // [blocks] the same times ||v^||
  std::vector<double> bar;     // [blocks] mass times vbar_b of value codes, nu_b of original values
  double m = 0, z = 0;         // Z' = sum of mass
  double s = 0, h = 0, r = 0;  // E2, over T
  double den = 0;
  double key_sqrt = 0, key_sum = 0;  // the two members of E4's minimum
  double e_val = 0;                  // E1
  double big_s = 0, g_o = 0;         // S of E5; sum of bar / Z'
  double m2 = 0, a_bar = 0;          // over T: c_b w' times ||v^||^2, and times the block's bar
  double out_norm = 0;
  double nu_max = 0, eta_max = 0;
};

// delta: [blocks] Delta_b as charged. out: [head_dim].
Terms terms(const SealedHead& head, std::span<const BlockRef> blocks, const float* q,
            std::span<const float> delta, std::span<const float> out);

// The text's eps_w for J = 1 and scores any distance apart, with eps_e as small as FP32 allows.
inline constexpr double kUnitRoundoff = 0x1p-24;
inline constexpr double kLeastEpsW = 2 * (0x1p-22 + 2 * kUnitRoundoff) + 3 * kUnitRoundoff * 104;
inline double gamma(double n) {
  return n * kUnitRoundoff / (1 - n * kUnitRoundoff);
}

}  // namespace certkv::oracle
