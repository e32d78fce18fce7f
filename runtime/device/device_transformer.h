// The model's forward pass on one device, one rank of a tensor-parallel group: what
// runtime/transformer.h is for the CPU, with the same meaning of prefill and decode.
//
// Weights lie in the device's memory in one type (F32, F16 or BF16), which their products' inputs
// are rounded to, or in 8 bits (kernels/cuda/int8_args.h); the residual stream, sums, norms and
// rotation are float. Prefill's attention takes queries, keys and values rounded to the originals'
// type and gives rounded outputs.
//
// A decode step is enqueued whole on the device's stream, as one graph where its shape has been
// before: the host waits once, at its end, and nothing is allocated. Unlike on the CPU, logits may
// have other last bits for another number of rows or ranks: the products' library chooses by shape.
//
// ERRORS (besides those of the device, the operations, the cache and the group)
//   InvalidArgument   a token outside the vocabulary, a prompt that is empty or beyond the limit,
//                     more rows than max_batch
//   NonFinite         prefill met a NaN or an infinity; the message names the layer
//   OutOfMemory       no memory for the weights, the step or the prompt (prefill_bytes)
//   DeadlineExceeded  the device has not finished a step, or a chunk of a prompt, in time
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels/cuda/dense_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/model_ops.h"
#include "parallel/shard.h"
#include "runtime/device/device_attention.h"
#include "runtime/device/device_group.h"
#include "runtime/device/device_weights.h"
#include "runtime/device/step_graphs.h"
#include "runtime/forward_pass.h"
#include "runtime/model_config.h"

namespace certkv {

struct DeviceTransformerOptions {
  DType originals = DType::BF16;  // of keys and values: BF16 or F16
  DType weights = DType::BF16;    // in the device's memory: the model's own, or F32
  bool int8 = false;              // the layers' matrices are INT8 (runtime/weights.h)
  // What changes speed and memory.
  size_t max_batch = 1;      // rows of a decode step
  int64_t max_tokens = 0;    // of prompt and answer; 0: the model's limit. 4 head_dim bytes each
  size_t chunk_rows = 2048;  // prompt rows taken through a layer together
  std::chrono::milliseconds deadline{30000};  // of a step, and of a chunk in a layer
};

// The device's operations, all of one device.
struct DeviceOps {
  cuda::ModelOps& model;
  cuda::LinearOps& linear;
  cuda::DenseOps& dense;
};

class DeviceTransformer : public ForwardPass {
 public:
  // Everything but `weights` must outlive this object; those are uploaded here. `group` may be
  // nullptr: one rank, which owns all KV groups. Throws InvalidArgument where the weights are not
  // those of the group's rank, or not of the options' format.
  DeviceTransformer(const ModelConfig& config, const Weights& weights, cuda::Device& device,
                    DeviceOps ops, DeviceAttention& cache, DeviceGroup* group,
                    DeviceTransformerOptions options);

  // With weights that are on the device already: all of its group's rank.
  DeviceTransformer(const ModelConfig& config, DeviceWeights weights, cuda::Device& device,
                    DeviceOps ops, DeviceAttention& cache, DeviceGroup* group,
                    DeviceTransformerOptions options);

  // The cache gets every layer's originals before the next layer begins, a chunk's rows already
  // while the chunk is computed on; progress is told what the device has finished. Nothing that was
  // enqueued runs any more when it returns or throws, unless the device has ceased to answer.
  std::vector<float> prefill(int64_t sequence, std::span<const int32_t> tokens,
                             const Progress& progress) override;
  std::vector<float> prefill(int64_t sequence, std::span<const int32_t> tokens) {
    return prefill(sequence, tokens, {});
  }
  // Over several ranks a layer that any of them sends to rung 4 halts the step, which all ranks see
  // in the layer's sum; at its end the hosts repeat that layer for the rows concerned, densely, and
  // go on behind it. fallback_layers counts these; of one rank it is 0, for its cache goes dense
  // within its layer.
  DecodeOutput decode(std::span<const DecodeInput> rows) override;
  // The same into memory that is used again: half a megabyte of logits a row is costly to take
  // anew. Rows with a choice have their token; their logits stay on the device.
  void decode(std::span<const DecodeInput> rows, DecodeOutput& out);

