#include "runtime/bench/device_bench.h"

#include <chrono>
#include <cmath>
#include <random>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kvstore/client.h"
#include "kvstore/store_process.h"
#include "parallel/local_world.h"
#include "runtime/bench/dense_baseline.h"
#include "runtime/device/device_backend.h"
#include "runtime/device/device_cache.h"
#include "runtime/device/device_transformer.h"
#include "runtime/weights.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kDeadline = std::chrono::seconds(120);

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

ModelConfig config_of(const DeviceBenchOptions& o) {
  ModelConfig c;
  c.hidden = o.hidden;
  c.intermediate = o.intermediate;
  c.layers = o.layers;
  c.heads = o.query_heads;
  c.kv_heads = o.kv_heads;
  c.head_dim = o.head_dim;
  c.vocab = o.vocab;
  c.rope.theta = 5e5;
  c.max_position_embeddings = c.max_tokens = o.context + 1024;
  c.dtype = o.dtype;
  return c;
}

class WeightSource {
 public:
  explicit WeightSource(uint64_t seed) : state_(uint32_t(seed) * 2654435761u + 1) {}
  float next() {  // uniform, about as wide as trained weights are
    state_ = state_ * 1664525u + 1013904223u;
    return (float(state_ >> 8) * 0x1p-24f - 0.5f) * 0.04f;
  }
  Matrix matrix(int64_t rows, int64_t cols) {
    Matrix m{rows, cols, std::make_unique_for_overwrite<float[]>(size_t(rows * cols))};
    for (int64_t i = 0; i < rows * cols; ++i) m.values[size_t(i)] = next();
    return m;
  }

 private:
  uint32_t state_;
};

// With one layer.
Weights one_layer_of_weights(const ModelConfig& c, uint64_t seed) {
  WeightSource source(seed);
  Weights w;
  w.groups = {0, c.kv_heads};
  w.embed = {c.dtype, c.vocab, c.hidden,
             std::make_unique_for_overwrite<std::byte[]>(size_t(c.vocab * c.hidden) * 2)};
  auto* table = reinterpret_cast<uint16_t*>(w.embed.values.get());
  for (int64_t i = 0; i < c.vocab * c.hidden; ++i) table[i] = float_to_16(c.dtype, source.next());
  const std::vector<float> ones(size_t(c.hidden), 1.0f);
  const int64_t n = c.heads_per_group(), d = c.head_dim;
  LayerWeights& layer = w.layers.emplace_back();
  layer.input_norm = layer.post_attention_norm = w.final_norm = ones;
  for (int64_t g = 0; g < c.kv_heads; ++g) {
    const int64_t tile = shard_range(c.intermediate, c.kv_heads, g).count();
    GroupWeights& group = layer.groups.emplace_back();
    group.qkv = source.matrix((n + 2) * d, c.hidden);
    group.o = source.matrix(c.hidden, n * d);
    group.gate_up = source.matrix(2 * tile, c.hidden);
    group.down = source.matrix(c.hidden, tile);
    w.lm_head_rows.push_back(shard_range(c.vocab, c.kv_heads, g));
    w.lm_head.push_back(source.matrix(w.lm_head_rows.back().count(), c.hidden));
  }
  return w;
}

