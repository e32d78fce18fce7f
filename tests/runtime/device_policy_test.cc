// Policy paper of the device's cache: what its kernels select is what the CPU backend's functions
// select of the same pass, what the scratch does with it, and which heads ranking sends to rung 3.
// In emulation, whose device's memory is the host's.
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "kernels/arith/certificate.h"
#include "kernels/cuda/chains.h"
#include "kernels/cuda/pass.h"
#include "kernels/quantize.h"
#include "runtime/certify/learn.h"
#include "runtime/certify/selector.h"
#include "tests/runtime/device_scrub_rank.h"

namespace certkv {
namespace {

using namespace scrub_test;  // NOLINT: this test's own
using cuda::kKeys;
using cuda::kPageTiles;
using cuda::kValues;

// What a pass has left of an item, as the host's functions take it.
struct Left {
  explicit Left(const cuda::PassItem& p) {
    for (int page = 0; page < p.page_count; ++page) {
      const cuda::PageEntry& entry = p.pages[page];
      for (int t = 0; t < (entry.tokens + 15) / 16; ++t) {
        const auto at = size_t(page * kPageTiles + t);
        place.push_back(uint32_t(at));
        const auto* notes = entry.page == nullptr ? nullptr : &cuda::device_notes(kDim, entry.page);
        nu.push_back(notes != nullptr ? notes->block[t].nu : p.open_nu[at]);
        eta.push_back(notes != nullptr ? notes->block[t].eta : 0);
        vbar.push_back(notes != nullptr ? notes->block[t].vbar : nu.back());
        coded.push_back(notes != nullptr);
      }
    }
    cuda::PassOutput o;
    o.heads = p.heads;
    o.head_dim = kDim;
    o.blocks = place.size();
    o.tokens = size_t(p.tokens);
    o.unit = p.unit;
    o.place = place;
    o.records = {p.records, size_t(p.page_count) * cuda::kRecordFloats};
    o.used = {p.used, size_t(p.page_count) * kPageTiles};
    o.merged = {p.merged, size_t(p.heads) * size_t(cuda::sums_floats(kDim))};
    o.nu = nu;
    o.eta = eta;
    o.vbar = vbar;
    cuda::read_state(o, &state);
  }
  std::vector<uint32_t> place;
  std::vector<float> nu, eta, vbar;
  std::vector<bool> coded;
  PassState state;
};

using Set = std::set<uint32_t>;

// What the host selects of the same pass, for all heads together.
std::array<Set, 2> selected(const Left& left, int heads, const PaperOptions& o) {
  const PageFormat format = make_page_format(layout_by_name("compact"), kDim, 16);
  const PaperRule rule{o.tau_cov, o.expand_tail, o.v_tol,
                       o.k_min,   o.k_max,       o.value_rule == "greedy"};
  // Pages of which nothing but eta_b is read.
  std::vector<std::vector<std::byte>> pages;
  std::vector<BlockRef> blocks(left.place.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (!left.coded[b]) continue;
    if (b % kPageTiles == 0) pages.emplace_back(format.page_bytes + 64);
    std::byte* page = pages.back().data() + (64 - uintptr_t(pages.back().data()) % 64) % 64;
    const_cast<BlockAnnotations&>(page_annotations(format, page, int(b % kPageTiles))).eta =
        left.eta[b];
    blocks[b].page = page;
    blocks[b].index = uint8_t(b % kPageTiles);
    blocks[b].tokens = 16;
  }
  const AttendContext context{&format, DType::BF16};
  std::array<Set, 2> out;
  for (int h = 0; h < heads; ++h) {
    for (uint32_t b : select_paper_keys(left.state, h, blocks, rule)) out[kKeys].insert(b);
    for (uint32_t b : select_paper_values(context, left.state, h, blocks, rule))
      out[kValues].insert(b);
  }
  return out;
}

struct Seen {
  uint64_t items = 0, keys = 0, values = 0, hits = 0, evicted = 0, unfit = 0;
  uint64_t resolved = 0, unresolved = 0, swapped = 0;
};

class DevicePolicy : public ::testing::Test {
 protected:
  void SetUp() override { backend_ = make_device_backend("emulated", 0); }

