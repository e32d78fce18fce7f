// Sealing, judged by a decoder of its own that reads the documented bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string_view>
#include <utility>

#include "kernels/quantize.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

struct FreeBytes {
  void operator()(std::byte* p) const { std::free(p); }
};

struct Sealed {
  PageFormat format;
  oracle::Originals x;
  std::unique_ptr<std::byte, FreeBytes> page;
  Sealed(std::string_view layout, int head_dim, int block, DType dtype)
      : format(make_page_format(layout_by_name(layout), head_dim, block)),
        x{.dtype = dtype, .head_dim = head_dim, .k = {}, .v = {}},
        page(static_cast<std::byte*>(std::aligned_alloc(64, format.page_bytes))) {}
  template <typename Make>
  void fill(Make make) {  // make(t, c) -> {key, value}
    for (int t = 0; t < format.group_tokens; ++t)
      for (int c = 0; c < format.head_dim; ++c) {
        const auto [k, v] = make(t, c);
        x.k.push_back(oracle::encode(x.dtype, k));
        x.v.push_back(oracle::encode(x.dtype, v));
      }
  }
  void fill_random(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    fill([&](int, int c) {
      return std::pair{normal(random) * (c % 13 == 0 ? 20 : 1), normal(random) + 0.5};
    });
  }
  SealStatus seal() { return seal_page(format, x.dtype, x.k.data(), x.v.data(), page.get()); }
};

// Measured in double from values exact in double: sums of at most 256 squares.
constexpr double kMeasured = 1 + 1e-12;
// An annotation exceeds what was measured by the step to the next float, 2^-23 at most, and by
// 2^-40.
constexpr double kRoundedUp = (1 + 0x1p-23) * (1 + 0x1p-39);

TEST(Seal, AnnotationsCoverWhatIsServedAndAreNotLoose) {
  for (const char* layout : {"compact", "balanced", "paper", "k12v8", "k12v8split"})
    for (int d : {64, 96, 128, 256})
      for (int block : {16, 32})
        for (DType dtype : {DType::F16, DType::BF16}) {
          SCOPED_TRACE(testing::Message() << layout << " d " << d << " block " << block);
          Sealed s(layout, d, block, dtype);
          s.fill_random(uint64_t(d + block));
          ASSERT_EQ(s.seal(), SealStatus::Sealed);
          const oracle::Served served = oracle::decode_page(s.format, s.page.get());
          std::vector<double> k(served.k.size()), v(served.v.size());
          decode_page(s.format, s.page.get(), k.data(), v.data());
          EXPECT_EQ(k, served.k);
          EXPECT_EQ(v, served.v);
          double kbar2 = 0;
          for (int c = 0; c < d; ++c) {
            const ServedAffine a = served_key_affine(s.format, s.page.get(), c);
            const double kbar = std::abs(double(a.base)) + double(a.max_code) * a.step;
            kbar2 += kbar * kbar;
          }
          EXPECT_GE(page_notes(s.format, s.page.get()).kbar_norm * kMeasured, std::sqrt(kbar2));
          for (size_t t = 0; t < size_t(s.format.group_tokens); ++t) {
            double norm2 = 0;
            for (size_t c = 0; c < size_t(d); ++c)
              norm2 += served.v[t * size_t(d) + c] * served.v[t * size_t(d) + c];
            ASSERT_LE(served.norm_below[t], std::sqrt(norm2) * kMeasured);
            ASSERT_GE(served.norm_above[t] * kMeasured, std::sqrt(norm2));
            ASSERT_LE(served.norm_above[t] - served.norm_below[t], 1e-4 * std::sqrt(norm2));
          }
          const PageNotes& notes = page_notes(s.format, s.page.get());
          for (int b = 0; b < s.format.blocks(); ++b) {
            EXPECT_GE(notes.kappa, page_annotations(s.format, s.page.get(), b).kappa);
            EXPECT_GE(notes.e, page_annotations(s.format, s.page.get(), b).e);
            const BlockAnnotations& note = page_annotations(s.format, s.page.get(), b);
            const oracle::Measured m = oracle::measure(s.format, served, s.x, b);
            EXPECT_GE(note.eta * kMeasured, m.eta);
            EXPECT_GE(note.nu * kMeasured, m.nu);
            EXPECT_GE(note.kappa * kMeasured, m.kappa);
            EXPECT_GE(note.e * kMeasured, m.e);
            EXPECT_GE(note.k_norm * kMeasured, m.k_norm);
            EXPECT_GE(note.vbar * kMeasured, m.vbar);
            EXPECT_LE(note.vbar, 1.001 * m.vbar);
            EXPECT_LE(note.eta, 1.001 * m.eta);
            EXPECT_LE(note.nu, 1.001 * m.nu);
            EXPECT_LE(note.kappa, 0.51);
            EXPECT_LE(note.e, 1.001 * m.e);
          }
        }
}

