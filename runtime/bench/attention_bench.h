// Times of one layer's decode attention: dense, certified, and what the certificate's parts cost.
//
// All of them are measured in turn, in one run (A B C ... A B C ...), on rotating sets: copies of
// the layer's caches in memory of their own, so many that what a pass reads comes from memory, as
// it does in a model with many layers. Figures are medians; spread is (p90 - p10) / median.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "runtime/bench/synthetic_heads.h"
#include "runtime/certify/head_step.h"
#include "runtime/options.h"

namespace certkv {

struct AttentionBenchOptions {
  int query_heads = 8, kv_heads = 2, head_dim = 128, batch = 1;
  int block_tokens = 16;
  int repeats = 20, threads = 1;
  HeadKind heads = HeadKind::Mixed;
  Tolerance tolerance;
  ScratchOptions scratch;  // per layer, as in a job
  LadderOptions ladder;
  SkipOptions skip;
  PaperOptions paper;
  uint64_t seed = 1;
  uint64_t cache_bytes = 0;  // last level; 0: unknown, 32 MiB are assumed
};

struct Timing {
  double us = 0;      // median
  double spread = 0;  // (p90 - p10) / median
};
// REQUIRES samples not empty. Quantiles by linear interpolation between order statistics.
Timing timing_of(std::vector<double> samples_us);

struct AttentionCase {
  std::string layout;
  int64_t context = 0;  // as asked for
  size_t tokens = 0;    // attended to: half a scale group beyond the context lies in the open block
  size_t sets = 0;      // rotating sets
  size_t steps = 0;     // certified steps that were measured

  Timing dense;           // policy dense: originals, digests not checked
  Timing dense_verified;  // the same as a job runs it: every original's digest is checked first
  Timing certified;       // the whole step under policy budget, F and X learned over earlier steps
  Timing pass;            // its pass alone, without judging and learning
  std::optional<Timing> uncertified_pass;  // the same without the certificate's sums
  Timing cold;                             // the step after a prefill: empty scratch, centre 0
  Timing correction;  // 16 blocks, keys and values, in one query head: read back with digests
                      // checked, corrected, canary, judged again
  Timing correction_read, correction_canary;  // of it: reading back; the canary
  Timing paper, naive;                        // the step under these policies
  Timing ladder;  // a certified step in which 5 % of the head-steps go on to rung 3

  double dense_bytes = 0, certified_bytes = 0;  // read by a step
  double copy_gbps = 0, copy_streaming_gbps = 0, read_gbps = 0;
  std::array<uint64_t, kRungs> rungs{};  // head-steps of the certified steps
  uint64_t over_tolerance = 0;           // among them: neither certified nor exact; always 0
  double f_blocks = 0, x_blocks = 0;     // per KV head, mean
  double skipped_blocks = 0;             // whose values were not read, per KV head, mean
  double bytes_per_token = 0;            // of tier 1, per token and KV head

  double best_copy_gbps() const { return std::max(copy_gbps, copy_streaming_gbps); }
  double dense_gbps() const { return dense_bytes / dense.us * 1e-3; }
  double certified_gbps() const { return certified_bytes / certified.us * 1e-3; }
  // Of the pass; empty where uncertified_pass is.
  std::optional<double> certificate_share() const;
};

// Bytes of memory that the case takes at most. UNITS: bytes
uint64_t attention_bench_bytes(const AttentionBenchOptions& options, const std::string& layout,
                               int64_t context);

// progress (may be empty) is told what is being done. ERRORS: InvalidArgument; Uncertifiable where
// a step broke, which would make its time meaningless.
AttentionCase bench_attention(const AttentionBenchOptions& options, const std::string& layout,
                              int64_t context,
                              const std::function<void(const std::string&)>& progress = {});

}  // namespace certkv
