#include "parallel/verdict_reduce.h"

#include <algorithm>
#include <bit>

namespace certkv {

void merge_verdict_words(uint64_t* into, const uint64_t* from, size_t records) {
  for (size_t i = 0; i < records; ++i, into += kVerdictWords, from += kVerdictWords) {
    for (int w = 0; w < kVerdictMaxWords; ++w) into[w] = std::max(into[w], from[w]);
    for (int w = kVerdictMaxWords; w < kVerdictWords; ++w) into[w] += from[w];
  }
}

void merge_verdict(VerdictRecord& into, const VerdictRecord& from) {
  using Words = std::array<uint64_t, kVerdictWords>;
  Words a = std::bit_cast<Words>(into);
  const Words b = std::bit_cast<Words>(from);
  merge_verdict_words(a.data(), b.data(), 1);
  into = std::bit_cast<VerdictRecord>(a);
}

void split_verdicts(const VerdictRecord* records, size_t count, uint64_t* words) {
  uint64_t* max = words;
  uint64_t* sum = words + count * kVerdictMaxWords;
  for (size_t i = 0; i < count; ++i) {
    const auto of = std::bit_cast<std::array<uint64_t, kVerdictWords>>(records[i]);
    max = std::copy_n(of.begin(), kVerdictMaxWords, max);
    sum = std::copy_n(of.begin() + kVerdictMaxWords, kVerdictSumWords, sum);
  }
}

void join_verdicts(const uint64_t* words, size_t count, VerdictRecord* records) {
  const uint64_t* max = words;
  const uint64_t* sum = words + count * kVerdictMaxWords;
  for (size_t i = 0; i < count; ++i, max += kVerdictMaxWords, sum += kVerdictSumWords) {
    std::array<uint64_t, kVerdictWords> of;
    std::copy_n(sum, kVerdictSumWords, std::copy_n(max, kVerdictMaxWords, of.begin()));
    records[i] = std::bit_cast<VerdictRecord>(of);
  }
}

}  // namespace certkv
