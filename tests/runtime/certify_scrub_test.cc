// The scrub of one KV head: what it finds, when, and what stands there afterwards.
#include "runtime/certify/scrub.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <random>
#include <set>

#include "kernels/quantize.h"
#include "tests/support/attention_cases.h"

// Counts allocations of this program.
static std::atomic<size_t> allocations{0};
__attribute__((noinline)) void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
__attribute__((noinline)) void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes);
}
__attribute__((noinline)) void operator delete(void* p) noexcept {
  std::free(p);
}
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace certkv {
namespace {

AttentionCase scrub_case(const char* layout) {
  AttentionCase c;
  c.seed = 77;
  c.layout = layout;
  c.dtype = DType::F16;
  c.heads = 2;
  c.tokens = 64 * 7 + 5;
  c.key_quota = c.value_quota = 4096;
  c.q_scale = 0.5f;
  c.rules.tolerance.value = 0.2;  // certified from codes alone, so that every page is read
  return c;
}

// One KV head that is scrubbed, appended to and asked at every step, as the cache does it.
class Head {
 public:
  Head(const AttentionCase& c, uint64_t period)
      : case_(c),
        schedule_(period),
        rows_(c),
        originals(x, c.block_tokens),
        state(DeviceTier(std::make_shared<const PageFormat>(make_page_format(
                             layout_by_name(c.layout), c.head_dim, c.block_tokens)),
                         c.dtype, std::make_shared<TierAccount>()),
              c.key_quota, c.value_quota) {
    append(c.tokens);
  }

  StepWhere where() const { return {.step = state.tier.tokens()}; }

  void scrub() {
    found.clear();
    repairs.clear();
    scrub_due(schedule_, where(), state, &found);
    for (const PageFinding& f : found) repairs.push_back(repair_page(f, &state, originals));
  }

  // Returns what the oracle says against the step; empty: every claim holds.
  std::string step() {
    scrub();
    append(1);
    const size_t d = size_t(case_.head_dim), heads = size_t(case_.heads);
    const std::vector<float> q = rows_.query();
    out.assign(heads * d, 0.0f);
    head_step(case_.rules, where(), case_.heads, q.data(), &state, originals, out.data(), nullptr,
              &report);
    if (report.broken)
      dense_step(where(), case_.heads, (1u << heads) - 1, 4, q.data(), &state, originals,
                 out.data(), nullptr, &report);
    std::string wrong;
    for (size_t h = 0; h < heads; ++h) {
      const oracle::Verdict v =
          oracle::check(oracle::attention(x, x.tokens(), q.data() + h * d), {&out[h * d], d},
                        claim_of(case_.rules, report.heads[h]));
      if (!v.holds) wrong += v.why + "; ";
      if (report.heads[h].outcome == Outcome::Failed) wrong += "failed; ";
    }
    return wrong;
  }

  const PageFormat& format() const { return state.tier.format(); }
  const BlockRef& block(size_t page, size_t index = 0) const {
    return state.tier.blocks()[page * size_t(format().blocks()) + index];
  }
  BlockRef& damage_table(size_t page, size_t index = 0) {
    return const_cast<BlockRef&>(block(page, index));
  }
  std::byte* bytes(size_t page) const { return const_cast<std::byte*>(block(page).page); }
  void flip(size_t page, size_t bit) const { bytes(page)[bit / 8] ^= std::byte(1u << bit % 8); }
  bool same_page(const Head& other, size_t page) const {
    return std::memcmp(bytes(page), other.bytes(page), format().page_bytes) == 0;
  }

 private:
  void append(size_t tokens) {
    const size_t before = x.tokens(), d = size_t(case_.head_dim);
    rows_.append(tokens, &x);
    state.tier.append(x.k.data() + before * d, x.v.data() + before * d, tokens, {});
  }
  AttentionCase case_;
  ScrubSchedule schedule_;
  RowMaker rows_;

 public:
  oracle::Originals x{.dtype = case_.dtype, .head_dim = case_.head_dim, .k = {}, .v = {}};
  MemoryOriginals originals;
  HeadState state;
  std::vector<float> out;
  GroupReport report;
  std::vector<PageFinding> found;
  std::vector<PageRepair> repairs;
};

// Every field that a page has, and where its bytes lie.
struct Field {
  std::string name;
  size_t first, bytes;
};
std::vector<Field> fields_of(const PageFormat& f) {
  const size_t d = size_t(f.head_dim), n = size_t(f.group_tokens), groups = size_t(f.value_groups);
  const TensorPlanes &key = f.layout.key, &value = f.layout.value;
  const auto meta = [](const TensorPlanes& p) { return size_t(p.metadata == DType::F32 ? 4 : 2); };
  std::vector<Field> fields = {
      {"key codes", f.key_base, n * d * size_t(key.base_bits()) / 8},
      {"key scale", f.key_scale, d * meta(key)},
      {"key offset", f.key_offset, d * meta(key)},
      {"value codes", f.value_base, n * d * size_t(value.base_bits()) / 8},
      {"value scale", f.value_scale, n * groups * meta(value)},
      {"value offset", f.value_offset, n * groups * meta(value)},
  };
  if (key.residual_bits > 0) fields.push_back({"key residual", f.key_residual, n * d / 2});
  if (value.residual_bits > 0) fields.push_back({"value residual", f.value_residual, n * d / 2});
  for (size_t b = 0; b < size_t(f.blocks()); ++b) {
    const size_t note = f.annotations + b * sizeof(BlockAnnotations);
    fields.push_back({"eta", note + offsetof(BlockAnnotations, eta), 4});
    fields.push_back({"nu", note + offsetof(BlockAnnotations, nu), 4});
    fields.push_back({"kappa", note + offsetof(BlockAnnotations, kappa), 4});
    fields.push_back({"e", note + offsetof(BlockAnnotations, e), 4});
    fields.push_back({"k_norm", note + offsetof(BlockAnnotations, k_norm), 4});
  }
  return fields;
}

constexpr const char* kLayouts[] = {"compact", "balanced", "paper", "k12v8", "k12v8split"};

TEST(Scrub, AFlipInAnyFieldIsRebuiltBeforeUse_AndTheOutputsAreTheSameBits) {
  for (const char* layout : kLayouts) {
    Head hit(scrub_case(layout), 1), clean(scrub_case(layout), 1);
    std::mt19937_64 random(5);
    size_t page = 0;
    for (const Field& field : fields_of(hit.format())) {
      // The first, the last and a random bit; the page moves on, so that all are hit in turn.
      for (const size_t bit :
           {size_t(0), field.bytes * 8 - 1, size_t(random() % (field.bytes * 8))}) {
        SCOPED_TRACE(std::string(layout) + " " + field.name + " bit " + std::to_string(bit));
        page = (page + 1) % hit.state.tier.pages();
        hit.flip(page, field.first * 8 + bit);
        ASSERT_FALSE(hit.same_page(clean, page));
        EXPECT_EQ(hit.step(), "");
        EXPECT_EQ(clean.step(), "");
        ASSERT_EQ(hit.found.size(), 1u);
        EXPECT_EQ(hit.found[0].page, page);
        EXPECT_EQ(hit.repairs[0].result, PageRepair::Result::Repaired);
        EXPECT_TRUE(clean.found.empty());
        EXPECT_TRUE(hit.same_page(clean, page));
        EXPECT_EQ(hit.out, clean.out);
        for (size_t h = 0; h < hit.report.heads.size(); ++h) {
          const HeadReport &a = hit.report.heads[h], &b = clean.report.heads[h];
          EXPECT_EQ(a.returned.bound, b.returned.bound);
          EXPECT_EQ(a.outcome, Outcome::Certified);
          EXPECT_EQ(a.rung, 0);
        }
      }
    }
  }
}

TEST(Scrub, RandomFlipsAreFoundWithinThePeriod_AndStepsAfterwardsHold) {
  constexpr uint64_t kPeriod = 5;
  for (const char* layout : kLayouts) {
    Head hit(scrub_case(layout), kPeriod), clean(scrub_case(layout), 0);
    std::mt19937_64 random(6);
    for (int trial = 0; trial < 40; ++trial) {
      const size_t page = random() % hit.state.tier.pages();
      const size_t bit = random() % (hit.format().page_bytes * 8);
      SCOPED_TRACE(std::string(layout) + " page " + std::to_string(page) + " bit " +
                   std::to_string(bit));
      hit.flip(page, bit);
      uint64_t steps = 0;
      std::string wrong;
      do {  // steps before it is found are in doubt: nothing is asked of them
        ASSERT_LT(steps, kPeriod);
        wrong = hit.step();
        ++steps;
      } while (hit.found.empty());
      EXPECT_EQ(hit.found[0].page, page);
      EXPECT_EQ(wrong, "");
      EXPECT_EQ(hit.report.canary, 0u);
      for (uint64_t i = 0; i < steps; ++i) clean.step();
      EXPECT_TRUE(hit.same_page(clean, page));
    }
  }
}

// A control: the same kind of flip, not looked for, makes a certificate that does not hold.
TEST(Scrub, WithoutItASilentFlipBreaksTheCertificate) {
  for (const uint64_t period : {0, 1}) {
    Head head(scrub_case("balanced"), period);
    // The third highest exponent bit of a half: the offset of a key channel times 256, and with it
    // all scores of the page move by the same amount. No annotation and no bound depends on it.
    head.flip(2, head.format().key_offset * 8 + 13);
    const std::string wrong = head.step();
    EXPECT_EQ(head.found.size(), period);
    if (period == 0)
      EXPECT_NE(wrong, "");
    else
      EXPECT_EQ(wrong, "");
  }
}

TEST(Scrub, TheBlockTableIsComparedWithThePageAndRestored) {
  Head hit(scrub_case("compact"), 1), clean(scrub_case("compact"), 1);
  const std::vector<std::pair<const char*, std::function<void(BlockRef&)>>> damages = {
      {"nu", [](BlockRef& r) { r.nu *= 2; }},
      {"nu sign", [](BlockRef& r) { r.nu = -r.nu; }},
      {"k_norm", [](BlockRef& r) { r.k_norm /= 2; }},
      {"index", [](BlockRef& r) { r.index = int16_t(r.index ^ 1); }},
      {"tokens", [](BlockRef& r) { r.tokens = 8; }},
      {"page", [&](BlockRef& r) { r.page = hit.bytes(4); }},
      {"no page", [](BlockRef& r) { r.page = nullptr; }},
      {"key pointer", [&](BlockRef& r) { r.k = hit.x.k.data(); }},
      {"value pointer", [&](BlockRef& r) { r.v = hit.x.v.data(); }},
  };
  size_t block = 0;
  for (const auto& [name, damage] : damages) {
    SCOPED_TRACE(name);
    damage(hit.damage_table(3, block++ % 4));
    EXPECT_EQ(hit.step(), "");
    clean.step();
    ASSERT_EQ(hit.found.size(), 1u);
    EXPECT_EQ(hit.found[0].page, 3u);
    EXPECT_EQ(hit.repairs[0].result, PageRepair::Result::Repaired);
    EXPECT_EQ(hit.out, clean.out);
    EXPECT_EQ(hit.originals.reads(), clean.originals.reads());  // the page itself says it all
  }
}

TEST(Scrub, AResidentOriginalThatChangedIsDropped) {
  for (const bool values : {false, true}) {
    SCOPED_TRACE(values ? "values" : "keys");
    // Values err more than keys under one of the layouts, and less under the other.
    AttentionCase c = scrub_case(values ? "compact" : "balanced");
    c.rules.tolerance.value = values ? 0.08 : 0.03;
    c.rules.ladder.max_share = 1;
    Head head(c, 1);
    ScratchCache& cache = values ? head.state.values : head.state.keys;
    for (int i = 0; i < 5 && cache.resident() == 0; ++i) EXPECT_EQ(head.step(), "");
    ASSERT_GT(cache.resident(), 0u);
    EXPECT_TRUE(head.found.empty());
    const uint32_t block = cache.blocks()[0];
    auto* data = const_cast<uint16_t*>(cache.find(block));
    data[100] = uint16_t(data[100] ^ 0x4000);
    EXPECT_EQ(head.step(), "");
    ASSERT_EQ(head.found.size(), 1u);
    EXPECT_TRUE(head.found[0].resident);
    EXPECT_EQ(head.found[0].page, block / 4);
    EXPECT_EQ(head.repairs[0].result, PageRepair::Result::Repaired);
    EXPECT_EQ(head.report.canary, 0u);
    EXPECT_FALSE(head.report.broken);
  }
}

TEST(Scrub, ARebuiltPageKeepsItsResidentOriginals_AndAStrayPointerIsSetRight) {
  AttentionCase c = scrub_case("balanced");
  c.rules.tolerance.value = 0.03;
  c.rules.ladder.max_share = 1;
  Head hit(c, 1), clean(c, 1);
  for (int i = 0; i < 5 && hit.state.keys.resident() == 0; ++i) {
    EXPECT_EQ(hit.step(), "");
    EXPECT_EQ(clean.step(), "");
  }
  ASSERT_GT(hit.state.keys.resident(), 0u);
  const uint32_t block = hit.state.keys.blocks()[0];
  hit.flip(block / 4, 321);
  EXPECT_EQ(hit.step(), "");
  EXPECT_EQ(clean.step(), "");
  ASSERT_EQ(hit.found.size(), 1u);
  EXPECT_EQ(hit.found[0].page, block / 4);
  EXPECT_EQ(hit.out, clean.out);
  EXPECT_EQ(hit.originals.reads(), clean.originals.reads() + 4);  // the page's blocks, no more

  ASSERT_NE(hit.state.keys.find(block), nullptr);
  BlockRef& ref = hit.damage_table(block / 4, block % 4);
  ASSERT_EQ(ref.k, hit.state.keys.find(block));
  ref.k = hit.x.k.data();
  EXPECT_EQ(hit.step(), "");
  EXPECT_EQ(clean.step(), "");
  ASSERT_EQ(hit.found.size(), 1u);
  EXPECT_TRUE(hit.found[0].resident);
  EXPECT_EQ(hit.out, clean.out);
}

TEST(Scrub, APageWhoseOriginalsAreGoneIsNotRepaired) {
  for (const BlockStatus status : {BlockStatus::Absent, BlockStatus::Corrupt, BlockStatus::Lost}) {
    Head head(scrub_case("compact"), 1);
    head.originals.fail(9, status);
    head.flip(2, 77);
    head.scrub();
    ASSERT_EQ(head.repairs.size(), 1u);
    EXPECT_EQ(head.repairs[0].result, PageRepair::Result::Lost);
    EXPECT_NE(head.repairs[0].what.find("block 9"), std::string::npos) << head.repairs[0].what;
    EXPECT_EQ(head.state.tier.check_page(2), PageState::Bytes);
  }
}

TEST(Scrub, OriginalsThatGiveAnotherPageAreNotTrusted) {
  Head head(scrub_case("compact"), 1);
  head.flip(2, 77);
  head.x.v[2 * 64 * 64 + 5] ^= 0x0200;  // as if a wrong block had come with a right digest
  head.scrub();
  ASSERT_EQ(head.repairs.size(), 1u);
  EXPECT_EQ(head.repairs[0].result, PageRepair::Result::OtherDigest);
  EXPECT_EQ(head.state.tier.check_page(2), PageState::Bytes);
}

TEST(Scrub, APageIsLookedAtByTheStepAfterItsSealing) {
  Head head(scrub_case("compact"), 1 << 20);
  const size_t pages = head.state.tier.pages();
  while (head.state.tier.pages() == pages) EXPECT_EQ(head.step(), "");
  head.flip(pages, 3);
  EXPECT_EQ(head.step(), "");
  ASSERT_EQ(head.found.size(), 1u);
  EXPECT_EQ(head.found[0].page, pages);
}

TEST(Scrub, OriginalsKeptInPlaceOfAPageAreCoveredToo) {
  AttentionCase c = scrub_case("compact");
  c.shape = Shape::Huge;
  c.dtype = DType::BF16;
  Head head(c, 1);
  ASSERT_FALSE(head.state.tier.is_quantised(0));
  const auto expect_found = [&] {
    EXPECT_EQ(head.step(), "");
    ASSERT_EQ(head.found.size(), 1u);
    EXPECT_EQ(head.found[0].page, 1u);
    EXPECT_EQ(head.repairs[0].result, PageRepair::Result::Repaired);
  };
  for (const bool values : {false, true}) {
    const BlockRef& ref = head.block(1, 2);
    auto* data = const_cast<uint16_t*>(values ? ref.v : ref.k);
    data[5] = uint16_t(data[5] ^ 0x0100);
    expect_found();
  }
  head.damage_table(1, 2).nu /= 2;
  expect_found();
  head.damage_table(1, 3).k = head.x.k.data();
  expect_found();
}

TEST(Scrub, ALookAtSoundPagesAllocatesNothing) {
  Head head(scrub_case("compact"), 1);
  EXPECT_EQ(head.step(), "");
  std::vector<PageFinding> found;
  const size_t before = allocations;
  scrub_due(ScrubSchedule(1), head.where(), head.state, &found);
  scrub_all(head.state, &found);
  EXPECT_EQ(allocations, before);
  EXPECT_TRUE(found.empty());
}

// ---- the schedule -------------------------------------------------------------------------------

std::set<size_t> due(const ScrubSchedule& schedule, StepWhere where, size_t pages) {
  std::set<size_t> out;
  for (size_t p = schedule.first_due(where); p < pages; p += size_t(schedule.period()))
    out.insert(p);
  return out;
}

TEST(ScrubSchedule, EveryPageIsDueOnceInAnyPeriod_AndNoStepHasMoreThanItsShare) {
  for (const uint64_t period : {1, 2, 7, 256}) {
    const ScrubSchedule schedule(period);
    for (const size_t pages : {1, 6, 7, 8, 100, 512}) {
      for (int layer : {0, 3}) {
        std::map<size_t, int> times;
        for (uint64_t step = 1000; step < 1000 + period; ++step) {
          const StepWhere where{.layer = layer, .kv_head = 5, .step = step};
          const auto now = due(schedule, where, pages);
          EXPECT_LE(now.size(), (pages + period - 1) / period);
          for (size_t p : now) {
            ++times[p];
            EXPECT_EQ(schedule.last_due(where, p), step - period);
            const StepWhere later{.layer = layer, .kv_head = 5, .step = step + 1};
            EXPECT_EQ(schedule.last_due(later, p), step);
          }
        }
        EXPECT_EQ(times.size(), pages);
        for (const auto& [page, n] : times) EXPECT_EQ(n, 1) << page;
      }
    }
  }
}

// Fewer pages a head than steps: the heads' phases must spread them. Twice the even share allows
// for the discrepancy of 64 phases in windows of pages / period of the circle.
TEST(ScrubSchedule, HeadsTakeTurnsWherePagesAreFewerThanSteps) {
  const ScrubSchedule schedule(256);
  for (const size_t pages : {32, 64, 128}) {
    const size_t even = pages * 64 / 256;
    for (uint64_t step = 500; step < 756; ++step) {
      size_t all = 0;
      for (int layer = 0; layer < 8; ++layer)
        for (int head = 0; head < 8; ++head)
          all += due(schedule, {.layer = layer, .kv_head = head, .step = step}, pages).size();
      EXPECT_LE(all, 2 * even) << pages << " pages, step " << step;
      EXPECT_GE(all, even / 2) << pages << " pages, step " << step;
    }
  }
}

}  // namespace
}  // namespace certkv
