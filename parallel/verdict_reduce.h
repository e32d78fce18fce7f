// How two verdict records become one: the operation that every communicator reduces with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arith/verdict.h"

namespace certkv {

inline constexpr int kVerdictWords = kVerdictMaxWords + kVerdictSumWords;

// into[i] := the maximum of the `max` words and the sum (modulo 2^64) of the `sum` words.
// Associative and commutative on the bits: the order of ranks does not matter.
// into, from: [records, kVerdictWords]
void merge_verdict_words(uint64_t* into, const uint64_t* from, size_t records);

void merge_verdict(VerdictRecord& into, const VerdictRecord& from);

// The same records with all `max` words in front of all `sum` words, for reductions that have one
// operation per call. words: [records * kVerdictMaxWords, records * kVerdictSumWords]
void split_verdicts(const VerdictRecord* records, size_t count, uint64_t* words);
void join_verdicts(const uint64_t* words, size_t count, VerdictRecord* records);

}  // namespace certkv
