#include "runtime/layers.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "kernels/activation.h"
#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kernels/norm.h"
#include "parallel/communicator.h"
#include "runtime/model_config.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

constexpr size_t kRowTile = 128;     // rows of one OpenBLAS call
constexpr size_t kOutputTile = 512;  // outputs of one OpenBLAS call
constexpr size_t kNormRows = 32;     // rows of one task of row-wise work

class PhaseTimer {
 public:
  explicit PhaseTimer(double& seconds) : seconds_(seconds) {}
  ~PhaseTimer() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  double& seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Buffers only grow.
void reserve(std::vector<float>& buffer, size_t count) {
  if (buffer.size() < count) buffer.resize(count);
}

LinearWeight weight_of(const Matrix& m, const std::vector<float>* bias) {
  return {m.data(), bias && !bias->empty() ? bias->data() : nullptr, size_t(m.rows),
          size_t(m.cols)};
}

}  // namespace

LayerForward::LayerForward(const ModelConfig& config, const Weights& weights, Communicator& group,
                           ThreadPool& pool, bool deterministic)
    : config_(config),
      weights_(weights),
      group_(group),
      pool_(pool),
      deterministic_(deterministic),
      hidden_(size_t(config.hidden)),
      head_dim_(size_t(config.head_dim)),
      heads_per_group_(size_t(config.heads_per_group())),
      groups_(size_t(weights.groups.count())),
      all_groups_(size_t(config.kv_heads)),
      tick_([&group] { group.alive(); }) {
  const ShardRange own = kv_heads_of_rank(config.kv_heads, group.size(), group.rank());
  CERTKV_EXPECT(own.begin == weights.groups.begin && own.end == weights.groups.end, InvalidArgument,
                "weights of KV groups {}..{} given to rank {} of {}, which owns {}..{}",
                weights.groups.begin, weights.groups.end, group.rank(), group.size(), own.begin,
                own.end);
}

void LayerForward::embed(std::span<const int32_t> tokens, float* x) const {
  for (size_t i = 0; i < tokens.size(); ++i) weights_.embed.row(tokens[i], x + i * hidden_);
}

void LayerForward::multiply(std::span<const LinearRows> products, size_t rows, ProductShape shape) {
  PhaseTimer timer(phases.projections);
  if (shape == ProductShape::Rows) {
    linear_rows(products, rows, pool_);
    tick_();
    return;
  }
  struct Tile {
    const LinearRows* product;
    size_t row, output;
  };
  std::vector<Tile> tiles;
  for (const LinearRows& p : products)
    for (size_t o = 0; o < p.w.out; o += kOutputTile)
      for (size_t r = 0; r < rows; r += kRowTile) tiles.push_back({&p, r, o});
  pool_.parallel_for(tiles.size(), [&](size_t i) {
    const auto& [p, row, output] = tiles[i];
    const LinearWeight part{p->w.weight + output * p->w.in,
                            p->w.bias ? p->w.bias + output : nullptr,
                            std::min(kOutputTile, p->w.out - output), p->w.in};
    linear_tile(part, p->x + row * p->x_stride, p->x_stride, std::min(kRowTile, rows - row),
                p->y + row * p->y_stride + output, p->y_stride);
    tick_();
  });
}

void LayerForward::rows_in_parallel(size_t rows, const std::function<void(size_t, size_t)>& body) {
  pool_.parallel_for((rows + kNormRows - 1) / kNormRows,
                     [&](size_t i) { body(i * kNormRows, std::min(rows, (i + 1) * kNormRows)); });
}

void LayerForward::norm_rows(const float* x, size_t rows, const std::vector<float>& weight) {
  reserve(normed_, rows * hidden_);
  PhaseTimer timer(phases.projections);
  rows_in_parallel(rows, [&](size_t begin, size_t end) {
    rms_norm(x + begin * hidden_, hidden_, end - begin, hidden_, weight.data(),
             float(config_.rms_norm_eps), normed_.data() + begin * hidden_, hidden_);
  });
}

