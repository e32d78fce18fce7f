#include "runtime/device/device_transformer.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/rope.h"
#include "runtime/kv_attention.h"
#include "runtime/model_rope.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

constexpr auto kSettleDeadline = std::chrono::seconds(10);  // after an error

// Names of memory, with what makes it smaller.
constexpr const char* kPromptMemory =
    "a prompt's activations (shorten it, or raise parallel.tensor)";
constexpr const char* kStepMemory = "a step's activations (lower run.max_batch)";
constexpr const char* kSamplerMemory = "the sampler's counts (lower run.max_batch)";
constexpr const char* kLogitsMemory = "a step's logits (lower run.max_batch)";

ShardRange groups_of(const ModelConfig& config, const DeviceGroup* group) {
  return group == nullptr ? ShardRange{0, config.kv_heads}
                          : kv_heads_of_rank(config.kv_heads, group->size(), group->rank());
}

const Weights& check_weights(const ModelConfig& config, const Weights& weights,
                             const DeviceGroup* group) {
  const ShardRange own = groups_of(config, group);
  CERTKV_EXPECT(own.begin == weights.groups.begin && own.end == weights.groups.end, InvalidArgument,
                "weights of KV groups {}..{} given to a device that owns {}..{}",
                weights.groups.begin, weights.groups.end, own.begin, own.end);
  return weights;
}

ShardRange vocab_of(const ModelConfig& c, ShardRange groups) {
  return {shard_range(c.vocab, c.kv_heads, groups.begin).begin,
          shard_range(c.vocab, c.kv_heads, groups.end - 1).end};
}

size_t mlp_of(const ModelConfig& c, ShardRange groups) {
  return size_t(shard_range(c.intermediate, c.kv_heads, groups.end - 1).end -
                shard_range(c.intermediate, c.kv_heads, groups.begin).begin);
}

}  // namespace

struct DeviceTransformer::Prompt {
  int64_t sequence = 0;
  size_t tokens = 0;
  size_t capacity = 0;  // tokens that k and v have room for: few values, so few plans of attention
  cuda::DeviceArray<int32_t> ids;    // [tokens]
  cuda::DeviceArray<float> x;        // [tokens, hidden], the residual stream
  cuda::DeviceArray<uint16_t> k, v;  // [kv_heads, capacity, head_dim], of the current layer
  size_t last_queries = 0;           // rows of host_q_
  Buffers chunk;                     // of the rows at hand

  // Whatever ends a prefill, what it enqueued may still use its memory.
  explicit Prompt(cuda::Device& on) : device(on) {}
  ~Prompt() { device.settle(Deadline::after(kSettleDeadline)); }
  cuda::Device& device;
};

DeviceTransformer::DeviceTransformer(const ModelConfig& config, const Weights& weights,
                                     cuda::Device& device, DeviceOps ops, DeviceAttention& cache,
                                     DeviceGroup* group, DeviceTransformerOptions options)
    : DeviceTransformer(
          config,
          DeviceWeights(config, check_weights(config, weights, group), device, options.weights),
          device, ops, cache, group, options) {}

