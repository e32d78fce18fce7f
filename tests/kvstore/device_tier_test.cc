#include "kvstore/device_tier.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "kernels/base/error.h"
#include "kernels/quantize.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

constexpr size_t kDim = 64;

struct Rows {
  std::vector<uint16_t> k, v;
  Rows(size_t tokens, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < tokens * kDim; ++i) {
      k.push_back(oracle::encode(DType::F16, normal(random)));
      v.push_back(oracle::encode(DType::F16, normal(random)));
    }
  }
};

class Tier : public testing::Test {
 protected:
  std::shared_ptr<const PageFormat> format =
      std::make_shared<const PageFormat>(make_page_format(layout_by_name("compact"), kDim, 16));
  std::shared_ptr<TierAccount> account = std::make_shared<TierAccount>();
  DeviceTier make() const { return {format, DType::F16, account}; }
  void append(DeviceTier* tier, const Rows& rows, size_t first, size_t tokens) const {
    tier->append(rows.k.data() + first * kDim, rows.v.data() + first * kDim, tokens, {});
  }
  void expect_same(const DeviceTier& a, const DeviceTier& b) const {
    ASSERT_EQ(a.tokens(), b.tokens());
    ASSERT_EQ(a.blocks().size(), b.blocks().size());
    for (size_t i = 0; i < a.blocks().size(); ++i) {
      const BlockRef &x = a.blocks()[i], &y = b.blocks()[i];
      ASSERT_EQ(x.tokens, y.tokens) << i;
      ASSERT_EQ(x.index, y.index) << i;
      ASSERT_EQ(x.nu, y.nu) << i;
      ASSERT_EQ(x.k_norm, y.k_norm) << i;
      ASSERT_EQ(x.page == nullptr, y.page == nullptr) << i;
      if (x.page != nullptr) {
        ASSERT_EQ(a.format().page_bytes, b.format().page_bytes);
        ASSERT_EQ(std::memcmp(x.page, y.page, a.format().page_bytes), 0) << i;
      } else {
        ASSERT_EQ(std::memcmp(x.k, y.k, size_t(x.tokens) * kDim * 2), 0) << i;
        ASSERT_EQ(std::memcmp(x.v, y.v, size_t(x.tokens) * kDim * 2), 0) << i;
      }
    }
  }
};

TEST_F(Tier, AppendingInPiecesIsAppendingAtOnce) {
  const Rows rows(300, 1);
  DeviceTier whole = make();
  append(&whole, rows, 0, 300);
  for (size_t piece : {1, 7, 16, 63, 64, 65, 299}) {
    DeviceTier pieces = make();
    for (size_t first = 0; first < 300; first += piece)
      append(&pieces, rows, first, std::min<size_t>(piece, 300 - first));
    expect_same(whole, pieces);
  }
  EXPECT_EQ(whole.sealed_blocks(), 16u);
  EXPECT_EQ(whole.blocks().size(), 19u);  // 44 open tokens: 16 + 16 + 12
}

TEST_F(Tier, AForkSharesSealedPagesAndThenGoesItsOwnWay) {
  const Rows rows(200, 2), left(100, 3), right(100, 4);
  DeviceTier a = make();
  append(&a, rows, 0, 200);
  const uint64_t before = account->bytes;
  a.use_key(0, rows.k.data());
  DeviceTier b = a.fork();
  EXPECT_EQ(account->bytes, before);
  EXPECT_EQ(b.blocks()[0].page, a.blocks()[0].page);
  EXPECT_EQ(b.blocks()[0].k, nullptr);  // another head's scratch is not this one's
  EXPECT_NE(b.blocks().back().k, a.blocks().back().k);
  append(&a, left, 0, 100);
  append(&b, right, 0, 100);
  a.use_key(0, nullptr);
  const auto fresh = [&](const Rows& tail) {
    DeviceTier t = make();
    append(&t, rows, 0, 200);
    append(&t, tail, 0, 100);
    return t;
  };
  expect_same(a, fresh(left));
  expect_same(b, fresh(right));
}

TEST_F(Tier, AForkOfTheFirstPagesIsASequenceThatBeganAlike) {
  const Rows rows(300, 2), tail(100, 3);
  DeviceTier a = make();
  append(&a, rows, 0, 300);
  a.use_key(0, rows.k.data());
  const uint64_t before = account->bytes;
  DeviceTier b = a.fork_pages(2);
  EXPECT_EQ(account->bytes, before);
  EXPECT_EQ(b.tokens(), 128u);
  EXPECT_TRUE(b.shares_page(1, a));
  append(&b, tail, 0, 100);
  DeviceTier fresh = make();
  append(&fresh, rows, 0, 128);
  append(&fresh, tail, 0, 100);
  expect_same(b, fresh);
  EXPECT_EQ(b.quantised_blocks(), fresh.quantised_blocks());
}

