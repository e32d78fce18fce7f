// Times of decode on a device: attention alone and whole steps, certified and dense, side by side.
//
// The model has the shape asked for and random weights (one layer's, copied); its attention's
// queries, keys and values are those of synthetic heads (synthetic_heads.h), the same in every
// layer, each in memory of its own. Certified: the device's cache, as a job runs it, originals in a
// store process. Dense: the library's attention (kernels/cuda/dense_ops.h) over 16-bit keys and
// values, behind the same forward pass. Figures are medians; spread is (p90 - p10) / median.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "kernels/arith/verdict.h"
#include "runtime/bench/attention_bench.h"
#include "runtime/bench/synthetic_heads.h"
#include "runtime/options.h"

namespace certkv {

struct DeviceBenchOptions {
  std::string backend = "cuda";  // or emulated, to test
  int64_t layers = 32, query_heads = 32, kv_heads = 8, head_dim = 128;
  int64_t hidden = 4096, intermediate = 14336, vocab = 128256;
  int64_t context = 32768;
  int batch = 1, steps = 20, warmup = 8, threads = 1;
  bool whole_steps = true;  // false: attention alone
  HeadKind heads = HeadKind::Mixed;
  DType dtype = DType::BF16;  // of originals and weights
  bool int8 = false;          // the layers' matrices in 8 bits (model.quantization)
  Tolerance tolerance;
  ScratchOptions scratch;
  LadderOptions ladder;
  uint64_t seed = 1;
};

struct DeviceBenchResult {
  std::string device;
  // What a layer's attention takes, by itself; and what it adds to the output projection that
  // follows and uses its outputs: both together less the projection alone, spreads of both
  // together.
  Timing certified_attention, dense_attention;
  Timing certified_added, dense_added;
  Timing projection;                  // alone
  Timing certified_step, dense_step;  // of the device and the host until the logits
  Timing bookkeeping;  // of a certified step, after its logits: reading and counting verdicts
  std::array<uint64_t, kRungs> rungs{};  // head-steps of the measured steps
  uint64_t over_tolerance = 0;           // among them: neither certified nor exact; always 0
  double f_blocks = 0, x_blocks = 0;     // resident, per KV head, mean
  double promoted = 0, hits = 0;         // blocks of one tensor per KV head and step
  double paged_bytes = 0;                // per step, all layers
  double tier1_bytes = 0, scratch_bytes = 0, dense_bytes = 0;  // of all sequences
  double read_bytes = 0;                                       // per step, all layers
};

// progress (may be empty) is told what is being done. ERRORS: those of the device; InvalidArgument;
// Uncertifiable where a step failed.
DeviceBenchResult bench_device(const DeviceBenchOptions& options,
                               const std::function<void(const std::string&)>& progress = {});

}  // namespace certkv
