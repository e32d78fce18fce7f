// The engine's inside: what its parts share. For runtime/certified_engine.cc and
// runtime/engine_prompt.cc alone.
#pragma once

#include <chrono>
#include <cstddef>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/thread_pool.h"
#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/byte_size.h"
#include "runtime/certified_engine.h"
#include "runtime/generation.h"
#include "runtime/model_config.h"
#include "runtime/rank_compute.h"

namespace certkv {

using EngineClock = std::chrono::steady_clock;
inline double seconds_since(EngineClock::time_point start) {
  return std::chrono::duration<double>(EngineClock::now() - start).count();
}

// What the leader tells its group at the start of every step.
enum class EngineAction : uint64_t { Done, Stop, Admit, Decode };
struct EnginePlan {
  uint64_t action = 0;
  uint64_t bytes = 0;   // of the request that follows, for Admit
  uint64_t policy = 0;  // for Decode
  uint64_t step = 0;
};
static_assert(sizeof(EnginePlan) == 4 * 8);

class CertifiedEngine : public Engine {
 public:
  CertifiedEngine(const JobOptions& options, EngineParts parts)
      : options_(options),
        parts_(std::move(parts)),
        pool_(parts_.threads),
        group_(*parts_.group),
        heads_(kv_heads_of_rank(parts_.config->kv_heads, group_.size(), group_.rank())),
        compute_(make_rank_compute(options, parts_, heads_, pool_)),
        cache_(*compute_.cache),
        forward_(*compute_.forward) {
    stop_ids_ = parts_.config->eos_ids;
    stop_ids_.insert(stop_ids_.end(), parts_.stop_ids.begin(), parts_.stop_ids.end());
    if (options.run.tier1_memory == "auto") {
      tier1_capacity_ = compute_.tier1_memory(parts_.local_ranks);
    } else {
      const std::optional<uint64_t> bytes = parse_byte_size(options.run.tier1_memory);
      CERTKV_EXPECT(bytes.has_value(), InvalidArgument,
                    "run.tier1_memory is '{}': write auto or a size such as 8GiB",
                    options.run.tier1_memory);
      tier1_capacity_ = *bytes;
    }
  }

  void submit(Request request) override;
  bool step(bool stop) override;
  Load load() const override;

 private:
  bool leader() const { return group_.rank() == 0; }
  EnginePlan make_plan(bool stop, std::vector<std::byte>* payload);
  void share_plan(EnginePlan* plan, std::vector<std::byte>* payload);
  void admit(const Request& request);
  EngineNeed need(const Request& request) const;
  // Segments of the prompt that can be shared by name, and how many of them all ranks have.
  struct Shared {
    std::vector<OwnerId> segments;
    size_t found = 0;
  };
  Shared find_shared(const Request& request);
  int64_t reserve(const Request& request, const Shared& shared, std::string* why);
  bool refused_anywhere(bool here);
  void prefill(const Request& request, int64_t prompt, Shared shared);
  std::optional<Error> run_prompt(const Request& request, int64_t* prompt, Shared* shared,
                                  std::vector<float>* logits);
  int64_t fork(const Request& request, size_t which, int64_t prompt, bool* sealed,
               std::string* why);
  void take(Generation& g, int32_t drawn);
  void tell(AnswerProgress progress, const Generation& g);
  void decode(Policy policy);
  StepRecord::Phases phases_of(std::span<const int64_t> handles) const;
  void finish(std::list<Generation>::iterator g);
  void fail(Generation& g, ErrorKind kind, const std::string& text);
  StepRules rules_of(const Request& request, Policy policy) const;
  uint64_t claimed() const;

  const JobOptions options_;
  EngineParts parts_;
  ThreadPool pool_;
  Communicator& group_;
  ShardRange heads_;
  RankCompute compute_;
  SequenceCache& cache_;
  ForwardPass& forward_;

  std::deque<Request> waiting_;          // leader only
  std::list<Generation> running_;        // the same on every rank, in the same order
  std::map<uint64_t, uint64_t> claims_;  // request id -> bytes of memory counted for it
  std::map<uint64_t, int> open_forks_;   // request id -> generations not finished
  std::vector<int32_t> stop_ids_;
  uint64_t tier1_capacity_ = 0;
  uint64_t step_ = 0;
  uint64_t tokens_ = 0;
  size_t next_policy_ = 0;
  bool blocked_ = false;  // the first waiting request waits for room
};

inline std::vector<Policy> policies_of(const Request& r) {
  return r.compare.empty() ? std::vector<Policy>{r.policy} : r.compare;
}

// Null where no earlier session has drawn a token of it.
inline const AnswerState* resumed_answer(const Request& r, Policy policy) {
  for (const AnswerState& a : r.resumed)
    if (a.policy == policy && !a.tokens.empty()) return &a;
  return nullptr;
}

}  // namespace certkv
