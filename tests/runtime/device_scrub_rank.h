// A rank whose device's cache is scrubbed, for tests that damage it: pages, originals, and through
// its operations what the device sees just before and after they run.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "kernels/arith/verdict.h"
#include "kvstore/client.h"
#include "parallel/local_world.h"
#include "runtime/device/device_backend.h"
#include "runtime/device/device_cache.h"
#include "tests/kvstore/store_support.h"

namespace certkv::scrub_test {

inline constexpr int kLayers = 2, kKvHeads = 2, kPerGroup = 2, kDim = 64;
inline constexpr size_t kPages = 5, kPrompt = 64 * kPages + 9;
inline constexpr int64_t kAnswer = 200;
inline constexpr uint64_t kArena = uint64_t(32) << 20;
inline const size_t kPageBytes = cuda::page_layout(kDim, cuda::PageKind::K8V4).page_bytes();

// Counts the pages whose digests are taken, and lets a test in before and after.
class CountingOps : public cuda::CacheOps {
 public:
  explicit CountingOps(cuda::CacheOps& ops) : ops_(ops) {}
  void append(const cuda::AppendArgs& a) override { ops_.append(a); }
  void attend(const cuda::PassArgs& a, const cuda::PassShape& s) override { ops_.attend(a, s); }
  void climb(const cuda::LadderArgs& a) override {
    if (before_climb) before_climb(a);
    ops_.climb(a);
    if (after_climb) after_climb(a);
  }
  void page_in(const cuda::LadderArgs& a) override { ops_.page_in(a); }
  void select_paper(const cuda::LadderArgs& a, const cuda::PaperArgs& p) override {
    if (before_select) before_select(a, p);
    ops_.select_paper(a, p);
    if (after_select) after_select(a, p);
  }
  void rank(const cuda::LadderArgs& a, const cuda::PaperArgs& p) override {
    if (before_rank) before_rank(a, p);
    ops_.rank(a, p);
    if (after_rank) after_rank(a, p);
  }
  void explore(const cuda::LadderArgs& a) override {
    if (before_explore) before_explore(a);
    ops_.explore(a);
    if (after_explore) after_explore(a);
  }
  void forget(const cuda::LadderArgs& a) override { ops_.forget(a); }
  void list_dense(const cuda::LadderArgs& a) override { ops_.list_dense(a); }
  void stage_dense(const cuda::LadderArgs& a, const cuda::DenseArgs& d, int n) override {
    ops_.stage_dense(a, d, n);
  }
  void take_dense(const cuda::LadderArgs& a, const cuda::DenseArgs& d, int n) override {
    ops_.take_dense(a, d, n);
  }
  void learn(const cuda::LadderArgs& a) override { ops_.learn(a); }
  void prefetch(const cuda::LadderArgs& a, double share) override { ops_.prefetch(a, share); }
  void largest_notes(const cuda::LibraryArgs& a) override { ops_.largest_notes(a); }
  void judge_library(const cuda::LibraryArgs& a) override { ops_.judge_library(a); }
  void seal(const cuda::SealArgs& a) override { ops_.seal(a); }
  void digest_pages(const cuda::DigestArgs& a) override {
    if (a.list != nullptr) looks += size_t(a.count);
    if (a.list == nullptr && before_sealed_digests) before_sealed_digests(a);
    if (before_digests) before_digests();
    ops_.digest_pages(a);
    if (after_digests) after_digests(a);
  }
  void check_tables(const cuda::TableArgs& a) override {
    if (before_tables) before_tables(a);
    ops_.check_tables(a);
  }
  size_t looks = 0;
  std::function<void(const cuda::LadderArgs&)> before_climb, after_climb, before_explore,
      after_explore;
  std::function<void(const cuda::LadderArgs&, const cuda::PaperArgs&)> before_select, after_select,
      before_rank, after_rank;
  std::function<void(const cuda::TableArgs&)> before_tables;
  std::function<void()> before_digests;
  std::function<void(const cuda::DigestArgs&)> before_sealed_digests;  // of pages just sealed
  std::function<void(const cuda::DigestArgs&)> after_digests;

 private:
  cuda::CacheOps& ops_;
};

// A cache of one rank. What is appended and asked depends on (sequence, layer, length) alone, so
// two runs that do the same are twins.
class OneRank {
 public:
  // scratch: blocks of a layer, keys and values each; 0: as by default.
  OneRank(DeviceBackend& backend, int64_t scrub_steps, Policy policy = Policy::Naive,
          int64_t scratch = 0, const char* layout = "compact")
      : backend_(backend),
        policy_(policy),
        ops(*backend.cache),
        cache(config_, {0, kKvHeads}, options_with(scrub_steps, scratch, layout), *backend.device,
              ops, pool_, store_, *group_) {}

  std::vector<int64_t> start(int64_t id, int forks,
                             const std::function<void(int64_t)>& before_fork = {}) {
    const int64_t prompt = cache.create(int64_t(kPrompt), id, kAnswer);
    for (int layer = 0; layer < kLayers; ++layer) {
      auto keys = draw(id, layer, 0, kKvHeads * kPrompt * kDim);
      for (size_t i = kDim; equal_keys && i < keys.size(); ++i) keys[i] = keys[i - kDim];
      const auto k = put(keys);
      const auto v = put(draw(id, layer, 1, kKvHeads * kPrompt * kDim));
      cache.store_prefill(prompt, layer, kPrompt, k.data(), v.data(), kPrompt * kDim, {});
    }
    if (before_fork) before_fork(prompt);
    rules.policy = policy_;
    rules.tolerance.value = tolerance;
    std::vector<int64_t> out;
    for (int f = 0; f < forks; ++f) {
      out.push_back(cache.fork(prompt, kAnswer, rules));
      tokens_[out.back()] = kPrompt;
    }
    cache.drop(prompt);
    return out;
  }

