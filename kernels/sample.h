// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/arith/sampling.h"

namespace certkv {

struct SampleOptions {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: off
  double top_p = 1.0;        // 1: off
};

// The random stream of a job: a number in [0, 1) that depends on these three values alone, so that
// a request draws the same whatever is decoded beside it, on any number of ranks, and after resume.
// The counter (request, position) is hashed under the key `seed` by three rounds of the SplitMix64
// finaliser; 53 bits of the result are kept. SOURCE: Steele, Lea, Flood, "Fast splittable
// pseudorandom number generators", 2014.
double uniform_at(uint64_t seed, uint64_t request, uint64_t position);

// The token id with the largest logit, the lowest id among equals. logits: [vocabulary].
// Throws NonFinite if a logit is NaN or +infinity, or if all are -infinity; InvalidArgument for
// none.
int32_t sample_greedy(std::span<const float> logits);

// `token`, which was chosen elsewhere from a row with this largest logit, a NaN counting as
// largest. Throws NonFinite as above; `token` is then the place of the largest.
int32_t sampled_elsewhere(int32_t token, float largest);

// temperature 0: sample_greedy. Otherwise, in this order: logits / temperature; the top_k largest
// (ties: lowest ids first); softmax; the smallest prefix, largest first, whose mass reaches top_p;
// of what is left, in the order of ids, the token at `uniform`. Masses are the whole numbers of
// kernels/arith/sampling.h, so the device, on any number of ranks, draws the same.
// REQUIRES temperature >= 0 and finite, top_k >= 0, 0 < top_p <= 1, 0 <= uniform < 1.
// Throws InvalidArgument where these do not hold, NonFinite as above.
int32_t sample_token(std::span<const float> logits, const SampleOptions& options, double uniform);

// The same as the device takes it: temperature 0 where the largest logit alone decides. Throws
// InvalidArgument as sample_token.
SampleDraw draw_of(const SampleOptions& options, double uniform);

}  // namespace certkv