  // Gives the weights up; nothing may be called afterwards.
  DeviceWeights take_weights() { return std::move(weights_); }

  // Of prefill alone: a decode step is not interrupted to be timed.
  ForwardPhases phases() const override { return phases_; }
  void clear_phases() override { phases_ = {}; }

  // Device memory beside the weights that prefill of so many tokens takes for its time, at most.
  // UNITS: bytes
  static uint64_t prefill_bytes(const ModelConfig& config, int64_t tensor, int64_t tokens,
                                const DeviceTransformerOptions& options);
  // Device memory that the constructor takes beside the weights, at most. UNITS: bytes
  static uint64_t step_bytes(const ModelConfig& config, int64_t tensor,
                             const DeviceTransformerOptions& options);

 private:
  // What some rows need on their way through a layer. Sizes per row: see the constructor.
  struct Buffers {
    size_t rows = 0;
    cuda::DeviceArray<int32_t> ids, positions;
    cuda::DeviceArray<std::byte> normed;        // [rows, hidden], in the weights' type
    cuda::DeviceArray<float> qkv;               // [rows, qkv_width]
    cuda::DeviceArray<float> attention;         // [rows, heads * head_dim] (decode)
    cuda::DeviceArray<uint16_t> q16, out16;     // [rows, heads * head_dim] (prefill)
    cuda::DeviceArray<std::byte> attention_in;  // [rows, heads * head_dim], in the weights' type
    cuda::DeviceArray<float> sums;  // [rows, hidden]; and of several ranks' decode [rows] flags
    // Of one rank's decode: the output projection once more, from what the ladder left.
    cuda::DeviceArray<std::byte> attention_again;
    cuda::DeviceArray<float> sums_again;
    cuda::DeviceArray<uint32_t> redone;  // a word: which of the two counts
    cuda::DeviceArray<float> gate_up;    // [rows, 2 I]
    cuda::DeviceArray<std::byte> gated;  // [rows, I], in the weights' type
    cuda::DeviceArray<uint32_t> fault;   // [rows]
    // Of several ranks: where the step has halted [halt_words], then every rank's faults.
    cuda::DeviceArray<uint32_t> faults;     // [halt_words + ranks * rows]
    cuda::HostArray<uint32_t> host_faults;  // the same
    size_t halt_words = 0;                  // 1 + rows of several ranks' decode, else 0
  };
  struct Prompt;
  // Where in a layer a row's first fault was; with the layer, the code that operations are given.
  static constexpr uint32_t kParts = 4;
  static uint32_t fault_code(size_t layer, LayerPart part) {
    return uint32_t(layer) * kParts + uint32_t(part);
  }
  // Which rows of a step are to be repeated, beside their sums; nullptr: one rank, or a prompt.
  float* flags_of(const Buffers& b, size_t rows) const {
    return b.halt_words == 0 ? nullptr : b.sums.data() + rows * hidden_;
  }
  // What a step brings to the host: half a megabyte of logits a row only where a row needs them.
  struct Wanted {
    bool logits = false, best = false, draw = false;
  };

  static uint64_t int8_workspaces_bytes(const ModelConfig& config, int64_t tensor,
                                        const DeviceTransformerOptions& options);
  Buffers make_buffers(size_t rows, bool prompt);
  void prefill_layer(size_t layer, Prompt& p, const Progress& progress);
  void prefill_chunk(size_t layer, Prompt& p, size_t first, size_t rows);
  void wait(double* phase);  // for the device; adds what it took since the last wait
  void attend_prompt(Prompt& p, size_t first, size_t rows);
  void check_chunk(const Prompt& p, size_t layer, size_t first, size_t rows);

