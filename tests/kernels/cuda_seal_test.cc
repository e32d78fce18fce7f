// Sealing on the device against sealing on the host: seal_page() and convert_page(), whose bytes
// must come out, all of them, whatever the rows are; and what a decode's tables say afterwards.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/cuda/page.h"
#include "kernels/digest.h"
#include "kernels/quantize.h"
#include "tests/support/device_ops.h"

namespace certkv::cuda {
namespace {

// What rows are made of.
enum Kind {
  kNormal,
  kOutliers,  // some channels, and some elements, are far larger
  kZeros,     // of both signs
  kConstant,  // channels of keys, groups of values
  kFewSteps,  // neighbours in the last place
  kSubnormal,
  kAnyBits,      // of a finite number
  kWide,         // sizes from the smallest to the largest half
  kLargest,      // of halves, of both signs
  kTokenScales,  // each token has its own size
  kBeyond,       // of what an offset or a scale can be
  kNotFinite,    // one element
  kKinds
};

struct Rows {
  std::vector<uint16_t> k, v;  // [64, head_dim]
};

class RowDrawer {
 public:
  explicit RowDrawer(uint64_t seed) : random_(seed) {}

  Rows draw(Kind kind, DType dtype, int d) {
    Rows rows;
    for (auto* x : {&rows.k, &rows.v})
      for (int t = 0; t < kPageTokens; ++t)
        for (int c = 0; c < d; ++c) x->push_back(element(kind, dtype, t, c));
    // One tensor of a page may be plain while the other is not.
    if (kind != kNormal && draw_below(3) == 0)
      for (uint16_t& x : draw_below(2) == 0 ? rows.k : rows.v)
        x = float_to_16(dtype, float(normal_(random_)));
    if (kind == kBeyond) spoil(&rows, float_to_16(dtype, dtype == DType::BF16 ? 3e38f : 65504.0f));
    if (kind == kBeyond) spoil(&rows, float_to_16(dtype, dtype == DType::BF16 ? 1e-9f : -65504.0f));
    if (kind == kNotFinite) {
      const float bad[] = {INFINITY, -INFINITY, NAN};
      spoil(&rows, float_to_16(dtype, bad[draw_below(3)]));
    }
    return rows;
  }