struct MeasuredErrors {
  double error = 0, norm = 0;
};
MeasuredErrors measured_errors(const Sealed& s, int block) {
  const oracle::Measured m =
      oracle::measure(s.format, oracle::decode_page(s.format, s.page.get()), s.x, block);
  return {m.eta, m.nu};
}

TEST(ValueErrors, AreThoseOfTheValuesAsServed) {
  for (const Layout& layout : layouts())
    for (int d : {64, 96, 128, 256})
      for (int block : {16, 32})
        for (DType dtype : {DType::F16, DType::BF16}) {
          SCOPED_TRACE(testing::Message() << layout.name << " d " << d << " block " << block);
          Sealed s(layout.name, d, block, dtype);
          s.fill_random(uint64_t(2 * d + block));
          ASSERT_EQ(s.seal(), SealStatus::Sealed);
          const size_t row = size_t(d), rows = size_t(block) * row;
          for (int b = 0; b < s.format.blocks(); ++b) {
            const MeasuredErrors m = measured_errors(s, b);
            const uint16_t* v = s.x.v.data() + size_t(b) * rows;
            const ValueErrors seen = value_errors(s.format, s.page.get(), b, dtype, v);
            EXPECT_NEAR(seen.error, m.error, m.error * (kMeasured - 1));
            EXPECT_NEAR(seen.norm, m.norm, m.norm * (kMeasured - 1));
            EXPECT_LE(seen.error, page_annotations(s.format, s.page.get(), b).eta);
            EXPECT_LE(seen.norm, page_annotations(s.format, s.page.get(), b).nu);
          }
          // Flipped code bits count, in their block and plane.
          std::mt19937_64 random(uint64_t(d + block));
          const int last = s.format.blocks() - 1;
          for (int i = 0; i < 8; ++i) {
            const bool second = s.format.layout.value.read_residual && i % 2 == 1;
            const size_t plane = second ? s.format.value_residual : s.format.value_base;
            const int bits = second || s.format.layout.value.base_bits() == 4 ? 4 : 8;
            const size_t bytes = size_t(s.format.group_tokens) * row * size_t(bits) / 8;
            std::byte& cell = s.page.get()[plane + random() % bytes];
            const std::byte kept = cell;
            cell ^= std::byte(1 << random() % 8);
            for (int b = 0; b <= last; ++b) {
              const MeasuredErrors m = measured_errors(s, b);
              const uint16_t* v = s.x.v.data() + size_t(b) * rows;
              const ValueErrors seen = value_errors(s.format, s.page.get(), b, dtype, v);
              EXPECT_NEAR(seen.error, m.error, m.error * (kMeasured - 1));
            }
            cell = kept;
          }
          // A NaN offset of any token and group is never below an annotation.
          for (int i = 0; i < 4; ++i) {
            const size_t cells = size_t(s.format.group_tokens * s.format.value_groups);
            const size_t at = random() % cells, t = at % size_t(s.format.group_tokens);
            uint16_t* offsets = reinterpret_cast<uint16_t*>(s.page.get() + s.format.value_offset);
            ASSERT_EQ(s.format.layout.value.metadata, DType::F16);
            const uint16_t kept = std::exchange(offsets[at], uint16_t(0x7e00));
            const int b = int(t) / block;
            const ValueErrors seen =
                value_errors(s.format, s.page.get(), b, dtype, s.x.v.data() + size_t(b) * rows);
            EXPECT_FALSE(seen.error <= page_annotations(s.format, s.page.get(), b).eta);
            EXPECT_TRUE(std::isnan(seen.error));
            EXPECT_FALSE(std::isnan(seen.norm));
            offsets[at] = kept;
          }
          // Nor is a damaged original: NaN, infinity, or a finite one of another size.
          for (const double bad : {std::nan(""), double(INFINITY), 6e4}) {
            std::vector<uint16_t> v(s.x.v.end() - int64_t(rows), s.x.v.end());
            v[random() % rows] = oracle::encode(dtype, bad);
            const ValueErrors seen = value_errors(s.format, s.page.get(), last, dtype, v.data());
            EXPECT_FALSE(seen.error <= page_annotations(s.format, s.page.get(), last).eta);
            EXPECT_FALSE(seen.norm <= page_annotations(s.format, s.page.get(), last).nu);
          }
        }
}

