// Jobs of an engine on random weights, as thread ranks with a store in this process.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "runtime/certified_engine.h"

namespace certkv {
class StoreClient;
}

namespace certkv::test {

class ThreadHolder;

Request random_request(uint64_t id, int64_t vocab, size_t prompt, int64_t max_tokens);

struct RunResult {
  std::map<std::pair<uint64_t, Policy>, Completion> completions;
  std::vector<StepRecord> steps;
  std::vector<double> prefilled;  // shares, as they were told
  std::vector<PrefillRecord> prefills;
  std::vector<AnswerProgress> progress;
  uint64_t tier1_peak = 0;  // bytes, of rank 0, after its steps
};
struct RunHooks {
  // Called by rank 0 once, with its store, when the first step is done.
  std::function<void(const StoreClient&)> after_prefill;
  std::function<void(Weights&)> change;  // every rank's
  std::optional<ContentScope> scope;     // prompts share originals
  ThreadHolder* store = nullptr;         // that outlives the run; null: one of its own
  // Of every rank, with its store, before anything is submitted.
  std::function<void(StoreClient&, int rank)> before;
  // Every rank ends as if it had been killed after so many steps: nothing is finished, and its
  // store learns nothing.
  uint64_t kill_after = 0;
  std::function<DeviceBackend(const std::string& backend, int ordinal)> make_device;
};
RunResult run(const JobOptions& options, int ranks, int threads,
              const std::vector<Request>& requests, const RunHooks& hooks = {});

JobOptions deterministic_options();

// Two runs agree bit for bit in tokens and recorded verdicts.
void expect_same(const RunResult& a, const RunResult& b, const std::string& what);

}  // namespace certkv::test
