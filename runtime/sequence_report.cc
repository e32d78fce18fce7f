#include <algorithm>

#include "kernels/arith/rounding.h"
#include "runtime/sequence_cache.h"

namespace certkv {

HeadFigures figures_of(const HeadReport& r) {
  return {float_up(r.candidate.bound), float_up(r.candidate.relative),
          float_up(r.returned.bound),  float_up(r.returned.relative),
          float_up(r.returned.e_key),  float_up(r.returned.e_val),
          float_up(r.returned.e_fp),   float_up(r.returned.e_key_paper)};
}

VerdictRecord verdict_of(const SequenceReport& report, bool failed, uint64_t step, int head_dim) {
  VerdictRecord v;
  v.sum.votes = 1;
  set_step(v, step);
  for (const GroupReport& g : report.layers) {
    for (const HeadReport& r : g.heads) {
      const Outcome outcome = failed ? Outcome::Failed : r.outcome;
      v.max.severity = std::max(v.max.severity, severity(outcome));
      v.max.bound = std::max(v.max.bound, bound_key(float_up(r.returned.bound)));
      v.max.relative = std::max(v.max.relative, bound_key(float_up(r.returned.relative)));
      v.max.candidate = std::max(v.max.candidate, bound_key(float_up(r.candidate.bound)));
      v.max.candidate_relative =
          std::max(v.max.candidate_relative, bound_key(float_up(r.candidate.relative)));
      switch (outcome) {
        case Outcome::Certified:
          ++v.sum.certified;
          break;
        case Outcome::Exact:
          ++v.sum.exact;
          break;
        case Outcome::Over:
          ++v.sum.over;
          break;
        case Outcome::Failed:
          ++v.sum.failed;
          break;
      }
      ++v.sum.rungs[size_t(r.rung)];
      v.sum.promoted_keys += uint64_t(r.promoted_keys);
      v.sum.promoted_values += uint64_t(r.promoted_values);
    }
    v.sum.scratch_hits += g.scratch_hits;
    v.sum.scratch_misses += g.scratch_misses;
    v.sum.paged_bytes += g.paged_bytes;
    v.sum.prefetched += g.prefetched;
    v.sum.prefetched_used += g.prefetched_used;
    v.sum.read_bytes += g.read_bytes;
    v.sum.attended_tokens += g.attended_tokens;
    v.sum.dense_bytes += g.attended_tokens * 4 * uint64_t(head_dim);
    v.sum.canary += g.canary;
    v.sum.digest += g.digest;
  }
  v.sum.digest += report.damaged_pages + report.lost_reads;
  if (report.error) {
    v.max.error = 1 + uint64_t(*report.error);
    v.max.severity = severity(Outcome::Failed);
  }
  return v;
}

}  // namespace certkv
