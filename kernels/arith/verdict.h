// The plain record in which a step's verdicts are counted and agreed upon over the ranks.
//
// Everything in it is an unsigned integer, because floating-point maxima lose NaN (MPI_MAX and
// ncclMax both do): a bound travels as key(bound), whose order puts NaN and every negative number
// above infinity. SOURCE: method section 8.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace certkv {

// What became of one head at one decode step. The values are the file codes of `certkv attend`.
enum class Outcome : uint8_t { Certified = 0, Exact = 1, Failed = 2, Over = 3 };

const char* outcome_name(Outcome outcome);

// Order used for reductions: certified < exact < over < failed.
CERTKV_INLINE uint64_t severity(Outcome o) {
  switch (o) {
    case Outcome::Certified: return 0;
    case Outcome::Exact: return 1;
    case Outcome::Over: return 2;
    case Outcome::Failed: return 3;
  }
  return 3;
}
CERTKV_INLINE Outcome outcome_of_severity(uint64_t s) {
  return s == 0 ? Outcome::Certified : s == 1 ? Outcome::Exact : s == 2 ? Outcome::Over
                                                                         : Outcome::Failed;
}

// Order-preserving integer of a bound. Decide on the integer; never decode first.
CERTKV_INLINE uint64_t bound_key(float x) {
  return x >= 0 ? std::bit_cast<uint32_t>(x + 0.0f) : 0x7fc00000u;
}

inline constexpr int kRungs = 5;  // rung 0 .. 4

// One per sequence and step. Two groups, each reduced by one operation over the tensor-parallel
// group: `max` by MAX and `sum` by SUM. Receivers pre-fill the result with kFailed.
struct VerdictRecord {
  struct Max {
    uint64_t severity = 0;       // worst outcome
    uint64_t bound = 0;          // bound_key of the worst returned absolute bound
    uint64_t relative = 0;       // bound_key of the worst returned relative bound
    uint64_t candidate = 0;      // the same of the candidates, before the ladder acted
    uint64_t candidate_relative = 0;
    uint64_t step = 0;           // MAX and, through its complement, MIN of (epoch, step): the ranks
    uint64_t step_complement = 0;  // must all be at the same one
    uint64_t error = 0;          // 1 + ErrorKind of the worst error, 0 none
  } max;
  struct Sum {
    uint64_t votes = 0;  // 1 per rank: must equal the group's size afterwards
    uint64_t certified = 0, exact = 0, over = 0, failed = 0;
    std::array<uint64_t, kRungs> rungs{};  // head-steps by the highest rung reached
    uint64_t promoted_keys = 0, promoted_values = 0;  // blocks, this step
    uint64_t scratch_hits = 0, scratch_misses = 0;    // originals wanted by a step
    uint64_t paged_bytes = 0;                         // tier 2 to scratch
    uint64_t canary = 0, digest = 0;                  // failures seen
    // What attention read, the tokens it attended to (both summed over KV heads), and what those
    // take as originals. UNITS: bytes, tokens, bytes
    uint64_t read_bytes = 0, attended_tokens = 0, dense_bytes = 0;
    uint64_t prefetched = 0, prefetched_used = 0;  // blocks of one tensor, see GroupReport
  } sum;
};
inline constexpr int kVerdictMaxWords = sizeof(VerdictRecord::Max) / 8;
inline constexpr int kVerdictSumWords = sizeof(VerdictRecord::Sum) / 8;
static_assert(sizeof(VerdictRecord) == 8 * (kVerdictMaxWords + kVerdictSumWords));

CERTKV_INLINE void set_step(VerdictRecord& r, uint64_t epoch_and_step) {
  r.max.step = epoch_and_step;
  r.max.step_complement = ~epoch_and_step;
}

// True iff every rank voted, all at the same step. Written so that a damaged record fails.
CERTKV_INLINE bool verdict_agreed(const VerdictRecord& r, uint64_t world, uint64_t epoch_and_step) {
  return r.sum.votes == world && r.max.step == epoch_and_step &&
         r.max.step_complement == ~epoch_and_step;
}

// What a result holds before a reduction has written it: nobody voted, everything failed.
inline VerdictRecord failed_verdict() {
  VerdictRecord r;
  r.max.severity = severity(Outcome::Failed);
  r.max.bound = r.max.relative = r.max.candidate = r.max.candidate_relative = 0x7fc00000u;
  return r;
}

}  // namespace certkv