  // Lets the host look at what the kernels of a rank do.
  void watch(OneRank* rank, Seen* seen) {
    rank->ops.before_select = [this, rank, seen](const cuda::LadderArgs& a,
                                                 const cuda::PaperArgs&) {
      expected_.clear();
      before_.clear();
      for (int i = 0; i < a.count; ++i) {
        const Left left(a.passes[i]);
        for (size_t b = 0; b < left.place.size(); ++b)
          for (int h = 0; h < a.passes[i].heads && left.coded[b]; ++h)
            EXPECT_EQ(left.state.used[left.state.at(h, b)], 0) << "codes alone";
        expected_.push_back(selected(left, a.passes[i].heads, rank->rules.paper));
        std::array<std::vector<int32_t>, 2> held;
        for (int part = 0; part < 2; ++part)
          held[size_t(part)].assign(a.items[i].block_of[part],
                                    a.items[i].block_of[part] + a.items[i].quota[part]);
        before_.push_back(held);
        scored_of(left, a.passes[i].heads);
      }
      ++seen->items;
    };
    rank->ops.after_select = [this, seen](const cuda::LadderArgs& a, const cuda::PaperArgs&) {
      for (int i = 0; i < a.count; ++i) check_selection(a, i, seen);
    };
    rank->ops.before_rank = [this, seen](const cuda::LadderArgs& a, const cuda::PaperArgs& p) {
      failing_.clear();
      for (int i = 0; i < a.count; ++i) failing_.push_back(unresolved(a, i, p.ranking, seen));
    };
    rank->ops.after_rank = [this](const cuda::LadderArgs& a, const cuda::PaperArgs&) {
      for (int i = 0; i < a.count; ++i) EXPECT_EQ(a.passes[i].failing[0], failing_[size_t(i)]);
      scored_.clear();
    };
  }

  void scored_of(const Left& left, int heads) {
    std::vector<std::vector<double>> of_heads;
    for (int h = 0; h < heads; ++h) {
      of_heads.emplace_back();
      for (size_t b = 0; b < left.place.size(); ++b)
        of_heads.back().push_back(block_log_mass(left.state, h, b));
    }
    scored_.push_back(of_heads);
  }

  void check_selection(const cuda::LadderArgs& a, int i, Seen* seen) {
    const cuda::LadderItem& item = a.items[i];
    const cuda::PassItem& pass = a.passes[i];
    const auto& expected = expected_[size_t(i)];
    const bool fits = int(expected[kKeys].size()) <= item.quota[kKeys] &&
                      int(expected[kValues].size()) <= item.quota[kValues];
    EXPECT_EQ(*item.again != 0, fits);
    EXPECT_EQ(pass.failing[0], fits ? 0 : (1u << pass.heads) - 1);
    std::array<Set, 2> wanted;
    for (int block = 0; block < item.coded_pages * kPageTiles; ++block)
      for (int part = 0; part < 2; ++part)
        if ((item.pages[block / kPageTiles].wants >> (block % kPageTiles + 4 * part) & 1) != 0)
          wanted[size_t(part)].insert(uint32_t(block));
    if (!fits) {
      ++seen->unfit;
      EXPECT_TRUE(wanted[0].empty() && wanted[1].empty());
      EXPECT_EQ(a.listed[i], 0u);
      return;
    }
    EXPECT_EQ(wanted, expected);
    seen->keys += wanted[kKeys].size();
    seen->values += wanted[kValues].size();
    const cuda::PageInRequest* list = a.list;
    for (int n = 0; n < i; ++n) list += a.items[n].quota[0] + a.items[n].quota[1];
    std::array<Set, 2> listed, slots;
    for (uint32_t n = 0; n < a.listed[i]; ++n) {
      const auto part = size_t(list[n].part);
      ASSERT_LT(list[n].slot, item.quota[part]);
      listed[part].insert(uint32_t(list[n].block));
      slots[part].insert(uint32_t(list[n].slot));
      const int32_t held = before_[size_t(i)][part][size_t(list[n].slot)];
      EXPECT_EQ(list[n].resident != 0, held == list[n].block);
      seen->hits += list[n].resident != 0;
      seen->evicted += list[n].resident == 0 && held >= 0;
      EXPECT_EQ(item.block_of[part][list[n].slot], list[n].block);
    }
    EXPECT_EQ(listed, wanted);
    for (size_t part = 0; part < 2; ++part) {
      EXPECT_EQ(slots[part].size(), listed[part].size()) << "a slot of its own each";
      Set held;  // no block twice
      for (int s = 0; s < item.quota[part]; ++s) {
        if (item.block_of[part][s] < 0) continue;
        EXPECT_TRUE(held.insert(uint32_t(item.block_of[part][s])).second);
      }
    }
  }

