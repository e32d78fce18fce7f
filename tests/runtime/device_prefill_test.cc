// A prompt's rows on their way from the device to the arena, beside what is computed: whatever the
// chunks and whenever the device copies, the arena has every row; and what ends a prefill early
// leaves nothing running. In emulation, whose fetches are done as late as their waits allow, or at
// once.
#include <gtest/gtest.h>

#include <map>

#include "kvstore/client.h"
#include "runtime/device/device_cache.h"
#include "runtime/device/device_transformer.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/faulty_device.h"
#include "tests/support/random_model.h"
#include "tests/support/thread_ranks.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

constexpr size_t kTokens = 214;  // 3 pages, 22 open rows
constexpr size_t kPages = kTokens / 64, kBlocks = 4 * kPages;
constexpr int64_t kAnswer = 8;
constexpr uint64_t kSeed = 11;
constexpr const char* kArea = "a prompt's rows on their way to the arena";

std::vector<int32_t> prompt(size_t tokens, int64_t vocab) {
  std::vector<int32_t> ids;
  for (size_t t = 0; t < tokens; ++t) ids.push_back(int32_t((t * 37 + 5) % size_t(vocab)));
  return ids;
}

// Passes everything on, and remembers what a layer was when it was stored.
class Spy : public DeviceAttention {
 public:
  Spy(DeviceCache& cache, cuda::Device& device, const ModelConfig& c)
      : cache_(cache), device_(device), heads_(size_t(c.kv_heads)), d_(size_t(c.head_dim)) {}
  void take_rows(int64_t sequence, int layer, size_t rows, const uint16_t* k, const uint16_t* v,
                 size_t head_stride) override {
    cache_.take_rows(sequence, layer, rows, k, v, head_stride);
  }
  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, size_t stride, std::span<const float> last_q) override {
    for (size_t h = 0; h < heads_; ++h)
      for (const auto& [part, from] : {std::pair{0, k}, std::pair{1, v}}) {
        std::vector<uint16_t>& to = stored[{layer, h, part}];
        to.resize(tokens * d_);
        device_.copy(to.data(), from + h * stride, to.size() * 2);
      }
    device_.synchronize(patience());
    cache_.store_prefill(sequence, layer, tokens, k, v, stride, last_q);
  }
  void begin_rows(std::span<const int64_t> sequences, float* out) override {
    cache_.begin_rows(sequences, out);
  }
  void decode(int layer, const float* qkv, const Following& following) override {
    cache_.decode(layer, qkv, following);
  }
  uint64_t shape() const override { return cache_.shape(); }

  std::map<std::tuple<int, size_t, int>, std::vector<uint16_t>> stored;  // layer, KV head, part

 private:
  DeviceCache& cache_;
  cuda::Device& device_;
  size_t heads_, d_;
};

// A model on a device of its own.
struct Model {
  explicit Model(
      size_t chunk, bool late, const std::function<void(Weights&)>& change = [](Weights&) {})
      : device([](uint64_t, const std::string&) { return false; }, {.late_fetches = late}),
        cache_ops(cuda::make_emulated_cache_ops(device)),
        model_ops(cuda::make_emulated_model_ops(device)),
        linear_ops(cuda::make_emulated_linear_ops(device)),
        dense_ops(cuda::make_emulated_dense_ops(device)),
        store(holder.attach(0)),
        world(LocalWorld::create(1)),
        group(world->communicator(0)) {
    CertifiedCacheOptions o;
    o.dtype = DType::BF16;
    cache.emplace(config, ShardRange{0, config.kv_heads}, o, device, *cache_ops, pool, store,
                  *group);
    spy.emplace(*cache, device, config);
    options.weights = DType::F32;
    options.max_tokens = 300;
    options.chunk_rows = chunk;
    Weights weights = random_weights(config, 1, 0, kSeed);
    change(weights);
    transformer.emplace(config, weights, device, DeviceOps{*model_ops, *linear_ops, *dense_ops},
                        *spy, nullptr, options);
  }
  int64_t create() { return cache->create(kTokens, 1, kAnswer); }
  std::vector<float> prefill(int64_t handle, const ForwardPass::Progress& progress = {}) {
    return transformer->prefill(handle, prompt(kTokens, config.vocab), progress);
  }
  // Every sealed block of the arena, verified by its reader, is what the layer was.
  void expect_in_arena(int64_t handle) {
    cache->fork(handle, kAnswer, StepRules{});  // waits for what is written in the background
    const size_t d = size_t(config.head_dim);
    for (int layer = 0; layer < int(config.layers); ++layer)
      for (int head = 0; head < int(config.kv_heads); ++head)
        for (uint32_t block = 0; block < kBlocks; ++block) {
          const BlockId id = cache->originals_id(handle, layer, head, block);
          const Destination view{.part = BlockPart::Both, .view = true};
          ReadTicket ticket = store->reader()->read({&id, 1}, {&view, 1}, patience());
          const BlockResult r = BlockReader::wait(ticket)[0];
          ASSERT_EQ(r.status, BlockStatus::Ok) << layer << " " << head << " " << block;
          for (const auto& [part, got] : {std::pair{0, r.k}, std::pair{1, r.v}}) {
            const uint16_t* rows = spy->stored.at({layer, size_t(head), part}).data();
            ASSERT_TRUE(std::equal(got, got + 16 * d, rows + block * 16 * d))
                << "layer " << layer << " head " << head << " block " << block << " part " << part;
          }
        }
  }

