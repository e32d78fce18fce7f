// The figures of one step from all ranks of the group, for quantiles and records.
#pragma once

#include <span>
#include <vector>

#include "parallel/shard.h"
#include "runtime/engine.h"
#include "runtime/model_config.h"
#include "runtime/sequence_cache.h"

namespace certkv {

class Communicator;

class StepFigures {
 public:
  StepFigures(const ModelConfig& config, ShardRange heads, int ranks);

  // Collective: every rank brings the figures of its heads.
  void gather(const SequenceCache& cache, std::span<const int64_t> sequences, Communicator& group);

  // Adds the head-steps of one sequence of the step.
  void add_to(size_t sequence, Completion::Distribution* returned,
              Completion::Distribution* candidate) const;
  void fill(StepRecord* record) const;

 private:
  size_t per_sequence_;  // floats of one sequence of one rank
  size_t ranks_, sequences_ = 0;
  std::vector<float> all_;  // [ranks, sequences * per_sequence + extras]
  uint64_t f_blocks_ = 0, x_blocks_ = 0, skipped_blocks_ = 0;
  std::array<uint64_t, kClasses> classes_{};
  const HeadFigures* figures(size_t rank, size_t sequence) const;
  size_t stride() const;
};

}  // namespace certkv