TEST_F(Tier, AGroupIsHandedToTheSinkBeforeItCanBeRead) {
  const Rows rows(128, 5);
  DeviceTier tier = make();
  std::vector<uint32_t> seen;
  const SealSink sink = [&](uint32_t first, int blocks, const uint16_t* k, const uint16_t* v) {
    EXPECT_EQ(tier.sealed_blocks(), first);
    EXPECT_EQ(blocks, 4);
    EXPECT_EQ(std::memcmp(k, rows.k.data() + first * 16 * kDim, 64 * kDim * 2), 0);
    EXPECT_EQ(std::memcmp(v, rows.v.data() + first * 16 * kDim, 64 * kDim * 2), 0);
    seen.push_back(first);
  };
  for (size_t t = 0; t < 128; ++t)
    tier.append(rows.k.data() + t * kDim, rows.v.data() + t * kDim, 1, sink);
  EXPECT_EQ(seen, (std::vector<uint32_t>{0, 4}));
}

TEST_F(Tier, ReencodingIsAFreshSealOfTheSameOriginals) {
  const Rows rows(400, 11), far(64, 12);
  for (const std::string_view name : class_layouts()) {
    SCOPED_TRACE(name);
    const auto other =
        std::make_shared<const PageFormat>(make_page_format(layout_by_name(name), kDim, 16));
    DeviceTier tier = make(), sibling = make();
    append(&tier, rows, 0, 200);
    const DeviceTier fork = tier.fork();
    tier.use_key(5, far.k.data());
    tier.begin_reseal(other);
    for (size_t page = 0; page < 2; ++page)
      ASSERT_TRUE(
          tier.reseal_next(rows.k.data() + page * 64 * kDim, rows.v.data() + page * 64 * kDim));
    append(&tier, rows, 200, 200);  // three more groups become full meanwhile
    EXPECT_THROW(tier.adopt_reseal(), Error);
    append(&sibling, rows, 0, 400);
    sibling.use_key(5, far.k.data());
    expect_same(tier, sibling);  // until then all is as it was
    while (tier.resealed() < tier.pages()) {
      const size_t at = tier.resealed() * 64 * kDim;
      ASSERT_TRUE(tier.reseal_next(rows.k.data() + at, rows.v.data() + at));
    }
    tier.adopt_reseal();
    DeviceTier fresh(other, DType::F16, account);
    append(&fresh, rows, 0, 400);
    expect_same(tier, fresh);
    EXPECT_EQ(tier.bytes(), fresh.bytes());
    EXPECT_EQ(tier.quantised_blocks(), fresh.quantised_blocks());
    EXPECT_EQ(tier.blocks()[5].k, far.k.data());
    for (size_t page = 0; page < tier.pages(); ++page)
      EXPECT_EQ(tier.check_page(page), PageState::Sound);
    DeviceTier before = make();
    append(&before, rows, 0, 200);
    expect_same(fork, before);  // the fork keeps its own
  }
}

TEST_F(Tier, PagesThatGroupOtherTokensCannotTakeAnOthersPlace) {
  DeviceTier tier = make();
  EXPECT_THROW(tier.begin_reseal(std::make_shared<const PageFormat>(
                   make_page_format(layout_by_name("paper"), kDim, 16))),
               Error);
}

TEST_F(Tier, ASealedPageIsNeverRewritten) {
  const Rows rows(200, 6);
  DeviceTier tier = make();
  append(&tier, rows, 0, 64);
  const std::byte* page = tier.blocks()[0].page;
  const std::vector<std::byte> bytes(page, page + format->page_bytes);
  append(&tier, rows, 64, 136);
  EXPECT_EQ(tier.blocks()[0].page, page);
  EXPECT_EQ(std::memcmp(page, bytes.data(), bytes.size()), 0);
}

TEST_F(Tier, ANonFiniteTokenIsRefusedAndLeavesWhatWasThere) {
  for (size_t at : {size_t(0), size_t(70)}) {
    Rows rows(128, 7);
    rows.v[at * kDim + 3] = oracle::encode(DType::F16, INFINITY);
    DeviceTier tier = make(), good = make();
    EXPECT_THROW(append(&tier, rows, 0, 128), Error);
    append(&good, rows, 0, at / 64 * 64);
    expect_same(tier, good);
  }
}