void LayerForward::project_qkv(size_t layer, const float* x, size_t rows, const RopeTable& table,
                               ProductShape shape) {
  const LayerWeights& w = weights_.layers[layer];
  const size_t width = qkv_width();
  norm_rows(x, rows, w.input_norm);
  reserve(qkv_, groups_ * rows * width);
  qkv_rows_ = rows;
  std::vector<LinearRows> products;
  for (size_t g = 0; g < groups_; ++g)
    products.push_back({weight_of(w.groups[g].qkv, &w.groups[g].qkv_bias), normed_.data(), hidden_,
                        qkv_.data() + g * rows * width, width});
  multiply(products, rows, shape);

  PhaseTimer timer(phases.projections);
  const float eps = float(config_.rms_norm_eps);
  rows_in_parallel(groups_ * rows, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      float* row = qkv_.data() + i * width;
      float* key = row + heads_per_group_ * head_dim_;
      if (!w.q_norm.empty())
        rms_norm(row, head_dim_, heads_per_group_, head_dim_, w.q_norm.data(), eps, row, head_dim_);
      if (!w.k_norm.empty())
        rms_norm(key, head_dim_, 1, head_dim_, w.k_norm.data(), eps, key, head_dim_);
      rope_rotate(table, i % rows, row, heads_per_group_ + 1);  // queries and the key after them
    }
  });
}

void LayerForward::round_originals(DType dtype, size_t rows, uint16_t* k, uint16_t* v,
                                   size_t group_stride, size_t row_stride,
                                   const std::function<void(size_t)>& bad) {
  PhaseTimer timer(phases.projections);
  finite_.resize(groups_ * rows);
  rows_in_parallel(groups_ * rows, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const size_t g = i / rows, r = i % rows;
      const float* from = qkv(g) + r * qkv_width() + heads_per_group_ * head_dim_;  // key, value
      bool finite = true;
      for (uint16_t* to :
           {k + g * group_stride + r * row_stride, v + g * group_stride + r * row_stride}) {
        for (size_t c = 0; c < head_dim_; ++c) {
          to[c] = float_to_16(dtype, from[c]);
          finite = finite && std::isfinite(float_from_16(dtype, to[c]));
        }
        from += head_dim_;
      }
      finite_[i] = finite;
    }
  });
  for (size_t i = 0; i < groups_ * rows; ++i)
    if (!finite_[i]) bad(i % rows);
}

float* LayerForward::partials(size_t rows) {
  reserve(partial_, groups_ * rows * sum_stride());
  for (size_t i = 0; i < groups_ * rows; ++i) {
    partial_[i * sum_stride() + hidden_] = 0.0f;
    partial_[i * sum_stride() + hidden_ + 1] = 0.0f;
  }
  return partial_.data();
}

// Adds partial_ [groups, rows, hidden + 2] over all groups of all ranks into sum_.
const float* LayerForward::sum_partials(size_t rows, const std::vector<float>& bias) {
  const size_t count = rows * sum_stride();
  const float* parts = partial_.data();
  size_t parts_count = groups_;
  if (deterministic_ && group_.size() > 1) {
    PhaseTimer timer(phases.communicate);
    reserve(gathered_, all_groups_ * count);
    group_.all_gather(view_f32(partial_.data(), groups_ * count),
                      view_f32(gathered_.data(), all_groups_ * count), Stream{});
    group_.wait();
    parts = gathered_.data();
    parts_count = all_groups_;
  }
  reserve(sum_, count);
  {
    PhaseTimer timer(phases.projections);
    rows_in_parallel(rows, [&](size_t begin, size_t end) {
      const size_t from = begin * sum_stride(), n = (end - begin) * sum_stride();
      float* sum = sum_.data() + from;
      std::copy(parts + from, parts + from + n, sum);
      for (size_t g = 1; g < parts_count; ++g) {
        const float* part = parts + g * count + from;
        for (size_t i = 0; i < n; ++i) sum[i] += part[i];
      }
    });
  }
  if (!deterministic_ && group_.size() > 1) {
    PhaseTimer timer(phases.communicate);
    group_.all_reduce_sum(view_f32(sum_.data(), count), Stream{});
    group_.wait();
  }
  if (!bias.empty()) {
    for (size_t r = 0; r < rows; ++r)
      for (size_t i = 0; i < hidden_; ++i) sum_[r * sum_stride() + i] += bias[i];
  }
  return sum_.data();
}

