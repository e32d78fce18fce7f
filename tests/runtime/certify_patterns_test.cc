// All 65,536 half patterns in each place where a half can stand: a query's upper half, a key, a
// value, and the metadata of codes. What is not finite is refused; of what is finite the bound
// holds.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/quantize.h"
#include "tests/support/attention_cases.h"
#include "tests/support/sealed_head.h"

namespace certkv {
namespace {

using Floats = std::vector<float>;
constexpr int kDim = 64;
constexpr uint32_t kPatterns = 0x10000, kAtOnce = 64;

struct Tried {
  int certified = 0, exact = 0, failed = 0;
};

HeadState sealed(const PageFormat& format, const oracle::Originals& x) {
  HeadState state(DeviceTier(std::make_shared<const PageFormat>(format), x.dtype,
                             std::make_shared<TierAccount>()),
                  8, 8);
  state.tier.append(x.k.data(), x.v.data(), x.tokens(), {});
  return state;
}

// One budget step over x, rung 4 included. Every finite answer is judged.
Outcome step(HeadState* sealed_head, const oracle::Originals& x, const Floats& q, Floats* out,
             Tried* tried, const char* what) {
  const int heads = int(q.size()) / kDim;
  HeadState& state = *sealed_head;
  MemoryOriginals originals(x, state.tier.format().block_tokens);
  StepRules rules;
  rules.tolerance = {true, 0.3};  // flat attention over random values: some certify, some do not
  GroupReport report;
  out->assign(q.size(), 0.0f);
  head_step(rules, {}, heads, q.data(), &state, originals, out->data(), nullptr, &report);
  if (report.broken)
    dense_step({}, heads, (1u << heads) - 1, 4, q.data(), &state, originals, out->data(), nullptr,
               &report);
  for (int h = 0; h < heads; ++h) {
    const HeadReport& r = report.heads[size_t(h)];
    tried->certified += r.outcome == Outcome::Certified;
    tried->exact += r.outcome == Outcome::Exact;
    tried->failed += r.outcome == Outcome::Failed;
    if (r.outcome == Outcome::Failed) continue;
    const auto v = oracle::check(oracle::attention(x, x.tokens(), q.data() + h * kDim),
                                 {out->data() + h * kDim, kDim}, claim_of(rules, r));
    EXPECT_TRUE(v.holds) << what << ": " << v.why;
  }
  return report.heads[0].outcome;
}

oracle::Originals random_rows(DType dtype, size_t tokens, uint64_t seed) {
  oracle::Originals x{.dtype = dtype, .head_dim = kDim, .k = {}, .v = {}};
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < tokens * kDim; ++i) {
    x.k.push_back(oracle::encode(dtype, normal(random)));
    x.v.push_back(oracle::encode(dtype, normal(random)));
  }
  return x;
}

TEST(Patterns, EveryUpperHalfOfAQuery) {
  log_set_level(LogLevel::Error);
  const oracle::Originals x = random_rows(DType::F16, 64 + 5, 1);
  const PageFormat format = make_page_format(layout_by_name("compact"), kDim, 16);
  Floats q(kDim), out;
  for (int c = 0; c < kDim; ++c) q[size_t(c)] = c % 3 == 0 ? 0.3f : -0.2f;
  Tried tried;
  HeadState state = sealed(format, x);
  for (uint32_t i = 0; i < kPatterns && !HasFailure(); ++i) {
    q[7] = std::bit_cast<float>(i << 16 | (i * 40503u & 0xffffu));
    const Outcome outcome = step(&state, x, q, &out, &tried, "query");
    if (!std::isfinite(q[7])) {
      EXPECT_EQ(outcome, Outcome::Failed) << std::hex << i;
      for (float c : out) ASSERT_EQ(c, 0) << std::hex << i;
    } else if (std::abs(q[7]) < 1e6f) {
      EXPECT_NE(outcome, Outcome::Failed) << q[7];
    }
  }
  EXPECT_GE(tried.certified, 20000);
  EXPECT_GE(tried.exact, 1000);
}

// 64 patterns side by side, so of similar size; the query makes them count.
void try_rows(DType dtype, bool key) {
  log_set_level(LogLevel::Error);
  Tried tried;
  int refused = 0;
  for (uint32_t first = 0; first < kPatterns && !testing::Test::HasFailure(); first += kAtOnce) {
    const Layout& layout = layouts()[first / kAtOnce % layouts().size()];
    const PageFormat format = make_page_format(layout, kDim, 16);
    oracle::Originals x = random_rows(dtype, kAtOnce + 3, first + 1);
    double largest = 0;
    for (uint32_t t = 0; t < kAtOnce; ++t) {
      (key ? x.k : x.v)[t * kDim + 3] = uint16_t(first + t);
      const double size = std::abs(oracle::decode(dtype, uint16_t(first + t)));
      largest = size > largest ? size : largest;
    }
    Floats q(kDim, 0.1f), out;
    if (key) {  // the rounding of scores is bounded by norms, gamma ||q|| K: other channels keep to
                // it
      q[3] = float(std::min(8 / largest, 1e6));
      for (size_t c = 0; c < kDim; ++c) q[c] = c == 3 ? q[3] : std::min(q[c], q[3]);
    }
    for (size_t t = kAtOnce; t < x.tokens(); ++t) x.k[t * kDim + 3] = 0;
    bool finite = true;
    for (uint32_t t = 0; t < kAtOnce; ++t)
      finite = finite && std::isfinite(oracle::decode(dtype, uint16_t(first + t)));
    if (finite) {
      HeadState state = sealed(format, x);
      EXPECT_NE(step(&state, x, q, &out, &tried, key ? "key" : "value"), Outcome::Failed) << first;
      continue;
    }
    for (uint32_t t = 0; t < kAtOnce; ++t) {  // each alone
      oracle::Originals one = random_rows(dtype, kAtOnce, 1);
      (key ? one.k : one.v)[t * kDim + 3] = uint16_t(first + t);
      DeviceTier tier(std::make_shared<const PageFormat>(format), dtype,
                      std::make_shared<TierAccount>());
      try {
        tier.append(one.k.data(), one.v.data(), kAtOnce, {});
        ADD_FAILURE() << "pattern " << first + t << " was taken";
      } catch (const Error& e) {
        ++refused;
        EXPECT_EQ(e.kind(), ErrorKind::NonFinite);
        EXPECT_NE(std::string(e.what()).find("NaN or infinite"), std::string::npos) << e.what();
      }
    }
  }
  EXPECT_EQ(refused, dtype == DType::F16 ? 2048 : 256);
  EXPECT_GT(tried.certified, 0);
}

TEST(Patterns, EveryKey) {
  for (DType dtype : {DType::F16, DType::BF16}) try_rows(dtype, true);
}
TEST(Patterns, EveryValue) {
  for (DType dtype : {DType::F16, DType::BF16}) try_rows(dtype, false);
}

// ---- metadata -----------------------------------------------------------------------------------

// Annotations and notes as the method defines them, measured on what the page now decodes to.
void annotate(SealedHead* head) {
  const PageFormat& f = *head->format;
  const oracle::Served served = head->served(0);
  const auto up = [](double x) { return std::nextafter(float(x), INFINITY); };
  PageNotes of_page{};
  for (int b = 0; b < f.blocks(); ++b) {
    const oracle::Measured m = oracle::measure(f, served, head->x, b);
    const BlockAnnotations note{up(m.eta), up(m.nu),     up(m.kappa),
                                up(m.e),   up(m.k_norm), up(m.vbar)};
    std::memcpy(head->page_bytes(0) + f.annotations + size_t(b) * sizeof note, &note, sizeof note);
    head->blocks[size_t(b)].nu = note.nu;
    head->blocks[size_t(b)].k_norm = note.k_norm;
    of_page.kappa = std::max(of_page.kappa, note.kappa);
    of_page.e = std::max(of_page.e, note.e);
  }
  double kbar2 = 0, largest = 0;
  for (double bar : served.key_bar) kbar2 += bar * bar;
  std::vector<double> norms;
  for (int t = 0; t < f.group_tokens; ++t) {
    double n2 = 0;
    for (int c = 0; c < kDim; ++c) {
      const double v = served.v[size_t(t * kDim + c)];
      n2 += v * v;
    }
    norms.push_back(std::sqrt(n2));
    largest = std::max(largest, norms.back());
  }
  of_page.kbar_norm = up(std::sqrt(kbar2));
  of_page.norm_step = up(std::max(largest / 65535, 0x1p-126));
  for (size_t t = 0; t < norms.size(); ++t) {
    const auto code = uint16_t(norms[t] / double(of_page.norm_step));
    std::memcpy(head->page_bytes(0) + f.value_norms + 2 * t, &code, 2);
  }
  std::memcpy(head->page_bytes(0) + f.notes, &of_page, sizeof of_page);
}

struct Slot {
  const char* name;
  size_t PageFormat::*at;
  bool key, scale;
};
constexpr Slot kSlots[] = {{"key scale", &PageFormat::key_scale, true, true},
                           {"key offset", &PageFormat::key_offset, true, false},
                           {"value scale", &PageFormat::value_scale, false, true},
                           {"value offset", &PageFormat::value_offset, false, false}};

// Writes a pattern, as a half or as the upper half of a float.
void write(const SealedHead& head, const Slot& slot, size_t i, uint32_t pattern) {
  const Layout& l = head.format->layout;
  std::byte* section = head.page_bytes(0) + (*head.format).*slot.at;
  if ((slot.key ? l.key : l.value).metadata == DType::F32) {
    const uint32_t bits = pattern << 16;
    std::memcpy(section + 4 * i, &bits, 4);
  } else {
    const auto bits = uint16_t(pattern);
    std::memcpy(section + 2 * i, &bits, 2);
  }
}

// Pages whose metadata are any patterns that sealing may write (a scale is not negative), and whose
// originals are the nearest BF16 to what they decode to: the bound holds. Pages with one pattern
// that is not finite have no bound.
TEST(Patterns, EveryMetadatum) {
  log_set_level(LogLevel::Error);
  int bounds = 0, none = 0;
  for (const char* layout : {"compact", "balanced", "paper", "k12v8"}) {
    SealedHead fresh(layout, DType::BF16, kDim);
    const oracle::Originals rows = random_rows(DType::BF16, size_t(fresh.format->group_tokens), 5);
    for (const Slot& slot : kSlots) {
      const bool wide =
          (slot.key ? fresh.format->layout.key : fresh.format->layout.value).metadata == DType::F32;
      const size_t entries =
          slot.key ? kDim : size_t(fresh.format->group_tokens * fresh.format->value_groups);
      for (uint32_t first = 0; first < kPatterns && !HasFailure(); first += kAtOnce) {
        if (slot.scale && (first & 0x8000) != 0) break;
        SealedHead head(layout, DType::BF16, kDim);
        head.x = rows;
        head.seal();
        const bool finite =
            std::isfinite(oracle::decode(wide ? DType::BF16 : DType::F16, uint16_t(first)));
        if (!finite) {  // one at a time: the next in every page
          write(head, slot, first / kAtOnce % entries, first + first / kAtOnce % kAtOnce);
          const Floats q(kDim, 0.1f);
          const JudgedPass judged(head, head.blocks, 1, q.data());
          EXPECT_FALSE(std::isfinite(judged.certificate[0].bound)) << slot.name << " " << first;
          EXPECT_FALSE(within_tolerance(judged.certificate[0], true, 1e30));
          ++none;
          continue;
        }
        for (size_t i = 0; i < entries; ++i) write(head, slot, i, first + uint32_t(i) % kAtOnce);
        const oracle::Served served = head.served(0);
        Floats q(kDim);
        bool in_range = true;
        for (size_t c = 0; c < kDim; ++c) {
          double largest = 0;
          for (size_t i = c; i < served.k.size(); i += kDim) {
            head.x.k[i] = oracle::encode(DType::BF16, served.k[i]);
            head.x.v[i] = oracle::encode(DType::BF16, served.v[i]);
            in_range = in_range && std::abs(served.k[i]) < 1e38 && std::abs(served.v[i]) < 1e38;
            largest = std::max(largest, std::abs(served.k[i]));
          }
          q[c] = float((c % 2 == 0 ? 1 : -1) / std::max(largest, 1e-37));
        }
        if (!in_range) continue;  // no original of BF16 could have been sealed so
        annotate(&head);
        const JudgedPass judged(head, head.blocks, 1, q.data());
        const double error =
            distance(oracle::attention(head.x, head.x.tokens(), q.data()).out, judged.out[0]);
        if (!std::isfinite(judged.certificate[0].bound)) continue;
        ++bounds;
        EXPECT_LE(error, judged.certificate[0].bound) << layout << " " << slot.name << " " << first;
      }
    }
  }
  EXPECT_GE(bounds, 10000);
  EXPECT_GE(none, 100);
}

}  // namespace
}  // namespace certkv
