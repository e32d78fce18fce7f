// The rolling scrub of tier 1: which pages a step verifies, and how a damaged one is rebuilt.
//
// SOURCE: method section 7, "Tier-1 digest". A look at a page covers its codes, metadata and
// annotations (by the digest written at its sealing), what the block table says of its blocks, and
// their originals near the compute. Open tokens are verified by DeviceTier::append, at every step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/certify/head_step.h"

namespace certkv {

// Page p of a (layer, KV head) is due before every step at which the sequence holds t tokens with
// t = p + phase modulo `period`, and before the first step that finds it sealed. The phases of
// layers and heads are spread evenly, so that every step verifies about the same share. All of it
// depends on the sequence's own length and on global indices alone: not on time, batch or the
// number of ranks.
class ScrubSchedule {
 public:
  // UNITS: steps of a sequence. 0: nothing is ever due. 1: every page, before every step.
  explicit ScrubSchedule(uint64_t period) : period_(period) {}
  uint64_t period() const { return period_; }

  // The first page due at where.step (tokens the sequence holds before the step's own); the others
  // follow at distances of period(). REQUIRES period() > 0
  size_t first_due(const StepWhere& where) const;
  // The latest step before where.step at which the page was due. REQUIRES period() > 0
  uint64_t last_due(const StepWhere& where, size_t page) const;

 private:
  uint64_t phase(const StepWhere& where) const;
  uint64_t period_;
};

struct PageFinding {
  size_t page = 0;
  PageState state = PageState::Sound;
  bool resident = false;  // originals near the compute are damaged, or a pointer to them is
};

// Verifies the pages that are due, or all of them; what is damaged is appended to *found. Nothing
// is allocated while all is sound. THREADS: `state` is only read.
void scrub_due(const ScrubSchedule& schedule, const StepWhere& where, const HeadState& state,
               std::vector<PageFinding>* found);
void scrub_all(const HeadState& state, std::vector<PageFinding>* found);

struct PageRepair {
  enum class Result {
    NotNeeded,  // has been repaired meanwhile, through another sequence that shares the page
    Repaired,
    Lost,         // originals are not to be had: the page must not be read any more
    OtherDigest,  // verified originals gave another page than at sealing: neither is to be trusted
  } result = Result::NotNeeded;
  std::string what;  // for the log: what was damaged, and what was done
};

// What it means that a damaged page was sealed from verified originals again.
PageRepair repair_of(PageRebuild rebuilt);

// Rebuilds what the finding names: a page from its originals, the table from the page, a resident
// original by dropping it (the codes stand in for it until it is promoted again). Originals that
// are not to be had are a result, not an error.
PageRepair repair_page(const PageFinding& finding, HeadState* state, HeadOriginals& originals);

}  // namespace certkv