const float* LayerForward::output_projection(size_t layer, const float* attention,
                                             size_t group_stride, size_t row_stride, size_t rows,
                                             RowFlags* flags, ProductShape shape) {
  const LayerWeights& w = weights_.layers[layer];
  float* partial = partials(rows);
  std::vector<LinearRows> products;
  for (size_t g = 0; g < groups_; ++g)
    products.push_back({weight_of(w.groups[g].o, nullptr), attention + g * group_stride, row_stride,
                        partial + g * rows * sum_stride(), sum_stride()});
  multiply(products, rows, shape);
  for (size_t r = 0; r < rows; ++r) {
    partial[r * sum_stride() + hidden_] = flags[r].fallback;
    partial[r * sum_stride() + hidden_ + 1] = flags[r].nonfinite;
  }
  const float* sums = sum_partials(rows, w.o_bias);
  for (size_t r = 0; r < rows; ++r)
    flags[r] = {sums[r * sum_stride() + hidden_], sums[r * sum_stride() + hidden_ + 1]};
  return sums;
}

void LayerForward::mlp(size_t layer, float* x, size_t rows, ProductShape shape,
                       const std::function<void(size_t)>& bad) {
  const LayerWeights& w = weights_.layers[layer];
  norm_rows(x, rows, w.post_attention_norm);
  size_t tiles = 0;
  for (const GroupWeights& g : w.groups) tiles += size_t(g.tile());
  reserve(gate_up_, rows * 2 * tiles);
  reserve(gated_, rows * tiles);
  float* partial = partials(rows);

  std::vector<LinearRows> up, down;
  std::vector<float*> gated;
  size_t at = 0;
  for (size_t g = 0; g < groups_; ++g) {
    const GroupWeights& gw = w.groups[g];
    const size_t tile = size_t(gw.tile());
    up.push_back({weight_of(gw.gate_up, &gw.gate_up_bias), normed_.data(), hidden_,
                  gate_up_.data() + rows * 2 * at, 2 * tile});
    gated.push_back(gated_.data() + rows * at);
    down.push_back({weight_of(gw.down, nullptr), gated.back(), tile,
                    partial + g * rows * sum_stride(), sum_stride()});
    at += tile;
  }
  multiply(up, rows, shape);
  {
    PhaseTimer timer(phases.projections);
    rows_in_parallel(rows, [&](size_t begin, size_t end) {
      for (size_t g = 0; g < groups_; ++g) {
        const size_t tile = down[g].w.in;
        silu_and_multiply(up[g].y + begin * 2 * tile, end - begin, tile, gated[g] + begin * tile,
                          tile);
      }
    });
  }
  multiply(down, rows, shape);
  add_sums(sum_partials(rows, w.down_bias), rows, x, bad);
}

void LayerForward::add_sums(const float* sums, size_t rows, float* x,
                            const std::function<void(size_t)>& bad) {
  PhaseTimer timer(phases.projections);
  finite_.resize(rows);
  rows_in_parallel(rows, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const float* sum = sums + r * sum_stride();
      finite_[r] = all_finite(sum, hidden_);
      for (size_t i = 0; i < hidden_; ++i) x[r * hidden_ + i] += sum[i];
    }
  });
  for (size_t r = 0; r < rows; ++r)
    if (!finite_[r]) bad(r);
}

void LayerForward::logits(const float* x, size_t rows, float* out) {
  const size_t vocab = size_t(config_.vocab);
  size_t widest = 0;
  for (size_t g = 0; g < all_groups_; ++g)
    widest =
        std::max(widest, size_t(shard_range(config_.vocab, config_.kv_heads, int64_t(g)).count()));
  norm_rows(x, rows, weights_.final_norm);
  const size_t part = rows * widest;
  vocab_part_.assign(groups_ * part, 0.0f);
  std::vector<LinearRows> products;
  for (size_t g = 0; g < groups_; ++g)
    products.push_back({weight_of(weights_.lm_head[g], nullptr), normed_.data(), hidden_,
                        vocab_part_.data() + g * part, widest});
  multiply(products, rows, ProductShape::Rows);
  const float* all = vocab_part_.data();
  if (group_.size() > 1) {
    PhaseTimer timer(phases.communicate);
    reserve(vocab_all_, all_groups_ * part);
    group_.all_gather(view_f32(vocab_part_.data(), groups_ * part),
                      view_f32(vocab_all_.data(), all_groups_ * part), Stream{});
    group_.wait();
    all = vocab_all_.data();
  }
  for (size_t g = 0; g < all_groups_; ++g) {
    const ShardRange ids = shard_range(config_.vocab, config_.kv_heads, int64_t(g));
    for (size_t r = 0; r < rows; ++r) {
      const float* from = all + g * part + r * widest;
      std::copy(from, from + ids.count(), out + r * vocab + size_t(ids.begin));
    }
  }
}

}  // namespace certkv
