#include "runtime/transformer.h"

#include <algorithm>
#include <chrono>
#include <new>

#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/prefill_attention.h"
#include "kernels/rope.h"
#include "kvstore/content_owner.h"
#include "parallel/communicator.h"
#include "runtime/kv_attention.h"
#include "runtime/model_config.h"
#include "runtime/model_rope.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

constexpr size_t kChunk = 512;  // prompt rows taken through a layer together
// So that behind shared segments chunks begin where they would have begun without them.
static_assert(kSegmentTokens % kChunk == 0);

class Stopwatch {
 public:
  explicit Stopwatch(double& seconds) : seconds_(seconds) {}
  ~Stopwatch() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

const char* layer_part_text(LayerPart part) {
  switch (part) {
    case LayerPart::KeyValue:
      return "a key or value";
    case LayerPart::Attention:
      return "the attention output";
    case LayerPart::Mlp:
      return "the MLP output";
  }
  return "an unknown part";
}

void check_tokens(const ModelConfig& config, std::span<const int32_t> tokens) {
  for (size_t i = 0; i < tokens.size(); ++i)
    CERTKV_EXPECT(tokens[i] >= 0 && tokens[i] < config.vocab, InvalidArgument,
                  "token {} of the prompt is id {}: the vocabulary has {} ids", i, tokens[i],
                  config.vocab);
}

struct Transformer::Prompt {
  int64_t sequence = 0;
  size_t tokens = 0;
  size_t shared = 0;             // of them, whose originals the store had: x begins behind them
  std::vector<float> x;          // [tokens, hidden], the residual stream
  std::vector<uint16_t> k, v;    // [local_kv_heads, tokens, head_dim], of the current layer
  std::vector<float> attention;  // [local_kv_heads, chunk, heads_per_group * head_dim]
  std::vector<float> last_q;     // of the current layer, as KvAttention::store_prefill takes them
  bool nonfinite = false;        // a key or value on this rank, not yet agreed upon
};

Transformer::Transformer(const ModelConfig& config, const Weights& weights, Communicator& group,
                         KvAttention& cache, ThreadPool& pool, TransformerOptions options)
    : config_(config),
      group_(group),
      cache_(cache),
      pool_(pool),
      options_(options),
      layers_(config, weights, group, pool, options.deterministic),
      frequency_(model_rope_frequencies(config)) {
  CERTKV_EXPECT(options.originals == DType::BF16 || options.originals == DType::F16,
                InvalidArgument, "originals of type {}: BF16 or F16 is needed",
                dtype_name(options.originals));
}

uint64_t Transformer::prefill_bytes(const ModelConfig& config, int64_t tensor, int64_t tokens) {
  const uint64_t originals = 2 * 2 * uint64_t(config.kv_heads / tensor) * uint64_t(config.head_dim);
  const uint64_t chunk_row =
      4 * (uint64_t(config.kv_heads) * uint64_t(config.hidden + 2) * 2 +  // partial sums
           uint64_t(config.hidden + 2) * 2 + 3 * uint64_t(config.intermediate) +
           3 * uint64_t(config.heads + config.kv_heads) * uint64_t(config.head_dim));
  return uint64_t(tokens) * (4 * uint64_t(config.hidden) + originals) +
         std::min<uint64_t>(kChunk, uint64_t(tokens)) * chunk_row;
}

// ---- prefill ------------------------------------------------------------------------------------

std::vector<float> Transformer::prefill(int64_t sequence, std::span<const int32_t> tokens,
                                        const Progress& progress) {
  CERTKV_EXPECT(!tokens.empty(), InvalidArgument,
                "the prompt is empty: at least 1 token is needed");
  CERTKV_EXPECT(int64_t(tokens.size()) <= config_.max_tokens, InvalidArgument,
                "the prompt has {} tokens: the model's limit is {}", tokens.size(),
                config_.max_tokens);
  check_tokens(config_, tokens);
  Prompt p;
  p.sequence = sequence;
  p.tokens = tokens.size();
  p.shared = cache_.shared_tokens(sequence);
  CERTKV_EXPECT(p.shared % kSegmentTokens == 0 && p.shared < p.tokens, InvalidArgument,
                "{} of a prompt's {} tokens are shared: whole segments, and not the last token",
                p.shared, p.tokens);
  try {
    p.x.resize((p.tokens - p.shared) * layers_.hidden());
    p.k.resize(layers_.groups() * p.tokens * layers_.head_dim());
    p.v.resize(p.k.size());
    p.attention.resize(layers_.groups() * std::min(kChunk, p.tokens) * layers_.heads_per_group() *
                       layers_.head_dim());
  } catch (const std::bad_alloc&) {
    CERTKV_THROW(OutOfMemory, "no memory for the activations of a prompt of {} tokens", p.tokens);
  }
  layers_.embed(tokens.subspan(p.shared), p.x.data());
  for (size_t layer = 0; layer < size_t(config_.layers); ++layer) prefill_layer(layer, p, progress);

  std::vector<float> logits(size_t(config_.vocab));
  layers_.logits(p.x.data() + (p.tokens - 1 - p.shared) * layers_.hidden(), 1, logits.data());
  CERTKV_EXPECT(all_finite(logits.data(), logits.size()), NonFinite,
                "the logits after a prompt of {} tokens are not finite", p.tokens);
  return logits;
}

void Transformer::prefill_layer(size_t layer, Prompt& p, const Progress& progress) {
  if (p.shared > 0) load_shared(layer, p);
  for (size_t first = p.shared; first < p.tokens; first += kChunk) {
    const size_t rows = std::min(kChunk, p.tokens - first);
    prefill_chunk(layer, p, first, rows);
    if (progress) progress(int(layer), first + rows);
  }
  Stopwatch watch(layers_.phases.store);
  cache_.store_prefill(p.sequence, int(layer), p.tokens, p.k.data(), p.v.data(), p.last_q);
}

// All ranks have their part of the shared rows, or none goes on.
void Transformer::load_shared(size_t layer, Prompt& p) {
  uint64_t lost = 0;
  {
    Stopwatch watch(layers_.phases.store);
    if (!cache_.load_shared(p.sequence, int(layer), p.tokens, p.k.data(), p.v.data())) lost = 1;
  }
  group_.all_reduce_sum(view_u64(&lost, 1), {});
  group_.wait();
  if (lost != 0)
    throw SharedPrefixLost(
        ErrorKind::OriginalsLost,
        fmt::format("layer {}: originals of the prompt's first {} tokens are damaged or gone on "
                    "{} rank(s)",
                    layer, p.shared, lost),
        __FILE__, __LINE__);
}

void Transformer::prefill_chunk(size_t layer, Prompt& p, size_t first, size_t rows) {
  const size_t d = layers_.head_dim(), hidden = layers_.hidden();
  const size_t out_width = layers_.heads_per_group() * d;
  float* x = p.x.data() + (first - p.shared) * hidden;

  rope_.fill(frequency_, model_rope_magnitude(config_), int64_t(first), rows);
  layers_.project_qkv(layer, x, rows, rope_, ProductShape::Tiles);
  layers_.round_originals(options_.originals, rows, p.k.data() + first * d, p.v.data() + first * d,
                          p.tokens * d, d, [&](size_t) { p.nonfinite = true; });

  if (first + rows == p.tokens) {
    const size_t n = std::min(KvAttention::kLastQueries, rows),
                 width = layers_.heads_per_group() * d;
    p.last_q.clear();
    for (size_t r = rows - n; r < rows; ++r)
      for (size_t g = 0; g < layers_.groups(); ++g) {
        const float* q = layers_.qkv(g) + r * layers_.qkv_width();
        p.last_q.insert(p.last_q.end(), q, q + width);
      }
  }

  // After the last layer only the last token is asked for: its tile of queries is enough. The
  // layer's keys and values are complete all the same.
  size_t begin = 0;
  if (layer + 1 == size_t(config_.layers)) {
    if (first + rows < p.tokens) return;
    const size_t tile = prefill_query_tile(layers_.heads_per_group());
    begin = (rows - 1) / tile * tile;
  }
  const size_t count = rows - begin;
  {
    Stopwatch watch(layers_.phases.attention);
    PrefillAttention a;
    a.q = layers_.qkv(0) + begin * layers_.qkv_width();
    a.q_group_stride = rows * layers_.qkv_width();
    a.q_row_stride = layers_.qkv_width();
    a.k = p.k.data();
    a.v = p.v.data();
    a.kv_head_stride = p.tokens * d;
    a.dtype = options_.originals;
    a.out = p.attention.data();
    a.out_group_stride = count * out_width;
    a.out_row_stride = out_width;
    a.first = first + begin;
    a.rows = count;
    a.kv_heads = layers_.groups();
    a.heads_per_group = layers_.heads_per_group();
    a.head_dim = d;
    prefill_attention(a, pool_, layers_.tick());
  }

  // What one rank saw alone rides on the sum; what all ranks see in the sum needs no agreement.
  std::vector<RowFlags> flags(count);
  flags[0].nonfinite = p.nonfinite ? 1.0f : 0.0f;
  const float* sums =
      layers_.output_projection(layer, p.attention.data(), count * out_width, out_width, count,
                                flags.data(), ProductShape::Tiles);
  CERTKV_EXPECT(flags[0].nonfinite == 0, NonFinite,
                "layer {}: a key or value of the prompt's first {} tokens is NaN, infinite or "
                "beyond the range of {}",
                layer, first + rows, dtype_name(options_.originals));
  x += begin * hidden;
  layers_.add_sums(sums, count, x, [&](size_t r) {
    CERTKV_THROW(NonFinite, "layer {}: the attention output of token {} is not finite", layer,
                 first + begin + r);
  });
  layers_.mlp(layer, x, count, ProductShape::Tiles, [&](size_t r) {
    CERTKV_THROW(NonFinite, "layer {}: the MLP output of token {} is not finite", layer,
                 first + begin + r);
  });
}

// ---- decode -------------------------------------------------------------------------------------

DecodeOutput Transformer::decode(std::span<const DecodeInput> rows) {
  DecodeOutput out;
  out.chosen.resize(rows.size());  // none: the logits are here already
  if (rows.empty()) return out;
  const size_t local = layers_.groups() * layers_.head_dim();
  const size_t pairs = layers_.head_dim() / 2;
  std::vector<int32_t> tokens;
  for (const DecodeInput& row : rows) {
    CERTKV_EXPECT(row.position >= 0 && row.position < config_.max_tokens, InvalidArgument,
                  "position {} of sequence {}: the model's limit is {} tokens", row.position,
                  row.sequence, config_.max_tokens);
    tokens.push_back(row.token);
  }
  check_tokens(config_, tokens);
  x_.resize(rows.size() * layers_.hidden());
  q_.resize(rows.size() * local * layers_.heads_per_group());
  out_.resize(q_.size());
  k_.resize(rows.size() * local);
  v_.resize(k_.size());
  out.nonfinite_layer.assign(rows.size(), -1);
  out.nonfinite_part.assign(rows.size(), LayerPart::KeyValue);
  out.fallback_layers.assign(rows.size(), 0);
  out.logits.resize(rows.size() * size_t(config_.vocab));

  // One table row per sequence, each at its own position.
  RopeTable& table = rope_;
  std::vector<float> cos, sin;
  for (const DecodeInput& row : rows) {
    table.fill(frequency_, model_rope_magnitude(config_), row.position, 1);
    cos.insert(cos.end(), table.cos.begin(), table.cos.begin() + ptrdiff_t(pairs));
    sin.insert(sin.end(), table.sin.begin(), table.sin.begin() + ptrdiff_t(pairs));
  }
  table.cos = std::move(cos);
  table.sin = std::move(sin);

  layers_.embed(tokens, x_.data());
  for (size_t layer = 0; layer < size_t(config_.layers); ++layer) decode_layer(layer, rows, out);
  layers_.logits(x_.data(), rows.size(), out.logits.data());
  return out;
}

void Transformer::decode_layer(size_t layer, std::span<const DecodeInput> rows, DecodeOutput& out) {
  const auto mark_as = [&](LayerPart part) {
    return [&out, layer, part](size_t r) {
      if (out.nonfinite_layer[r] >= 0) return;
      out.nonfinite_layer[r] = int(layer);
      out.nonfinite_part[r] = part;
    };
  };
  layers_.project_qkv(layer, x_.data(), rows.size(), rope_, ProductShape::Rows);
  std::vector<RowFlags> flags(rows.size());
  const float* sums = attend_rows(layer, rows, flags.data(), out);
  for (size_t r = 0; r < rows.size(); ++r)
    if (!(flags[r].nonfinite == 0)) mark_as(LayerPart::KeyValue)(r);
  layers_.add_sums(sums, rows.size(), x_.data(), mark_as(LayerPart::Attention));
  layers_.mlp(layer, x_.data(), rows.size(), ProductShape::Rows, mark_as(LayerPart::Mlp));
}

// Attention and output projection of one layer; rows for which any rank asks for rung 4 are
// repeated densely on all ranks, and their sums replaced.
const float* Transformer::attend_rows(size_t layer, std::span<const DecodeInput> rows,
                                      RowFlags* flags, DecodeOutput& out) {
  const size_t d = layers_.head_dim(), groups = layers_.groups();
  const size_t width = layers_.heads_per_group() * d;  // of one group's queries
  std::vector<DecodeRow> asked;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (size_t g = 0; g < groups; ++g) {
      const float* q = layers_.qkv(g) + r * layers_.qkv_width();
      std::copy(q, q + width, q_.data() + (r * groups + g) * width);
    }
    asked.push_back({rows[r].sequence, q_.data() + r * groups * width, k_.data() + r * groups * d,
                     v_.data() + r * groups * d, out_.data() + r * groups * width});
  }
  layers_.round_originals(options_.originals, rows.size(), k_.data(), v_.data(), d, groups * d,
                          [&](size_t r) { flags[r].nonfinite = 1; });
  {
    Stopwatch watch(layers_.phases.attention);
    std::vector<float> fallback(rows.size(), 0.0f);
    cache_.decode(int(layer), asked, fallback.data());
    for (size_t r = 0; r < rows.size(); ++r) flags[r].fallback = fallback[r];
  }
  const float* sums = layers_.output_projection(layer, out_.data(), width, groups * width,
                                                rows.size(), flags, ProductShape::Rows);
  std::vector<size_t> again;
  for (size_t r = 0; r < rows.size(); ++r)
    if (!(flags[r].fallback == 0)) again.push_back(r);
  if (again.empty()) return sums;

  sums_.assign(sums, sums + rows.size() * layers_.sum_stride());
  std::vector<DecodeRow> dense;
  for (size_t r : again) dense.push_back(asked[r]);
  {
    Stopwatch watch(layers_.phases.attention);
    cache_.decode_dense(int(layer), dense);
  }
  std::vector<float> compact(again.size() * groups * width);
  std::vector<RowFlags> repeated(again.size());
  for (size_t i = 0; i < again.size(); ++i)
    std::copy(dense[i].out, dense[i].out + groups * width, compact.data() + i * groups * width);
  sums = layers_.output_projection(layer, compact.data(), width, groups * width, again.size(),
                                   repeated.data(), ProductShape::Rows);
  for (size_t i = 0; i < again.size(); ++i) {
    ++out.fallback_layers[again[i]];
    std::copy(sums + i * layers_.sum_stride(), sums + (i + 1) * layers_.sum_stride(),
              sums_.data() + again[i] * layers_.sum_stride());
  }
  return sums_.data();
}

}  // namespace certkv