DeviceTransformer::DeviceTransformer(const ModelConfig& config, DeviceWeights weights,
                                     cuda::Device& device, DeviceOps ops, DeviceAttention& cache,
                                     DeviceGroup* group, DeviceTransformerOptions options)
    : config_(config),
      device_(device),
      ops_(ops),
      cache_(cache),
      group_(group),
      options_(options),
      hidden_(size_t(config.hidden)),
      head_dim_(size_t(config.head_dim)),
      heads_(size_t(groups_of(config, group).count() * config.heads_per_group())),
      kv_heads_(size_t(groups_of(config, group).count())),
      mlp_(mlp_of(config, groups_of(config, group))),
      ranks_(group == nullptr ? 1 : size_t(group->size())),
      rank_(group == nullptr ? 0 : size_t(group->rank())),
      max_tokens_(options.max_tokens == 0 ? config.max_tokens
                                          : std::min(options.max_tokens, config.max_tokens)),
      weights_(std::move(weights)),
      graphs_(device, group) {
  CERTKV_EXPECT(options.originals == DType::BF16 || options.originals == DType::F16,
                InvalidArgument, "originals of type {}: BF16 or F16 is needed",
                dtype_name(options.originals));
  CERTKV_EXPECT(options.max_batch > 0 && options.chunk_rows > 0 && options.max_tokens >= 0,
                InvalidArgument,
                "max_batch is {}, chunk_rows {}, max_tokens {}: positive numbers are needed",
                options.max_batch, options.chunk_rows, options.max_tokens);
  CERTKV_EXPECT(options.int8 == weights_.int8, InvalidArgument,
                "weights that are {}INT8 given to a device that was told otherwise",
                weights_.int8 ? "" : "not ");
  for (size_t r = 0; r < ranks_; ++r) {
    vocab_.push_back(
        vocab_of(config, kv_heads_of_rank(config.kv_heads, int64_t(ranks_), int64_t(r))));
    vocab_widest_ = std::max(vocab_widest_, size_t(vocab_.back().count()));
  }

  RopeTable table;
  table.fill(model_rope_frequencies(config), model_rope_magnitude(config), 0, size_t(max_tokens_));
  cos_ = {device, table.cos.size(), "the rotary table (lower model.max_len)"};
  sin_ = {device, table.sin.size(), "the rotary table (lower model.max_len)"};
  device.copy(cos_.data(), table.cos.data(), cos_.bytes());
  device.copy(sin_.data(), table.sin.data(), sin_.bytes());

  if (options.int8)
    int8_workspaces_ = {device, int8_workspaces_bytes(config, int64_t(ranks_), options),
                        "workspaces for 8-bit weights"};
  const size_t batch = options.max_batch;
  step_ = make_buffers(batch, false);
  if (ranks_ > 1) {
    repeated_ = {device, batch, kStepMemory};
    device.fill(step_.faults.data(), 0, step_.faults.bytes());
  }
  x_ = {device, batch * hidden_, kStepMemory};
  logits_ = {device, batch * vocab_widest_, kLogitsMemory};
  if (ranks_ > 1) all_logits_ = {device, ranks_ * batch * vocab_widest_, kLogitsMemory};
  host_logits_ = {device, ranks_ * batch * vocab_widest_, kLogitsMemory};
  best_ = {device, batch, kLogitsMemory};
  if (ranks_ > 1) all_best_ = {device, ranks_ * batch, kLogitsMemory};
  host_best_ = {device, ranks_ * batch, kLogitsMemory};
  host_rows_ = {device, 2 * batch, "a step's tokens"};
  host_draws_ = {device, batch, kSamplerMemory};
  draws_ = {device, batch, kSamplerMemory};
  sampler_ = {device, batch, kSamplerMemory};
  drawn_ = {device, batch, kSamplerMemory};
  host_drawn_ = {device, batch, kSamplerMemory};
  std::vector<uint32_t> begins{0};
  for (const ShardRange& v : vocab_) begins.push_back(uint32_t(v.end));
  vocab_begins_ = {device, begins.size(), kSamplerMemory};
  device.copy(vocab_begins_.data(), begins.data(), vocab_begins_.bytes());
  host_q_ = {device, KvAttention::kLastQueries * heads_ * head_dim_, "a prompt's last queries"};
  device.synchronize(Deadline::after(options.deadline));
}