// Rows of queries, keys and values in place of those that random weights would make.
class SyntheticRows : public DeviceAttention {
 public:
  SyntheticRows(DeviceAttention& inner, cuda::Device& device,
                const std::vector<SyntheticHead>& heads, const DeviceBenchOptions& o,
                int query_steps)
      : inner_(inner), device_(device), steps_(query_steps) {
    const size_t d = size_t(o.head_dim), n = size_t(o.query_heads / o.kv_heads);
    const size_t kv = heads.size(), width = (n + 2) * kv * d;
    row_ = size_t(o.batch) * width;
    std::vector<float> all(row_ * size_t(query_steps));
    for (int step = 0; step < query_steps; ++step)
      for (int r = 0; r < o.batch; ++r)
        for (size_t h = 0; h < kv; ++h) {
          float* to = all.data() + size_t(step) * row_ + size_t(r) * width;
          const float* q = heads[h].q.data() + size_t(step) * n * d;
          std::copy_n(q, n * d, to + h * n * d);
          // A new token is like one of the newest.
          const size_t from = (heads[h].k.size() / d - 1 - size_t(step)) * d;
          for (size_t c = 0; c < d; ++c) {
            to[kv * n * d + h * d + c] = float_from_16(o.dtype, heads[h].k[from + c]);
            to[kv * (n + 1) * d + h * d + c] = float_from_16(o.dtype, heads[h].v[from + c]);
          }
        }
    all_ = {device, all.size(), "synthetic queries"};
    now_ = {device, row_, "synthetic queries"};
    device.copy(all_.data(), all.data(), all_.bytes());
    device.synchronize(Deadline::after(kDeadline));
  }

  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, size_t head_stride,
                     std::span<const float> last_q) override {
    inner_.store_prefill(sequence, layer, tokens, k, v, head_stride, last_q);
  }
  void begin_rows(std::span<const int64_t> sequences, float* out) override {
    inner_.begin_rows(sequences, out);
    device_.copy(now_.data(), all_.data() + size_t(step_++ % steps_) * row_, row_ * sizeof(float));
  }
  void decode(int layer, const float*, const Following& following) override {
    inner_.decode(layer, now_.data(), following);
  }
  void end_rows() override { inner_.end_rows(); }
  uint64_t shape() const override { return inner_.shape(); }

 private:
  DeviceAttention& inner_;
  cuda::Device& device_;
  size_t row_ = 0;
  int steps_, step_ = 0;
  cuda::DeviceArray<float> all_, now_;
};

struct Bench {
  Bench(const DeviceBenchOptions& options, const std::function<void(const std::string&)>& told)
      : o(options), progress(told) {}

  const DeviceBenchOptions& o;
  const std::function<void(const std::string&)>& progress;
  ModelConfig config = config_of(o);
  ThreadPool pool{o.threads};
  DeviceBackend backend = make_device_backend(o.backend, 0);
  std::vector<SyntheticHead> heads;
  std::vector<uint16_t> k, v;  // [kv_heads, context, head_dim]
  DeviceBenchResult result;

  cuda::Device& device() { return *backend.device; }
  void say(const std::string& what) const {
    if (progress) progress(what);
  }
  void wait() { device().synchronize(Deadline::after(kDeadline)); }

  void make_heads() {
    say("making heads");
    heads.resize(size_t(o.kv_heads));
    pool.parallel_for(heads.size(), [&](size_t h) {
      heads[h] = make_synthetic_head({.kind = o.heads,
                                      .dtype = o.dtype,
                                      .query_heads = int(o.query_heads / o.kv_heads),
                                      .head_dim = int(o.head_dim),
                                      .tokens = size_t(o.context)},
                                     o.seed + h);
    });
    for (const SyntheticHead& h : heads) {
      k.insert(k.end(), h.k.begin(), h.k.end());
      v.insert(v.end(), h.v.begin(), h.v.end());
    }
  }

  DeviceWeights weights() {
    say("making weights");
    Weights layer = one_layer_of_weights(config, o.seed);
    if (o.int8) quantise_weights(layer);
    DeviceWeights w(config, layer, device(), o.dtype);
    w.repeat_last_layer(device(), size_t(o.layers));
    wait();
    return w;
  }

  // Median of a layer, all layers in one graph.
  Timing layers(DeviceAttention& rows, std::span<const int64_t> sequences, float* out,
                const std::function<void(int)>& layer) {
    const auto all = [&] {
      for (int i = 0; i < int(o.layers); ++i) layer(i);
    };
    rows.begin_rows(sequences, out);
    all();  // makes plans
    wait();
    const auto graph = device().capture(all);
    std::vector<double> us;
    for (int i = 0; i < o.warmup + o.steps; ++i) {
      rows.begin_rows(sequences, out);
      wait();
      const auto start = Clock::now();
      device().launch(*graph);
      wait();
      if (i >= o.warmup) us.push_back(us_since(start) / double(o.layers));
    }
    return timing_of(us);
  }

