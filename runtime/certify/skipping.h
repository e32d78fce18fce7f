// Certified skipping of values: which runs of the next step are so light that their values need not
// be read. A guess: what a pass skips is charged by its certificate. SOURCE: method E6;
// kernels/METHOD.md, section 12.
#pragma once

#include <span>
#include <vector>

#include "kernels/attend.h"

namespace certkv {

struct SkipGuess {
  std::vector<double> limits;  // [heads] as PassOptions::skip takes them; empty: nothing is skipped
  // A wrong guess costs a pass, and a head whose attention jumps once will do so again: steps that
  // are still to read everything, and how many the next wrong guess will cost.
  int pause = 0, next_pause = 4;
  std::vector<double> cost;  // memory of guess_skips
};

// What the values that a pass did not read may amount to in a head's output, as an L2 norm: their
// masses times nu_b.
double skipped_cost(const PassState& pass, int head);

// From one pass, whatever it skipped itself: the largest limit under which each head would have
// spent at most spend[h] (an L2 norm, >= 0; NaN skips nothing). Allocates only where the number of
// heads has grown.
void guess_skips(const PassState& pass, std::span<const BlockRef> blocks,
                 std::span<const double> spend, SkipGuess* guess);

// After a guess was used. Wrong: the pass had to be run again with every value.
void learn_pause(bool wrong, SkipGuess* guess);

}  // namespace certkv