DeviceTransformer::Buffers DeviceTransformer::make_buffers(size_t rows, bool prompt) {
  const char* what = prompt ? kPromptMemory : kStepMemory;
  const size_t element = dtype_bytes(options_.weights), width = heads_ * head_dim_;
  Buffers b;
  b.rows = rows;
  b.normed = {device_, rows * hidden_ * element, what};
  b.qkv = {device_, rows * (heads_ + 2 * kv_heads_) * head_dim_, what};
  b.attention_in = {device_, rows * width * element, what};
  const bool agrees = ranks_ > 1 && !prompt;
  b.halt_words = agrees ? 1 + rows : 0;
  b.sums = {device_, rows * hidden_ + (agrees ? rows : 0), what};
  b.gate_up = {device_, rows * 2 * mlp_, what};
  b.gated = {device_, rows * mlp_ * element, what};
  b.fault = {device_, rows, what};
  if (ranks_ > 1) b.faults = {device_, b.halt_words + ranks_ * rows, what};
  b.host_faults = {device_, b.halt_words + ranks_ * rows, what};
  if (prompt) {
    b.q16 = {device_, rows * width, what};
    b.out16 = {device_, rows * width, what};
  } else {
    b.ids = {device_, rows, what};
    b.positions = {device_, rows, what};
    b.attention = {device_, rows * width, what};
    if (ranks_ == 1) {
      b.attention_again = {device_, rows * width * element, what};
      b.sums_again = {device_, rows * hidden_, what};
      b.redone = {device_, 1, what};
    }
  }
  return b;
}

namespace {

// Of the largest rank.
struct RankSizes {
  RankSizes(const ModelConfig& c, int64_t tensor, DType weights)
      : hidden(uint64_t(c.hidden)),
        kv(uint64_t(c.kv_heads / tensor) * uint64_t(c.head_dim)),
        q(kv * uint64_t(c.heads_per_group())),
        element(dtype_bytes(weights)) {
    for (int64_t r = 0; r < tensor; ++r) {
      const ShardRange g = kv_heads_of_rank(c.kv_heads, tensor, r);
      mlp = std::max<uint64_t>(mlp, mlp_of(c, g));
      vocab = std::max<uint64_t>(vocab, vocab_of(c, g).count());
    }
  }
  // Of make_buffers(), for either kind of rows.
  uint64_t row(int64_t tensor) const {
    const uint64_t faults = 1 + (tensor > 1 ? uint64_t(tensor) : 0);
    return (hidden + q + mlp) * element + 4 * (q + 2 * kv + hidden + 2 * mlp + faults);
  }
  uint64_t hidden, kv, q, element, mlp = 0, vocab = 0;
};

}  // namespace

uint64_t DeviceTransformer::prefill_bytes(const ModelConfig& c, int64_t tensor, int64_t tokens,
                                          const DeviceTransformerOptions& options) {
  const RankSizes s(c, tensor, options.weights);
  const uint64_t capacity = std::bit_ceil(uint64_t(tokens));
  return uint64_t(tokens) * (4 + 4 * s.hidden) + capacity * 4 * s.kv +
         std::min(uint64_t(options.chunk_rows), capacity) * (s.row(tensor) + 4 * s.q);
}

uint64_t DeviceTransformer::step_bytes(const ModelConfig& c, int64_t tensor,
                                       const DeviceTransformerOptions& options) {
  const RankSizes s(c, tensor, options.weights);
  const uint64_t tokens =
      uint64_t(options.max_tokens == 0 ? c.max_tokens : std::min(options.max_tokens, c.max_tokens));
  // And of each row the likeliest token, and the drawn one.
  const uint64_t logits = (4 * s.vocab + 8) * (1 + (tensor > 1 ? uint64_t(tensor) : 0));
  const uint64_t draw = sizeof(SampleDraw) + sizeof(cuda::SampleScratch) + 4;
  const uint64_t workspace = options.int8 ? int8_workspaces_bytes(c, tensor, options) : 0;
  // One rank projects ahead; several agree on rung 4.
  const uint64_t again = tensor == 1 ? s.q * s.element + 4 * s.hidden : 3 * 4;
  return workspace + tokens * 4 * uint64_t(c.head_dim) + 4 +
         (uint64_t(tensor) + (tensor > 1 ? 2 : 1)) * 4 +
         options.max_batch *
             (s.row(tensor) + 2 * 4 + 4 * s.q + 4 * s.hidden + again + logits + draw);
}

// ---- parts of a layer ---------------------------------------------------------------------------