// The sum is a token's, the maximum over tokens; a NaN does not go under in a later maximum.
TEST(ValueErrors, ANaNOfTheFirstTokenStays) {
  Sealed s("compact", 64, 16, DType::F16);
  s.fill_random(11);
  ASSERT_EQ(s.seal(), SealStatus::Sealed);
  s.x.v[0] = oracle::encode(DType::F16, std::nan(""));
  const ValueErrors seen = value_errors(s.format, s.page.get(), 0, DType::F16, s.x.v.data());
  EXPECT_TRUE(std::isnan(seen.error));
  EXPECT_TRUE(std::isnan(seen.norm));
}

TEST(AnnotateOriginals, CoversTheLargestNormsOfAnyNumberOfRows) {
  for (int d : {64, 96, 128, 256})
    for (DType dtype : {DType::F16, DType::BF16}) {
      Sealed s("compact", d, 16, dtype);
      s.fill_random(uint64_t(d));
      for (size_t tokens = 1; tokens <= 32; ++tokens) {
        SCOPED_TRACE(testing::Message() << "d " << d << ", " << tokens << " rows");
        // Another row is the longest each time.
        const size_t row = size_t(d), longest = tokens * 5 / 8, from = longest * row;
        std::vector<uint16_t> k = s.x.k, v = s.x.v;
        k[from] = v[from] = oracle::encode(dtype, 300);
        double k_norm = 0, v_norm = 0;
        for (size_t t = 0; t < tokens; ++t) {
          double kk = 0, vv = 0;
          for (size_t i = t * row; i < (t + 1) * row; ++i) {
            kk += std::pow(oracle::decode(dtype, k[i]), 2);
            vv += std::pow(oracle::decode(dtype, v[i]), 2);
          }
          k_norm = std::max(k_norm, std::sqrt(kk));
          v_norm = std::max(v_norm, std::sqrt(vv));
        }
        BlockAnnotations note;
        ASSERT_EQ(annotate_originals(s.format, dtype, k.data(), v.data(), int(tokens), &note),
                  SealStatus::Sealed);
        EXPECT_GE(note.k_norm * kMeasured, k_norm);
        EXPECT_LE(note.k_norm, k_norm * kRoundedUp);
        EXPECT_GE(note.nu * kMeasured, v_norm);
        EXPECT_LE(note.nu, v_norm * kRoundedUp);
        EXPECT_EQ(note.vbar, note.nu);
        EXPECT_EQ(note.eta + note.kappa + note.e, 0);
        for (std::vector<uint16_t>* x : {&k, &v})
          for (const double bad : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
            const uint16_t kept = std::exchange((*x)[from + row / 2], oracle::encode(dtype, bad));
            ASSERT_EQ(annotate_originals(s.format, dtype, k.data(), v.data(), int(tokens), &note),
                      SealStatus::NonFinite);
            (*x)[from + row / 2] = kept;
          }
      }
    }
}

