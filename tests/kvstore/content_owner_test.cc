// Names of a prompt's originals: FORMAT.md, "Owners".
#include "kvstore/content_owner.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>

#include "kvstore/client.h"

namespace certkv::test {
namespace {

std::vector<int32_t> counted(size_t tokens) {
  std::vector<int32_t> t(tokens);
  for (size_t i = 0; i < tokens; ++i) t[i] = int32_t(i);
  return t;
}

ContentScope scope() {
  return {sha256("a model"), sha256("a layout"), DType::BF16};
}

// Of tests/golden/make_owner_goldens.py, which is written from FORMAT.md alone.
TEST(ContentOwner, IsWhatTheFormatSays) {
  const std::vector<OwnerId> owners = content_owners(counted(1030), scope());
  ASSERT_EQ(owners.size(), 2u);
  EXPECT_EQ(owners[0], (OwnerId{0x84586306f5316971, 0x172d750086fc5cc1}));
  EXPECT_EQ(owners[1], (OwnerId{0xafc0e6aab1b07537, 0x3367ca865423edf0}));
}

TEST(ContentOwner, WholeSegmentsAloneHaveNames) {
  EXPECT_TRUE(content_owners(counted(kSegmentTokens - 1), scope()).empty());
  EXPECT_EQ(content_owners(counted(kSegmentTokens), scope()).size(), 1u);
  EXPECT_EQ(content_owners(counted(5 * kSegmentTokens + 1), scope()).size(), 5u);
}

TEST(ContentOwner, ACommonBeginningHasCommonNamesUpToTheFirstSegmentThatDiffers) {
  const auto a = counted(4 * kSegmentTokens);
  for (size_t at = 0; at < a.size(); at += 37) {
    auto b = a;
    b[at] += 1;
    const auto x = content_owners(a, scope()), y = content_owners(b, scope());
    for (size_t s = 0; s < x.size(); ++s) EXPECT_EQ(x[s] == y[s], s < at / kSegmentTokens) << at;
  }
}

TEST(ContentOwner, EverythingThatDecidesBytesChangesTheName) {
  std::set<OwnerId> seen;
  const auto tokens = counted(kSegmentTokens);
  const std::function<void(ContentScope&)> changes[] = {
      [](ContentScope&) {}, [](ContentScope& s) { s.model[31] ^= std::byte(1); },
      [](ContentScope& s) { s.layout[0] ^= std::byte(1); },
      [](ContentScope& s) { s.dtype = DType::F16; },
      [](ContentScope& s) { std::swap(s.model, s.layout); }};
  for (const auto& change : changes) {
    ContentScope s = scope();
    change(s);
    EXPECT_TRUE(seen.insert(content_owners(tokens, s)[0]).second);
  }
}

TEST(ContentOwner, NamesCanBeAskedForAndPrivateOnesCannot) {
  EXPECT_TRUE(content_owners(counted(kSegmentTokens), scope())[0].is_content());
  EXPECT_TRUE(lasting_owner().is_content());
  EXPECT_NE(lasting_owner(), lasting_owner());
  EXPECT_FALSE(private_owner().is_content());
  EXPECT_NE(private_owner(), private_owner());
}

}  // namespace
}  // namespace certkv::test