void DeviceTransformer::norm(const float* x, const cuda::DeviceArray<float>& weight, size_t rows,
                             void* normed) {
  ops_.model.residual_norm({.x = const_cast<float*>(x),
                            .weight = weight.data(),
                            .eps = float(config_.rms_norm_eps),
                            .dtype = weights_.dtype,
                            .normed = normed,
                            .rows = rows,
                            .n = hidden_});
}

void DeviceTransformer::project_qkv(const DeviceLayer& layer, Buffers& b, size_t rows,
                                    cuda::RotateQkv rotation, size_t index) {
  project(layer.qkv, b.normed.data(), rows, b.qkv.data());
  rotation.qkv = b.qkv.data();
  rotation.bias = layer.qkv_bias.data();
  rotation.q_norm = layer.q_norm.data();
  rotation.k_norm = layer.k_norm.data();
  rotation.eps = float(config_.rms_norm_eps);
  rotation.cos = cos_.data();
  rotation.sin = sin_.data();
  rotation.originals = options_.originals;
  rotation.fault = b.fault.data();
  rotation.code = fault_code(index, LayerPart::KeyValue);
  rotation.rows = rows;
  rotation.heads = heads_;
  rotation.kv_heads = kv_heads_;
  rotation.head_dim = head_dim_;
  ops_.model.rotate_qkv(rotation);
}

void DeviceTransformer::project_output(size_t index, Buffers& b, size_t rows, bool again) {
  const void* attention = b.attention.data();
  if (weights_.dtype != DType::F32) {
    std::byte* converted = (again ? b.attention_again : b.attention_in).data();
    ops_.model.convert(
        {attention, DType::F32, converted, weights_.dtype, rows * heads_ * head_dim_});
    attention = converted;
  }
  project(weights_.layers[index].o, attention, rows, (again ? b.sums_again : b.sums).data(), again);
}

void DeviceTransformer::finish_layer(size_t index, Buffers& b, size_t rows, float* x,
                                     uint32_t* fault, const cuda::DeviceArray<float>* next,
                                     const uint32_t* only) {
  const DeviceLayer& w = weights_.layers[index];
  cuda::ResidualNorm add{.x = x,
                         .y = b.sums.data(),
                         .y_again = b.sums_again.data(),
                         .again = b.redone.data(),
                         .bias = w.o_bias.data(),
                         .fault = fault,
                         .code = fault_code(index, LayerPart::Attention),
                         .weight = w.post_attention_norm.data(),
                         .eps = float(config_.rms_norm_eps),
                         .dtype = weights_.dtype,
                         .normed = b.normed.data(),
                         .rows = rows,
                         .n = hidden_,
                         .only = only};
  // What forces rung 4 rides on the sum, an element a row. SOURCE: method section 8.
  float* const flags = flags_of(b, rows);
  if (flags != nullptr) {
    add.halted = b.faults.data();
    add.layer = uint32_t(index);
    if (only == nullptr) add.fallback = flags;
  }
  const bool rides = add.fallback != nullptr;
  if (group_ != nullptr) group_->sum(b.sums.data(), rows * hidden_ + (rides ? rows : 0));
  ops_.model.residual_norm(add);
  add.y_again = nullptr;
  add.again = nullptr;
  add.fallback = nullptr;
  add.only = nullptr;
  add.clear = flags;

  project(w.gate_up, b.normed.data(), rows, b.gate_up.data());
  ops_.model.gate(
      {b.gate_up.data(), w.gate_up_bias.data(), weights_.dtype, b.gated.data(), rows, mlp_});
  project(w.down, b.gated.data(), rows, b.sums.data());
  if (group_ != nullptr) group_->sum(b.sums.data(), rows * hidden_);
  add.bias = w.down_bias.data();
  add.code = fault_code(index, LayerPart::Mlp);
  add.weight = next == nullptr ? nullptr : next->data();
  ops_.model.residual_norm(add);
}

// ---- prefill ------------------------------------------------------------------------------------

