#include "kvstore/scratch_cache.h"

#include <gtest/gtest.h>

namespace certkv {
namespace {

uint32_t evicted_by(ScratchCache* cache, uint32_t block) {
  uint32_t evicted = 0;
  EXPECT_NE(cache->insert(block, &evicted), nullptr);
  return evicted;
}

TEST(Scratch, AMissingPageIsNeverSlotZero) {
  ScratchCache cache(4, 16);
  EXPECT_EQ(cache.find(0), nullptr);
  evicted_by(&cache, 7);
  for (uint32_t missing : {0u, 1u, 6u, 8u, ScratchCache::kNone})
    EXPECT_EQ(cache.find(missing), nullptr) << missing;
  cache.erase(7);
  EXPECT_EQ(cache.find(7), nullptr);
  EXPECT_EQ(cache.find(0), nullptr);
}

TEST(Scratch, AQuotaOfZeroHoldsNothing) {
  ScratchCache cache(0, 16);
  uint32_t evicted = 0;
  EXPECT_EQ(cache.insert(3, &evicted), nullptr);
  EXPECT_EQ(evicted, ScratchCache::kNone);
  EXPECT_EQ(cache.find(3), nullptr);
  EXPECT_EQ(cache.bytes(), 0u);
}

TEST(Scratch, TheLowestScoreLeavesAndTiesGoByNumber) {
  ScratchCache cache(3, 16);
  for (uint32_t b : {30u, 10u, 20u}) EXPECT_EQ(evicted_by(&cache, b), ScratchCache::kNone);
  cache.unpin_all();
  std::vector<uint32_t> dropped;
  cache.score(10, 5);
  cache.score(20, 1);
  cache.score(30, 1);
  cache.age(0.5, 0.1, &dropped);
  EXPECT_TRUE(dropped.empty());
  EXPECT_EQ(evicted_by(&cache, 40), 20u);
  EXPECT_EQ(cache.find(20), nullptr);
  EXPECT_EQ(evicted_by(&cache, 50), 30u);  // 40 is pinned
  EXPECT_EQ(cache.blocks(), (std::vector<uint32_t>{10, 40, 50}));
  EXPECT_EQ(cache.resident(), 3u);
}

TEST(Scratch, APinnedBlockIsNotEvicted) {
  ScratchCache cache(2, 16);
  evicted_by(&cache, 1);
  evicted_by(&cache, 2);
  uint32_t evicted = 0;
  EXPECT_EQ(cache.insert(3, &evicted), nullptr);
  EXPECT_EQ(evicted, ScratchCache::kNone);
  cache.unpin_all();
  cache.pin(1);
  EXPECT_EQ(evicted_by(&cache, 3), 2u);
  EXPECT_NE(cache.find(1), nullptr);
}

TEST(Scratch, BlocksKeepTheirBytesWhileOthersComeAndGo) {
  ScratchCache cache(8, 4);
  uint32_t evicted = 0;
  for (uint32_t b = 0; b < 8; ++b) {
    uint16_t* slot = cache.insert(b, &evicted);
    for (int i = 0; i < 4; ++i) slot[i] = uint16_t(100 * b + uint32_t(i));
  }
  cache.erase(3);
  cache.insert(90, &evicted)[0] = 9;
  for (uint32_t b : {0u, 1u, 2u, 4u, 7u}) {
    ASSERT_NE(cache.find(b), nullptr);
    for (uint32_t i = 0; i < 4; ++i) EXPECT_EQ(cache.find(b)[i], 100 * b + i);
  }
}

TEST(Scratch, AnIdleBlockAgesOut) {
  ScratchCache cache(2, 16);
  evicted_by(&cache, 1);
  evicted_by(&cache, 2);
  cache.unpin_all();
  std::vector<uint32_t> dropped;
  cache.score(1, 1);
  cache.score(2, 1);
  cache.age(0.5, 0.3, &dropped);
  EXPECT_TRUE(dropped.empty());
  cache.score(2, 1);
  cache.age(0.5, 0.3, &dropped);  // 1 is at a half
  EXPECT_TRUE(dropped.empty());
  cache.age(0.5, 0.3, &dropped);
  EXPECT_EQ(dropped, (std::vector<uint32_t>{1}));
  EXPECT_EQ(cache.find(1), nullptr);
  EXPECT_NE(cache.find(2), nullptr);
}

TEST(Scratch, ASealedBlockIsSoundUntilItsBytesChange) {
  ScratchCache cache(2, 16);
  uint32_t evicted;
  uint16_t* slot = cache.insert(5, &evicted);
  std::fill_n(slot, 16, uint16_t(7));
  EXPECT_FALSE(cache.sound(5));  // nobody has said that its bytes are there
  cache.seal(5);
  EXPECT_TRUE(cache.sound(5));
  slot[15] = uint16_t(slot[15] ^ 0x8000);
  EXPECT_FALSE(cache.sound(5));
  cache.erase(5);
  EXPECT_EQ(cache.insert(6, &evicted), slot);
  EXPECT_FALSE(cache.sound(6));
}

}  // namespace
}  // namespace certkv