  // Heads that must go to rung 3, by the formulas of method section 6 over the pass's own Delta_b.
  uint32_t unresolved(const cuda::LadderArgs& a, int i, int r, Seen* seen) {
    if (*a.items[i].again == 0) return a.passes[i].failing[0];
    const Left left(a.passes[i]);
    const PassState& pass = left.state;
    uint32_t out = a.passes[i].failing[0];
    for (int h = 0; h < a.passes[i].heads && r > 0; ++h) {
      std::vector<uint32_t> inside, outside;
      std::vector<double> l(pass.blocks);
      for (size_t b = 0; b < pass.blocks; ++b) {
        const bool in_f = (pass.used[pass.at(h, b)] & kUsedKey) != 0;
        (in_f ? inside : outside).push_back(uint32_t(b));
        l[b] = double(pass.block_ref[pass.at(h, b)]) +
               std::log(double(pass.block_sum[pass.at(h, b)]) +
                        (in_f ? 0 : 16 * double(kExpAbsolute)));
      }
      std::sort(inside.begin(), inside.end(),
                [&](uint32_t x, uint32_t y) { return l[x] != l[y] ? l[x] > l[y] : x < y; });
      bool open = inside.size() < size_t(r) && !outside.empty();
      for (const uint32_t b : outside) {
        if (open) break;
        const uint32_t last = inside[size_t(r) - 1];
        const double eps = gamma_n(20) + 2 * kUnit * std::max(std::abs(l[b]), std::abs(l[last]));
        open =
            !(l[b] + pass.delta[pass.at(h, b)] <= l[last] - pass.delta[pass.at(h, last)] - 2 * eps);
      }
      const bool same = same_order_under_codes(pass, h, scored_[size_t(i)][size_t(h)], r);
      seen->swapped += !same;
      open = open || !same;
      (open ? seen->unresolved : seen->resolved) += 1;
      if (open) out |= 1u << h;
    }
    return out;
  }

  // Policy budget: the blocks that leave a head unresolved, as ranking_unresolved() has them, by
  // the device's own Delta_b; and what climb() makes of them.
  static Set open_blocks(const PassState& pass, int h, int r) {
    std::vector<uint32_t> inside, outside;
    std::vector<double> l(pass.blocks);
    for (size_t b = 0; b < pass.blocks; ++b) {
      const size_t at = pass.at(h, b);
      const bool in_f = (pass.used[at] & kUsedKey) != 0;
      (in_f ? inside : outside).push_back(uint32_t(b));
      l[b] = double(pass.block_ref[at]) +
             std::log(double(pass.block_sum[at]) + (in_f ? 0 : 16 * double(kExpAbsolute)));
    }
    const auto heavier = [&](uint32_t x, uint32_t y) { return l[x] != l[y] ? l[x] > l[y] : x < y; };
    std::sort(inside.begin(), inside.end(), heavier);
    if (inside.size() < size_t(r)) {
      std::sort(outside.begin(), outside.end(), heavier);
      outside.resize(std::min(outside.size(), size_t(r) - inside.size()));
      return {outside.begin(), outside.end()};
    }
    const uint32_t last = inside[size_t(r) - 1];
    Set out;
    for (const uint32_t b : outside) {
      const double eps = gamma_n(20) + 2 * kUnit * std::max(std::abs(l[b]), std::abs(l[last]));
      if (!(l[b] + pass.delta[pass.at(h, b)] + eps <= l[last] - pass.delta[pass.at(h, last)] - eps))
        out.insert(b);
    }
    return out;
  }

