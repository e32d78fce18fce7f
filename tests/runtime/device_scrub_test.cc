// The scrub of tier 1 in a device's memory: damage to any part of a page is found in time, counted,
// and repaired to the same bytes, so that what follows is as if nothing had happened. In emulation,
// and on a GPU as a program of tests/gpu.
#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <random>
#include <utility>

#include "runtime/certify/scrub.h"
#include "runtime/device/device_backend.h"
#include "tests/kvstore/store_support.h"
#include "tests/runtime/device_scrub_rank.h"
#ifdef CERTKV_TEST_ON_GPU
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {
namespace {

using namespace scrub_test;  // NOLINT: this test's own

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
  const cuda::PageLayoutDevice p = cuda::page_layout(kDim, cuda::PageKind::K8V4);
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

// ---- tables and the scratch ---------------------------------------------------------------------

// What a look is about to look at, on the host, and what a test makes of it.
class Tables {
 public:
  Tables(cuda::Device& device, const cuda::TableArgs& args, int item) : device_(device) {
    read(args.items + item, 1, &item_);
  }
  cuda::PageEntry entry(size_t page) const { return one(item_.pages + page); }
  void set_entry(size_t page, const cuda::PageEntry& e) const { write(item_.pages + page, e); }
  int slot_of(int part, int block) const { return one(item_.slot_of[part] + block); }
  void set_slot_of(int part, int block, int x) const { write(item_.slot_of[part] + block, x); }
  int block_of(int part, int slot) const {
    return one(item_.block_of[part] + slot - item_.first_slot[part]);
  }
  void set_block_of(int part, int slot, int x) const {
    write(item_.block_of[part] + slot - item_.first_slot[part], x);
  }
  bool wants(int part, int block) const {
    return (entry(size_t(block / 4)).wants >> (block % 4 + 4 * part) & 1) != 0;
  }
  void flip_original(int slot) const {
    std::byte* to = item_.slots + size_t(slot) * 16 * kDim * 2 + 77;
    write(to, one(to) ^ std::byte(4));
  }
  // A block that the scratch holds, from a sealed page of the prompt; -1: none.
  int resident(int part) const {
    for (int b = 0; b < int(kPages) * 4; ++b)
      if (wants(part, b)) return b;
    return -1;
  }
  // Nothing is wanted that no slot holds, and nobody else says he holds it.
  bool agree() const {
    for (int part = 0; part < 2; ++part)
      for (int b = 0; b < int(kPages) * 4; ++b) {
        const int slot = slot_of(part, b);
        if (wants(part, b) ? slot < 0 || block_of(part, slot) != b : slot != -1) return false;
      }
    return true;
  }

 private:
  template <typename T>
  void read(const T* from, size_t count, T* to) const {
    device_.get().copy(to, from, count * sizeof(T));
    device_.get().synchronize(test::patience());
  }
  template <typename T>
  T one(const T* from) const {
    T x{};
    read(from, 1, &x);
    return x;
  }
  template <typename T>
  void write(T* to, const T& x) const {
    device_.get().copy(to, &x, sizeof(T));
    device_.get().synchronize(test::patience());
  }
  std::reference_wrapper<cuda::Device> device_;
  cuda::LadderItem item_;
};

TEST_F(DeviceScrub, AnEntryThatNamesAnotherPageIsRestored) {
  OneRank hit(backend_, 1), clean(backend_, 0);
  const auto a = hit.start(1, 1), b = clean.start(1, 1);
  for (int kind = 0; kind < 3; ++kind) {
    cuda::PageEntry before, after;
    hit.ops.before_tables = [&, kind](const cuda::TableArgs& args) {
      const Tables t(*backend_.device, args, 3);
      before = after = t.entry(2);
      if (kind == 0) after.page += kPageBytes;
      if (kind == 1) after.tokens ^= 1;
      if (kind == 2) after.wants ^= 1u << 20;
      t.set_entry(2, after);
    };
    const std::string log = logged([&] { EXPECT_EQ(hit.step(a)[0].sum.digest, 1u); });
    clean.step(b);
    EXPECT_EQ(times(log,
                    "layer 1 KV head 1 page 2 (blocks 8 to 11): the block table did not match "
                    "it; restored from the page; the steps at"),
              1u)
        << log;
    hit.ops.before_tables = [&](const cuda::TableArgs& args) {
      const cuda::PageEntry now = Tables(*backend_.device, args, 3).entry(2);
      EXPECT_EQ(now.page, before.page);
      EXPECT_EQ(now.tokens, before.tokens);
      EXPECT_EQ(now.wants, before.wants);
    };
    EXPECT_EQ(hit.step(a)[0].sum.digest, 0u);
    clean.step(b);
    EXPECT_EQ(hit.outputs, clean.outputs);
  }
}

TEST_F(DeviceScrub, EveryRowOfAStepHasTablesOfItsOwn) {
  OneRank hit(backend_, 1);
  const auto a = hit.start(1, 2);
  hit.ops.before_tables = [&, first = true](const cuda::TableArgs& args) mutable {
    if (!std::exchange(first, false)) return;
    const Tables t(*backend_.device, args, 2 * kKvHeads + kKvHeads);  // layer 1, the second row
    cuda::PageEntry e = t.entry(1);
    e.page += 16;
    t.set_entry(1, e);
  };
  const std::string log = logged([&] {
    const auto verdicts = hit.step(a);
    EXPECT_EQ(verdicts[0].sum.digest, 0u);
    EXPECT_EQ(verdicts[1].sum.digest, 1u);
  });
  EXPECT_EQ(times(log, "layer 1 KV head 0 page 1 "), 1u) << log;
  for (const VerdictRecord& v : hit.step(a)) EXPECT_EQ(v.sum.digest, 0u);
}

TEST_F(DeviceScrub, OriginalsInTheScratchThatAreDamagedAreDropped) {
  OneRank hit(backend_, 1, Policy::Budget);
  hit.tolerance = 0.05;
  hit.sharpness = 4;  // a few blocks carry the mass: they are promoted, and stay
  const auto a = hit.start(1, 1);
  // Their bytes; the table's pointer to them; the slot's own; what is wanted.
  for (int kind = 0; kind < 4; ++kind)
    for (int part = 0; part < 2; ++part) {
      SCOPED_TRACE(testing::Message() << "kind " << kind << " part " << part);
      int item = -1, block = -1, slot = -1;
      std::optional<Tables> damaged;
      hit.ops.before_tables = [&](const cuda::TableArgs& args) {
        for (item = 0; item < kLayers * kKvHeads && block < 0; ++item) {
          const Tables t(*backend_.device, args, item);
          EXPECT_TRUE(t.agree());
          block = t.resident(part);
          if (block < 0) continue;
          slot = t.slot_of(part, block);
          damaged = t;
          if (kind == 0) t.flip_original(slot);
          if (kind == 1) t.set_slot_of(part, block, slot ^ (1 << 28));
          if (kind == 2) t.set_block_of(part, slot, block ^ 1);
          cuda::PageEntry e = t.entry(size_t(block / 4));
          e.wants ^= 1u << (block % 4 + 4 * part);
          if (kind == 3) t.set_entry(size_t(block / 4), e);
          break;
        }
      };
      std::string log;
      for (int step = 0; step < 20 && block < 0; ++step)
        log = logged([&] {
          const uint64_t found = hit.step(a)[0].sum.digest;
          EXPECT_EQ(found, block < 0 ? 0u : 1u);
        });
      ASSERT_GE(block, 0) << "nothing was promoted";
      EXPECT_EQ(times(log, "originals near the compute were damaged, or pointers to them; dropped"),
                1u)
          << log;
      EXPECT_EQ(damaged->slot_of(part, block), -1);
      EXPECT_FALSE(damaged->wants(part, block));
      // Where the table named another slot, its own is freed once learning drops it.
      if (kind != 1) {
        EXPECT_EQ(damaged->block_of(part, slot), -1);
      }
      bool looked = false;
      hit.ops.before_tables = [&](const cuda::TableArgs& args) {
        looked = true;
        for (int i = 0; i < kLayers * kKvHeads; ++i)
          EXPECT_TRUE(Tables(*backend_.device, args, i).agree()) << i;
      };
      const VerdictRecord v = hit.step(a)[0];
      EXPECT_TRUE(looked);
      EXPECT_EQ(v.sum.digest, 0u);
      EXPECT_EQ(v.max.error, 0u);
    }
}

TEST_F(DeviceScrub, ATableIsLookedAtOnceMoreAtTheEnd) {
  OneRank hit(backend_, 1000);
  const auto a = hit.start(1, 1);
  hit.step(a);
  hit.ops.before_tables = [&, first = true](const cuda::TableArgs& args) mutable {
    if (!std::exchange(first, false)) return;
    const Tables t(*backend_.device, args, 1);
    cuda::PageEntry e = t.entry(4);
    e.page += 16;
    t.set_entry(4, e);
  };
  const std::string log = logged([&] { EXPECT_EQ(hit.cache.close(a[0]), 1u); });
  EXPECT_EQ(times(log, "layer 0 KV head 1 page 4"), 1u) << log;
  EXPECT_EQ(times(log, "the steps at 330 to 330 tokens are in doubt"), 1u) << log;
  EXPECT_EQ(hit.cache.close(a[0]), 0u);
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

// One bit of one block, between sealing and the step that wants it: policy dense fails before its
// first step, rung 3 at the step, both by name; the other KV heads' outputs are exact.
TEST_F(DeviceScrub, ABitOfAnOriginalFailsRung3AndDenseByName) {
  for (const Policy policy : {Policy::Budget, Policy::Dense}) {
    OneRank hit(backend_, 0, policy), sound(backend_, 0, policy);
    hit.tolerance = sound.tolerance = 1e-5;  // rung 3 throughout
    // A fork waits until the arena has the prompt's blocks.
    const auto settle = [](OneRank& rank, int64_t prompt) {
      rank.cache.drop(rank.cache.fork(prompt, kAnswer, {}));
    };
    const auto flip = [&](int64_t prompt) {
      settle(hit, prompt);
      hit.flip_original(prompt, 1, 1, 7);
    };
    const int64_t a = hit.start(1, 1, flip)[0];
    const int64_t b = sound.start(1, 1, [&](int64_t prompt) { settle(sound, prompt); })[0];
    const bool before = hit.cache.report(a).error.has_value();
    EXPECT_EQ(before, policy == Policy::Dense);
    const VerdictRecord v = hit.step({a})[0];
    sound.step({b});
    EXPECT_GT(v.sum.failed, 0u);
    const SequenceReport& report = hit.cache.report(a);
    ASSERT_TRUE(report.error.has_value());
    EXPECT_EQ(*report.error, ErrorKind::OriginalsLost);
    EXPECT_NE(report.error_text.find("layer 1 KV head 1: "), std::string::npos)
        << report.error_text;
    if (policy == Policy::Dense) {
      EXPECT_NE(report.error_text.find("block 7 are corrupt"), std::string::npos);
      continue;
    }
    constexpr size_t kWidth = kPerGroup * kDim;
    for (size_t cell = 0; cell < size_t(kLayers) * kKvHeads; ++cell)
      for (size_t e = 0; e < kWidth; ++e) {
        const bool lost = cell == kKvHeads + 1;
        EXPECT_EQ(hit.outputs[cell * kWidth + e], lost ? 0 : sound.outputs[cell * kWidth + e]);
      }
  }
}

}  // namespace
}  // namespace certkv
