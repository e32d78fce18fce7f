// The canary of the device's cache: codes or notes that were damaged before their digest was taken
// are seen by it alone, where a block's originals are read beside them, and send the layer to rung
// 4. In emulation, and on a GPU as a program of tests/gpu.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "tests/runtime/device_scrub_rank.h"
#ifdef CERTKV_TEST_ON_GPU
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {
namespace {

using namespace scrub_test;  // NOLINT: this test's own

constexpr int kLayer = 0, kHead = 1;  // what is damaged: of every prompt
// A few blocks carry the mass of each head: they are promoted, keys and values.
constexpr double kTolerance = 0.06;
constexpr float kSharpness = 16;

using Damage = std::function<void(std::byte* page)>;

class DeviceCanary : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef CERTKV_TEST_ON_GPU
    if (cuda::cuda_device_count() == 0) GTEST_SKIP() << "no device answers";
    backend_ = make_device_backend("cuda", 0);
#else
    backend_ = make_device_backend("emulated", 0);
#endif
  }

  // Of some pages of the prompt, once sealed and before their digests are taken.
  void damage(OneRank* rank, const std::vector<size_t>& pages, const Damage& how) {
    rank->ops.before_sealed_digests = [this, pages, how,
                                       layer = 0](const cuda::DigestArgs& a) mutable {
      if (layer++ != kLayer) return;
      for (const size_t page : pages) {
        // const: the sealing kernel's output, which is ours.
        auto* at = const_cast<std::byte*>(a.first) + kHead * a.row_stride + page * a.bytes;
        std::vector<std::byte> bytes(a.bytes);
        backend_.device->copy(bytes.data(), at, a.bytes);
        backend_.device->synchronize(test::patience());
        how(bytes.data());
        backend_.device->copy(at, bytes.data(), a.bytes);
        backend_.device->synchronize(test::patience());
      }
    };
  }

  // A step of the damaged and of an undamaged sequence under policy dense: what rung 4 returned is
  // exact, everything else certified or exact. Returns the failures that the canary counted.
  uint64_t step(OneRank* hit, int64_t sequence, OneRank* exact, int64_t twin, std::string* log) {
    testing::internal::CaptureStderr();
    const VerdictRecord v = hit->step({sequence})[0];
    *log = testing::internal::GetCapturedStderr();
    exact->step({twin});
    EXPECT_EQ(v.sum.digest, 0u) << "the digest is of the damaged bytes";
    EXPECT_EQ(v.sum.failed, 0u);
    EXPECT_EQ(v.sum.over, 0u);
    const SequenceReport &report = hit->cache.report(sequence), &dense = exact->cache.report(twin);
    uint64_t seen = 0;
    for (const GroupReport& g : report.layers) seen += g.canary;
    EXPECT_EQ(v.sum.canary, seen);
    bool other_layers = false;
    for (size_t cell = 0; cell < report.layers.size(); ++cell)
      for (size_t h = 0; h < kPerGroup; ++h) {
        const HeadReport& r = report.layers[cell].heads[h];
        const bool of_layer = cell / kKvHeads == size_t(kLayer);
        if (!of_layer) {
          other_layers = other_layers || r.rung == 4;
          continue;
        }
        EXPECT_EQ(r.rung == 4, seen > 0) << "cell " << cell << " head " << h;
        if (seen == 0) continue;  // nothing was read beside its originals
        EXPECT_EQ(r.outcome, Outcome::Exact);
        EXPECT_TRUE(std::isfinite(r.candidate.bound));
        // Sharp scores of 12-bit codes, by exact products, round less than those of originals.
        if (cuda::key_bits(hit->cache.kind(sequence, 0, 0)) == 8) {
          EXPECT_GT(r.candidate.bound, r.returned.bound);
        }
        // Both are exact within their bounds.
        double apart = 0;
        for (size_t e = 0; e < kDim; ++e) {
          const size_t at = (cell * kPerGroup + h) * kDim + e;
          apart += std::pow(double(hit->outputs[at]) - exact->outputs[at], 2);
        }
        EXPECT_LE(std::sqrt(apart), r.returned.bound + dense.layers[cell].heads[h].returned.bound);
      }
    EXPECT_FALSE(other_layers);
    return seen;
  }

  DeviceBackend backend_;
};

