// How much memory a job needs, before any of it is allocated: the figures by which the engine
// admits requests and sizes the arena, added up for a whole batch of one length.
#pragma once

#include <cstdint>

#include "runtime/model_config.h"
#include "runtime/options.h"

namespace certkv {

struct FootprintQuestion {
  int64_t tensor = 1;  // T, divides kv_heads
  int64_t ranks_on_node = 1;
  int64_t context = 0;  // tokens of prompt + answer of every sequence
  int64_t batch = 1;    // sequences decoded together, per replica
};

// UNITS: bytes. Upper bounds but for the libraries' own memory.
struct Footprint {
  // per rank
  uint64_t weights = 0;
  uint64_t tier1 = 0;    // pages of quantised keys and values, and the open blocks
  uint64_t scratch = 0;  // originals near the compute, all of the quota in use
  uint64_t prefill = 0;  // activations and originals of one layer, for one prompt at a time
  // per node
  uint64_t tier2 = 0;  // the arena of originals, block headers included

  uint64_t dense_kv = 0;         // per rank: what keys and values would take unquantised
  double tier1_token_bytes = 0;  // per token and KV head, annotations included, padding apart
  int64_t ranks_on_node = 1;

  uint64_t rank() const { return weights + tier1 + scratch + prefill; }
  uint64_t node() const { return uint64_t(ranks_on_node) * rank() + tier2; }
};

// Under `compare` each policy has an open block and scratch of its own; pages and originals of the
// prompt are shared.
// ERRORS: InvalidArgument: T does not divide the KV heads, the context is above the model's limit,
// sizes overflow, or the layout does not exist for this head_dim.
Footprint footprint(const ModelConfig& model, const JobOptions& options,
                    const FootprintQuestion& question);

// The largest batch (at least 0, at most question.batch), and for one sequence the longest context
// (a multiple of 64, at most question.context), whose node() is within `node_bytes`.
int64_t largest_batch(const ModelConfig& model, const JobOptions& options,
                      FootprintQuestion question, uint64_t node_bytes);
int64_t longest_context(const ModelConfig& model, const JobOptions& options,
                        FootprintQuestion question, uint64_t node_bytes);

}  // namespace certkv
