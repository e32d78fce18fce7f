// One in-process injection after the other: what tests/faults/worker.cc and its rows share.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "runtime/certified_engine.h"
#include "runtime/weights.h"

namespace certkv::faults {

// What came of one injection. `text` says what is wrong, or what was said.
struct Outcome {
  enum class Result { Same, Named, Violation, Unreached, InDoubt } result = Result::Violation;
  std::string text;
};
const char* result_name(Outcome::Result result);

// Numbers of one injection: everything that is drawn comes from its seed.
class Draw {
 public:
  explicit Draw(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) { return engine_() % n; }
  uint64_t between(uint64_t a, uint64_t b) { return a + below(b - a + 1); }
  uint64_t bits() { return engine_(); }
  bool chance(double p) { return double(engine_() >> 11) * 0x1p-53 < p; }
  template <typename T>
  const T& of(const std::vector<T>& list) {
    return list[size_t(below(list.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

// The demo model, its questions, and the fault-free answers by number of ranks.
class Bench {
 public:
  // folder: for audits; emptied after every job.
  Bench(const std::string& model, const std::string& folder);

  struct Job {
    int ranks = 1;
    int64_t scrub_steps = 1;
    uint64_t arena_bytes = uint64_t(16) << 20;
    std::string failpoints;
    std::chrono::milliseconds silence{5000};
    bool may_be_in_doubt = false;  // the fault falls into a window that the scrub leaves open
    // Rank 0, after each step, with its store: between two steps nobody reads.
    std::function<void(const StoreClient&, uint64_t step)> between;
    // Beside the job, in a thread of its own, until `done`.
    std::function<void(const std::string& socket, const std::atomic<bool>& done)> beside;
    uint64_t store_ends_after = ~uint64_t(0);  // the step after which the store is stopped
  };
  // Runs one question under a job's faults and judges it: the answer against the fault-free one,
  // the certificates by the verifier.
  Outcome run(const Job& job, Draw& draw);

  const std::string& model() const { return model_; }
  const std::string& folder() const { return folder_; }

 private:
  struct Answer {
    bool done = false, failed = false;
    std::string text, error_kind, error;
    uint64_t digest = 0;  // damaged pages and originals that were noticed
  };
  Answer answer(const Job& job, size_t question);

  std::string model_, folder_;
  std::shared_ptr<const ModelConfig> config_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::map<int, std::vector<std::shared_ptr<const Weights>>> weights_;  // by ranks, then rank
  std::vector<Request> questions_;
  std::map<int, std::vector<std::string>> right_;  // by ranks
};

struct Row {
  const char* name;
  int fault;         // row of the fault model
  const char* what;  // is injected
  double share;      // of the in-process injections
  std::function<Outcome(Bench&, Draw&)> inject;
};
const std::vector<Row>& rows();

Outcome stale_generation(Bench&, Draw&);  // stale_rows.cc
Outcome model_files(Bench&, Draw&);       // file_rows.cc

}  // namespace certkv::faults