const std::vector<size_t> kAll = {0, 1, 2, 3, 4};

cuda::BlockNotesDevice* notes_of(std::byte* page) {
  auto* notes = reinterpret_cast<cuda::PageNotesDevice*>(page + cuda::notes_offset(kDim));
  return notes->block;
}

TEST_F(DeviceCanary, DamageWithAValidDigestSendsTheLayerToRung4) {
  struct Case {
    const char* name;
    Damage damage;
    const char* said;
  };
  for (const cuda::PageKind kind : cuda::kPageKinds) {
    const cuda::PageLayoutDevice p = cuda::page_layout(kDim, kind);
    const Case cases[] = {{"eta_b of a quarter",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].eta *= 0.25f;
                           },
                           "a value of its codes is off by more than promised"},
                          {"nu_b of a quarter",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].nu *= 0.25f;
                           },
                           "a value's norm is above what was promised"},
                          {"steps of values that are larger by an eighth",
                           [&](std::byte* page) {
                             auto* halves =
                                 reinterpret_cast<uint16_t*>(page + p.key_bytes + p.value_affine);
                             for (size_t i = 0; i < 64 * kDim / size_t(value_group(kind)) * 2; ++i)
                               if (i / 2 % 2 == 0) halves[i] = uint16_t(halves[i] + 0x80);
                           },
                           "a value of its codes is off by more than promised"},
                          {"a scale of keys that is larger by a quarter",
                           [&](std::byte* page) {
                             auto* halves = reinterpret_cast<uint16_t*>(page + p.key_affine);
                             for (size_t i = 0; i < 4; ++i) halves[i] = uint16_t(halves[i] + 0x100);
                           },
                           "a score of its codes is off by more than promised"}};
    for (const Case& c : cases) {
      // Finer values that promise even less are not read again.
      if (kind != cuda::PageKind::K8V4 && &c == &cases[0]) continue;
      SCOPED_TRACE(testing::Message() << c.name << ", " << cuda::page_kind_name(kind));
      OneRank hit(backend_, 1, Policy::Budget, 0, cuda::page_kind_name(kind)),
          exact(backend_, 0, Policy::Dense);
      // What finer codes err by is less: so that some heads climb.
      hit.tolerance = kind == cuda::PageKind::K8V4   ? kTolerance
                      : kind == cuda::PageKind::K8V8 ? kTolerance / 2
                                                     : kTolerance / 10;
      hit.sharpness = exact.sharpness = kSharpness;
      damage(&hit, kAll, c.damage);
      const int64_t a = hit.start(1, 1)[0], b = exact.start(1, 1)[0];
      uint64_t seen = 0;
      std::string log;
      for (int n = 0; n < 4; ++n) {
        std::string lines;
        const uint64_t now = step(&hit, a, &exact, b, &lines);
        if (now > 0) log += lines;
        seen += now;
      }
      fmt::print("{}, {}: {} looks failed\n", c.name, cuda::page_kind_name(kind), seen);
      EXPECT_GT(seen, 0u);
      EXPECT_NE(
          log.find(fmt::format("canary: sequence 1 layer {} KV head {} block ", kLayer, kHead)),
          std::string::npos)
          << log;
      EXPECT_NE(log.find(c.said), std::string::npos) << log;
      EXPECT_NE(log.find("the layer goes dense"), std::string::npos) << log;
    }
  }
}

