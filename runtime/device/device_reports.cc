// The device's cache: what a step has left, as reports of the CPU's cache.
#include <cmath>

#include "kernels/base/log.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kPageTokens;

namespace {

// Of cuda::kCanaryScore and its like.
const char* broken_promise(uint32_t what) {
  return what == cuda::kCanaryScore   ? "a score of its codes is off by more than promised"
         : what == cuda::kCanaryError ? "a value of its codes is off by more than promised"
                                      : "a value's norm is above what was promised";
}

}  // namespace

// Promotions are the KV head's: they count for its first head that needed them, under policy paper
// for all of them.
void DeviceCache::read_reports(Sequence* s) {
  const size_t heads = size_t(heads_.count()), n = size_t(config_.heads_per_group());
  const Tolerance& tolerance = s->rules.tolerance;
  const uint64_t originals = 4 * uint64_t(config_.head_dim);  // of a token
  const bool paper = s->rules.policy == Policy::Paper;
  const auto fits = [&](const Certificate& c) {
    return within_tolerance(c, tolerance.is_relative, tolerance.value);
  };
  const auto fail = [&](ErrorKind kind, const std::string& text) {
    if (s->failed()) return;
    s->report.error = kind;
    s->report.error_text = text;
  };
  for (size_t cell = 0; cell < cells(); ++cell) {
    const uint32_t* marks = s->marks_host.data() + cell * kMarks;
    const cuda::LadderCounts& counts = s->counts_host[cell];
    GroupReport& g = s->report.layers[cell];
    g.clear(n);
    // What this step promoted was not there for its first pass.
    const auto before = [](uint32_t resident, uint32_t promoted) {
      return resident > promoted ? resident - promoted : 0;
    };
    g.f_blocks = before(counts.resident_keys, counts.promoted_keys + counts.explored);
    g.x_blocks = before(counts.resident_values, counts.promoted_values + counts.explored);
    g.scratch_hits = paper ? counts.hits : g.f_blocks + g.x_blocks;
    g.scratch_misses = counts.paged;
    g.paged_bytes = uint64_t(counts.paged + counts.prefetched) * block_bytes_;
    g.prefetched = counts.prefetched;
    g.prefetched_used = counts.prefetched_used;
    g.digest = counts.digest;
    g.canary = counts.canary + counts.canary_ahead;
    g.attended_tokens = s->tokens;
    const uint64_t coded = s->dense() ? 0 : s->pages;
    if (has_classes_) g.precision = int(s->kinds[cell]);  // numbered alike
    const uint64_t pass_bytes = coded * bytes_at(*s, cell, s->pages) +
                                (s->tokens - coded * kPageTokens) * originals +
                                (g.f_blocks + g.x_blocks) * block_bytes_;
    const uint64_t promoted_bytes =
        paper && marks[kAgain] != 0
            ? (counts.promoted_keys + counts.promoted_values) * uint64_t(block_bytes_)
            : 0;
    const uint64_t passes = 1 + (paper ? marks[kAgain] : counts.rounds);
    g.read_bytes = pass_bytes * passes + promoted_bytes + counts.dense * s->tokens * originals;
    const std::string where =
        fmt::format("layer {} KV head {}", cell / heads, size_t(heads_.begin) + cell % heads);
    bool first = true;
    const auto needed = [&](size_t h, const HeadReport& r) {
      return !fits(r.candidate) || (counts.ranked >> h & 1) != 0;
    };
    for (size_t h = 0; h < n; ++h) {
      HeadReport& r = g.heads[h];
      r.returned = s->judged_host[cell * n + h];
      const bool climbed = counts.rounds > 0 || counts.dense > 0;
      r.candidate = climbed ? s->candidate_host[cell * n + h] : r.returned;
      if (counts.rung4 > 0 && marks[kClimbed] == 0) std::swap(r.candidate, r.returned);
      const bool dense = s->dense() || (counts.dense > 0 && (marks[kFailing] >> h & 1) != 0);
      if (dense) {
        r.rung = counts.rung4 > 0 ? 4 : 3;
        r.outcome = std::isfinite(r.returned.bound) ? Outcome::Exact : Outcome::Failed;
      } else {
        r.outcome = fits(r.returned) ? Outcome::Certified : Outcome::Over;
        if (climbed && (paper || needed(h, r)))
          r.rung = counts.promoted_values > 0 ? 2 : counts.promoted_keys > 0 ? 1 : 0;
      }
      if (climbed && (paper || (first && needed(h, r)))) {
        first = false;
        r.promoted_keys = counts.promoted_keys;
        r.promoted_values = counts.promoted_values;
      }
      if (r.outcome == Outcome::Over &&
          (s->rules.policy == Policy::Budget || !std::isfinite(r.returned.out_norm)))
        r.outcome = Outcome::Failed;  // never an output that nothing is known of
      if (r.outcome == Outcome::Failed)
        fail(counts.digest > 0 ? ErrorKind::OriginalsLost : ErrorKind::Uncertifiable,
             where + (counts.digest > 0 ? ": originals are corrupt or lost, and no copy is left"
                                        : ": no finite output with a finite bound exists"));
      s->report.figures[cell * n + h] = figures_of(r);
    }
    if ((marks[kFlags] & cuda::kFlagNonFinite) != 0)
      fail(ErrorKind::NonFinite, where + ": a query, key or value is NaN or infinite");
    if ((marks[kFlags] & cuda::kFlagMissing) != 0)
      fail(ErrorKind::DeviceError, where + ": the page table names originals that no slot holds");
    if (g.canary > 0)
      log_error("canary: sequence {} {} block {}: {}{}; {}", s->id, where, counts.canary_last / 4,
                broken_promise(counts.canary_last % 4),
                g.canary > 1 ? fmt::format(", and {} more looks", g.canary - 1) : "",
                counts.canary > 0
                    ? "the layer goes dense"
                    : fmt::format("read ahead, and not used; the step at {} tokens is in doubt",
                                  s->tokens));
    if (counts.digest > 0)
      log_warning("sequence {} {}: {} blocks of originals did not match what was asked for", s->id,
                  where, counts.digest);
  }
}

}  // namespace certkv
