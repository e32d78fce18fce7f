// The model's forward pass on one rank of a tensor-parallel group.
//
// Prefill runs layer by layer over the whole prompt, so that the originals of one layer only are
// near the compute at a time; decode runs one token of each sequence of a batch through all layers.
// Attention of decode belongs to the cache behind KvAttention; attention of prefill is dense over
// the originals, that is over keys (after RoPE) and values rounded to 16 bits.
//
// Every rank of the group constructs one and calls the same functions with the same arguments in
// the same order. Results are the same on all of them, bit for bit.
//
// With `deterministic` logits are also bitwise the same for every number of ranks, provided the
// cache's answers are. With or without it they do not depend on the number of threads, nor on which
// other sequences are decoded in the same batch.
//
// ERRORS (besides those of the group and the cache)
//   InvalidArgument  a token outside the vocabulary, a prompt that is empty or beyond the limit
//   NonFinite        prefill met a NaN or an infinity; the message names the layer
//   OutOfMemory      no memory for the prompt's activations (prefill_bytes)
//   SharedPrefixLost originals that the prompt was to go on behind cannot be had, on some rank
// These are thrown by all ranks at the same point, but for OutOfMemory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/base/dtype.h"
#include "runtime/forward_pass.h"
#include "runtime/layers.h"

namespace certkv {

class KvAttention;

struct TransformerOptions {
  bool deterministic = false;
  DType originals = DType::BF16;  // of keys and values: BF16 or F16
};

class Transformer : public ForwardPass {
 public:
  // All references must outlive this object.
  Transformer(const ModelConfig& config, const Weights& weights, Communicator& group,
              KvAttention& cache, ThreadPool& pool, TransformerOptions options);

  std::vector<float> prefill(int64_t sequence, std::span<const int32_t> tokens,
                             const Progress& progress) override;
  std::vector<float> prefill(int64_t sequence, std::span<const int32_t> tokens) {
    return prefill(sequence, tokens, {});
  }
  DecodeOutput decode(std::span<const DecodeInput> rows) override;

  // Host memory that prefill of so many tokens takes on this rank. UNITS: bytes
  static uint64_t prefill_bytes(const ModelConfig& config, int64_t tensor, int64_t tokens);

  ForwardPhases phases() const override { return layers_.phases; }
  void clear_phases() override { layers_.phases = {}; }

 private:
  struct Prompt;  // activations and originals of a prefill
  void prefill_layer(size_t layer, Prompt& p, const Progress& progress);
  void load_shared(size_t layer, Prompt& p);
  void prefill_chunk(size_t layer, Prompt& p, size_t first, size_t rows);
  void decode_layer(size_t layer, std::span<const DecodeInput> rows, DecodeOutput& out);
  const float* attend_rows(size_t layer, std::span<const DecodeInput> rows, RowFlags* flags,
                           DecodeOutput& out);

  const ModelConfig& config_;
  Communicator& group_;
  KvAttention& cache_;
  ThreadPool& pool_;
  TransformerOptions options_;
  LayerForward layers_;
  std::vector<double> frequency_;
  RopeTable rope_;

  // Decode: one row per sequence, local heads only.
  std::vector<float> x_;         // [rows, hidden]
  std::vector<float> q_, out_;   // [rows, local_kv_heads * heads_per_group * head_dim]
  std::vector<uint16_t> k_, v_;  // [rows, local_kv_heads * head_dim]
  std::vector<float> sums_;      // of a layer in which rows were repeated
};

}  // namespace certkv