 private:
  size_t draw_below(size_t n) { return size_t(random_() % n); }
  void spoil(Rows* rows, uint16_t x) {
    auto& tensor = draw_below(2) == 0 ? rows->k : rows->v;
    tensor[draw_below(tensor.size())] = x;
  }
  uint16_t element(Kind kind, DType dtype, int t, int c) {
    const auto half = [&](double x) { return float_to_16(dtype, float(x)); };
    const double x = normal_(random_);
    switch (kind) {
      case kOutliers:
        return half(x * (c % 13 == 0 ? 40 : 1) * (draw_below(500) == 0 ? 300 : 1));
      case kZeros:
        return draw_below(2) == 0 ? 0x8000u : 0u;
      case kConstant:
        return half(draw_below(200) == 0 ? x : 0.1 * (c / 16) - 0.3);
      case kFewSteps:
        return uint16_t(half(1 + c % 7) + draw_below(3));
      case kSubnormal:
        return uint16_t(draw_below(2) << 15 | draw_below(40));
      case kAnyBits: {
        const auto bits = uint16_t(random_());
        const bool finite = std::isfinite(float_from_16(dtype, bits));
        return finite ? bits : half(x);
      }
      case kWide:
        return half(std::ldexp(x, int(draw_below(38)) - 24));
      case kLargest:
        return half(draw_below(2) == 0 ? 65504 : -65504);
      case kTokenScales:
        return half(x * std::ldexp(1.0, (t * 7) % 26 - 16));
      default:
        return half(x);
    }
  }
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
};

// A page as the host makes it.
struct HostPage {
  SealStatus status;
  std::vector<std::byte> device;
  BlockAnnotations block[kPageTiles];
};
HostPage on_host(const Rows& rows, DType dtype, int d, const char* layout) {
  const PageFormat format = make_page_format(layout_by_name(layout), d, 16);
  std::vector<std::byte> memory(format.page_bytes + 64);
  auto* page = reinterpret_cast<std::byte*>((uintptr_t(memory.data()) + 63) / 64 * 64);
  HostPage out{};
  out.status = seal_page(format, dtype, rows.k.data(), rows.v.data(), page);
  if (out.status == SealStatus::Sealed) {
    out.device.resize(page_layout(d, page_kind_of(format)).page_bytes());
    convert_page(format, page, out.device.data());
  }
  for (int b = 0; b < kPageTiles && out.status != SealStatus::NonFinite; ++b)
    EXPECT_EQ(annotate_originals(format, dtype, rows.k.data() + b * 16 * d,
                                 rows.v.data() + b * 16 * d, 16, &out.block[b]),
              SealStatus::Sealed);
  return out;
}

class DeviceSeal : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ != nullptr) ops_ = make_test_cache_ops(*device_);
  }

  static constexpr int kHeads = 3, kPages = 4;
  static constexpr std::byte kUntouched{0x5a};

  // 12 pages at once, with gaps between heads and between pages.
  void compare(uint64_t seed, DType dtype, int d, const char* layout,
               std::array<int, 3>* statuses) {
    const PageKind kind = page_kind_of(make_page_format(layout_by_name(layout), d, 16));
    RowDrawer drawer(seed);
    const size_t elements = size_t(kPageTokens * d), page_bytes = page_layout(d, kind).page_bytes();
    const size_t page_room = page_bytes + 32, head_rows = kPages * elements + 24;
    std::vector<Rows> rows;
    std::vector<uint16_t> k(kHeads * head_rows), v(k.size());
    for (int n = 0; n < kHeads * kPages; ++n) {
      rows.push_back(drawer.draw(Kind((seed + uint64_t(n)) % kKinds), dtype, d));
      const size_t at = size_t(n / kPages) * head_rows + size_t(n % kPages) * elements;
      std::copy(rows.back().k.begin(), rows.back().k.end(), k.begin() + ptrdiff_t(at));
      std::copy(rows.back().v.begin(), rows.back().v.end(), v.begin() + ptrdiff_t(at));
    }
    const auto keys = put(k), values = put(v);
    const auto pages = put(std::vector<std::byte>(kHeads * kPages * page_room, kUntouched));
    const auto status = put(std::vector<uint8_t>(kHeads * kPages, 9));
    const size_t head_notes = kPages * kPageTiles + 1;
    const auto k_norm = put(std::vector<float>(kHeads * head_notes, -1));
    const auto nu = put(std::vector<float>(kHeads * head_notes, -1));
    const auto largest_nu = put(std::vector<float>(kHeads * kPages, -1));
    const DeviceArray<uint16_t> originals(*device_, kHeads * kPages * 2 * elements, "originals");
    SealArgs a;
    a.heads = kHeads;
    a.pages = kPages;
    a.head_dim = d;
    a.kind = kind;
    a.dtype = dtype;
    a.k = reinterpret_cast<const std::byte*>(keys.data());
    a.v = reinterpret_cast<const std::byte*>(values.data());
    a.rows_of_head = head_rows * 2;
    a.rows_of_page = elements * 2;
    a.page = pages.data();
    a.page_of_head = kPages * page_room;
    a.page_of_page = page_room;
    a.status = status.data();
    a.k_norm = k_norm.data();
    a.nu = nu.data();
    a.notes_of_head = head_notes * sizeof(float);
    a.notes_of_page = kPageTiles * sizeof(float);
    a.largest_nu = largest_nu.data();
    a.originals = reinterpret_cast<std::byte*>(originals.data());
    ops_->seal(a);
    const auto got_pages = get(pages);
    const auto got_status = get(status);
    const auto got_k = get(k_norm), got_nu = get(nu);
    const auto got_largest = get(largest_nu);
    const auto got_originals = get(originals);
    for (int n = 0; n < kHeads * kPages; ++n) {
      SCOPED_TRACE(testing::Message()
                   << "seed " << seed << " page " << n << " kind " << (seed + uint64_t(n)) % kKinds
                   << " " << dtype_name(dtype) << " d " << d << " " << layout);
      const HostPage host = on_host(rows[size_t(n)], dtype, d, layout);
      ASSERT_EQ(got_status[size_t(n)], uint8_t(host.status));
      ++(*statuses)[size_t(host.status)];
      const std::byte* page = got_pages.data() + size_t(n) * page_room;
      if (host.status == SealStatus::Sealed) {
        expect_same_bytes(page_layout(d, kind), page, host.device.data());
      }
      for (size_t i = page_bytes; i < page_room; ++i) ASSERT_EQ(page[i], kUntouched);
      const size_t note = size_t(n / kPages) * head_notes + size_t(n % kPages) * kPageTiles;
      for (size_t b = 0; b < kPageTiles && host.status != SealStatus::NonFinite; ++b) {
        EXPECT_EQ(got_k[note + b], host.block[b].k_norm);
        EXPECT_EQ(got_nu[note + b], host.block[b].nu);
      }
      if (host.status != SealStatus::NonFinite) {
        const float* nus = got_nu.data() + note;
        EXPECT_EQ(got_largest[size_t(n)], *std::max_element(nus, nus + kPageTiles));
      }
      const uint16_t* copy = got_originals.data() + size_t(n) * 2 * elements;
      EXPECT_TRUE(std::equal(rows[size_t(n)].k.begin(), rows[size_t(n)].k.end(), copy));
      EXPECT_TRUE(std::equal(rows[size_t(n)].v.begin(), rows[size_t(n)].v.end(), copy + elements));
    }
    for (size_t h = 0; h < kHeads; ++h) EXPECT_EQ(got_k[(h + 1) * head_notes - 1], -1);
  }

  static void expect_same_bytes(const PageLayoutDevice& p, const std::byte* got,
                                const std::byte* want) {
    for (size_t i = 0; i < p.page_bytes(); ++i)
      if (got[i] != want[i]) {
        const char* part = i < p.key_affine                   ? "key codes"
                           : i < p.notes                      ? "key scales"
                           : i < p.key_rest                   ? "notes"
                           : i < p.key_bytes                  ? "key rests"
                           : i - p.key_bytes < p.value_affine ? "value codes"
                           : i - p.key_bytes < p.norms        ? "value steps"
                                                              : "norms";
        FAIL() << "byte " << i << " (" << part << ") is " << int(got[i]) << ", not "
               << int(want[i]);
      }
  }

  std::unique_ptr<CacheOps> ops_;
};

