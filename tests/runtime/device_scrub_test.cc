// The scrub of tier 1 in a device's memory: damage to any part of a page is found in time, counted,
// and repaired to the same bytes, so that what follows is as if nothing had happened. In emulation,
// and on a GPU as a program of tests/gpu.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>
#include <utility>

#include "kernels/arith/verdict.h"
#include "kvstore/client.h"
#include "parallel/local_world.h"
#include "runtime/certify/scrub.h"
#include "runtime/device/device_backend.h"
#include "runtime/device/device_cache.h"
#include "tests/kvstore/store_support.h"
#ifdef CERTKV_TEST_ON_GPU
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {
namespace {

constexpr int kLayers = 2, kKvHeads = 2, kPerGroup = 2, kDim = 64;
constexpr size_t kPages = 5, kPrompt = 64 * kPages + 9;
constexpr int64_t kAnswer = 200;
constexpr uint64_t kArena = uint64_t(32) << 20;
const size_t kPageBytes = cuda::page_layout(kDim).page_bytes();

// Counts the pages whose digests are taken, and lets a test in before and after.
class CountingOps : public cuda::CacheOps {
 public:
  explicit CountingOps(cuda::CacheOps& ops) : ops_(ops) {}
  void append(const cuda::AppendArgs& a) override { ops_.append(a); }
  void attend(const cuda::PassArgs& a, const cuda::PassShape& s) override { ops_.attend(a, s); }
  void climb(const cuda::LadderArgs& a) override { ops_.climb(a); }
  void page_in(const cuda::LadderArgs& a) override { ops_.page_in(a); }
  void list_dense(const cuda::LadderArgs& a) override { ops_.list_dense(a); }
  void stage_dense(const cuda::LadderArgs& a, const cuda::DenseArgs& d, int n) override {
    ops_.stage_dense(a, d, n);
  }
  void take_dense(const cuda::LadderArgs& a, const cuda::DenseArgs& d, int n) override {
    ops_.take_dense(a, d, n);
  }
  void learn(const cuda::LadderArgs& a) override { ops_.learn(a); }
  void largest_notes(const cuda::LibraryArgs& a) override { ops_.largest_notes(a); }
  void judge_library(const cuda::LibraryArgs& a) override { ops_.judge_library(a); }
  void seal(const cuda::SealArgs& a) override { ops_.seal(a); }
  void digest_pages(const cuda::DigestArgs& a) override {
    if (a.list != nullptr) looks += size_t(a.count);
    if (before_digests) before_digests();
    ops_.digest_pages(a);
    if (after_digests) after_digests(a);
  }
  size_t looks = 0;
  std::function<void()> before_digests;
  std::function<void(const cuda::DigestArgs&)> after_digests;

 private:
  cuda::CacheOps& ops_;
};

// A cache of one rank. What is appended and asked depends on (sequence, layer, length) alone, so
// two runs that do the same are twins.
class OneRank {
 public:
  OneRank(DeviceBackend& backend, int64_t scrub_steps, Policy policy = Policy::Naive)
      : backend_(backend),
        policy_(policy),
        ops(*backend.cache),
        cache(config_, {0, kKvHeads}, options_with(scrub_steps), *backend.device, ops, pool_,
              store_, *group_) {}

  std::vector<int64_t> start(int64_t id, int forks,
                             const std::function<void(int64_t)>& before_fork = {}) {
    const int64_t prompt = cache.create(int64_t(kPrompt), id, kAnswer);
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto k = put(draw(id, layer, 0, kKvHeads * kPrompt * kDim));
      const auto v = put(draw(id, layer, 1, kKvHeads * kPrompt * kDim));
      cache.store_prefill(prompt, layer, kPrompt, k.data(), v.data(), kPrompt * kDim, {});
    }
    if (before_fork) before_fork(prompt);
    StepRules rules;
    rules.policy = policy_;
    rules.tolerance.value = 0.2;
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
        for (size_t i = 0; i < kWidth; ++i) rows.push_back(normal(random));
      }
      std::vector<float> got(n * kOuts);
      device.copy(qkv.data(), rows.data(), qkv.bytes());
      cache.decode(layer, qkv.data());
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
  static CertifiedCacheOptions options_with(int64_t scrub_steps) {
    CertifiedCacheOptions o;
    o.cache.scrub_steps = scrub_steps;
    o.dtype = DType::BF16;
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
};

std::string logged(const std::function<void()>& body) {
  testing::internal::CaptureStderr();
  body();
  return testing::internal::GetCapturedStderr();
}

size_t times(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

class DeviceScrub : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef CERTKV_TEST_ON_GPU
    if (cuda::cuda_device_count() == 0) GTEST_SKIP() << "no device answers";
    backend_ = make_device_backend("cuda", 0);
#else
    backend_ = make_device_backend("emulated", 0);
#endif
  }
  DeviceBackend backend_;
};

// Under policy naive nothing is learned from outputs, so one that was in doubt leaves no trace.
TEST_F(DeviceScrub, DamageToAnyPartOfAPageIsFoundByItsStepAndRepaired) {
  const cuda::PageLayoutDevice p = cuda::page_layout(kDim);
  const size_t ends[] = {0,
                         p.key_affine,
                         p.notes,
                         p.key_bytes,
                         p.key_bytes + p.value_affine,
                         p.key_bytes + p.norms,
                         p.page_bytes()};
  OneRank hit(backend_, 1), clean(backend_, 0);
  const auto a = hit.start(1, 1), b = clean.start(1, 1);
  std::mt19937_64 random(3);
  for (size_t part = 0; part + 1 < std::size(ends); ++part) {
    SCOPED_TRACE(testing::Message() << "part from byte " << ends[part]);
    const int layer = int(random() % kLayers), head = int(random() % kKvHeads);
    const size_t page = random() % kPages;
    // Low bits of a number, so that the step itself has finite outputs.
    const size_t words = (ends[part + 1] - ends[part]) / 4;
    const size_t bit = (ends[part] + random() % words * 4) * 8 + random() % 4;
    hit.flip(a[0], layer, head, page, bit);
    ASSERT_NE(hit.page(a[0], layer, head, page), clean.page(b[0], layer, head, page));
    const std::string log = logged([&] { EXPECT_EQ(hit.step(a)[0].sum.digest, 1u); });
    clean.step(b);
    EXPECT_EQ(times(log, "rebuilt from originals"), 1u) << log;
    EXPECT_EQ(hit.page(a[0], layer, head, page), clean.page(b[0], layer, head, page));
    EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
    clean.step(b);
    EXPECT_EQ(hit.outputs, clean.outputs);
  }
}

TEST_F(DeviceScrub, ADamagedPageIsFoundWithinThePeriodAndRepairedForEveryFork) {
  constexpr int kPeriod = 8;
  OneRank hit(backend_, kPeriod), clean(backend_, 0);
  const auto a = hit.start(1, 3), b = clean.start(1, 3);
  hit.step(a);
  hit.flip(a[0], 1, 0, 2, 12345);
  uint64_t found = 0;
  int steps = 0;
  const std::string log = logged([&] {
    while (found == 0 && steps < kPeriod) {  // the second fork steps, the others wait
      found = hit.step({a[1]})[0].sum.digest;
      ++steps;
    }
  });
  EXPECT_EQ(found, 1u);
  EXPECT_EQ(times(log, "sequence 1 layer 1 KV head 0 page 2 (blocks 8 to 11)"), 1u) << log;
  EXPECT_EQ(times(log, "rebuilt from originals"), 1u) << log;
  EXPECT_EQ(times(log, "sequence 1 shares it: the steps at 330 to 330 tokens are in doubt"), 2u)
      << log;
  EXPECT_EQ(hit.page(a[0], 1, 0, 2), clean.page(b[0], 1, 0, 2));
  // Those that shared the page count it too, once.
  const auto next = hit.step(a);
  EXPECT_EQ(next[0].sum.digest, 1u);
  EXPECT_EQ(next[1].sum.digest, 0u);
  EXPECT_EQ(next[2].sum.digest, 1u);
  for (int step = 0; step < kPeriod + 2; ++step)
    for (const VerdictRecord& v : hit.step(a)) EXPECT_EQ(v.sum.digest, 0u);
}

// What the log says of steps: those whose passes ran since the page was last looked at, the one
// that found it among them.
TEST_F(DeviceScrub, TheLogNamesTheStepsThatAreInDoubt) {
  // Period 4, page 0 of layer 0, head 0 (phase 0): due at lengths that are multiples of 4.
  ASSERT_EQ(ScrubSchedule(4).first_due({1, 0, 0, 336}), 0u);
  OneRank hit(backend_, 4);
  const auto a = hit.start(1, 1);
  static_assert(kPrompt == 329);
  for (int step = 0; step < 3; ++step) hit.step(a);  // now 332 tokens, at which it was due
  hit.flip(a[0], 0, 0, 0, 9);
  const std::string log = logged([&] {
    for (int step = 0; step < 3; ++step) EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
    EXPECT_EQ(hit.step(a)[0].sum.digest, 1u);
  });
  EXPECT_NE(log.find("the steps at 333 to 336 tokens are in doubt"), std::string::npos) << log;
}

TEST_F(DeviceScrub, APageThatAnAnswerFilledIsLookedAtByTheNextStep) {
  OneRank hit(backend_, 1000), clean(backend_, 0);
  const auto a = hit.start(1, 1), b = clean.start(1, 1);
  while (hit.tokens(a[0]) < 384) {
    EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
    clean.step(b);
  }
  hit.flip(a[0], 1, 0, 5, 40);
  const std::string log = logged([&] { EXPECT_EQ(hit.step(a)[0].sum.digest, 1u); });
  clean.step(b);
  EXPECT_NE(log.find("page 5"), std::string::npos) << log;
  EXPECT_NE(log.find("the steps at 385 to 385 tokens are in doubt"), std::string::npos) << log;
  EXPECT_EQ(hit.page(a[0], 1, 0, 5), clean.page(b[0], 1, 0, 5));
  hit.step(a);
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
}

// Every page has its turn once in a period, a prompt's once for all forks of the same length.
TEST_F(DeviceScrub, LooksAtAPageThatForksShareOnce) {
  constexpr size_t kCells = size_t(kLayers) * kKvHeads;
  constexpr int kPeriod = 4;
  OneRank hit(backend_, kPeriod);
  const auto a = hit.start(1, 3);
  EXPECT_EQ(hit.ops.looks, kCells * kPages) << "of the prompt, at its first fork";
  hit.ops.looks = 0;
  for (int step = 0; step < kPeriod; ++step) hit.step(a);
  EXPECT_EQ(hit.ops.looks, kCells * kPages);
  hit.ops.looks = 0;
  hit.step({a[0]});
  for (int step = 0; step < kPeriod; ++step) hit.step({a[0], a[1]});  // of two lengths
  EXPECT_GE(hit.ops.looks, 2 * kCells * kPages);
  EXPECT_LE(hit.ops.looks, (2 * kPeriod + 1) * kCells * (kPages / kPeriod + 1));
}

TEST_F(DeviceScrub, ForksThatFindTheSameDamageCountItEachAndRepairItOnce) {
  OneRank hit(backend_, 1), clean(backend_, 0);
  const auto a = hit.start(1, 3), b = clean.start(1, 3);
  hit.step(a);
  clean.step(b);
  hit.flip(a[2], 0, 1, 4, 1);
  const std::string log = logged([&] {
    for (const VerdictRecord& v : hit.step(a)) EXPECT_EQ(v.sum.digest, 1u);
  });
  EXPECT_EQ(times(log, "tier 1: "), 1u) << log;
  EXPECT_EQ(times(log, "the steps at 331 to 331 tokens are in doubt"), 3u) << log;
  clean.step(b);
  hit.step(a);
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
}

TEST_F(DeviceScrub, WithoutOriginalsEveryForkOfThePageFailsByNameAndNobodyElse) {
  OneRank hit(backend_, 1);
  const auto a = hit.start(1, 2), other = hit.start(2, 1);
  hit.step({a[0], a[1], other[0]});
  hit.flip_original(a[0], 0, 1, 7);
  hit.flip(a[0], 0, 1, 1, 1000);  // blocks 4 to 7
  const auto verdicts = hit.step({a[0], other[0]});
  EXPECT_EQ(outcome_of_severity(verdicts[0].max.severity), Outcome::Failed);
  EXPECT_EQ(verdicts[0].max.error, 1 + uint64_t(ErrorKind::OriginalsLost));
  EXPECT_EQ(verdicts[0].sum.digest, 1u);
  const SequenceReport& report = hit.cache.report(a[0]);
  ASSERT_TRUE(report.error.has_value());
  EXPECT_NE(report.error_text.find("layer 0 KV head 1 page 1 (blocks 4 to 7)"), std::string::npos)
      << report.error_text;
  EXPECT_NE(report.error_text.find("block 7 are corrupt"), std::string::npos) << report.error_text;
  EXPECT_EQ(verdicts[1].max.error, 0u);
  const auto later = hit.step({a[1], other[0]});
  EXPECT_EQ(later[0].sum.digest, 1u);
  EXPECT_EQ(later[0].max.error, 1 + uint64_t(ErrorKind::OriginalsLost));
  EXPECT_EQ(later[1].max.error, 0u);
}

// Falsifies the digest of a prompt's first page, as it is sealed: of layer 0, KV head 0.
void falsify_record(cuda::Device& device, OneRank* rank) {
  rank->ops.after_digests = [&device, first = true](const cuda::DigestArgs& a) mutable {
    if (a.list != nullptr || !std::exchange(first, false)) return;
    const uint64_t wrong = 4711;
    device.copy(a.digests, &wrong, sizeof wrong);
  };
}

TEST_F(DeviceScrub, ARecordThatIsDamagedIsNoDamageOfItsPage) {
  OneRank hit(backend_, 1), clean(backend_, 0);
  falsify_record(*backend_.device, &hit);
  const auto b = clean.start(1, 1);
  std::vector<int64_t> a;
  const std::string log = logged([&] { a = hit.start(1, 1); });
  EXPECT_EQ(times(log,
                  "layer 0 KV head 0 page 0 (blocks 0 to 3): its digest was damaged, not its "
                  "bytes"),
            1u)
      << log;
  EXPECT_EQ(times(log, "tier 1: "), 1u) << log;
  EXPECT_EQ(hit.page(a[0], 0, 0, 0), clean.page(b[0], 0, 0, 0));
  EXPECT_EQ(hit.step(a)[0].sum.digest, 1u);
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
  EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
}

// Neither what was sealed nor what its originals give: nobody can say which is right.
TEST_F(DeviceScrub, APageThatIsNotWhatItsOriginalsGiveFailsAsCorrupt) {
  OneRank hit(backend_, 1);
  falsify_record(*backend_.device, &hit);
  const auto a = hit.start(1, 1, [&](int64_t prompt) { hit.flip(prompt, 0, 0, 0, 8); });
  const VerdictRecord v = hit.step(a)[0];
  EXPECT_EQ(outcome_of_severity(v.max.severity), Outcome::Failed);
  EXPECT_EQ(v.max.error, 1 + uint64_t(ErrorKind::Corrupt));
  EXPECT_EQ(v.sum.digest, 1u);
}

TEST_F(DeviceScrub, MemoryThatDoesNotHoldWhatIsWrittenEndsTheJob) {
  OneRank hit(backend_, 1);
  const auto a = hit.start(1, 1);
  std::byte* stuck = hit.cache.page(a[0], 1, 1, 3) + 100;
  const std::byte value = ~hit.page(a[0], 1, 1, 3)[100];
  hit.ops.before_digests = [&] { backend_.device->copy(stuck, &value, 1); };
  try {
    hit.step(a);
    ADD_FAILURE() << "its memory is at fault";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::DeviceError);
    EXPECT_NE(std::string(e.what()).find("does not hold what is written to it: a page of layer 1"),
              std::string::npos)
        << e.what();
  }
}