  // Attention alone, and what it adds to the output projection, which has weights of its own in
  // every layer, so that they come from memory as in a step.
  void attention(DeviceAttention& rows, std::span<const int64_t> sequences, Timing* alone,
                 Timing* added) {
    const size_t batch = size_t(o.batch), width = size_t(o.query_heads * o.head_dim);
    const size_t hidden = size_t(o.hidden), matrix = hidden * width;
    const cuda::DeviceArray<float> out(device(), batch * width, "outputs");
    *alone =
        layers(rows, sequences, out.data(), [&](int layer) { rows.decode(layer, nullptr, {}); });

    const cuda::DeviceArray<uint16_t> weights(device(), matrix * size_t(o.layers), "projections");
    device().fill(weights.data(), 0x3c, weights.bytes());  // small finite numbers of either type
    struct Outputs {
      cuda::DeviceArray<uint16_t> in;
      cuda::DeviceArray<float> sums;
    } outputs[2];
    for (Outputs& to : outputs)
      to = {{device(), batch * width, "outputs"}, {device(), batch * hidden, "sums"}};
    const cuda::DeviceArray<uint32_t> redone(device(), 1, "a word");
    const auto project = [&](int layer, bool again) {
      const Outputs& to = outputs[again ? 1 : 0];
      backend.model->convert({out.data(), DType::F32, to.in.data(), o.dtype, batch * width});
      backend.linear->linear({.weight = weights.data() + size_t(layer) * matrix,
                              .dtype = o.dtype,
                              .out = hidden,
                              .in = width,
                              .x = to.in.data(),
                              .x_stride = width,
                              .y = to.sums.data(),
                              .y_stride = hidden,
                              .rows = batch,
                              .beside = again});
    };
    const Timing both = layers(rows, sequences, out.data(), [&](int layer) {
      rows.decode(layer, nullptr,
                  {[&project, layer](bool again) { project(layer, again); }, redone.data()});
    });
    result.projection =
        layers(rows, sequences, out.data(), [&](int layer) { project(layer, false); });
    *added = {both.us - result.projection.us, both.spread};
  }

  void run() {
    result.device = device().name();
    make_heads();
    DeviceWeights w = o.whole_steps ? weights() : DeviceWeights{};
    certified(&w);
    dense(&w);
  }

  std::vector<DecodeInput> inputs(std::span<const int64_t> sequences, int step) const {
    std::vector<DecodeInput> rows;
    for (int64_t s : sequences)
      rows.push_back({s, int32_t((step * 7919 + 13) % o.vocab), o.context + step});
    return rows;
  }

  std::unique_ptr<DeviceTransformer> forward(DeviceWeights* w, DeviceAttention& rows) {
    return std::make_unique<DeviceTransformer>(
        config, std::move(*w), device(), DeviceOps{*backend.model, *backend.linear, *backend.dense},
        rows, nullptr,
        DeviceTransformerOptions{.originals = o.dtype,
                                 .weights = o.dtype,
                                 .int8 = o.int8,
                                 .max_batch = size_t(o.batch),
                                 .max_tokens = config.max_tokens});
  }