  void enqueue_step(size_t rows, Wanted wanted);
  // Layers from `first` on, and what is wanted; from the norm before the first of them.
  void enqueue_layers(size_t first, size_t rows, Wanted wanted);
  void wait_for_step();
  std::optional<size_t> halted_layer() const;
  void repeat_from(size_t layer, size_t rows, Wanted wanted, std::vector<int>* fallback_layers);
  void project(const DeviceMatrix& matrix, const void* x, size_t rows, float* y,
               bool beside = false);
  void project_qkv(const DeviceLayer& layer, Buffers& b, size_t rows, cuda::RotateQkv rotation,
                   size_t index);
  // Of decode, from b.attention; again: to the buffers of that.
  void project_output(size_t index, Buffers& b, size_t rows, bool again);
  // From the output projection's sums to the end of the layer; `next`: the norm that follows, if
  // any. fault: of the first row. only: of a layer that is repeated, the rows that are.
  void finish_layer(size_t index, Buffers& b, size_t rows, float* x, uint32_t* fault,
                    const cuda::DeviceArray<float>* next, const uint32_t* only = nullptr);
  void norm(const float* x, const cuda::DeviceArray<float>& weight, size_t rows, void* normed);
  void project_logits(const Buffers& b, size_t rows);     // of b.normed, to logits_
  const float* gather_logits(size_t rows);                // of all ranks, on the device
  void fetch_logits(const float* gathered, size_t rows);  // to host_logits_
  const uint64_t* fetch_best(size_t rows);  // to host_best_, of all ranks; where the device has it
  void draw_tokens(const float* gathered, const uint64_t* best, size_t rows);  // to host_drawn_
  DecodeOutput::Chosen chosen_of(size_t row, size_t rows) const;
  void copy_logits(size_t row, size_t rows, float* out) const;
  void collect_faults(Buffers& b, size_t rows);
  uint32_t fault_of(const Buffers& b, size_t rows, size_t row) const;

  const ModelConfig& config_;
  cuda::Device& device_;
  DeviceOps ops_;
  DeviceAttention& cache_;
  DeviceGroup* group_;
  DeviceTransformerOptions options_;
  ForwardPhases phases_;
  std::chrono::steady_clock::time_point waited_{};
  size_t hidden_, head_dim_, heads_, kv_heads_, mlp_;  // of this rank
  size_t ranks_, rank_;
  int64_t max_tokens_;
  DeviceWeights weights_;
  std::vector<ShardRange> vocab_;  // of each rank
  size_t vocab_widest_ = 0;

  cuda::DeviceArray<float> cos_, sin_;            // [max_tokens, head_dim / 2]
  cuda::DeviceArray<std::byte> int8_workspaces_;  // one, two (device_products.cc), or empty
  Buffers step_;
  cuda::DeviceArray<float> x_;                    // [max_batch, hidden]
  cuda::DeviceArray<float> logits_, all_logits_;  // [max_batch, widest], [ranks, max_batch, widest]
  cuda::HostArray<float> host_logits_;            // the same
  cuda::DeviceArray<uint64_t> best_, all_best_;   // [max_batch], [ranks, max_batch]: argmax_word
  cuda::HostArray<uint64_t> host_best_;           // [ranks, max_batch]
  cuda::HostArray<int32_t> host_rows_;            // [2, max_batch]: ids, positions
  cuda::HostArray<SampleDraw> host_draws_;        // [max_batch], and on the device
  cuda::DeviceArray<SampleDraw> draws_;
  cuda::DeviceArray<cuda::SampleScratch> sampler_;  // [max_batch]
  cuda::DeviceArray<uint32_t> vocab_begins_;        // [ranks + 1]
  cuda::DeviceArray<int32_t> drawn_;                // [max_batch]: tokens, -1 where none is drawn
  cuda::HostArray<int32_t> host_drawn_;
  cuda::DeviceArray<uint32_t> repeated_;  // [max_batch] rows of a layer that is repeated
  StepGraphs graphs_;
  cuda::HostArray<float> host_q_;  // [kLastQueries, heads, head_dim]
};

}  // namespace certkv
