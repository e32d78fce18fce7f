// Everything a job can be told. Plain structs, defaults in place; one visitor per struct (runtime/
// options_visit.h) gives YAML reading, flags, --help, validation and the echo stored with the
// results (runtime/options_io.h). Each field: meaning, unit, and what a larger value costs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

enum class Policy : uint8_t { Budget, Paper, Naive, Dense };    // method section 5
const char* policy_name(Policy policy);                         // "budget", "paper", ...
std::optional<Policy> policy_from_name(std::string_view name);  // empty for any other word

// Relative: bound <= relative * S (method E5). Absolute: bound <= absolute. Exactly one is set.
struct Tolerance {
  bool is_relative = true;
  double value = 0.05;
};
inline constexpr double kMaxTolerance = 1e30;
bool tolerance_allowed(const Tolerance& tolerance);  // 0 to kMaxTolerance; NaN is not

// ---- options that change answers ----------------------------------------------------------------

struct ModelOptions {
  std::string path;            // Hugging Face folder; a relative path is looked up from the working
                               // folder first, then from the configuration file's folder
  std::string dtype = "auto";  // auto (the folder's own), bfloat16, float16: of K and V originals
  int64_t max_len = 0;         // tokens of prompt + answer; 0: the model's own limit
  std::string chat_template = "auto";  // auto, llama3, qwen, plain
  std::string quantization = "none";   // none, int8 (kernels/arith/int8_weight.h): of the layers'
                                       // matrices; no certificate speaks of it
};

struct CacheOptions {
  std::string layout = "compact";  // compact, balanced, paper, classes (runtime/certify/
                                   // head_class.h) or one class for all: k8v4, k8v8, k12v8
  int block_tokens = 16;           // 16 or 32: unit of selection and paging
  int64_t scrub_steps = 256;       // every page is verified within as many steps; 0: never
};
std::string tier1_digest_name(const CacheOptions& cache);  // none, scrub:<steps>

struct PaperOptions {  // used by policy paper only (method section 5)
  double tau_cov = 0.995;
  int64_t k_min = 2, k_max = 128;
  double expand_tail = 0.02;  // expand once to 2 k_max above this estimated tail mass
  double v_tol = 0.05;
  std::string value_rule = "local";  // local, greedy
};

struct LadderOptions {
  int max_rounds = 4;        // rung 1 and 2 rounds per head-step before rung 3; more: slower steps
  double max_share = 0.25;   // of the blocks promoted per head-step before rung 3
  double value_share = 0.5;  // of the tolerance that E_val may use up before values are promoted
  int ranking = -1;          // r of method section 6; -1: 1 under paper, 0 elsewhere
  // Of the tolerance: a KV head with a bound above it has its next blocks read beside what follows;
  // 0: none. On a device alone.
  double prefetch = 0.0;
  double exploration = 0.0;  // share of tail blocks promoted at random each step (0.01-0.05: soak)
};

struct SkipOptions {   // certified skipping, policy budget
  double share = 0.0;  // of the tolerance that unread values may use up; 0: every value is read
};

struct SamplingOptions {
  int64_t max_tokens = 64;
  double temperature = 0.0;  // 0: greedy
  double top_p = 1.0;
  int64_t top_k = 0;  // 0: off
  uint64_t seed = 0;
  std::vector<std::string> stop;
};

// ---- options that change speed and size ---------------------------------------------------------

struct ScratchOptions {       // originals kept near the compute, per request and layer
  int64_t key_blocks = 2048;  // blocks, shared equally by the KV heads; more: more memory
  int64_t value_blocks = 2048;
};

struct StoreOptions {
  std::string mode = "auto";   // auto: one per node, started by the first local rank; attach
  std::string socket;          // attach: the control socket; empty under auto
  std::string arena = "auto";  // bytes of originals per node, "4GiB"; auto: what the job can need
  std::string reuse =
      "auto";                 // prompts share originals of a common beginning; auto: where they can
  double linger_seconds = 2;  // the store ends itself this long after its last rank is gone
  double deadline_seconds = 5;  // since the last sign of life of the store
};

struct ParallelOptions {
  int tensor = 0;               // T ranks share the heads; 0: ranks / data
  int data = 1;                 // D replicas of the model
  int threads = 0;              // per rank; 0: cores of the node / ranks on it
  double deadline_seconds = 5;  // since the last sign of life of a peer
  double start_seconds = 120;   // from a rank's start until all have met; 0: no limit
};

struct AuditOptions {
  double sample = 0;   // share of head-steps that are audited; more: more disk, slower steps
  std::string folder;  // empty: audit/ in run.output
};

struct HttpListenOptions {
  std::string listen;  // host:port for health, metrics and status of rank 0; empty: none
};

struct RunOptions {
  std::string input;                   // JSONL
  std::string backend = "cpu";         // cpu, cuda, or emulated: cuda's kernels on the CPU
  std::string output = "runs/latest";  // folder for manifest, results, steps, summary
  bool resume = false;
  int64_t max_batch = 8;  // sequences decoded together; more: more memory, more tokens/s
  std::string tier1_memory = "auto";  // bytes for quantised KV per rank; auto: half of free memory
  double progress_seconds = 5;        // between progress lines when standard error is no terminal
};

struct JobOptions {
  ModelOptions model;
  Policy policy = Policy::Budget;
  std::vector<Policy> compare;  // when given, every prompt is decoded under each of these
  Tolerance tolerance;
  CacheOptions cache;
  PaperOptions paper;
  LadderOptions ladder;
  SkipOptions skip;
  SamplingOptions sampling;
  bool deterministic = false;  // bitwise equal for every T, at some cost in speed (method 8)
  ScratchOptions scratch;
  StoreOptions store;
  ParallelOptions parallel;
  AuditOptions audit;
  HttpListenOptions http;
  RunOptions run;
  std::string log_level = "info";
};

}  // namespace certkv