// The log names a block of the damaged page, not of any other.
TEST_F(DeviceCanary, TheDamagedBlockIsNamed) {
  constexpr size_t kPage = 3;
  OneRank hit(backend_, 1, Policy::Budget), exact(backend_, 0, Policy::Dense);
  hit.tolerance = kTolerance;
  hit.sharpness = exact.sharpness = kSharpness;
  damage(&hit, {kPage}, [](std::byte* page) { notes_of(page)[2].nu *= 0.25f; });
  const int64_t a = hit.start(1, 1)[0], b = exact.start(1, 1)[0];
  uint64_t seen = 0;
  std::string log;
  for (int n = 0; n < 8 && seen == 0; ++n) seen = step(&hit, a, &exact, b, &log);
  ASSERT_GT(seen, 0u);
  EXPECT_NE(log.find(fmt::format("KV head {} block {}:", kHead, 4 * kPage + 2)), std::string::npos)
      << log;
}

// Under policy paper every head-step reads blocks beside their originals, kept ones too.
TEST_F(DeviceCanary, PaperAsksItOfEveryBlockThatItPromotes) {
  OneRank hit(backend_, 1, Policy::Paper);
  hit.sharpness = kSharpness;
  damage(&hit, kAll, [](std::byte* page) {
    for (int b = 0; b < 4; ++b) notes_of(page)[b].nu *= 0.25f;
  });
  hit.rules.paper.v_tol = 0;  // values of every block
  const int64_t a = hit.start(1, 1)[0];
  for (int n = 0; n < 3; ++n) {
    const VerdictRecord v = hit.step({a})[0];
    EXPECT_EQ(v.sum.canary, 4 * kAll.size());
    EXPECT_EQ(v.sum.rungs[4], uint64_t(kKvHeads) * kPerGroup);
    EXPECT_EQ(v.sum.digest, 0u);
    for (size_t cell = 0; cell < kKvHeads; ++cell)
      for (const HeadReport& r : hit.cache.report(a).layers[cell].heads) {
        EXPECT_EQ(r.outcome, Outcome::Exact);
        EXPECT_LT(r.returned.bound, r.candidate.bound);
      }
  }
}

// Nothing climbs, and the canary hears of every block all the same.
TEST_F(DeviceCanary, ExplorationShowsItTheTail) {
  OneRank hit(backend_, 1, Policy::Budget), exact(backend_, 0, Policy::Dense);
  hit.tolerance = 0.9;
  hit.rules.ladder.exploration = 0.5;
  damage(&hit, {2}, [](std::byte* page) { notes_of(page)[1].eta *= 0.25f; });
  const int64_t a = hit.start(1, 1)[0], b = exact.start(1, 1)[0];
  uint64_t seen = 0;
  std::string log;
  int steps = 0;
  for (; steps < 12 && seen == 0; ++steps) seen = step(&hit, a, &exact, b, &log);
  ASSERT_EQ(seen, 1u);
  EXPECT_NE(log.find(fmt::format("KV head {} block 9: a value of its codes", kHead)),
            std::string::npos)
      << log;
}

