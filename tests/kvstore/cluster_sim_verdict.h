// The agreement of a step in simulation: ranks that die, pause, come back, or send NaN, over the
// same faulty network. The collective is modelled; what decides is kernels/arith/verdict.h and
// parallel/verdict_reduce.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace certkv::test {

enum class VerdictMutation {
  None,
  VotesNotCounted,   // a result is accepted whoever voted
  RankCountedTwice,  // a record that comes twice is merged twice
  StepNotCompared,   // a record of another step is merged as well
  FloatMaximum,      // bounds are reduced as floats, as MPI_MAX and ncclMax do
};
const char* verdict_mutation_name(VerdictMutation m);

struct VerdictSimResult {
  std::string violation;             // empty: none
  uint64_t accepted = 0, ended = 0;  // steps with output; ranks that gave up by name
};
VerdictSimResult simulate_verdicts(uint64_t seed, VerdictMutation mutation,
                                   const std::function<void(const std::string&)>& log);

}  // namespace certkv::test
