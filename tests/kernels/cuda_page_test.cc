// A page in the device's order: the same keys, values and notes that hold for what the device
// decodes. And the plan of a pass.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/base/error.h"
#include "kernels/cuda/page.h"
#include "kernels/cuda/pass.h"
#include "kernels/cuda/plan.h"
#include "kernels/quantize.h"
#include "tests/support/oracle.h"
#include "tests/support/thrown_by.h"

namespace certkv::cuda {
namespace {

// One of each kind of page.
constexpr const char* kLayouts[] = {"compact", "balanced", "k12v8"};

struct Page {
  PageFormat format;
  oracle::Originals x;
  std::vector<std::byte> memory, device;
  std::byte* bytes;
  std::vector<double> k, v;  // as the device serves them
  PageKind kind;
  template <typename Value>
  Page(const char* layout, int d, DType dtype, Value value)
      : format(make_page_format(layout_by_name(layout), d, 16)),
        x{.dtype = dtype, .head_dim = d, .k = {}, .v = {}},
        memory(format.page_bytes + 64),
        device(page_layout(d, page_kind_of(format)).page_bytes()),
        bytes(reinterpret_cast<std::byte*>((uintptr_t(memory.data()) + 63) / 64 * 64)),
        k(size_t(64 * d)),
        v(k.size()),
        kind(page_kind_of(format)) {
    for (int t = 0; t < 64; ++t)
      for (int c = 0; c < d; ++c) {
        const auto [key, val] = value(t, c);
        x.k.push_back(oracle::encode(dtype, key));
        x.v.push_back(oracle::encode(dtype, val));
      }
    EXPECT_EQ(seal_page(format, dtype, x.k.data(), x.v.data(), bytes), SealStatus::Sealed);
    convert_page(format, bytes, device.data());
    decode_device_page(d, kind, device.data(), k.data(), v.data());
  }
};

double row_norm(const std::vector<double>& x, size_t t, size_t d) {
  double sum = 0;
  for (size_t c = 0; c < d; ++c) sum += x[t * d + c] * x[t * d + c];
  return std::sqrt(sum);
}

void expect_sound(const Page& p, double closest) {
  const size_t d = size_t(p.x.head_dim);
  const oracle::Served cpu = oracle::decode_page(p.format, p.bytes);
  const PageNotesDevice& notes = device_notes(int(d), p.device.data());
  EXPECT_EQ(p.k, cpu.k);
  double largest = 0;
  for (size_t t = 0; t < 64; ++t) largest = std::max(largest, row_norm(p.v, t, d));
  for (size_t t = 0; t < 64; ++t) {
    double error = 0, moved = 0;
    for (size_t c = 0; c < d; ++c) {
      const double served = p.v[t * d + c];
      error += std::pow(served - oracle::decode(p.x.dtype, p.x.v[t * d + c]), 2);
      moved += std::pow(served - cpu.v[t * d + c], 2);
    }
    const BlockNotesDevice& note = notes.block[t / 16];
    const double norm = row_norm(p.v, t, d), lost = kLostWeight * largest;
    EXPECT_GE(double(note.eta), std::sqrt(error) + lost);
    EXPECT_GE(double(note.vbar), norm + lost);
    // One more rounding to 11 bits of what 4 bits have already moved.
    EXPECT_LE(std::sqrt(moved), closest * largest + 1e-12);
    const PageLayoutDevice layout = page_layout(int(d), p.kind);
    const size_t at = layout.key_bytes + layout.norms + t % 8 * 16 + t / 16 * 4 + t % 16 / 8 * 2;
    uint16_t code;
    std::memcpy(&code, p.device.data() + at, 2);
    EXPECT_LE(double(notes.norm_step) * code, std::max(0.0, norm - lost));
    EXPECT_GE(double(notes.norm_step) * (double(code) + kNormMargin), norm + lost);
    EXPECT_GE(double(notes.norm_step) * (double(code) + 1), (norm - lost) * (1 - 1e-9));
  }
  for (int b = 0; b < 4; ++b) {
    const BlockAnnotations& was = page_annotations(p.format, p.bytes, b);
    EXPECT_EQ(notes.block[b].nu, was.nu);
    EXPECT_EQ(notes.block[b].kappa, was.kappa);
    EXPECT_EQ(notes.block[b].e, was.e);
    EXPECT_EQ(notes.block[b].k_norm, was.k_norm);
  }
}

// Half a place of 11 bits of a sum of at most 16 steps beside its base, whose size is that of the
// largest: 2^-11, for each element.
constexpr double kHalfPlace = 0x1p-10;

TEST(DevicePage, ServesTheSameKeysAndItsNotesHold) {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  for (const char* layout : kLayouts)
    for (int d : {64, 128})
      for (DType dtype : {DType::F16, DType::BF16})
        for (double size : {1.0, 1e-4, 3000.0})
          expect_sound(Page(layout, d, dtype,
                            [&](int, int) {
                              return std::pair{normal(random), size * normal(random)};
                            }),
                       kHalfPlace);
}

TEST(DevicePage, HoldsWhereValuesAreOfVeryDifferentSizes) {
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  for (const char* layout : kLayouts)
    for (int d : {64, 128}) {
      const auto with = [&](auto value) {
        expect_sound(Page(layout, d, DType::F16,
                          [&](int t, int c) {
                            return std::pair{0.5, value(t, c)};
                          }),
                     kHalfPlace);
      };
      with([&](int t, int) { return t == 5 ? 6e4 : normal(random); });  // a giant
      with([&](int t, int) { return normal(random) * std::ldexp(1.0, -t / 4); });
      with([&](int, int c) { return 1000.0 + (c % 16 == 3) + normal(random); });  // a common mean
      with([&](int, int c) { return c / 16 % 2 == 0 ? 0.25 : normal(random); });  // constant groups
      with([&](int, int) { return 0.0; });
      with([&](int t, int) { return t % 3 == 0 ? 6e-8 : 0.0; });          // subnormal halves
      with([&](int, int c) { return c % 2 == 0 ? 65504.0 : -65504.0; });  // the largest there are
    }
}

TEST(DevicePage, TakesAsManyBytesAsTheLayoutPromises) {
  for (int d : {64, 128}) {
    for (const char* layout : kLayouts) {
      const PageFormat f = make_page_format(layout_by_name(layout), d, 16);
      // 8 bytes of a page's notes are the device's own, and they are padded to 128.
      EXPECT_NEAR(bytes_per_token(d, page_kind_of(f)), f.bytes_per_token(), 16.0 / 64);
    }
  }
  EXPECT_EQ(page_layout(128, PageKind::K8V4).page_bytes(), 236u * 64);
  EXPECT_EQ(page_layout(128, PageKind::K8V8).page_bytes(), 276u * 64);
  EXPECT_EQ(page_layout(128, PageKind::K12V8).page_bytes(), 340u * 64);
}

TEST(DevicePage, RefusesWhatTheDeviceDoesNotServe) {
  const auto refused = [](const char* layout, int d, int block, const char* why) {
    try {
      (void)page_kind_of(make_page_format(layout_by_name(layout), d, block));
      FAIL() << layout << " was taken";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  };
  refused("k12v8split", 128, 16, "layout k12v8split");
  refused("paper", 128, 16, "layout paper");
  refused("compact", 256, 16, "head_dim is 256");
  refused("compact", 96, 16, "head_dim is 96");
  refused("compact", 128, 32, "block_tokens is 32");
}

// ---- plan ---------------------------------------------------------------------------------------

constexpr PageKind kV4 = PageKind::K8V4;
constexpr DeviceShape kH100 = {132, 232448, 233472};
constexpr DeviceShape kA100 = {108, 166912, 167936};
constexpr DeviceShape kSmall = {128, 101376, 102400};  // sm_89; sm_86 and sm_120 are as small

TEST(LaunchPlan, CoversEveryPageOnceWithinWhatIsCharged) {
  for (const PageKind kind : kPageKinds)
    for (const DeviceShape& device : {kH100, kA100, kSmall})
      for (int d : {64, 128})
        for (int groups : {1, 2})
          for (int items : {1, 3, 8, 32, 500})
            for (int pages : {1, 2, 7, 8, 9, 55, 56, 129, 513, 2049, 16385, 100000}) {
              const SplitPlan plan = plan_splits(device, d, groups, kind, pages, items);
              EXPECT_EQ(plan.warps, pass_warps(device, d, groups, kind));
              EXPECT_GE(plan.pages_per_split, 1);
              EXPECT_LE(plan.pages_per_split, plan.warps * kMaxPagesPerWarp);
              EXPECT_GE(plan.splits * plan.pages_per_split, pages);
              EXPECT_LT((plan.splits - 1) * plan.pages_per_split, pages) << "an empty split";
            }
}

TEST(LaunchPlan, FillsTheDeviceOnceWhereThereIsWork) {
  const SplitPlan long_one = plan_splits(kH100, 128, 1, kV4, 2049, 8);
  EXPECT_LE(long_one.splits * 8, 132);
  EXPECT_GE(long_one.splits * 8, 120);
  const SplitPlan batch = plan_splits(kH100, 128, 1, kV4, 513, 32);
  EXPECT_LE(batch.splits * 32, 132);
  EXPECT_GE(batch.splits * 32, 120);
  // Two blocks fit on a multiprocessor at head_dim 64.
  EXPECT_GE(plan_splits(kH100, 64, 1, kV4, 2049, 8).splits * 8, 200);
  // A short sequence is not cut below 8 pages.
  EXPECT_EQ(plan_splits(kH100, 128, 1, kV4, 8, 1).splits, 1);
}

TEST(LaunchPlan, TakesTheMostWarpsThatFitTheDevice) {
  for (int d : {64, 128})
    for (int groups : {1, 2}) {
      EXPECT_EQ(pass_warps(kH100, d, groups, kV4), 12);
      EXPECT_EQ(pass_warps(kA100, d, groups, kV4), d == 64 ? 12 : 5);
      EXPECT_EQ(pass_warps(kSmall, d, groups, kV4), d == 64 ? 12 : 5);
      // What values of 8 bits add leaves room for as many warps on an H100, and for 5 anywhere.
      EXPECT_EQ(pass_warps(kH100, d, groups, PageKind::K8V8), 12);
      EXPECT_EQ(pass_warps(kA100, d, groups, PageKind::K8V8), d == 64 ? 12 : 5);
      EXPECT_EQ(pass_warps(kSmall, d, groups, PageKind::K8V8), 5);
      EXPECT_EQ(pass_warps(kH100, d, groups, PageKind::K12V8), 10);
      EXPECT_EQ(pass_warps(kA100, d, groups, PageKind::K12V8), d == 64 ? 10 : 4);
      EXPECT_EQ(pass_warps(kSmall, d, groups, PageKind::K12V8), 4);
      for (const PageKind kind : kPageKinds) {
        const WarpCounts counts = warp_counts(kind);
        for (int warps : {counts.most, counts.fewest}) {  // at the edge
          const uint32_t needed = shared_layout(d, groups, warps, kind).bytes;
          EXPECT_EQ(pass_warps({1, needed, needed + 1024}, d, groups, kind), warps);
        }
        EXPECT_LT(pass_warps({1, shared_layout(d, groups, counts.most, kind).bytes - 1, 1 << 20}, d,
                             groups, kind),
                  counts.most);
      }
    }
}

// One round of blocks, or some that are all as full: the last is not left half empty.
TEST(LaunchPlan, FillsTheRoundsOfASmallDevice) {
  const SplitPlan one = plan_splits(kSmall, 128, 1, kV4, 513, 8);
  EXPECT_LE(one.splits * 8, 128);
  EXPECT_GE(one.splits * 8, 120);
  const SplitPlan long_one = plan_splits(kSmall, 128, 1, kV4, 2049, 8);  // in 3 rounds
  EXPECT_LE(long_one.splits * 8, 3 * 128);
  EXPECT_GE(long_one.splits * 8, 3 * 120);
  // Two blocks of 5 warps fit where 12 warps do not.
  EXPECT_GE(plan_splits(kA100, 128, 1, kV4, 513, 8).splits * 8, 200);
}

TEST(LaunchPlan, ForetellsTheLongestSplitOfAnyLength) {
  for (const PageKind kind : kPageKinds)
    for (const DeviceShape& device : {kH100, kA100, kSmall})
      for (int items : {1, 8})
        for (int longest : {1, 8, 60, 1000, 3000}) {
          int most = 0;
          for (int pages = 1; pages <= longest; ++pages)
            most = std::max(most, plan_splits(device, 128, 1, kind, pages, items).pages_per_split);
          const int foretold = most_pages_per_split(device, 128, 1, kind, longest, items);
          EXPECT_LE(most, foretold) << longest;
          EXPECT_LE(foretold, std::max(most, std::min(longest, 8))) << longest;
        }
}

TEST(LaunchPlan, RefusesADeviceWithTooLittleSharedMemory) {
  // 64 KB, as sm_75 has.
  const std::string what = thrown_by([] { plan_splits({68, 65536, 65536}, 128, 1, kV4, 100, 8); });
  EXPECT_EQ(what,
            "InvalidArgument: the device's pass needs 79824 bytes of shared memory a block at "
            "head_dim 128 and 1 to 4 query heads a KV head with codes of k8v4, the device offers "
            "65536: use the CPU backend");
  EXPECT_NE(thrown_by([] {
              pass_warps({1, 40 * 1024, 64 * 1024}, 64, 2, PageKind::K8V8);
            }).find("5 to 8 query heads a KV head with codes of k8v8, the device offers 40960"),
            std::string::npos);
  EXPECT_THROW(plan_splits(kH100, 128, 1, kV4, 0, 8), Error);
  EXPECT_THROW(plan_splits(kH100, 128, 1, kV4, 8, 0), Error);
}

TEST(LaunchPlan, RefusesShapesTheKernelsDoNotTake) {
  PassArgs args;
  args.pages_per_split = 5 * kMaxPagesPerWarp;
  const PassShape good{
      .head_dim = 128, .heads = 8, .items = 1, .splits = 1, .warps = 5, .certificate = true};
  EXPECT_NO_THROW(check_shape(args, good));
  for (auto change :
       {+[](PassArgs&, PassShape&s) { s.head_dim = 96; },
        +[](PassArgs&, PassShape&s) { s.heads = 9; }, +[](PassArgs&, PassShape&s) { s.heads = 0; },
        +[](PassArgs&, PassShape&s) { s.warps = 0; }, +[](PassArgs&, PassShape&s) { s.warps = 6; },
        +[](PassArgs&a, PassShape&) { a.pages_per_split = -1; },
        +[](PassArgs&a, PassShape&) { ++a.pages_per_split; },
        +[](PassArgs&a, PassShape&s) {
          s.warps = kMostWarps;
          a.pages_per_split = kMostWarps * kMaxPagesPerWarp + 1;
        }}) {
    PassArgs a = args;
    PassShape s = good;
    change(a, s);
    EXPECT_THROW(check_shape(a, s), Error);
  }
}

}  // namespace
}  // namespace certkv::cuda