  void watch_budget(OneRank* rank, Seen* seen) {
    rank->ops.before_rank = [this](const cuda::LadderArgs& a, const cuda::PaperArgs& p) {
      if (p.all_items) open_.assign(size_t(a.count), {});
      failing_.resize(size_t(a.count));
      for (int i = 0; i < a.count; ++i) {
        failing_[size_t(i)] = a.passes[i].failing[0];
        if (!p.all_items && *a.items[i].again == 0) continue;
        const Left left(a.passes[i]);
        open_[size_t(i)].clear();
        for (int h = 0; h < a.passes[i].heads; ++h) {
          open_[size_t(i)].push_back(open_blocks(left.state, h, p.ranking));
          if (!open_[size_t(i)].back().empty()) failing_[size_t(i)] |= 1u << h;
        }
      }
    };
    rank->ops.after_rank = [this, seen](const cuda::LadderArgs& a, const cuda::PaperArgs&) {
      for (int i = 0; i < a.count; ++i) {
        EXPECT_EQ(a.passes[i].failing[0], failing_[size_t(i)]);
        for (int h = 0; h < a.passes[i].heads; ++h) {
          EXPECT_EQ(noted(a, i, h), open_[size_t(i)][size_t(h)]) << "item " << i << " head " << h;
          (open_[size_t(i)][size_t(h)].empty() ? seen->resolved : seen->unresolved) += 1;
        }
      }
    };
    rank->ops.after_climb = [this, seen](const cuda::LadderArgs& a) {
      for (int i = 0; i < a.count; ++i) {
        const cuda::PassItem& pass = a.passes[i];
        if (*a.items[i].again == 0) continue;
        bool all_fit = true;
        Set open;
        for (int h = 0; h < pass.heads; ++h) {
          all_fit = all_fit && within_tolerance(pass.judged[h], pass.relative != 0, pass.tolerance);
          open.merge(Set(open_[size_t(i)][size_t(h)]));
        }
        const cuda::PageInRequest* list = a.list;
        for (int n = 0; n < i; ++n) list += a.items[n].quota[0] + a.items[n].quota[1];
        Set keys;
        uint64_t values = 0;
        for (uint32_t n = 0; n < a.listed[i]; ++n)
          if (list[n].part == kKeys)
            keys.insert(uint32_t(list[n].block));
          else
            ++values;
        EXPECT_TRUE(std::includes(keys.begin(), keys.end(), open.begin(), open.end()));
        if (!all_fit) continue;
        EXPECT_EQ(keys, open) << "exactly the blocks that leave it unresolved";
        EXPECT_EQ(values, 0u);
        ++seen->items;
      }
    };
  }
  static Set noted(const cuda::LadderArgs& a, int i, int h) {
    Set out;
    const uint32_t* words = a.undecided + size_t(i) * a.undecided_of_item;
    for (int page = 0; page < a.passes[i].page_count; ++page)
      for (int t = 0; t < kPageTiles; ++t)
        if ((words[page] >> (8 * t + h) & 1) != 0) out.insert(uint32_t(page * kPageTiles + t));
    return out;
  }

