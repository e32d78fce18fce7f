// How a bench runs one layer's step on a pool: spread over the threads as
// runtime/certified_cache.cc spreads it. The one place of the benches that calls the kernels and
// the certified step.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "runtime/bench/bench_layer.h"
#include "runtime/certify/split_list.h"

namespace certkv {

class ThreadPool;

// One KV head's part of a step.
struct HeadTask {
  BenchHead* head = nullptr;
  HeadState* state = nullptr;  // of the head: which policy's
  const float* q = nullptr;    // [query_heads, head_dim]
  uint32_t rung3 = 0;          // query heads that go on to dense attention, whatever their bound
};

class LayerRunner {
 public:
  // query_heads: of each KV head. pool must outlive this object.
  LayerRunner(std::shared_ptr<const PageFormat> format, DType dtype, int query_heads,
              ThreadPool& pool);

  // A whole step of all KV heads; reports and outputs are left in their heads.
  // UNITS: microseconds of wall time
  double step(const StepRules& rules, uint64_t number, std::span<const HeadTask> tasks);

  // The pass of such a step alone, left in the heads. Without its certificate: empty where the
  // kernels cannot leave that out. UNITS: microseconds of wall time
  std::optional<double> pass(std::span<const HeadTask> tasks, bool certificate);

  // Corrects so many blocks, keys and values, for the first query head: reads originals back,
  // verifies them, corrects, asks the canary, judges again. On the calling thread.
  // REQUIRES a pass of this task with its certificate. ERRORS: InvalidArgument where there are not
  // so many blocks outside F and X; Uncertifiable where a correction was refused. UNITS:
  // microseconds of wall time
  struct Correction {
    double all = 0;
    double read = 0, canary = 0;  // of it: originals read back and verified; the canary
  };
  Correction correct(const HeadTask& task, size_t blocks);

 private:
  template <typename Begin, typename Splits, typename Attend, typename Finish>
  double spread(size_t tasks, const Begin& begin, const Splits& splits, const Attend& attend,
                const Finish& finish);

  std::shared_ptr<const PageFormat> format_;
  AttendContext context_;
  int query_heads_;
  ThreadPool& pool_;
  std::vector<HeadStep> steps_;      // [tasks], kept for their memory
  std::vector<QueryGroup> queries_;  // [tasks]
  std::vector<std::unique_ptr<DenseStep>> dense_;
  SplitList list_;
  std::vector<char> unfinished_;  // [tasks]
  std::vector<uint16_t> k_, v_;   // originals of corrected blocks
  std::unique_ptr<BlockTerms> before_, after_;
};

}  // namespace certkv