// What is read for the next step enters F or X without a climb: its promises are looked at all the
// same, those of keys by what D_b rests on. It is not used, the step that has trusted them is
// named, and no certificate rests on it afterwards that did not before.
TEST_F(DeviceCanary, WhatIsReadAheadIsShownToIt) {
  struct Case {
    const char* name;
    Damage damage;
    const char* said;
  };
  for (const cuda::PageKind kind : cuda::kPageKinds) {
    const cuda::PageLayoutDevice p = cuda::page_layout(kDim, kind);
    const Case cases[] = {{"none", [](std::byte*) {}, ""},
                          {"nu_b",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].nu *= 0.25f;
                           },
                           "a value's norm is above what was promised"},
                          {"eta_b",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].eta *= 0.9f;
                           },
                           "a value of its codes is off by more than promised"},
                          {"kappa_b",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].kappa *= 0.999f;
                           },
                           "a score of its codes is off by more than promised"},
                          {"e_b",
                           [](std::byte* page) {
                             for (int b = 0; b < 4; ++b) notes_of(page)[b].e *= 0.999f;
                           },
                           "a score of its codes is off by more than promised"},
                          {"a code of keys",
                           [&](std::byte* page) {
                             for (size_t i = 0; i < p.key_affine; i += 5) page[i] ^= std::byte(2);
                           },
                           "a score of its codes is off by more than promised"}};
    for (const Case& c : cases) {
      SCOPED_TRACE(testing::Message() << c.name << ", " << cuda::page_kind_name(kind));
      OneRank hit(backend_, 1, Policy::Budget, 0, cuda::page_kind_name(kind));
      hit.tolerance = 0.9;  // nothing climbs
      hit.sharpness = 4;
      hit.rules.ladder.prefetch = kind == cuda::PageKind::K8V4   ? 0.15
                                  : kind == cuda::PageKind::K8V8 ? 0.05
                                                                 : 0.005;
      hit.rules.ladder.max_share = 1;
      hit.rules.ladder.value_share = 0.1;
      damage(&hit, kAll, c.damage);
      const int64_t a = hit.start(1, 1)[0];
      uint64_t ahead = 0, seen = 0, before = 0;
      for (int n = 0; n < 6; ++n) {
        testing::internal::CaptureStderr();
        const VerdictRecord v = hit.step({a})[0];
        const std::string log = testing::internal::GetCapturedStderr();
        EXPECT_EQ(v.sum.rungs[0], uint64_t(kLayers) * kKvHeads * kPerGroup);
        EXPECT_EQ(v.sum.failed + v.sum.over + v.sum.digest, 0u);
        const SequenceReport& report = hit.cache.report(a);
        const GroupReport& g = report.layers[kLayer * kKvHeads + kHead];
        EXPECT_EQ(v.sum.canary, g.canary) << "of the damaged head alone";
        ahead += g.prefetched;
        seen += g.canary;
        if (g.canary > 0) {
          EXPECT_NE(log.find(c.said), std::string::npos) << log;
          EXPECT_NE(log.find("read ahead, and not used; the step at"), std::string::npos) << log;
        }
        // What had been read for this step, and was sound, is there.
        EXPECT_LE(g.f_blocks + g.x_blocks, before);
        before = ahead - seen;
      }
      EXPECT_GT(ahead, 0u);
      EXPECT_EQ(seen > 0, std::string_view(c.name) != "none");
    }
  }
}

TEST_F(DeviceCanary, IsSilentWhereWhatIsReadAheadIsSound) {
  OneRank clean(backend_, 0, Policy::Budget);
  clean.tolerance = 0.9;
  clean.sharpness = 4;
  clean.rules.ladder.prefetch = 0.15;
  clean.rules.ladder.max_share = 1;
  const int64_t a = clean.start(1, 1)[0];
  uint64_t ahead = 0;
  for (int n = 0; n < 3; ++n) {
    EXPECT_EQ(clean.step({a})[0].sum.canary, 0u);
    for (const GroupReport& g : clean.cache.report(a).layers) ahead += g.prefetched;
  }
  EXPECT_GT(ahead, 0u);
}

// The same rows without damage: blocks are promoted, and the canary is silent.
TEST_F(DeviceCanary, IsSilentWhereNothingIsDamaged) {
  OneRank clean(backend_, 1, Policy::Budget);
  clean.tolerance = kTolerance;
  clean.sharpness = kSharpness;
  const int64_t a = clean.start(1, 1)[0];
  uint64_t promoted = 0;
  for (int n = 0; n < 8; ++n) {
    const VerdictRecord v = clean.step({a})[0];
    EXPECT_EQ(v.sum.canary, 0u);
    EXPECT_EQ(v.sum.rungs[4], 0u);
    promoted += v.sum.promoted_keys + v.sum.promoted_values;
  }
  EXPECT_GT(promoted, 20u);
}

}  // namespace
}  // namespace certkv