  void certified(DeviceWeights* w) {
    const int64_t answer = o.steps + o.warmup + 8;
    CertifiedCacheOptions options;
    options.scratch = o.scratch;
    options.dtype = o.dtype;
    const CacheNeed need = cache_need(config, o.kv_heads, options, o.context, answer, 1);
    say("starting the store");
    StoreProcessOptions of_store;
    of_store.arena_bytes = need.arena * uint64_t(o.batch) + (uint64_t(1) << 20);
    const SpawnedStore spawned = spawn_store(of_store, std::chrono::seconds(60));
    StoreClientOptions client;
    client.socket = spawned.socket;
    const auto store = StoreClient::attach(client, Deadline::after(kDeadline));
    const auto world = LocalWorld::create(1);
    const auto group = world->communicator(0);
    DeviceCache cache(config, {0, o.kv_heads}, options, device(), *backend.cache, pool, store,
                      *group);
    SyntheticRows rows(cache, device(), heads, o, 16);
    cuda::DeviceArray<uint16_t> keys(device(), k.size(), "synthetic keys"),
        values(device(), v.size(), "synthetic values");
    device().copy(keys.data(), k.data(), keys.bytes());
    device().copy(values.data(), v.data(), values.bytes());
    std::vector<int64_t> sequences;
    StepRules rules;
    rules.tolerance = o.tolerance;
    rules.ladder = o.ladder;
    for (int i = 0; i < o.batch; ++i) {
      say(fmt::format("sealing sequence {} of {}", i + 1, o.batch));
      const int64_t prompt = cache.create(o.context, i, answer);
      for (int layer = 0; layer < int(o.layers); ++layer)
        cache.store_prefill(prompt, layer, size_t(o.context), keys.data(), values.data(),
                            size_t(o.context * o.head_dim), {});
      sequences.push_back(cache.fork(prompt, answer, rules));
      cache.drop(prompt);
      result.dense_bytes += double(cache.dense_bytes(sequences.back()));
    }
    keys.reset();
    values.reset();
    result.tier1_bytes = double(cache.tier1_bytes());
    say("certified");
    // F is learned over the first steps; attention alone repeats one position.
    std::unique_ptr<DeviceTransformer> model;
    if (o.whole_steps) model = forward(w, rows);
    std::vector<double> step_us, after_us;
    const size_t cells = size_t(o.layers * o.kv_heads) * sequences.size();
    std::vector<float> out(1);
    DecodeOutput logits;
    const cuda::DeviceArray<float> ignored(
        device(), size_t(o.batch) * size_t(o.query_heads * o.head_dim), "outputs");
    for (int step = 0; step < o.warmup + o.steps; ++step) {
      const bool counted = step >= o.warmup;
      cache.begin_step(uint64_t(step) + 1, sequences);
      auto start = Clock::now();
      if (model) {
        model->decode(inputs(sequences, step), logits);
      } else {
        rows.begin_rows(sequences, ignored.data());
        for (int layer = 0; layer < int(o.layers); ++layer) rows.decode(layer, nullptr, {});
        wait();
      }
      if (counted) step_us.push_back(us_since(start));
      start = Clock::now();
      cache.end_step();
      std::vector<VerdictRecord> verdicts;
      for (int64_t s : sequences) verdicts.push_back(cache.verdict(s));
      if (counted) after_us.push_back(us_since(start));
      for (size_t i = 0; i < sequences.size(); ++i) {
        const SequenceReport& report = cache.report(sequences[i]);
        CERTKV_EXPECT(!report.error, Uncertifiable, "step {}: {}", step, report.error_text);
        if (!counted) continue;
        const VerdictRecord::Sum& sum = verdicts[i].sum;
        for (size_t r = 0; r < sum.rungs.size(); ++r) result.rungs[r] += sum.rungs[r];
        result.over_tolerance += sum.over + sum.failed;
        const double share = 1.0 / double(o.steps), each = share / double(cells);
        result.promoted += double(sum.promoted_keys + sum.promoted_values) * each;
        result.hits += double(sum.scratch_hits) * each;
        result.paged_bytes += double(sum.paged_bytes) * share;
        result.read_bytes += double(sum.read_bytes) * share;
        for (const GroupReport& g : report.layers) {
          result.f_blocks += double(g.f_blocks) * each;
          result.x_blocks += double(g.x_blocks) * each;
        }
      }
    }
    if (model) result.certified_step = timing_of(step_us);
    result.bookkeeping = timing_of(after_us);
    result.scratch_bytes =
        (result.f_blocks + result.x_blocks) * double(cells) * 32 * double(o.head_dim);
    attention(rows, sequences, &result.certified_attention, &result.certified_added);
    if (model) *w = model->take_weights();
  }

  void dense(DeviceWeights* w) {
    say("dense");
    DenseBaseline baseline(config, o.dtype, o.batch, o.context, backend);
    for (int layer = 0; layer < int(o.layers); ++layer)
      for (int i = 0; i < o.batch; ++i) baseline.store(i, layer, k.data(), v.data());
    SyntheticRows rows(baseline, device(), heads, o, 16);
    std::vector<int64_t> sequences;
    for (int i = 0; i < o.batch; ++i) sequences.push_back(i);
    if (o.whole_steps) {
      const auto model = forward(w, rows);
      std::vector<double> us;
      DecodeOutput logits;
      for (int step = 0; step < o.warmup + o.steps; ++step) {
        const auto start = Clock::now();
        model->decode(inputs(sequences, step), logits);
        if (step >= o.warmup) us.push_back(us_since(start));
        baseline.end_step();
      }
      result.dense_step = timing_of(us);
    }
    attention(rows, sequences, &result.dense_attention, &result.dense_added);
  }
};

}  // namespace

DeviceBenchResult bench_device(const DeviceBenchOptions& options,
                               const std::function<void(const std::string&)>& progress) {
  CERTKV_EXPECT(options.kv_heads >= 1 && options.query_heads % options.kv_heads == 0 &&
                    options.batch >= 1 && options.steps >= 1 && options.layers >= 1,
                InvalidArgument,
                "{} query heads over {} KV heads, batch {}, {} steps, {} layers: positive numbers "
                "are needed, and query heads a multiple of KV heads",
                options.query_heads, options.kv_heads, options.batch, options.steps,
                options.layers);
  Bench bench(options, progress);
  bench.run();
  return bench.result;
}

}  // namespace certkv