  ModelConfig config = random_model_config();
  FaultyDevice device;
  std::unique_ptr<cuda::CacheOps> cache_ops;
  std::unique_ptr<cuda::ModelOps> model_ops;
  std::unique_ptr<cuda::LinearOps> linear_ops;
  std::unique_ptr<cuda::DenseOps> dense_ops;
  ThreadHolder holder{uint64_t(16) << 20};
  std::shared_ptr<StoreClient> store;
  std::shared_ptr<LocalWorld> world;
  std::unique_ptr<Communicator> group;
  ThreadPool pool{2};
  std::optional<DeviceCache> cache;
  std::optional<Spy> spy;
  DeviceTransformerOptions options;
  std::optional<DeviceTransformer> transformer;
};

// Chunks that end within a block, with a block, with a page; one that is the whole prompt.
TEST(DevicePrefill, TheArenaHasEveryRowWhateverTheChunksAndWheneverTheDeviceCopies) {
  for (const bool late : {true, false})
    for (const size_t chunk : {9u, 16u, 40u, 64u, 96u, 512u}) {
      SCOPED_TRACE(fmt::format("chunks of {}, {}", chunk, late ? "late" : "at once"));
      Model m(chunk, late);
      size_t told = 0, fetched = 0;
      const int64_t handle = m.create();
      m.prefill(handle, [&](int layer, size_t tokens) {
        // Each chunk's whole blocks left on their own, before the layer was complete.
        const size_t sealed = std::min(tokens / 16, kBlocks) + size_t(layer) * kBlocks;
        EXPECT_EQ(m.device.fetched_bytes(),
                  sealed * size_t(m.config.kv_heads) * 2 * 16 * size_t(m.config.head_dim) * 2);
        fetched += m.device.fetched_bytes() > told;
        told = m.device.fetched_bytes();
      });
      EXPECT_GE(fetched, size_t(m.config.layers) * std::min(kBlocks, kTokens / chunk));
      m.expect_in_arena(handle);
    }
}

TEST(DevicePrefill, PinnedMemoryIsWhatWasForetoldHoweverLongThePrompt) {
  for (const size_t chunk : {16u, 40u, 64u, 96u, 512u}) {
    Model m(chunk, true);
    for (int n = 0; n < 2; ++n) {
      const int64_t handle = m.create();
      m.prefill(handle);
      m.cache->drop(handle);
    }
    EXPECT_EQ(m.device.host_bytes(kArea),
              DeviceCache::prefill_host_bytes(m.config, m.config.kv_heads, kTokens, int64_t(chunk)))
        << chunk;
  }
}

// A device in emulation remembers that memory was freed while a fetch used it, and says so at every
// later wait: wherever a prefill ends, there is none, and the next prompt's rows are its own.
TEST(DevicePrefill, OneThatIsEndedAnywhereLeavesNothingRunning) {
  constexpr size_t kChunk = 64;
  for (const bool late : {true, false}) {
    Model m(kChunk, late);
    int ended = 0;
    for (int last = 0; last < int(m.config.layers); ++last)
      for (size_t at = kChunk; at < kTokens + kChunk; at += kChunk) {
        const int64_t handle = m.create();
        EXPECT_THROW(m.prefill(handle,
                               [&](int layer, size_t tokens) {
                                 if (layer == last && tokens == std::min(at, kTokens))
                                   throw std::runtime_error("enough");
                               }),
                     std::runtime_error);
        m.cache->drop(handle);
        ++ended;
        ASSERT_NO_THROW(m.device.synchronize(patience()));
      }
    EXPECT_EQ(ended, 4 * int(m.config.layers));
    const int64_t handle = m.create();
    m.prefill(handle);
    m.expect_in_arena(handle);
  }
}

TEST(DevicePrefill, ANanInAChunkLeavesNothingRunning) {
  Model m(64, true, [](Weights& w) { w.layers[0].groups[1].o.values[5] = NAN; });
  for (int n = 0; n < 2; ++n) {
    const int64_t handle = m.create();
    const std::string error = thrown_by([&] { m.prefill(handle); });
    EXPECT_TRUE(error.starts_with("NonFinite: layer 0: the attention output of token 0")) << error;
    m.cache->drop(handle);
    ASSERT_NO_THROW(m.device.synchronize(patience()));
  }
}

// What a copy fails with is said at the next wait, and the memory is let go all the same.
TEST(DevicePrefill, AFetchThatFailsOrNeverEndsIsNamed) {
  for (const auto& [kind, says] :
       {std::pair{ErrorKind::DeviceError, "DeviceError: the bus broke"},
        {ErrorKind::DeadlineExceeded, "DeadlineExceeded: the bus broke"}}) {
    Model m(64, true);
    const uint64_t free = m.device.free_bytes();
    const int64_t handle = m.create();
    int waits = 0;
    m.device.on_await = [&, kind = kind] {
      if (++waits == 2) throw Error(kind, "the bus broke");
    };
    EXPECT_EQ(thrown_by([&] { m.prefill(handle); }), says);
    EXPECT_GE(waits, 3);  // waited for once more before the memory went
    m.cache->drop(handle);
    EXPECT_EQ(m.device.free_bytes(), free);
    m.device.on_await = {};
    const int64_t next = m.create();
    m.prefill(next);
    m.expect_in_arena(next);
  }
}

}  // namespace
}  // namespace certkv::test