TEST_F(Tier, WhatCannotBeQuantisedIsServedFromOriginals) {
  DeviceTier tier(format, DType::BF16, account);
  Rows rows(64, 8);
  for (size_t i = 0; i < rows.k.size(); ++i) {
    rows.k[i] = oracle::encode(DType::BF16, 1.0 + double(i % 7));
    rows.v[i] = oracle::encode(DType::BF16, 1e20 * double(i % 5));
  }
  append(&tier, rows, 0, 64);
  ASSERT_EQ(tier.sealed_blocks(), 4u);
  for (size_t b = 0; b < 4; ++b) {
    EXPECT_FALSE(tier.is_quantised(b));
    EXPECT_EQ(std::memcmp(tier.blocks()[b].v, rows.v.data() + b * 16 * kDim, 16 * kDim * 2), 0);
  }
}

TEST_F(Tier, PagesAreCountedWhileAnyoneHoldsThem) {
  const Rows rows(64, 9);
  {
    DeviceTier a = make();
    append(&a, rows, 0, 64);
    const DeviceTier b = a.fork();
    EXPECT_GE(account->bytes, format->page_bytes);
  }
  EXPECT_EQ(account->bytes, 0u);
}

TEST_F(Tier, OpenTokensThatChangedAreNeitherServedOnNorSealed) {
  const Rows rows(128, 12);
  for (const bool values : {false, true}) {
    for (const size_t tokens : {1, 17, 63}) {  // the next token seals the last of these
      DeviceTier tier = make();
      append(&tier, rows, 0, 64 + tokens);
      const DeviceTier fork = tier.fork();
      const BlockRef& ref = tier.blocks()[4];
      auto* data = const_cast<uint16_t*>(values ? ref.v : ref.k);
      data[9] = uint16_t(data[9] ^ 2);
      try {
        append(&tier, rows, 64 + tokens, 1);
        ADD_FAILURE() << "accepted";
      } catch (const Error& e) {
        EXPECT_EQ(e.kind(), ErrorKind::OriginalsLost);
        EXPECT_NE(std::string(e.what()).find("tokens 64 to"), std::string::npos) << e.what();
      }
      EXPECT_EQ(tier.tokens(), 64 + tokens);
      EXPECT_EQ(tier.sealed_blocks(), 4u);
      DeviceTier other = fork.fork();
      append(&other, rows, 64 + tokens, 1);  // whose copy was made before
      EXPECT_EQ(other.tokens(), 65 + tokens);
    }
  }
}

TEST_F(Tier, APageSealedAnewIsTakenOnlyIfItIsTheSame) {
  const Rows rows(192, 10), others(64, 11);
  const auto at = [](const Rows& r, size_t page) {
    return std::pair{r.k.data() + page * 64 * kDim, r.v.data() + page * 64 * kDim};
  };
  DeviceTier tier = make(), good = make();
  append(&tier, rows, 0, 192);
  append(&good, rows, 0, 192);
  DeviceTier fork = tier.fork();
  ASSERT_EQ(tier.pages(), 3u);
  const auto [k, v] = at(rows, 1);
  EXPECT_EQ(tier.check_page(1), PageState::Sound);
  // Of a sound page the bytes come out as they were.
  EXPECT_EQ(tier.rebuild_page(1, k, v), PageRebuild::DigestWasDamaged);
  EXPECT_FALSE(tier.shares_page(1, fork));
  fork.adopt_page(1, tier);
  EXPECT_TRUE(tier.shares_page(1, fork));

  auto* bytes = const_cast<std::byte*>(tier.blocks()[4].page);
  bytes[100] ^= std::byte(4);
  EXPECT_EQ(tier.check_page(1), PageState::Bytes);
  EXPECT_EQ(tier.check_page(0), PageState::Sound);
  const auto [wrong_k, wrong_v] = at(others, 0);
  EXPECT_EQ(tier.rebuild_page(1, wrong_k, wrong_v), PageRebuild::OtherDigest);
  EXPECT_EQ(tier.blocks()[4].page, bytes);
  EXPECT_EQ(tier.rebuild_page(1, k, v), PageRebuild::Done);
  EXPECT_EQ(tier.check_page(1), PageState::Sound);
  EXPECT_EQ(fork.check_page(1), PageState::Bytes);  // until it is told
  fork.adopt_page(1, tier);
  expect_same(tier, good);
  expect_same(fork, good);
}

}  // namespace
}  // namespace certkv