std::vector<float> DeviceTransformer::prefill(int64_t sequence, std::span<const int32_t> tokens,
                                              const Progress& progress) {
  CERTKV_EXPECT(!tokens.empty(), InvalidArgument,
                "the prompt is empty: at least 1 token is needed");
  CERTKV_EXPECT(int64_t(tokens.size()) <= max_tokens_, InvalidArgument,
                "the prompt has {} tokens: the limit is {}", tokens.size(), max_tokens_);
  check_tokens(config_, tokens);
  Prompt p(device_);
  p.sequence = sequence;
  p.tokens = tokens.size();
  p.capacity = std::bit_ceil(p.tokens);
  const size_t originals = kv_heads_ * p.capacity * head_dim_;
  const char* what = kPromptMemory;
  p.ids = {device_, p.tokens, what};
  p.x = {device_, p.tokens * hidden_, what};
  p.k = {device_, originals, what};
  p.v = {device_, originals, what};
  p.chunk = make_buffers(std::min(options_.chunk_rows, p.capacity), true);

  // Attention multiplies what lies beyond the tokens by zero, so it must be finite.
  device_.fill(p.k.data(), 0, p.k.bytes());
  device_.fill(p.v.data(), 0, p.v.bytes());
  device_.copy(p.ids.data(), tokens.data(), p.ids.bytes());
  ops_.model.embed(
      {weights_.embed.data(), weights_.embed_dtype, p.ids.data(), p.x.data(), p.tokens, hidden_});
  waited_ = std::chrono::steady_clock::now();
  for (size_t layer = 0; layer < weights_.layers.size(); ++layer) prefill_layer(layer, p, progress);

  norm(p.x.data() + (p.tokens - 1) * hidden_, weights_.final_norm, 1, p.chunk.normed.data());
  project_logits(p.chunk, 1);
  fetch_logits(gather_logits(1), 1);
  wait(&phases_.projections);
  std::vector<float> out(size_t(config_.vocab));
  copy_logits(0, 1, out.data());
  CERTKV_EXPECT(all_finite(out.data(), out.size()), NonFinite,
                "the logits after a prompt of {} tokens are not finite", p.tokens);
  return out;
}

void DeviceTransformer::prefill_layer(size_t layer, Prompt& p, const Progress& progress) {
  for (size_t first = 0; first < p.tokens; first += p.chunk.rows) {
    const size_t rows = std::min(p.chunk.rows, p.tokens - first);
    prefill_chunk(layer, p, first, rows);
    if (progress) progress(int(layer), first + rows);
  }
  cache_.store_prefill(p.sequence, int(layer), p.tokens, p.k.data(), p.v.data(),
                       p.capacity * head_dim_,
                       {host_q_.data(), p.last_queries * heads_ * head_dim_});
  wait(&phases_.store);
}

void DeviceTransformer::prefill_chunk(size_t layer, Prompt& p, size_t first, size_t rows) {
  Buffers& b = p.chunk;
  const size_t width = heads_ * head_dim_;
  float* x = p.x.data() + first * hidden_;
  device_.fill(b.fault.data(), 0xff, rows * sizeof(uint32_t));
  norm(x, weights_.layers[layer].input_norm, rows, b.normed.data());
  project_qkv(weights_.layers[layer], b, rows,
              {.first_position = first,
               .q16 = b.q16.data(),
               .k16 = p.k.data(),
               .v16 = p.v.data(),
               .kv_head_stride = p.capacity * head_dim_,
               .kv_first = first},
              layer);
  cache_.take_rows(p.sequence, int(layer), first + rows, p.k.data(), p.v.data(),
                   p.capacity * head_dim_);
  const bool last_chunk = first + rows == p.tokens;
  if (last_chunk) {
    p.last_queries = std::min(KvAttention::kLastQueries, rows);
    for (size_t i = 0; i < p.last_queries; ++i)
      device_.copy(
          host_q_.data() + i * width,
          b.qkv.data() + (rows - p.last_queries + i) * (heads_ + 2 * kv_heads_) * head_dim_,
          width * sizeof(float));
  }
  // After the last layer only the last token is asked for. The layer's keys and values are complete
  // all the same.
  const bool last_layer = layer + 1 == weights_.layers.size();
  if (!last_layer || last_chunk) {
    const size_t begin = last_layer ? rows - 1 : 0, count = rows - begin;
    wait(&phases_.projections);
    attend_prompt(p, first, rows);
    wait(&phases_.attention);
    const uint16_t* out16 = b.out16.data() + begin * width;
    const void* attention = out16;
    if (weights_.dtype != options_.originals) {
      ops_.model.convert(
          {out16, options_.originals, b.attention_in.data(), weights_.dtype, count * width});
      attention = b.attention_in.data();
    }
    project(weights_.layers[layer].o, attention, count, b.sums.data());
    finish_layer(layer, b, count, x + begin * hidden_, b.fault.data() + begin, nullptr);
  }
  collect_faults(b, rows);
  wait(&phases_.projections);
  check_chunk(p, layer, first, rows);
}

