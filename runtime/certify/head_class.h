// The precision class of one KV head of one sequence, and what it is chosen by.
//
// SOURCE: method section 5b. A class is chosen by what a step is predicted to read: the class's
// bytes, the originals that would have to stand in for codes, and rung 3 where they would not do.
// Everything is decided from the head's own queries, keys and values at counts of its own tokens.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/attend.h"
#include "runtime/certify/certificate.h"
#include "runtime/certify/class_table.h"
#include "runtime/options.h"

namespace certkv {

struct HeadState;
struct StepRules;
struct StepWhere;

using ClassFormats = std::array<std::shared_ptr<const PageFormat>, kExactClass>;
// InvalidArgument as make_page_format().
ClassFormats make_class_formats(int head_dim, int block_tokens);
inline constexpr const char* kClassesLayout = "classes";  // cache.layout
// The format of a cache, of the dearest class where its layout is `classes`. InvalidArgument as
// layout_by_name() and make_page_format().
PageFormat largest_page_format(const CacheOptions& cache, int head_dim);

// Errors of each class as shares of class 0's, measured on pages sealed as all of them: of the
// score bounds of codes, and of eta.
struct ClassRatios {
  std::array<double, kExactClass> key{1, 1, 1}, value{1, 1, 1};
};

// What the steps of one head are predicted to read under each class. UNITS: bytes per token and KV
// head, as the mean over a sequence's tokens.
class ClassForecast {
 public:
  // A step of this head as it is now. The head must outlive it.
  explicit ClassForecast(const HeadState& state);
  // Adds one query of all heads of the group: a pass under class `now`, before its ladder, with its
  // certificates. What several queries promote is united, as a learned F unites it.
  // blocks: [blocks], certificates: [heads], both of `pass`.
  void add(const StepRules& rules, const ClassRatios& ratios, int now,
           std::span<const BlockRef> blocks, const PassState& pass,
           std::span<const Certificate> certificates);
  std::array<double, kClasses> bytes() const;
  double base(int number) const;  // without promotions and rung 3

 private:
  bool add_head(const StepRules& rules, const ClassRatios& ratios, int now, int number,
                std::span<const BlockRef> blocks, const PassState& pass, int h,
                const Certificate& c);
  const HeadState& state_;
  const ClassFormats& formats_;
  size_t blocks_;
  double coded_;  // share of the tokens that has codes
  PassState scaled_;
  std::array<std::vector<uint8_t>, kExactClass> promoted_;  // [blocks] kUsedKey | kUsedValue
  std::array<int, kExactClass> dense_{};                    // queries that went to rung 3
  int queries_ = 0;
};
// The cheapest; of two alike the first.
int cheapest_class(const std::array<double, kClasses>& bytes);

// Class of a head, and what its revision goes by. `formats` null: the head has no class.
struct HeadClass {
  const ClassFormats* formats = nullptr;
  int now = 0, next = 0;  // next != now: the tier is being re-encoded
  ClassRatios ratios;
  bool measured = false;  // ratios
  // Since the last decision.
  uint64_t steps = 0, forecasts = 0;
  double read = 0;  // bytes per token, summed over steps
  std::array<double, kClasses> forecast{}, base{};

  bool exact_now() const { return formats != nullptr && now == kExactClass; }
  // Whether this step's pass is to be forecast from. Under `exact` such a step runs as if the head
  // had the class of its pages. SOURCE of the counts: kRevisionSteps, kForecastSteps.
  bool forecasts_at(const StepWhere& where) const;
  void count(double bytes_per_token) {
    ++steps;
    read += bytes_per_token;
  }
  // The class of the pages: another than `now` where that is `exact`.
  int page_class(const PageFormat& format) const;
  // The class that the steps since the last decision speak for; starts the count anew.
  int decide();
};
// A class is revised after as many steps, on the mean of what they read.
inline constexpr uint64_t kRevisionSteps = 64;
inline constexpr uint64_t kForecastSteps = 8;  // distance of the steps that are forecast from
inline constexpr size_t kPagesPerStep = 4;     // re-encoded between two steps, per KV head

}  // namespace certkv
