// What a decode step and a prefill of the device's forward pass cost without the cache's attention:
// a few layers of the shape of Llama-3.1-8B with random weights, beside the time that their
// products alone take. forward_gpu_bench [layers] [prompt tokens]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/cuda_device.h"
#include "runtime/device/device_transformer.h"
#include "runtime/weights.h"

namespace certkv {
namespace {

class NoAttention final : public DeviceAttention {
 public:
  NoAttention(cuda::Device& device, size_t width) : device_(device), width_(width) {}
  void store_prefill(int64_t, int, size_t, const uint16_t*, const uint16_t*, size_t,
                     std::span<const float>) override {}
  void begin_rows(std::span<const int64_t> sequences, float* out) override {
    rows_ = sequences.size();
    out_ = out;
  }
  void decode(int, const float*, const Following& following) override {
    device_.fill(out_, 0, rows_ * width_ * sizeof(float));
    if (following.enqueue) following.enqueue(false);
  }
  uint64_t shape() const override { return 1; }

 private:
  cuda::Device& device_;
  size_t width_, rows_ = 0;
  float* out_ = nullptr;
};

uint32_t state = 1;
float random_weight() {
  state = state * 1664525u + 1013904223u;
  return (float(state >> 8) * 0x1p-24f - 0.5f) * 0.04f;
}
Matrix random_matrix(int64_t rows, int64_t cols) {
  Matrix m{rows, cols, std::make_unique_for_overwrite<float[]>(size_t(rows * cols))};
  for (int64_t i = 0; i < rows * cols; ++i) m.values[size_t(i)] = random_weight();
  return m;
}

ModelConfig shape(int64_t layers) {
  ModelConfig c;
  c.hidden = 4096;
  c.intermediate = 14336;
  c.layers = layers;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.vocab = 128256;
  c.rope.theta = 5e5;
  c.max_position_embeddings = c.max_tokens = 131072;
  c.dtype = DType::BF16;
  return c;
}

Weights random_weights(const ModelConfig& c) {
  Weights w;
  w.groups = {0, c.kv_heads};
  w.embed = {DType::BF16, c.vocab, c.hidden,
             std::make_unique<std::byte[]>(size_t(c.vocab * c.hidden) * 2)};
  auto* table = reinterpret_cast<uint16_t*>(w.embed.values.get());
  for (int64_t i = 0; i < c.vocab * c.hidden; ++i) table[i] = float_to_bf16(random_weight());
  const std::vector<float> ones(size_t(c.hidden), 1.0f);
  const int64_t n = c.heads_per_group(), d = c.head_dim, t = c.intermediate / c.kv_heads;
  for (int64_t l = 0; l < c.layers; ++l) {
    LayerWeights& layer = w.layers.emplace_back();
    layer.input_norm = layer.post_attention_norm = ones;
    for (int64_t g = 0; g < c.kv_heads; ++g) {
      GroupWeights& group = layer.groups.emplace_back();
      group.qkv = random_matrix((n + 2) * d, c.hidden);
      group.o = random_matrix(c.hidden, n * d);
      group.gate_up = random_matrix(2 * t, c.hidden);
      group.down = random_matrix(c.hidden, t);
    }
  }
  w.final_norm = ones;
  for (int64_t g = 0; g < c.kv_heads; ++g) {
    w.lm_head_rows.push_back(shard_range(c.vocab, c.kv_heads, g));
    w.lm_head.push_back(random_matrix(w.lm_head_rows.back().count(), c.hidden));
  }
  return w;
}

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The median of 30 in microseconds.
template <typename Body>
double median_us(Body body) {
  std::vector<double> seconds;
  for (int i = 0; i < 33; ++i) {
    const auto start = Clock::now();
    body();
    if (i >= 3) seconds.push_back(since(start));
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2] * 1e6;
}

// Each operation on rows, one launch after another.
void bench_rows(cuda::Device& device, cuda::ModelOps& ops, const ModelConfig& c) {
  constexpr int kLaunches = 200;
  const size_t most = 2048, n = size_t(c.hidden), mlp = size_t(c.intermediate), d = 128;
  const cuda::DeviceArray<float> x(device, most * 2 * mlp, "x"), y(device, most * n, "y"),
      table(device, 131072 * d / 2, "table"), weight(device, n, "weight");
  const cuda::DeviceArray<uint16_t> to(device, most * mlp, "to");
  const cuda::DeviceArray<uint32_t> fault(device, most, "faults");
  for (const auto* a : {&x, &y, &table, &weight}) device.fill(a->data(), 0, a->bytes());
  const auto time = [&](const char* name, size_t rows, double bytes, auto body) {
    const double us = median_us([&] {
                        for (int i = 0; i < kLaunches; ++i) body();
                        device.synchronize(Deadline::after(std::chrono::seconds(60)));
                      }) /
                      kLaunches;
    std::printf("%s, %zu rows: %.2f us, %.0f GB/s\n", name, rows, us, bytes / us * 1e-3);
  };
  for (size_t rows : {size_t(1), size_t(8), most}) {
    const double r = double(rows);
    time("sum and norm", rows, r * double(n) * 14, [&] {
      ops.residual_norm({.x = x.data(),
                         .y = y.data(),
                         .fault = fault.data(),
                         .weight = weight.data(),
                         .eps = 1e-5f,
                         .dtype = DType::BF16,
                         .normed = to.data(),
                         .rows = rows,
                         .n = n});
    });
    const size_t heads = size_t(c.heads), kv = size_t(c.kv_heads);
    time("rotation", rows, r * double((heads + 2 * kv) * d) * 8, [&] {
      ops.rotate_qkv({.qkv = x.data(),
                      .cos = table.data(),
                      .sin = table.data(),
                      .fault = fault.data(),
                      .rows = rows,
                      .heads = heads,
                      .kv_heads = kv,
                      .head_dim = d});
    });
    time("gate", rows, r * double(mlp) * 10, [&] {
      ops.gate({x.data(), nullptr, DType::BF16, to.data(), rows, mlp});
    });
    time("conversion", rows, r * double(n) * 6, [&] {
      ops.convert({x.data(), DType::F32, to.data(), DType::BF16, rows * n});
    });
  }
}

void bench(int64_t layers, size_t prompt) {
  const auto device = cuda::make_cuda_device(0);
  const auto wait = [&] { device->synchronize(Deadline::after(std::chrono::seconds(60))); };
  const auto model = cuda::make_cuda_model_ops(*device);
  const auto linear = cuda::make_cuda_linear_ops(*device);
  const auto dense = cuda::make_cuda_dense_ops(*device);
  const ModelConfig c = shape(layers);
  NoAttention cache(*device, size_t(c.heads * c.head_dim));
  auto start = Clock::now();
  Weights weights = random_weights(c);
  std::printf("%s, %s, %s, %lld layers; random weights made in %.1f s\n", device->name().c_str(),
              linear->name().c_str(), dense->name().c_str(), static_cast<long long>(layers),
              since(start));
  start = Clock::now();
  DeviceTransformer transformer(c, weights, *device, {*model, *linear, *dense}, cache, nullptr,
                                {.max_batch = 8});
  std::printf("uploaded in %.1f s\n", since(start));
  const DeviceWeights bare(c, weights, *device, DType::BF16);
  const uint64_t bytes = DeviceWeights::bytes(c, weights, DType::BF16) - bare.embed.bytes();
  weights = {};
  bench_rows(*device, *model, c);

  const size_t widest = size_t(std::max(2 * c.intermediate, c.vocab));
  const cuda::DeviceArray<float> y(*device, 8 * widest, "a result");
  const cuda::DeviceArray<uint16_t> x(*device, 8 * widest, "an input");
  device->fill(x.data(), 0, x.bytes());
  const auto product = [&](const void* w, size_t out, size_t in, size_t rows) {
    linear->linear({.weight = w,
                    .out = out,
                    .in = in,
                    .x = x.data(),
                    .x_stride = in,
                    .y = y.data(),
                    .y_stride = out,
                    .rows = rows});
  };
  DecodeOutput out;
  for (size_t rows : {1u, 4u, 8u}) {
    std::vector<DecodeInput> step;
    for (size_t r = 0; r < rows; ++r) step.push_back({int64_t(r), int32_t(1000 * r), 70000});
    const double whole = median_us([&] { transformer.decode(step, out); });
    const double products = median_us([&] {
      for (const DeviceLayer& l : bare.layers)
        for (const DeviceMatrix* m : {&l.qkv, &l.o, &l.gate_up, &l.down})
          product(m->values.data(), m->out, m->in, rows);
      product(bare.lm_head_values(), bare.vocab_rows, size_t(c.hidden), rows);
      wait();
    });
    std::printf(
        "decode of %zu rows: %.0f us, products alone %.0f us (%.0f GB/s of weights); the rest %.1f "
        "us a layer\n",
        rows, whole, products, double(bytes) / products * 1e-3,
        (whole - products) / double(layers));
  }

  std::vector<int32_t> ids(prompt);
  for (size_t i = 0; i < prompt; ++i) ids[i] = int32_t(i * 7919 % size_t(c.vocab));
  for (int run = 0; run < 2; ++run) {
    start = Clock::now();
    transformer.prefill(run, ids);
    const double seconds = since(start);
    const double hidden = double(c.hidden), qkv = double((c.heads + 2 * c.kv_heads) * c.head_dim);
    const double flop =
        2 * double(prompt) * double(layers) *
        (hidden * (qkv + double(c.heads * c.head_dim) + 3 * double(c.intermediate)) +
         double(prompt) * double(c.heads * c.head_dim));
    std::printf("prefill of %zu tokens, run %d: %.3f s, %.0f TFLOP/s (the last layer does less)\n",
                prompt, run + 1, seconds, flop / seconds * 1e-12);
  }
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (certkv::cuda::cuda_device_count() == 0) {
    std::printf("no device answers\n");
    return 0;
  }
  certkv::bench(argc > 1 ? std::atoi(argv[1]) : 4, argc > 2 ? size_t(std::atoi(argv[2])) : 16384);
}