#ifdef CERTKV_SANITIZED
constexpr uint64_t kSeeds = 4;
#else
constexpr uint64_t kSeeds = 24;
#endif

TEST_F(DeviceSeal, GivesTheHostsBytes) {
  std::array<int, 3> statuses{};
  for (uint64_t seed = 0; seed < kSeeds; ++seed)
    for (int d : {64, 128})
      for (DType dtype : {DType::F16, DType::BF16})
        for (const char* layout : {"compact", "balanced", "k12v8"}) {
          compare(seed, dtype, d, layout, &statuses);
          if (HasFatalFailure()) return;
        }
  // The test must have tried what it is about.
  const int pages = int(kSeeds) * 12 * kHeads * kPages;
  EXPECT_GE(statuses[size_t(SealStatus::Sealed)], pages / 2);
  EXPECT_GE(statuses[size_t(SealStatus::Unquantisable)], pages / 30);
  EXPECT_GE(statuses[size_t(SealStatus::NonFinite)], pages / 20);
}

// Heads of several kinds at once, as far apart as the largest needs; and digests of several
// lengths.
TEST_F(DeviceSeal, SealsEachHeadAsItsKind) {
  constexpr int kDim = 64;
  constexpr size_t kElements = size_t(kPageTokens * kDim), kCount = std::size(kPageKinds);
  const size_t room = page_layout(kDim, PageKind::K12V8).page_bytes();
  RowDrawer drawer(3);
  std::vector<Rows> rows;
  std::vector<uint16_t> k, v;
  std::vector<PageKind> kinds;
  std::vector<uint32_t> lengths;
  for (size_t n = 0; n < kCount; ++n) {
    rows.push_back(drawer.draw(kNormal, DType::F16, kDim));
    k.insert(k.end(), rows[n].k.begin(), rows[n].k.end());
    v.insert(v.end(), rows[n].v.begin(), rows[n].v.end());
    kinds.push_back(kPageKinds[kCount - 1 - n]);
    lengths.push_back(page_layout(kDim, kinds[n]).page_bytes());
  }
  const auto keys = put(k), values = put(v);
  const auto of_heads = put(kinds);
  const auto bytes = put(lengths);
  const auto pages = put(std::vector<std::byte>(kCount * room, kUntouched));
  const auto status = put(std::vector<uint8_t>(kCount, 9));
  const auto notes = put(std::vector<float>(2 * kCount * kPageTiles, -1));
  const auto digests = put(std::vector<uint64_t>(kCount, 0));
  SealArgs a;
  a.heads = int32_t(kCount);
  a.pages = 1;
  a.head_dim = kDim;
  a.kinds = of_heads.data();
  a.dtype = DType::F16;
  a.k = reinterpret_cast<const std::byte*>(keys.data());
  a.v = reinterpret_cast<const std::byte*>(values.data());
  a.rows_of_head = kElements * 2;
  a.page = pages.data();
  a.page_of_head = room;
  a.status = status.data();
  a.k_norm = notes.data();
  a.nu = notes.data() + kCount * kPageTiles;
  a.notes_of_head = kPageTiles * sizeof(float);
  ops_->seal(a);
  ops_->digest_pages({.first = pages.data(),
                      .row_stride = room,
                      .lengths = bytes.data(),
                      .count = int32_t(kCount),
                      .digests = digests.data()});
  const auto got = get(pages);
  const auto seen = get(digests);
  for (size_t n = 0; n < kCount; ++n) {
    const HostPage host = on_host(rows[n], DType::F16, kDim, page_kind_name(kinds[n]));
    ASSERT_EQ(host.status, SealStatus::Sealed);
    expect_same_bytes(page_layout(kDim, kinds[n]), got.data() + n * room, host.device.data());
    for (size_t i = lengths[n]; i < room; ++i) ASSERT_EQ(got[n * room + i], kUntouched);
    EXPECT_EQ(seen[n], payload_digest(host.device.data(), lengths[n]));
  }
  EXPECT_NE(thrown_by([&] {
              ops_->digest_pages({.per_row = 2, .lengths = bytes.data()});
            }).find("stretches of several lengths, 2 a row"),
            std::string::npos);
}

