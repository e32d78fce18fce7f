#include "kvstore/tier_adaptors.h"

#include <gtest/gtest.h>

#include <vector>

#include "kernels/base/error.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;

constexpr uint32_t kBlocks = 200;

class Adaptors : public testing::Test {
 protected:
  void SetUp() override {
    client_ = holder_.attach();
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = small_shape();
    r.blocks = kBlocks;
    span_ = client_->reserve(r);
    for (uint32_t b = 0; b < kBlocks; ++b) {
      seal_known(span_, 0, 0, b);
      ids_.push_back(span_.id(0, 0, b));
    }
    k_.resize(kBlocks * small_shape().elements());
    v_.resize(k_.size());
    for (uint32_t b = 0; b < kBlocks; ++b) {
      copies_.push_back({BlockPart::Both, false, &k_[b * small_shape().elements()],
                         &v_[b * small_shape().elements()]});
      views_.push_back({BlockPart::Both, true, nullptr, nullptr});
    }
  }
  std::vector<BlockStatus> statuses(BlockReader& reader, const std::vector<Destination>& to,
                                    Deadline deadline = patience()) {
    ReadTicket ticket = reader.read(ids_, to, deadline);
    std::vector<BlockStatus> s;
    for (const BlockResult& r : BlockReader::wait(ticket)) {
      s.push_back(r.status);
      if (r.status != BlockStatus::Ok) continue;
      const uint32_t b = uint32_t(s.size() - 1);
      const auto k = known_rows(small_shape(), 0, 0, b, false);
      const auto v = known_rows(small_shape(), 0, 0, b, true);
      EXPECT_TRUE(std::equal(k.begin(), k.end(), r.k)) << "wrong bytes as Ok, block " << b;
      EXPECT_TRUE(std::equal(v.begin(), v.end(), r.v)) << "wrong bytes as Ok, block " << b;
    }
    return s;
  }
  static long count(const std::vector<BlockStatus>& s, BlockStatus x) {
    return std::count(s.begin(), s.end(), x);
  }

  ThreadHolder holder_;
  std::shared_ptr<StoreClient> client_;
  OriginalsSpan span_;
  std::vector<BlockId> ids_;
  std::vector<Destination> copies_, views_;
  std::vector<uint16_t> k_, v_;
};

TEST_F(Adaptors, InjectedFaultsBecomeTheirStatusAndNothingElseChanges) {
  FaultInjectingReader faulty(client_->reader(), small_shape(),
                              {.seed = 3, .absent = 0.1, .lost = 0.2, .corrupt = 0.3});
  for (const auto* to : {&copies_, &views_}) {
    const uint64_t before = faulty.injected();
    const auto s = statuses(faulty, *to);
    EXPECT_GT(count(s, BlockStatus::Absent), 0);
    EXPECT_GT(count(s, BlockStatus::Lost), 0);
    EXPECT_GT(count(s, BlockStatus::Corrupt), 0);
    EXPECT_EQ(count(s, BlockStatus::Ok), long(kBlocks - (faulty.injected() - before)));
  }
  const auto clean = statuses(*client_->reader(), copies_);
  EXPECT_EQ(count(clean, BlockStatus::Ok), long(kBlocks)) << "the arena itself is untouched";
}

TEST_F(Adaptors, TheSameSeedInjectsTheSameFaults) {
  const ReaderFaults faults{.seed = 8, .absent = 0.3, .corrupt = 0.3};
  FaultInjectingReader a(client_->reader(), small_shape(), faults);
  FaultInjectingReader b(client_->reader(), small_shape(), faults);
  EXPECT_EQ(statuses(a, copies_), statuses(b, copies_));
  ReaderFaults other = faults;
  other.seed = 9;
  FaultInjectingReader c(client_->reader(), small_shape(), other);
  EXPECT_NE(statuses(b, copies_), statuses(c, copies_));
}

TEST_F(Adaptors, EveryCorruptionIsCaught) {
  FaultInjectingReader faulty(client_->reader(), small_shape(), {.seed = 5, .corrupt = 1});
  for (int round = 0; round < 20; ++round) {
    EXPECT_EQ(count(statuses(faulty, round % 2 == 0 ? copies_ : views_), BlockStatus::Corrupt),
              long(kBlocks));
  }
}

TEST_F(Adaptors, ADelayedBatchIsPendingFirstAndLostBeyondTheDeadline) {
  FaultInjectingReader slow(client_->reader(), small_shape(),
                            {.delayed = 1, .delay = milliseconds(60)});
  ReadTicket ticket = slow.read(ids_, copies_, patience());
  EXPECT_FALSE(BlockReader::poll(ticket));
  EXPECT_TRUE(eventually([&] { return BlockReader::poll(ticket); }));
  EXPECT_EQ(summarize(BlockReader::wait(ticket)).failed, 0u);

  slow.set({.delayed = 1, .delay = milliseconds(60000)});
  const auto start = std::chrono::steady_clock::now();
  const auto s = statuses(slow, copies_, Deadline::after(milliseconds(30)));
  EXPECT_EQ(count(s, BlockStatus::Lost), long(kBlocks));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));

  ReadTicket dropped = slow.read(ids_, copies_, patience());
  BlockReader::cancel(dropped);
  EXPECT_TRUE(BlockReader::poll(dropped));
  EXPECT_EQ(summarize(BlockReader::wait(dropped)).failed, size_t(kBlocks));
}

TEST_F(Adaptors, StatisticsAddUp) {
  auto faulty = std::make_shared<FaultInjectingReader>(
      client_->reader(), small_shape(),
      ReaderFaults{.seed = 4, .absent = 0.2, .lost = 0.1, .corrupt = 0.1});
  StatisticsReader counted(faulty, small_shape());
  const auto a = statuses(counted, copies_), b = statuses(counted, views_);
  const ReaderStatistics s = counted.statistics();
  EXPECT_EQ(s.batches, 2u);
  EXPECT_EQ(s.blocks, 2u * kBlocks);
  const auto both = [&](BlockStatus x) { return uint64_t(count(a, x) + count(b, x)); };
  EXPECT_EQ(s.ok, both(BlockStatus::Ok));
  EXPECT_EQ(s.absent, both(BlockStatus::Absent));
  EXPECT_EQ(s.corrupt, both(BlockStatus::Corrupt));
  EXPECT_EQ(s.lost, both(BlockStatus::Lost));
  const uint64_t block = 2 * small_shape().payload_bytes();
  EXPECT_EQ(s.copied_bytes, block * uint64_t(count(a, BlockStatus::Ok)));
  EXPECT_EQ(s.viewed_bytes, block * uint64_t(count(b, BlockStatus::Ok)));
}

TEST_F(Adaptors, SharesThatAreNoSharesAreRefused) {
  EXPECT_THROW(FaultInjectingReader(client_->reader(), small_shape(), {.absent = 1.5}), Error);
  EXPECT_THROW(FaultInjectingReader(client_->reader(), small_shape(), {.corrupt = -0.1}), Error);
  EXPECT_THROW(FaultInjectingReader(client_->reader(), small_shape(), {.delayed = 0.0 / 0.0}),
               Error);
}

}  // namespace
}  // namespace certkv::test
