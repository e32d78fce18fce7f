#include "runtime/engine.h"

namespace certkv {

void HeadStepCounts::add(const VerdictRecord& record) {
  const VerdictRecord::Sum& s = record.sum;
  head_steps += s.certified + s.exact + s.over + s.failed;
  certified += s.certified;
  exact += s.exact;
  over += s.over;
  failed += s.failed;
  for (size_t r = 0; r < rungs.size(); ++r) rungs[r] += s.rungs[r];
  promoted_keys += s.promoted_keys;
  promoted_values += s.promoted_values;
  scratch_hits += s.scratch_hits;
  scratch_misses += s.scratch_misses;
  paged_bytes += s.paged_bytes;
  canary += s.canary;
  digest += s.digest;
  read_bytes += s.read_bytes;
  attended_tokens += s.attended_tokens;
  dense_bytes += s.dense_bytes;
  prefetched += s.prefetched;
  prefetched_used += s.prefetched_used;
}

void HeadStepCounts::add(const HeadStepCounts& other) {
  head_steps += other.head_steps;
  certified += other.certified;
  exact += other.exact;
  over += other.over;
  failed += other.failed;
  for (size_t r = 0; r < rungs.size(); ++r) rungs[r] += other.rungs[r];
  promoted_keys += other.promoted_keys;
  promoted_values += other.promoted_values;
  scratch_hits += other.scratch_hits;
  scratch_misses += other.scratch_misses;
  paged_bytes += other.paged_bytes;
  canary += other.canary;
  digest += other.digest;
  read_bytes += other.read_bytes;
  attended_tokens += other.attended_tokens;
  dense_bytes += other.dense_bytes;
  prefetched += other.prefetched;
  prefetched_used += other.prefetched_used;
}

}  // namespace certkv