  DeviceBackend backend_;
  std::vector<std::vector<Set>> open_;  // of items, heads
  std::vector<std::array<Set, 2>> expected_;
  std::vector<std::array<std::vector<int32_t>, 2>> before_;
  std::vector<std::vector<std::vector<double>>> scored_;
  std::vector<uint32_t> failing_;
};

TEST_F(DevicePolicy, PaperSelectsWhatTheHostSelectsOfTheSamePass) {
  Seen seen;
  int n = 0;
  for (const char* value_rule : {"local", "greedy"})
    for (const double tau : {0.0, 0.5, 0.9, 0.995, 1.0})
      for (const int64_t k_max : {1, 4, 128}) {
        SCOPED_TRACE(testing::Message() << value_rule << " " << tau << " " << k_max);
        OneRank rank(backend_, 0, Policy::Paper);
        rank.sharpness = n % 3 == 0 ? 1 : (n % 3 == 1 ? 4 : 12);
        rank.rules.paper = {.tau_cov = tau,
                            .k_min = std::min<int64_t>(k_max, n % 4),
                            .k_max = k_max,
                            .expand_tail = n % 2 == 0 ? 0.02 : 0.3,
                            .v_tol = std::array{0.0, 0.003, 0.05, 0.01}[size_t(n % 4)],
                            .value_rule = value_rule};
        ++n;
        watch(&rank, &seen);
        const auto a = rank.start(1, 1);
        for (int step = 0; step < 2; ++step) rank.step(a);
      }
  fmt::print("{} layers: {} keys and {} values of blocks promoted, {} hits\n", seen.items,
             seen.keys, seen.values, seen.hits);
  EXPECT_GT(seen.keys, 500u);
  EXPECT_GT(seen.values, 200u);
  EXPECT_GT(seen.hits, 100u);
  EXPECT_EQ(seen.unfit, 0u);
}

TEST_F(DevicePolicy, BlocksOfEqualMassAreTakenByTheirNumber) {
  for (const int64_t k_max : {3, 128}) {
    Seen seen;
    OneRank rank(backend_, 0, Policy::Paper);
    rank.equal_keys = true;
    rank.rules.paper = {.tau_cov = 0.47, .k_min = 2, .k_max = k_max, .expand_tail = 1};
    watch(&rank, &seen);
    rank.step(rank.start(1, 1));
    EXPECT_GT(seen.keys, 0u);
  }
}

// A scratch that is smaller than what comes to be wanted: what is not asked for gives way, and what
// does not fit at all sends its heads to rung 3.
TEST_F(DevicePolicy, TheScratchKeepsWhatComesAgain) {
  Seen few, none;
  OneRank rank(backend_, 1, Policy::Paper, 2 * 9);  // 9 blocks a KV head
  rank.sharpness = 12;
  rank.rules.paper = {.tau_cov = 0.9, .k_min = 1, .k_max = 4, .expand_tail = 1, .v_tol = 0.05};
  watch(&rank, &few);
  const auto a = rank.start(1, 2);
  uint64_t hits = 0, misses = 0;
  for (int step = 0; step < 8; ++step)
    for (const VerdictRecord& v : rank.step(a)) {
      hits += v.sum.scratch_hits;
      misses += v.sum.scratch_misses;
      EXPECT_EQ(v.sum.digest, 0u);
      EXPECT_EQ(v.sum.canary, 0u);
    }
  fmt::print("{} hits, {} evicted, {} heads did not fit\n", few.hits, few.evicted, few.unfit);
  EXPECT_GT(few.hits, 20u);
  EXPECT_GT(few.evicted, 20u);
  EXPECT_EQ(hits, few.hits);
  EXPECT_GE(misses, few.evicted);

  OneRank small(backend_, 0, Policy::Paper, 2 * 2);
  small.rules.paper = {.k_min = 3};
  watch(&small, &none);
  const int64_t s = small.start(1, 1)[0];
  const VerdictRecord v = small.step({s})[0];
  EXPECT_GT(none.unfit, 0u);
  EXPECT_EQ(v.sum.rungs[3], v.sum.exact);
  EXPECT_EQ(v.sum.exact, uint64_t(kLayers) * kKvHeads * kPerGroup);
}

TEST_F(DevicePolicy, HeadsWhoseRankingIsOpenGoToRung3AndNoOthers) {
  Seen seen;
  uint64_t exact = 0, steps = 0;
  for (const int r : {0, 1, 3})
    for (const float sharpness : {1.0f, 4.0f, 16.0f}) {
      OneRank rank(backend_, 0, Policy::Paper);
      rank.sharpness = sharpness;
      rank.rules.ladder.ranking = r;
      rank.rules.paper = {.tau_cov = 0.6, .k_min = r == 3 ? 2 : 1, .k_max = 8};
      watch(&rank, &seen);
      const int64_t s = rank.start(1, 1)[0];
      for (int step = 0; step < 3; ++step) {
        const VerdictRecord v = rank.step({s})[0];
        EXPECT_TRUE(r > 0 || v.sum.rungs[3] == 0);
        EXPECT_EQ(v.sum.rungs[3], v.sum.exact);
        EXPECT_EQ(v.sum.failed, 0u);
        exact += v.sum.exact;
        ++steps;
      }
    }
  fmt::print("{} heads resolved, {} not, of them {} in another order under codes\n", seen.resolved,
             seen.unresolved, seen.swapped);
  EXPECT_EQ(exact, seen.unresolved);
  EXPECT_GT(seen.resolved, 20u);
  EXPECT_GT(seen.unresolved, 20u);
}

TEST_F(DevicePolicy, BudgetPromotesExactlyWhatLeavesItsRankingOpen) {
  Seen seen;
  uint64_t rungs[5] = {};
  for (const int r : {1, 2, 7})
    for (const float sharpness : {1.0f, 4.0f, 16.0f})
      for (const double tolerance : {0.08, 0.5}) {
        OneRank rank(backend_, 0, Policy::Budget);
        rank.sharpness = sharpness;
        rank.tolerance = tolerance;
        rank.rules.ladder.ranking = r;
        watch_budget(&rank, &seen);
        const int64_t s = rank.start(1, 1)[0];
        for (int step = 0; step < 3; ++step) {
          const VerdictRecord v = rank.step({s})[0];
          EXPECT_EQ(v.sum.failed + v.sum.over, 0u);
          EXPECT_EQ(v.sum.rungs[3], v.sum.exact);
          for (int i = 0; i < 5; ++i) rungs[i] += v.sum.rungs[i];
        }
      }
  fmt::print("{} heads resolved, {} not; {} items promoted for ranking alone; rungs {} {} {} {}\n",
             seen.resolved, seen.unresolved, seen.items, rungs[0], rungs[1], rungs[2], rungs[3]);
  EXPECT_GT(seen.resolved, 100u);
  EXPECT_GT(seen.unresolved, 100u);
  EXPECT_GT(seen.items, 20u);
  EXPECT_GT(rungs[1], 20u);
  EXPECT_GT(rungs[3], 20u);
}

// Blocks that nothing is resident of, as the host's seeded draw has them; over time all of them,
// and no head's rung comes of it.
TEST_F(DevicePolicy, ExploresWhatTheHostDraws) {
  constexpr double kShare = 0.3;
  constexpr uint64_t kSeed = 42;
  OneRank rank(backend_, 1, Policy::Budget);
  rank.tolerance = 0.9;
  rank.rules.ladder.exploration = kShare;
  rank.rules.exploration_seed = kSeed;
  uint64_t calls = 0, explored = 0;
  std::vector<Set> free;
  std::array<Set, size_t(kLayers) * kKvHeads> seen;
  rank.ops.before_explore = [&](const cuda::LadderArgs& a) {
    free.assign(size_t(a.count), {});
    for (int i = 0; i < a.count; ++i)
      for (int b = 0; b < a.items[i].coded_pages * kPageTiles; ++b)
        if ((a.items[i].pages[b / kPageTiles].wants >> (b % kPageTiles) & 0x11u) == 0)
          free[size_t(i)].insert(uint32_t(b));
  };
  rank.ops.after_explore = [&](const cuda::LadderArgs& a) {
    const int layer = int(calls++ % kLayers);
    for (int i = 0; i < a.count; ++i) {
      Set expected;
      for (const uint32_t b : free[size_t(i)])
        if (counter_uniform(kSeed, {0, layer, i % kKvHeads, uint64_t(a.passes[i].tokens)}, b) <
            kShare)
          expected.insert(b);
      const cuda::PageInRequest* list = a.list;
      for (int n = 0; n < i; ++n) list += a.items[n].quota[0] + a.items[n].quota[1];
      std::array<Set, 2> listed;
      for (uint32_t n = 0; n < a.listed[i]; ++n)
        listed[size_t(list[n].part)].insert(uint32_t(list[n].block));
      EXPECT_EQ(listed[kKeys], expected);
      EXPECT_EQ(listed[kValues], expected);
      EXPECT_EQ(*a.items[i].again != 0, !expected.empty());
      explored += expected.size();
      seen[size_t(layer * kKvHeads + i % kKvHeads)].merge(expected);
    }
  };
  const auto a = rank.start(1, 1);
  uint64_t paged = 0;
  for (int step = 0; step < 16; ++step) {
    const VerdictRecord v = rank.step(a)[0];
    EXPECT_EQ(v.sum.rungs[0], uint64_t(kLayers) * kKvHeads * kPerGroup);
    EXPECT_EQ(v.sum.certified, v.sum.rungs[0]);
    EXPECT_EQ(v.sum.promoted_keys + v.sum.promoted_values, 0u);
    EXPECT_EQ(v.sum.canary + v.sum.digest, 0u);
    paged += v.sum.scratch_misses;
  }
  EXPECT_GT(explored, 100u);
  EXPECT_EQ(paged, 2 * explored);
  for (const Set& blocks : seen) EXPECT_EQ(blocks.size(), kPages * kPageTiles);
}

}  // namespace
}  // namespace certkv
