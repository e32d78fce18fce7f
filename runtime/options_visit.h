// One visitor per struct of options.h: the name, type, meaning, unit, cost and allowed values of
// each key. YAML reading, flags, --help, validation, the echo and the tests are all derived from
// it.
//
// A new option is a field in options.h and one call here.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include "runtime/options.h"

namespace certkv {

using OptionTarget = std::variant<bool*, int*, int64_t*, uint64_t*, double*, std::string*, Policy*,
                                  Tolerance*, std::vector<Policy>*, std::vector<std::string>*>;

// What `--help`, errors and the tests say about a key.
struct OptionDoc {
  const char* meaning = "";
  const char* unit = "";     // empty: a name or a switch
  const char* cost = "";     // what a larger value costs
  const char* allowed = "";  // of a string: the words it may be, separated by spaces
  double min = -std::numeric_limits<double>::infinity();  // of a number, inclusive
  double max = std::numeric_limits<double>::infinity();
  bool above_min = false;  // min itself is not allowed
  bool bytes = false;      // of a string: "4GiB" or auto
  bool path = false;       // of a string: resolved by OptionTable::resolve_paths
  const char* flags = "";  // other flags for the same key, without --, separated by spaces
};

class OptionVisitor {
 public:
  virtual ~OptionVisitor() = default;
  virtual void field(const char* name, OptionTarget target, const OptionDoc& doc) = 0;
  virtual void open(const char* group) = 0;
  virtual void close() = 0;
};

inline constexpr double kMaxTokens = 1 << 30;
inline constexpr double kMaxDeadlineSeconds = 86400;

inline void visit_options(ModelOptions& o, OptionVisitor& v) {
  v.field("path", &o.path,
          {.meaning = "model folder as Hugging Face writes it; looked up from the working folder, "
                      "then from the configuration file's folder, then among the demo models",
           .path = true,
           .flags = "model"});
  v.field("dtype", &o.dtype,
          {.meaning = "type of the original keys and values; auto: the folder's own",
           .cost = "none in memory; a type other than the folder's changes the originals",
           .allowed = "auto bfloat16 float16",
           .flags = "dtype"});
  v.field("max_len", &o.max_len,
          {.meaning = "longest prompt plus answer; 0: the model's own limit",
           .unit = "tokens",
           .cost = "more tier-1, scratch and tier-2 memory per sequence",
           .min = 0,
           .max = kMaxTokens,
           .flags = "max-model-len"});
  v.field("chat_template", &o.chat_template,
          {.meaning = "how chat messages become a prompt; auto: told from the model folder",
           .allowed = "auto llama3 qwen plain",
           .flags = "chat-template"});
  v.field("quantization", &o.quantization,
          {.meaning = "how the matrices of the layers are kept; int8: 8 bits and a scale for each "
                      "output, of which no certificate speaks; the embedding and the head stay",
           .cost = "none; int8 halves what a GPU reads of them, and errs by up to 1/254 of each "
                   "output's largest weight",
           .allowed = "none int8",
           .flags = "quantization"});
}

inline void visit_options(CacheOptions& o, OptionVisitor& v) {
  v.field("layout", &o.layout,
          {.meaning = "what tier 1 stores of keys and values",
           .cost = "paper and balanced take more bytes per token than compact; balanced errs less; "
                   "classes: more bytes for the KV heads whose errors need them, per request",
           .allowed = "compact balanced paper classes k8v4 k8v8 k12v8",
           .flags = "kv-cache-dtype layout"});
  v.field("block_tokens", &o.block_tokens,
          {.meaning = "tokens of a block, the unit of selection and paging",
           .unit = "tokens",
           .cost = "fewer, larger promotions: more bytes paged for each",
           .allowed = "16 32",
           .flags = "block-size"});
  v.field(
      "scrub_steps", &o.scrub_steps,
      {.meaning = "every page of tier 1 is verified against its digest within this many steps of "
                  "its sequence, and once after the last; 1: all of them before every step; "
                  "0: never",
       .unit = "steps",
       .cost = "a damaged page is found later; 1 reads tier 1 twice in every step",
       .min = 0,
       .max = kMaxTokens});
}

inline void visit_options(PaperOptions& o, OptionVisitor& v) {
  v.field("tau_cov", &o.tau_cov,
          {.meaning = "policy paper: share of the estimated mass that the promoted keys must cover",
           .unit = "share",
           .cost = "more key blocks promoted each step",
           .min = 0,
           .max = 1});
  v.field("k_min", &o.k_min,
          {.meaning = "policy paper: fewest key blocks promoted per head-step",
           .unit = "blocks",
           .cost = "more paging each step",
           .min = 0,
           .max = kMaxTokens});
  v.field("k_max", &o.k_max,
          {.meaning = "policy paper: most key blocks promoted per head-step, before one doubling",
           .unit = "blocks",
           .cost = "slower worst steps",
           .min = 1,
           .max = kMaxTokens});
  v.field("expand_tail", &o.expand_tail,
          {.meaning = "policy paper: estimated tail mass above which k_max is doubled once",
           .unit = "share",
           .cost = "fewer doublings: faster, and larger errors",
           .min = 0,
           .max = 1});
  v.field("v_tol", &o.v_tol,
          {.meaning = "policy paper: value error (mass times eta) above which values are promoted",
           .unit = "L2 norm of the output",
           .cost = "fewer promotions: faster, and larger errors",
           .min = 0,
           .max = 1e30});
  v.field("value_rule", &o.value_rule,
          {.meaning = "policy paper: v_tol is held per block (local, as published) or by the sum "
                      "over blocks (greedy)",
           .allowed = "local greedy"});
}

inline void visit_options(SkipOptions& o, OptionVisitor& v) {
  v.field("share", &o.share,
          {.meaning = "policy budget: share of the tolerance that may go to values of negligible "
                      "weight which are not read; 0 reads them all",
           .unit = "share",
           .cost = "fewer bytes read where attention is sharp, less room for quantisation",
           .min = 0,
           .max = 1});
}

inline void visit_options(LadderOptions& o, OptionVisitor& v) {
  v.field("max_rounds", &o.max_rounds,
          {.meaning = "rounds of promotion (rungs 1 and 2) per head-step before dense attention",
           .unit = "rounds",
           .cost = "slower worst steps, fewer dense ones",
           .min = 0,
           .max = 64});
  v.field("max_share", &o.max_share,
          {.meaning = "share of the blocks that a head-step may promote before dense attention",
           .unit = "share",
           .cost = "slower worst steps, fewer dense ones",
           .min = 0,
           .max = 1});
  v.field("value_share", &o.value_share,
          {.meaning = "share of the tolerance that the value error may use up",
           .unit = "share",
           .cost = "fewer value blocks promoted, more key blocks",
           .min = 0,
           .max = 1});
  v.field("ranking", &o.ranking,
          {.meaning = "how many of the best blocks must be known to be the best; -1: 1 under "
                      "policy paper, else 0 (off)",
           .unit = "blocks",
           .cost = "more promotions on diffuse heads",
           .min = -1,
           .max = 1 << 20});
  v.field(
      "prefetch", &o.prefetch,
      {.meaning = "a KV head whose bound is beyond this share of the tolerance has the blocks "
                  "that would bring it below read for its next step, beside other work; 0: "
                  "none; on a device alone",
       .unit = "share",
       .cost = "fewer blocks read ahead: less to read each step, more steps that wait for blocks",
       .min = 0,
       .max = 1});
  v.field("exploration", &o.exploration,
          {.meaning = "share of the tail blocks checked against their originals at random each "
                      "step; 0.01 to 0.05 for soak runs",
           .unit = "share",
           .cost = "more paging each step",
           .min = 0,
           .max = 1});
}

inline void visit_options(SamplingOptions& o, OptionVisitor& v) {
  v.field("max_tokens", &o.max_tokens,
          {.meaning = "longest answer, where the request does not say",
           .unit = "tokens",
           .cost = "longer runs; memory is reserved for it",
           .min = 1,
           .max = kMaxTokens,
           .flags = "max-tokens"});
  v.field("temperature", &o.temperature,
          {.meaning = "of sampling, where the request does not say; 0: greedy",
           .cost = "more random text",
           .min = 0,
           .max = 100,
           .flags = "temperature"});
  v.field("top_p", &o.top_p,
          {.meaning = "sample among the likeliest tokens that hold this share of probability",
           .unit = "share",
           .cost = "more random text",
           .min = 0,
           .max = 1,
           .above_min = true,
           .flags = "top-p"});
  v.field("top_k", &o.top_k,
          {.meaning = "sample among this many likeliest tokens; 0: all",
           .unit = "tokens",
           .cost = "more random text",
           .min = 0,
           .max = kMaxTokens,
           .flags = "top-k"});
  v.field("seed", &o.seed,
          {.meaning = "of sampling and exploration; each request draws from a stream of its own",
           .flags = "seed"});
  v.field("stop", &o.stop,
          {.meaning = "strings that end an answer and are not part of it; the flag may be repeated",
           .flags = "stop"});
}

inline void visit_options(ScratchOptions& o, OptionVisitor& v) {
  v.field("key_blocks", &o.key_blocks,
          {.meaning = "original key blocks kept near the compute per request and layer, shared "
                      "equally by the KV heads",
           .unit = "blocks",
           .cost = "more memory near the compute, less paging",
           .min = 1,
           .max = kMaxTokens});
  v.field("value_blocks", &o.value_blocks,
          {.meaning = "original value blocks kept near the compute per request and layer, shared "
                      "equally by the KV heads",
           .unit = "blocks",
           .cost = "more memory near the compute, less paging",
           .min = 1,
           .max = kMaxTokens});
}

inline void visit_options(StoreOptions& o, OptionVisitor& v) {
  v.field("mode", &o.mode,
          {.meaning = "auto: the first local rank starts one store per node; attach: a running "
                      "store is used",
           .allowed = "auto attach"});
  v.field("socket", &o.socket,
          {.meaning = "control socket of the store to attach to; with mode attach only"});
  v.field("arena", &o.arena,
          {.meaning = "size of the originals per node; auto: what the job can need",
           .unit = "bytes (KiB MiB GiB TiB kB MB GB TB)",
           .cost = "host memory that is taken at start",
           .bytes = true});
  v.field(
      "reuse", &o.reuse,
      {.meaning = "prompts that begin alike share the originals of whole segments of 512 tokens, "
                  "and are not prefilled again there; auto: on the cpu backend; the answers are "
                  "the same, bit for bit",
       .allowed = "auto true false"});
  v.field("linger_seconds", &o.linger_seconds,
          {.meaning = "the store ends itself this long after its last rank is gone",
           .unit = "seconds",
           .cost = "host memory stays taken for longer after a job",
           .min = 0,
           .max = kMaxDeadlineSeconds});
  v.field("deadline_seconds", &o.deadline_seconds,
          {.meaning = "the store counts as lost this long after its last sign of life",
           .unit = "seconds",
           .cost = "a stopped store is noticed later",
           .min = 0.05,
           .max = kMaxDeadlineSeconds});
}

inline void visit_options(ParallelOptions& o, OptionVisitor& v) {
  v.field("tensor", &o.tensor,
          {.meaning = "ranks that share the heads of one replica; 0: ranks / data",
           .unit = "ranks",
           .cost = "more communication, less memory and time per rank",
           .min = 0,
           .max = 4096,
           .flags = "tensor-parallel-size"});
  v.field("data", &o.data,
          {.meaning = "replicas of the model",
           .unit = "replicas",
           .cost = "one more copy of the weights for each",
           .min = 1,
           .max = 4096,
           .flags = "data-parallel-size"});
  v.field("threads", &o.threads,
          {.meaning = "threads per rank; 0: cores of the node / ranks on it",
           .unit = "threads",
           .cost = "above the number of cores: slower",
           .min = 0,
           .max = 4096});
  v.field("deadline_seconds", &o.deadline_seconds,
          {.meaning = "a peer counts as lost this long after its last sign of life",
           .unit = "seconds",
           .cost = "a stopped peer is noticed later",
           .min = 0.05,
           .max = kMaxDeadlineSeconds});
  v.field("start_seconds", &o.start_seconds,
          {.meaning = "all ranks must have met this long after a rank's start, else the ones that "
                      "did not come are named and the job ends; 0: no limit",
           .unit = "seconds",
           .cost = "a rank that hangs at its start is noticed later",
           .min = 0,
           .max = kMaxDeadlineSeconds});
}

inline void visit_options(AuditOptions& o, OptionVisitor& v) {
  v.field(
      "sample", &o.sample,
      {.meaning = "share of head-steps whose certificates are recorded, with the originals, for "
                  "certkv verify; 0: none, 1: all",
       .unit = "share",
       .cost = "more disk, slower steps",
       .min = 0,
       .max = 1});
  v.field("folder", &o.folder,
          {.meaning = "folder for the audit, one file per rank, made if missing; empty: audit/ in "
                      "run.output"});
}

inline void visit_options(HttpListenOptions& o, OptionVisitor& v) {
  v.field("listen", &o.listen,
          {.meaning = "host:port where rank 0 serves /healthz, /readyz, /metrics, /v1/status and a "
                      "status page, as 127.0.0.1:8080; port 0: any, said in the log; empty: none"});
}

inline void visit_options(RunOptions& o, OptionVisitor& v) {
  v.field("input", &o.input,
          {.meaning = "requests, JSON lines (OpenAI batch, or prompt and max_tokens); looked up "
                      "from the working folder, then from the configuration file's folder",
           .path = true,
           .flags = "input"});
  v.field("backend", &o.backend,
          {.meaning = "what the model runs on; emulated: the kernels of cuda on the CPU, to test",
           .allowed = "cpu cuda emulated",
           .flags = "backend"});
  v.field("output", &o.output,
          {.meaning = "folder for results, steps, summary and manifest, made if missing",
           .flags = "output"});
  v.field("resume", &o.resume,
          {.meaning = "keep the finished lines of the output folder and go on", .flags = "resume"});
  v.field("max_batch", &o.max_batch,
          {.meaning = "sequences decoded together per replica",
           .unit = "sequences",
           .cost = "more memory, more tokens per second, slower steps",
           .min = 1,
           .max = 65536,
           .flags = "max-num-seqs"});
  v.field("tier1_memory", &o.tier1_memory,
          {.meaning = "memory for quantised keys and values per rank; auto: half of what is free",
           .unit = "bytes (KiB MiB GiB TiB kB MB GB TB)",
           .cost = "less memory for everything else",
           .bytes = true});
  v.field("progress_seconds", &o.progress_seconds,
          {.meaning = "between progress lines where standard error is no terminal; 0: none",
           .unit = "seconds",
           .cost = "fewer lines",
           .min = 0,
           .max = kMaxDeadlineSeconds});
}

template <typename Struct>
void visit_group(const char* name, Struct& o, OptionVisitor& v) {
  v.open(name);
  visit_options(o, v);
  v.close();
}

inline void visit_options(JobOptions& o, OptionVisitor& v) {
  visit_group("model", o.model, v);
  v.field(
      "policy", &o.policy,
      {.meaning = "what is done about errors above the tolerance: budget enforces it, paper and "
                  "naive only report them, dense reads the originals",
       .allowed = "budget paper naive dense"});
  v.field("compare", &o.compare,
          {.meaning = "decode every prompt under each of these policies from one prefill, instead "
                      "of under policy",
           .cost = "one decode per policy",
           .allowed = "budget paper naive dense"});
  v.field(
      "tolerance", &o.tolerance,
      {.meaning = "largest error bound of one head at one step: {relative: x} of the mean value "
                  "norm S, or {absolute: x}; a bare number means relative",
       .unit = "share of S or output norm",
       .cost = "faster, and larger errors are allowed",
       .min = 0,
       .max = kMaxTolerance});
  visit_group("cache", o.cache, v);
  visit_group("paper", o.paper, v);
  visit_group("ladder", o.ladder, v);
  visit_group("skip", o.skip, v);
  visit_group("sampling", o.sampling, v);
  v.field(
      "deterministic", &o.deterministic,
      {.meaning = "logits and recorded verdicts are bitwise equal for every number of ranks and "
                  "threads",
       .cost = "slower communication and products"});
  visit_group("scratch", o.scratch, v);
  visit_group("store", o.store, v);
  visit_group("parallel", o.parallel, v);
  visit_group("audit", o.audit, v);
  visit_group("http", o.http, v);
  visit_group("run", o.run, v);
  v.field("log_level", &o.log_level,
          {.meaning = "least severe messages that are logged to standard error",
           .allowed = "debug info warning error"});
}

}  // namespace certkv
