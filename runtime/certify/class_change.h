// Measuring the classes of a KV head, and re-encoding it into another one.
//
// SOURCE: method section 5b. Pages are always made from verified originals, never from codes.
// Originals that are not to be had are a result, not an error.
// THREADS: one at a time for a head, different heads at the same time.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "runtime/certify/head_class.h"
#include "runtime/certify/head_step.h"

namespace certkv {

// Measures state->precision.ratios on some of the head's pages. queries: that the score bounds are
// taken for, of the head's group; none: for one of equal channels. False where originals are not to
// be had (`error` says which). REQUIRES a tier that has a page.
bool measure_classes(std::span<const QueryGroup> queries, HeadState* state,
                     HeadOriginals& originals, std::string* error);

// The choice at the end of prefill: measures the classes' errors on some pages, forecasts from the
// prompt's last queries, and names the cheapest class. q: [queries, heads, head_dim].
// REQUIRES the head in class 0, with a tier that has a page.
struct ClassChoice {
  bool measured = false;  // false: originals were not to be had (`error` says which); number is 0
  int number = 0;
  std::string error;
};
ClassChoice choose_class(const StepRules& rules, int heads, std::span<const float> q,
                         HeadState* state, HeadOriginals& originals);

enum class ReencodeResult {
  Going,    // pages are left
  Adopted,  // this class is the head's from now on
  Lost,     // originals were not to be had: the old class stays
};
// Re-encodes up to `pages` more pages of a head whose state->precision.next is another class.
ReencodeResult reencode(size_t pages, HeadState* state, HeadOriginals& originals,
                        std::string* error);

}  // namespace certkv