  std::vector<VerdictRecord> step(const std::vector<int64_t>& sequences) {
    constexpr size_t kWidth = (kPerGroup + 2) * kKvHeads * kDim;
    constexpr size_t kOuts = kPerGroup * kKvHeads * kDim;
    const size_t n = sequences.size();
    cuda::Device& device = *backend_.device;
    const cuda::DeviceArray<float> qkv(device, n * kWidth, "rows"),
        out(device, n * kOuts, "outputs");
    outputs.clear();
    cache.begin_step(++step_, sequences);
    cache.begin_rows(sequences, out.data());
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<float> rows;
      for (const int64_t s : sequences) {
        std::mt19937_64 random(uint64_t(s) * 1000003 + tokens_[s] * 101 + uint64_t(layer));
        std::normal_distribution<float> normal;
        for (size_t i = 0; i < kWidth; ++i)
          rows.push_back(normal(random) * (i < kOuts ? sharpness : 1));
      }
      std::vector<float> got(n * kOuts);
      device.copy(qkv.data(), rows.data(), qkv.bytes());
      cache.decode(layer, qkv.data(), {});
      device.copy(got.data(), out.data(), out.bytes());
      device.synchronize(test::patience());
      outputs.insert(outputs.end(), got.begin(), got.end());
    }
    cache.end_step();
    std::vector<VerdictRecord> verdicts;
    for (const int64_t s : sequences) {
      ++tokens_[s];
      verdicts.push_back(cache.verdict(s));
    }
    return verdicts;
  }

  std::vector<std::byte> page(int64_t sequence, int layer, int head, size_t page) const {
    std::vector<std::byte> bytes(kPageBytes);
    backend_.device->copy(bytes.data(), cache.page(sequence, layer, head, page), kPageBytes);
    backend_.device->synchronize(test::patience());
    return bytes;
  }
  void flip(int64_t sequence, int layer, int head, size_t at, size_t bit) const {
    std::byte* to = cache.page(sequence, layer, head, at) + bit / 8;
    std::byte byte{};
    backend_.device->copy(&byte, to, 1);
    backend_.device->synchronize(test::patience());
    byte ^= std::byte(1u << bit % 8);
    backend_.device->copy(to, &byte, 1);
    backend_.device->synchronize(test::patience());
  }
  // Damages the originals of a block where they lie.
  void flip_original(int64_t sequence, int layer, int head, uint32_t block) {
    const BlockId id = cache.originals_id(sequence, layer, head, block);
    const Destination view{.part = BlockPart::Both, .view = true};
    ReadTicket ticket = store_->reader()->read({&id, 1}, {&view, 1}, test::patience());
    const BlockResult r = BlockReader::wait(ticket)[0];
    ASSERT_EQ(r.status, BlockStatus::Ok);
    auto* v = const_cast<uint16_t*>(r.v);
    v[3] = uint16_t(v[3] ^ 1);
  }
  size_t tokens(int64_t sequence) { return tokens_[sequence]; }

 private:
  static ModelConfig small_config() {
    ModelConfig c;
    c.layers = kLayers;
    c.kv_heads = kKvHeads;
    c.heads = kKvHeads * kPerGroup;
    c.head_dim = kDim;
    return c;
  }
  static CertifiedCacheOptions options_with(int64_t scrub_steps, int64_t scratch,
                                            const char* layout) {
    CertifiedCacheOptions o;
    o.cache.layout = layout;
    o.cache.scrub_steps = scrub_steps;
    o.dtype = DType::BF16;
    if (scratch > 0) o.scratch.key_blocks = o.scratch.value_blocks = scratch;
    return o;
  }
  static std::vector<uint16_t> draw(int64_t id, int layer, int part, size_t count) {
    std::mt19937_64 random(uint64_t(id) * 977 + uint64_t(layer * 2 + part));
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x;
    for (size_t i = 0; i < count; ++i) x.push_back(float_to_bf16(normal(random)));
    return x;
  }
  cuda::DeviceArray<uint16_t> put(const std::vector<uint16_t>& x) const {
    cuda::DeviceArray<uint16_t> array(*backend_.device, x.size(), "a test's rows");
    backend_.device->copy(array.data(), x.data(), array.bytes());
    return array;
  }

  DeviceBackend& backend_;
  Policy policy_;
  ModelConfig config_ = small_config();
  test::ThreadHolder holder_{kArena};
  std::shared_ptr<StoreClient> store_ = holder_.attach(0);
  std::shared_ptr<LocalWorld> world_ = LocalWorld::create(1);
  std::unique_ptr<Communicator> group_ = world_->communicator(0);
  ThreadPool pool_{1};
  std::map<int64_t, size_t> tokens_;
  uint64_t step_ = 0;

 public:
  CountingOps ops;
  DeviceCache cache;
  std::vector<float> outputs;
  double tolerance = 0.2;
  StepRules rules;
  float sharpness = 1;      // of queries
  bool equal_keys = false;  // all of a prompt
};

}  // namespace certkv::scrub_test