void DeviceTransformer::wait(double* phase) {
  if (group_ != nullptr) group_->wait();
  device_.synchronize(Deadline::after(options_.deadline));
  const auto now = std::chrono::steady_clock::now();
  *phase += std::chrono::duration<double>(now - waited_).count();
  waited_ = now;
}

// Attention of the chunk's rows, which begin at token `first`, to out16.
void DeviceTransformer::attend_prompt(Prompt& p, size_t first, size_t rows) {
  const size_t d = head_dim_;
  ops_.dense.prefill({.dtype = options_.originals,
                      .rows = rows,
                      .tokens = first + rows,
                      .row_capacity = p.chunk.rows,
                      .token_capacity = p.capacity,
                      .heads = heads_,
                      .kv_heads = kv_heads_,
                      .head_dim = d,
                      .q = p.chunk.q16.data(),
                      .q_row_stride = heads_ * d,
                      .q_head_stride = d,
                      .k = p.k.data(),
                      .k_token_stride = d,
                      .k_head_stride = p.capacity * d,
                      .v = p.v.data(),
                      .v_token_stride = d,
                      .v_head_stride = p.capacity * d,
                      .out = p.chunk.out16.data(),
                      .out_row_stride = heads_ * d,
                      .out_head_stride = d});
}

void DeviceTransformer::check_chunk(const Prompt& p, size_t layer, size_t first, size_t rows) {
  for (size_t r = 0; r < rows; ++r) {
    const uint32_t code = fault_of(p.chunk, rows, r);
    if (code == cuda::kNoFault) continue;
    switch (LayerPart(code % kParts)) {
      case LayerPart::KeyValue:
        CERTKV_THROW(
            NonFinite,
            "layer {}: a key or value of token {} of the prompt is NaN, infinite or beyond "
            "the range of {}",
            layer, first + r, dtype_name(options_.originals));
      case LayerPart::Attention:
        CERTKV_THROW(NonFinite, "layer {}: the attention output of token {} is not finite", layer,
                     first + r);
      case LayerPart::Mlp:
        CERTKV_THROW(NonFinite, "layer {}: the MLP output of token {} is not finite", layer,
                     first + r);
    }
  }
}

// ---- decode -------------------------------------------------------------------------------------

DecodeOutput DeviceTransformer::decode(std::span<const DecodeInput> rows) {
  DecodeOutput out;
  decode(rows, out);
  return out;
}