// The page a decode has filled, of each of two heads: one that can be quantised, one that cannot.
TEST_F(DeviceSeal, BeginsTheOpenBlocksAnew) {
  constexpr int kDim = 64, kCapacity = 7;
  constexpr size_t kElements = size_t(kPageTokens * kDim);
  RowDrawer drawer(7);
  Rows rows[2] = {drawer.draw(kNormal, DType::BF16, kDim), drawer.draw(kNormal, DType::BF16, kDim)};
  rows[1].k[5] = float_to_bf16(1e30f);  // beyond any half
  std::vector<uint16_t> all;
  for (const Rows& r : rows)
    for (const auto* x : {&r.k, &r.v}) all.insert(all.end(), x->begin(), x->end());
  const auto originals = put(all);
  for (const bool coded : {true, false}) {
    const size_t page_bytes = page_layout(kDim, PageKind::K8V4).page_bytes();
    const DeviceArray<std::byte> pages(*device_, 2 * page_bytes, "pages");
    const auto status = put(std::vector<uint8_t>(2, 9));
    const auto notes = put(std::vector<float>(16, -1));
    const auto entries = put(std::vector<PageEntry>(2 * kCapacity, {nullptr, 7, 7}));
    const auto keys = put(std::vector<int32_t>(2 * kCapacity * kPageTiles, 77));
    const auto values = put(std::vector<int32_t>(2 * kCapacity * kPageTiles, 77));
    SealArgs a;
    a.heads = 2;
    a.pages = 1;
    a.head_dim = kDim;
    a.dtype = DType::BF16;
    a.k = reinterpret_cast<const std::byte*>(originals.data());
    a.v = a.k + kElements * 2;
    a.rows_of_head = 4 * kElements;
    a.page = coded ? pages.data() : nullptr;
    a.page_of_head = page_bytes;
    a.status = status.data();
    a.k_norm = notes.data();
    a.nu = notes.data() + 8;
    a.notes_of_head = 4 * sizeof(float);
    a.entries = entries.data();
    a.entries_of_head = kCapacity;
    a.slot_of[0] = keys.data();
    a.slot_of[1] = values.data();
    for (int part = 0; part < 2; ++part) {
      a.open_slot[part] = 100 + 10 * part;
      a.kept_slot[part] = 200 + 10 * part;
    }
    ops_->seal(a);
    const auto got = get(entries);
    const auto got_status = get(status);
    EXPECT_EQ(got_status[0], uint8_t(SealStatus::Sealed));
    EXPECT_EQ(got_status[1], uint8_t(coded ? SealStatus::Unquantisable : SealStatus::Sealed));
    const std::vector<int32_t> slots[2] = {get(keys), get(values)};
    for (size_t h = 0; h < 2; ++h) {
      const PageEntry* e = got.data() + h * kCapacity;
      const bool has_codes = coded && h == 0;
      EXPECT_EQ(e[0].page, has_codes ? pages.data() : nullptr);
      EXPECT_EQ(e[0].wants, has_codes ? 0u : 0xffu);
      EXPECT_EQ(e[0].tokens, kPageTokens);
      for (size_t n = 1; n < kCapacity; ++n) {
        EXPECT_EQ(e[n].wants, n <= kPageTiles ? 0u : 7u);
        EXPECT_EQ(e[n].tokens, n <= kPageTiles ? 0 : 7);
      }
      for (int part = 0; part < 2; ++part)
        for (int i = 0; i < kCapacity * kPageTiles; ++i) {
          const int n = i / kPageTiles, t = i % kPageTiles;
          int want = 77;
          if (n == 0) want = coded ? -1 : 200 + 10 * part + t;
          if (n > 0 && n <= kPageTiles) want = t == 0 ? 100 + 10 * part + n - 1 : -1;
          EXPECT_EQ(slots[part][h * kCapacity * kPageTiles + size_t(i)], want) << n << " " << t;
        }
    }
  }
}

