// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>

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
// Throws NonFinite if a logit is NaN or +infinity, or if all are -infinity; InvalidArgument for none.
int32_t sample_greedy(std::span<const float> logits);

// The same where that token and its logit have been found elsewhere; a NaN counts as the largest.
int32_t sample_greedy(int32_t token, float logit);

// temperature 0: sample_greedy. Otherwise, in this order: logits / temperature; the top_k largest
// (ties: lowest ids first); softmax; the smallest prefix, largest first, whose mass reaches top_p;
// the token at `uniform` of what is left. All in double.
// REQUIRES temperature >= 0 and finite, top_k >= 0, 0 < top_p <= 1, 0 <= uniform < 1.
// Throws InvalidArgument where these do not hold, NonFinite as above.
int32_t sample_token(std::span<const float> logits, const SampleOptions& options, double uniform);

}  // namespace certkv