TEST_F(DeviceScrub, ThePromptIsVerifiedBeforeItsFirstStep) {
  OneRank hit(backend_, 1000, Policy::Budget), clean(backend_, 0, Policy::Budget);
  const auto b = clean.start(1, 2);
  std::vector<int64_t> a;
  const std::string log =
      logged([&] { a = hit.start(1, 2, [&](int64_t prompt) { hit.flip(prompt, 1, 1, 4, 777); }); });
  EXPECT_EQ(times(log, "no step has read it"), 1u) << log;
  const auto verdicts = hit.step(a);
  clean.step(b);
  EXPECT_EQ(hit.outputs, clean.outputs);
  for (const VerdictRecord& v : verdicts) EXPECT_EQ(v.sum.digest, 1u);  // with the first step
  EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
}

TEST_F(DeviceScrub, WhatIsDamagedAfterItsLastLookIsFoundAtTheEnd) {
  for (const int64_t period : {0, 1, 1000}) {
    OneRank hit(backend_, period);
    const auto a = hit.start(1, 2);
    hit.step(a);
    hit.flip(a[0], 0, 0, 3, 4321);
    const std::string log =
        logged([&] { EXPECT_EQ(hit.cache.close(a[0]), period == 0 ? 0u : 1u); });
    EXPECT_EQ(times(log, "page 3"), period == 0 ? 0u : 1u) << log;
    // The step itself looked at every page, or at none.
    const char* doubt = period == 1 ? "no step has read it since it was sound; sequence 1 shares it"
                                    : "the steps at 330 to 330 tokens are in doubt; sequence 1";
    EXPECT_EQ(times(log, doubt), period == 0 ? 0u : 1u) << log;
    if (period == 0) continue;
    hit.cache.drop(a[0]);
    EXPECT_EQ(hit.cache.close(a[1]), 1u) << "it held the page too";
    EXPECT_EQ(hit.cache.close(a[1]), 0u) << "repaired for it as well";
  }
}

}  // namespace
}  // namespace certkv