// payload_digest() is the host's own, with other lanes and another order. Lengths about those at
// which the kernel's loads, its rounds of a warp and the digest's chunks end; and a page's.
TEST_F(DeviceSeal, TakesTheDigestsOfPages) {
  std::mt19937_64 random(11);
  constexpr size_t kCount = 9, kRow = 3, kGap = 48;
  for (const uint32_t bytes :
       {16u, 496u, 512u, 528u, page_layout(64, PageKind::K8V4).page_bytes(),
        page_layout(128, PageKind::K8V8).page_bytes(), 16368u, 16384u, 16400u, 40000u}) {
    const size_t row = kRow * bytes + kGap;
    std::vector<std::byte> data(kCount / kRow * row);
    for (std::byte& b : data) b = std::byte(random());
    const auto memory = put(data);
    const auto place = [&](size_t n) { return n / kRow * row + n % kRow * bytes; };
    std::vector<const std::byte*> at;
    for (size_t n = kCount; n-- > 0;) at.push_back(memory.data() + place(n));
    const auto list = put(at);
    const auto in_rows = put(std::vector<uint64_t>(kCount + 1, 5));
    const auto listed = put(std::vector<uint64_t>(kCount + 1, 5));
    ops_->digest_pages({.first = memory.data(),
                        .row_stride = row,
                        .per_row = kRow,
                        .bytes = bytes,
                        .count = kCount,
                        .digests = in_rows.data()});
    ops_->digest_pages(
        {.list = list.data(), .bytes = bytes, .count = kCount, .digests = listed.data()});
    const auto a = get(in_rows), b = get(listed);
    for (size_t n = 0; n < kCount; ++n) {
      const uint64_t want = payload_digest(data.data() + place(n), bytes);
      EXPECT_EQ(a[n], want) << bytes << " bytes, page " << n;
      EXPECT_EQ(b[kCount - 1 - n], want) << bytes << " bytes, page " << n;
    }
    EXPECT_EQ(a[kCount], 5u);
    EXPECT_EQ(b[kCount], 5u);
  }
  EXPECT_NE(thrown_by([&] { ops_->digest_pages({.bytes = 24}); }).find("pages of 24 bytes"),
            std::string::npos);
}

TEST_F(DeviceSeal, RefusesWhatItDoesNotServe) {
  const auto refused = [&](auto change) {
    SealArgs a;
    a.heads = a.pages = 0;
    a.head_dim = 128;
    change(&a);
    return thrown_by([&] { ops_->seal(a); });
  };
  EXPECT_EQ(refused([](SealArgs*) {}), "");
  EXPECT_NE(refused([](SealArgs* a) { a->head_dim = 96; }).find("head_dim is 96"),
            std::string::npos);
  EXPECT_NE(refused([](SealArgs* a) { a->dtype = DType::F32; }).find("originals of type F32"),
            std::string::npos);
  EXPECT_NE(refused([](SealArgs* a) { a->rows_of_page = 8; }).find("not aligned to 16 bytes"),
            std::string::npos);
  PageEntry entry;
  EXPECT_NE(refused([&](SealArgs* a) {
              a->entries = &entry;
              a->pages = 2;
            }).find("2 pages at once"),
            std::string::npos);
}

}  // namespace
}  // namespace certkv::cuda