TEST(Seal, EveryOriginalLiesWithinItsCodesRange) {  // metadata is rounded outward
  // Below 2^-14 halves are coarser than BF16: there an offset is rounded.
  for (const auto& [dtype, unit] :
       {std::pair{DType::F16, 1.0}, std::pair{DType::BF16, 1.0}, std::pair{DType::BF16, 0x1p-18}})
    for (const char* layout : {"compact", "balanced", "paper", "k12v8", "k12v8split"}) {
      Sealed s(layout, 128, 16, dtype);
      std::mt19937_64 random(7);
      std::normal_distribution<double> normal;
      s.fill([&](int, int) { return std::pair{normal(random) * unit, normal(random) * unit}; });
      ASSERT_EQ(s.seal(), SealStatus::Sealed);
      for (int c = 0; c < 128; ++c) {
        const ServedAffine a = served_key_affine(s.format, s.page.get(), c);
        for (int t = 0; t < s.format.group_tokens; ++t) {
          const double k = oracle::decode(dtype, s.x.k[size_t(t * 128 + c)]);
          ASSERT_LE(a.base, k);
          ASSERT_LE(k, double(a.base) + double(a.step) * a.max_code);
        }
      }
    }
}

TEST(Seal, AConstantChannelIsExact) {
  for (const char* layout : {"compact", "balanced", "paper", "k12v8", "k12v8split"}) {
    Sealed s(layout, 64, 16, DType::F16);
    s.fill([](int, int c) { return std::pair{0.1 * c - 3, 0.3 * (c / 64) + 1.7}; });
    ASSERT_EQ(s.seal(), SealStatus::Sealed);
    const oracle::Served served = oracle::decode_page(s.format, s.page.get());
    for (size_t i = 0; i < served.k.size(); ++i) {
      ASSERT_EQ(served.k[i], oracle::decode(DType::F16, s.x.k[i]));
      ASSERT_EQ(served.v[i], oracle::decode(DType::F16, s.x.v[i]));
    }
    EXPECT_EQ(page_annotations(s.format, s.page.get(), 0).e, 0);
    EXPECT_EQ(page_annotations(s.format, s.page.get(), 0).kappa, 0);
  }
}

TEST(Seal, MetadataThatOverflowsIsUnquantisable) {
  for (int which : {0, 1}) {
    Sealed s("compact", 64, 16, DType::BF16);
    s.fill([&](int t, int c) {
      const double huge = t == 3 && c == 5 ? 1e20 : 1.0 * (t % 2);
      return which == 0 ? std::pair{huge, 1.0} : std::pair{1.0, huge};
    });
    EXPECT_EQ(s.seal(), SealStatus::Unquantisable);
  }
}

TEST(Seal, ASubnormalSinglePrecisionScaleIsUnquantisable) {
  Sealed s("paper", 64, 16, DType::BF16);
  s.fill([](int t, int) { return std::pair{1e-38 * (t % 3), 1.0}; });
  EXPECT_EQ(s.seal(), SealStatus::Unquantisable);
}

TEST(Seal, OneNonFiniteElementAnywhereIsNamed) {
  for (DType dtype : {DType::F16, DType::BF16})
    for (double bad : {std::nan(""), double(INFINITY), -double(INFINITY)})
      for (size_t at : {size_t(0), size_t(63), size_t(15 * 64 + 1), size_t(64 * 64 - 1)})
        for (bool key : {true, false}) {
          Sealed s("compact", 64, 16, dtype);
          s.fill_random(3);
          (key ? s.x.k : s.x.v)[at] = oracle::encode(dtype, bad);
          ASSERT_EQ(s.seal(), SealStatus::NonFinite) << at << (key ? " key" : " value");
        }
}

TEST(Layouts, StayWithinTheirBytes) {
  const auto bytes = [](const char* name) {
    return make_page_format(layout_by_name(name), 128, 16).bytes_per_token();
  };
  EXPECT_LE(bytes("compact"), 240);
  EXPECT_LE(bytes("balanced"), 280);
  // Annotations: 24 bytes a block, two a token and sixteen a page of 16 tokens.
  EXPECT_LE(bytes("paper"), 288 + 1.5 + 2 + 1);
}

}  // namespace
}  // namespace certkv