void DeviceTransformer::decode(std::span<const DecodeInput> rows, DecodeOutput& out) {
  const size_t n = rows.size(), vocab = size_t(config_.vocab);
  Wanted wanted;
  for (const DecodeInput& row : rows) (row.choice ? wanted.best : wanted.logits) = true;
  out.logits.resize(wanted.logits ? n * vocab : 0);
  out.chosen.assign(n, {});
  out.fallback_layers.assign(n, 0);
  out.nonfinite_layer.assign(n, -1);
  out.nonfinite_part.assign(n, LayerPart::KeyValue);
  if (n == 0) return;
  CERTKV_EXPECT(n <= options_.max_batch, InvalidArgument,
                "a step of {} sequences: at most {} were announced (max_batch)", n,
                options_.max_batch);
  std::vector<int32_t> tokens;
  std::vector<int64_t> sequences;
  for (const DecodeInput& row : rows) {
    CERTKV_EXPECT(row.position >= 0 && row.position < max_tokens_, InvalidArgument,
                  "position {} of sequence {}: the limit is {} tokens", row.position, row.sequence,
                  max_tokens_);
    tokens.push_back(row.token);
    sequences.push_back(row.sequence);
  }
  check_tokens(config_, tokens);
  for (size_t r = 0; r < n; ++r) {
    host_rows_[r] = rows[r].token;
    host_rows_[n + r] = int32_t(rows[r].position);
    host_draws_[r] =
        rows[r].choice ? draw_of(rows[r].choice->options, rows[r].choice->uniform) : SampleDraw{};
    wanted.draw = wanted.draw || host_draws_[r].temperature > 0;
  }
  cache_.agree_through({flags_of(step_, n), step_.halt_words > 0 ? step_.faults.data() : nullptr});
  cache_.begin_rows(sequences, step_.attention.data());

  graphs_.run({n, cache_.shape(), wanted.logits, wanted.best, wanted.draw},
              [this, n, wanted] { enqueue_step(n, wanted); });
  wait_for_step();
  while (const auto layer = halted_layer()) repeat_from(*layer, n, wanted, &out.fallback_layers);

  for (size_t r = 0; r < n; ++r) {
    const uint32_t code = fault_of(step_, n, r);
    out.nonfinite_layer[r] = code == cuda::kNoFault ? -1 : int(code / kParts);
    if (code != cuda::kNoFault) out.nonfinite_part[r] = LayerPart(code % kParts);
    if (rows[r].choice)
      out.chosen[r] = chosen_of(r, n);
    else
      copy_logits(r, n, out.logits.data() + r * vocab);
  }
}

// From host_rows_ to what is wanted on the host, and the rows' faults.
void DeviceTransformer::enqueue_step(size_t n, Wanted wanted) {
  Buffers& b = step_;
  device_.copy(b.ids.data(), host_rows_.data(), n * sizeof(int32_t));
  device_.copy(b.positions.data(), host_rows_.data() + n, n * sizeof(int32_t));
  device_.fill(b.fault.data(), 0xff, n * sizeof(uint32_t));
  ops_.model.embed(
      {weights_.embed.data(), weights_.embed_dtype, b.ids.data(), x_.data(), n, hidden_});
  cuda::ResidualNorm first{.x = x_.data(),
                           .weight = weights_.layers[0].input_norm.data(),
                           .eps = float(config_.rms_norm_eps),
                           .dtype = weights_.dtype,
                           .normed = b.normed.data(),
                           .rows = n,
                           .n = hidden_};
  first.clear = flags_of(b, n);
  ops_.model.residual_norm(first);
  enqueue_layers(0, n, wanted);
}

void DeviceTransformer::enqueue_layers(size_t first, size_t n, Wanted wanted) {
  Buffers& b = step_;
  for (size_t layer = first; layer < weights_.layers.size(); ++layer) {
    project_qkv(weights_.layers[layer], b, n, {.positions = b.positions.data()}, layer);
    const auto output = [this, &b, n, layer](bool again) { project_output(layer, b, n, again); };
    // Ranks sum what they share, of which there is one.
    DeviceAttention::Following following;
    if (ranks_ == 1) following = {output, b.redone.data()};
    cache_.decode(int(layer), b.qkv.data(), following);
    if (ranks_ > 1) output(false);
    const bool last = layer + 1 == weights_.layers.size();
    finish_layer(layer, b, n, x_.data(), b.fault.data(),
                 last ? &weights_.final_norm : &weights_.layers[layer + 1].input_norm);
  }
  project_logits(b, n);
  const float* gathered = wanted.logits || wanted.draw ? gather_logits(n) : nullptr;
  if (wanted.logits) fetch_logits(gathered, n);
  const uint64_t* best = wanted.best ? fetch_best(n) : nullptr;
  if (wanted.draw) draw_tokens(gathered, best, n);
  collect_faults(b, n);
}

}  // namespace certkv
