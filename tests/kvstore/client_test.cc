// Sealing and reading through a holder that runs in a thread of this process.
#include "kvstore/client.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/digest.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

ReserveRequest request_of(uint32_t layers, uint32_t heads, uint32_t blocks) {
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  r.layers = layers;
  r.kv_heads = heads;
  r.blocks = blocks;
  return r;
}

template <typename Body>
std::string error_of(ErrorKind kind, Body body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(StoreClient, ReadsBackBitForBitWhatWasSealed) {
  ThreadHolder holder;
  auto client = holder.attach();
  ReserveRequest request = request_of(3, 2, 5);
  request.first_layer = 4;
  request.first_kv_head = 6;  // global indices: this rank holds heads 6 and 7
  request.first_block = 10;
  OriginalsSpan span = client->reserve(request);
  for (uint32_t l = 4; l < 7; ++l) {
    for (uint32_t h = 6; h < 8; ++h) {
      for (uint32_t b = 10; b < 15; ++b) seal_known(span, l, h, b);
    }
  }
  auto reader = client->reader();
  for (uint32_t l = 4; l < 7; ++l) {
    for (uint32_t h = 6; h < 8; ++h) {
      for (uint32_t b = 10; b < 15; ++b) {
        const Copied c = read_copy(*reader, span.id(l, h, b), request.shape);
        ASSERT_EQ(c.result.status, BlockStatus::Ok);
        EXPECT_EQ(c.result.tokens, 16);
        EXPECT_EQ(c.k, known_rows(request.shape, l, h, b, false));
        EXPECT_EQ(c.v, known_rows(request.shape, l, h, b, true));
      }
    }
  }
}

TEST(StoreClient, KeysAloneOrValuesAloneOrAViewAreAsGood) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 1));
  seal_known(span, 0, 0, 0);
  auto reader = client->reader();
  const BlockId id = span.id(0, 0, 0);
  const auto k = known_rows(small_shape(), 0, 0, 0, false);
  const auto v = known_rows(small_shape(), 0, 0, 0, true);
  const std::vector<uint16_t> untouched(small_shape().elements(), 0);
  const Copied keys = read_copy(*reader, id, small_shape(), BlockPart::K);
  EXPECT_EQ(keys.result.status, BlockStatus::Ok);
  EXPECT_EQ(keys.k, k);
  EXPECT_EQ(keys.v, untouched);
  EXPECT_EQ(keys.result.v, nullptr);
  const Copied values = read_copy(*reader, id, small_shape(), BlockPart::V);
  EXPECT_EQ(values.v, v);
  EXPECT_EQ(values.k, untouched);
  const Destination view{BlockPart::Both, true, nullptr, nullptr};
  ReadTicket ticket = reader->read({&id, 1}, {&view, 1}, patience());
  EXPECT_TRUE(BlockReader::poll(ticket));
  const BlockResult& r = BlockReader::wait(ticket)[0];
  ASSERT_EQ(r.status, BlockStatus::Ok);
  EXPECT_TRUE(std::equal(k.begin(), k.end(), r.k));
  EXPECT_TRUE(std::equal(v.begin(), v.end(), r.v));
  EXPECT_EQ(r.k_digest, payload_digest(k.data(), k.size() * 2));
}

TEST(StoreClient, APartialBlockHasZeroRowsBehindItsTokens) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 2));
  const auto k = known_rows(small_shape(), 0, 0, 0, false);
  const auto v = known_rows(small_shape(), 0, 0, 0, true);
  span.seal_block(0, 0, 0, k.data(), v.data(), 5);
  auto rows = span.rows(0, 0, 1);
  std::copy(k.begin(), k.end(), rows.k);
  std::copy(v.begin(), v.end(), rows.v);
  span.seal_in_place(0, 0, 1, 5);
  auto expected = k;
  std::fill(expected.begin() + 5 * 64, expected.end(), uint16_t(0));
  for (uint32_t b = 0; b < 2; ++b) {
    const Copied c = read_copy(*client->reader(), span.id(0, 0, b), small_shape());
    ASSERT_EQ(c.result.status, BlockStatus::Ok);
    EXPECT_EQ(c.result.tokens, 5);
    EXPECT_EQ(c.k, expected);
  }
}

TEST(StoreClient, AnUnsealedBlockIsAbsentAndASealedOneNeverChanges) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 2));
  EXPECT_FALSE(span.sealed(0, 0, 1));
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 0, 1), small_shape()).result.status,
            BlockStatus::Absent);
  seal_known(span, 0, 0, 1);
  EXPECT_TRUE(span.sealed(0, 0, 1));
  error_of(ErrorKind::InvalidArgument, [&] { seal_known(span, 0, 0, 1); });
  error_of(ErrorKind::InvalidArgument, [&] { span.rows(0, 0, 1); });
  error_of(ErrorKind::InvalidArgument, [&] { seal_known(span, 0, 0, 2); });
  error_of(ErrorKind::InvalidArgument, [&] { seal_known(span, 0, 1, 0); });
  error_of(ErrorKind::InvalidArgument, [&] { seal_known(span, 1, 0, 0); });
  error_of(ErrorKind::InvalidArgument, [&] { span.id(0, 0, 0xffffffff); });
  const auto k = known_rows(small_shape(), 0, 0, 0, false);
  error_of(ErrorKind::InvalidArgument, [&] { span.seal_block(0, 0, 0, k.data(), k.data(), 0); });
  error_of(ErrorKind::InvalidArgument, [&] { span.seal_block(0, 0, 0, k.data(), k.data(), 17); });
}

TEST(StoreClient, AnIdThatDiffersInAnyFieldIsAMiss) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(2, 2, 2));
  for (uint32_t i = 0; i < 8; ++i) seal_known(span, i / 4, i / 2 % 2, i % 2);
  auto reader = client->reader();
  const BlockId good = span.id(0, 0, 0);
  ASSERT_EQ(read_copy(*reader, good, small_shape()).result.status, BlockStatus::Ok);
  const auto miss = [&](auto change) {
    BlockId id = good;
    change(id);
    EXPECT_EQ(read_copy(*reader, id, small_shape()).result.status, BlockStatus::Absent);
  };
  miss([](BlockId& id) { ++id.boot_nonce; });
  miss([](BlockId& id) { ++id.owner.hi; });
  miss([](BlockId& id) { ++id.owner.lo; });
  miss([](BlockId& id) { id.layer = 2; });
  miss([](BlockId& id) { id.kv_head = 2; });
  miss([](BlockId& id) { id.block = 2; });
  miss([](BlockId& id) { ++id.version; });
  miss([](BlockId& id) { id.version = 0; });
}

TEST(StoreClient, AReservationOfTheSameOwnerInFreedSpaceIsAnotherGeneration) {
  ThreadHolder holder(uint64_t(64) << 10);
  auto client = holder.attach();
  const ReserveRequest request = request_of(1, 1, 2);
  OriginalsSpan span = client->reserve(request);
  seal_known(span, 0, 0, 0);
  const BlockId stale = span.id(0, 0, 0);
  span.reset();
  EXPECT_EQ(read_copy(*client->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
  OriginalsSpan again = client->reserve(request);
  EXPECT_FALSE(again.sealed(0, 0, 0)) << "freed blocks are zeroed";
  seal_known(again, 0, 0, 0);
  EXPECT_NE(again.id(0, 0, 0), stale);
  EXPECT_EQ(read_copy(*client->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
  EXPECT_EQ(read_copy(*client->reader(), again.id(0, 0, 0), small_shape()).result.status,
            BlockStatus::Ok);
}

// Damage through a second mapping, as hardware would do it: every bit of header and payload.
TEST(StoreClient, EveryFlippedBitOfASealedBlockIsNoticed) {
  ThreadHolder holder(uint64_t(64) << 10);
  auto client = holder.attach();
  const BlockShape shape{DType::F16, 2, 64};
  ReserveRequest request = request_of(1, 1, 1);
  request.shape = shape;
  OriginalsSpan span = client->reserve(request);
  const std::vector<uint16_t> k(shape.elements(), 0x3c00), v(shape.elements(), 0);
  auto* slot = reinterpret_cast<unsigned char*>(span.rows(0, 0, 0).k) - kBlockHeaderBytes;
  span.seal_block(0, 0, 0, k.data(), v.data());
  auto reader = client->reader();
  const BlockId id = span.id(0, 0, 0);
  const size_t bits = 8 * shape.slot_bytes();
  const std::vector<unsigned char> before(slot, slot + shape.slot_bytes());
  for (size_t bit = 0; bit < bits; ++bit) {
    slot[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
    ASSERT_EQ(read_copy(*reader, id, shape).result.status, BlockStatus::Corrupt) << "bit " << bit;
    slot[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
  }
  // Keys alone do not see damage to values, and the other way round; views see what copies see.
  const Destination view{BlockPart::Both, true, nullptr, nullptr};
  slot[shape.v_offset()] ^= 1;
  EXPECT_EQ(read_copy(*reader, id, shape, BlockPart::K).result.status, BlockStatus::Ok);
  EXPECT_EQ(read_copy(*reader, id, shape, BlockPart::V).result.status, BlockStatus::Corrupt);
  ReadTicket ticket = reader->read({&id, 1}, {&view, 1}, patience());
  EXPECT_EQ(BlockReader::wait(ticket)[0].status, BlockStatus::Corrupt);
  EXPECT_EQ(BlockReader::wait(ticket)[0].k, nullptr);
  slot[shape.v_offset()] ^= 1;
  EXPECT_TRUE(std::equal(before.begin(), before.end(), slot));
  EXPECT_EQ(read_copy(*reader, id, shape).result.status, BlockStatus::Ok);
}

// A header that is consistent in itself but belongs elsewhere: a block copied over another one.
TEST(StoreClient, AWholeBlockInTheWrongPlaceIsAMiss) {
  ThreadHolder holder(uint64_t(256) << 10);
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 2, 1));
  auto* first = reinterpret_cast<unsigned char*>(span.rows(0, 0, 0).k) - kBlockHeaderBytes;
  auto* second = reinterpret_cast<unsigned char*>(span.rows(0, 1, 0).k) - kBlockHeaderBytes;
  seal_known(span, 0, 0, 0);
  seal_known(span, 0, 1, 0);
  std::copy(first, first + small_shape().slot_bytes(), second);
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 1, 0), small_shape()).result.status,
            BlockStatus::Absent);
}

// The writer's fencing token is part of what is checked, even where the identity is the same.
TEST(StoreClient, ABlockOfAnotherSessionsWriterIsAMiss) {
  ThreadHolder holder(uint64_t(256) << 10);
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 1));
  auto* slot = reinterpret_cast<unsigned char*>(span.rows(0, 0, 0).k) - kBlockHeaderBytes;
  seal_known(span, 0, 0, 0);
  BlockHeader header;
  std::memcpy(&header, slot, sizeof header);
  ++header.fence;
  header.seal = block_seal(header);
  std::memcpy(slot, &header, sizeof header);
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 0, 0), small_shape()).result.status,
            BlockStatus::Absent);
}

TEST(StoreClient, ForksShareThePrefixAndTheLastOneFreesIt) {
  ThreadHolder holder;
  auto client = holder.attach();
  const uint64_t before = client->capacity().free_bytes;
  OriginalsSpan prefix = client->reserve(request_of(1, 1, 8));
  for (uint32_t b = 0; b < 8; ++b) seal_known(prefix, 0, 0, b);
  OriginalsSpan fork = prefix;
  ReserveRequest own = request_of(1, 1, 4);
  own.first_block = 8;
  OriginalsSpan tail = client->reserve(own);
  seal_known(tail, 0, 0, 8);
  EXPECT_LT(client->capacity().free_bytes, before);
  const BlockId id = prefix.id(0, 0, 3);
  prefix.reset();
  EXPECT_EQ(read_copy(*client->reader(), id, small_shape()).result.status, BlockStatus::Ok);
  fork.reset();
  EXPECT_EQ(read_copy(*client->reader(), id, small_shape()).result.status, BlockStatus::Absent);
  EXPECT_EQ(read_copy(*client->reader(), tail.id(0, 0, 8), small_shape()).result.status,
            BlockStatus::Ok);
  tail = OriginalsSpan();
  EXPECT_EQ(client->capacity().free_bytes, before);
}

TEST(StoreClient, AFullArenaSaysHowMuchIsMissingAndTakesNothing) {
  ThreadHolder holder(uint64_t(1) << 20);
  auto client = holder.attach();
  const StoreCapacity before = client->capacity();
  EXPECT_EQ(before.total_bytes, (uint64_t(1) << 20) - 4096);
  EXPECT_EQ(before.free_bytes, before.total_bytes);
  const std::string text =
      error_of(ErrorKind::OutOfMemory, [&] { client->reserve(request_of(4, 4, 64)); });
  EXPECT_NE(text.find("store.arena"), std::string::npos) << text;
  EXPECT_EQ(client->capacity().free_bytes, before.free_bytes);
  const ReserveRequest fits = request_of(1, 2, 32);
  EXPECT_EQ(reservation_bytes(fits) % 4096, 0u);
  OriginalsSpan span = client->reserve(fits);
  EXPECT_EQ(client->capacity().free_bytes, before.free_bytes - reservation_bytes(fits));
}

TEST(StoreClient, OverlappingReservationsOfOneOwnerAreRefusedAndTakeNothing) {
  ThreadHolder holder;
  auto client = holder.attach();
  ReserveRequest request = request_of(2, 2, 4);
  OriginalsSpan span = client->reserve(request);
  const uint64_t free_bytes = client->capacity().free_bytes;
  error_of(ErrorKind::InvalidArgument, [&] { client->reserve(request); });
  ReserveRequest corner = request;
  corner.first_layer = 1, corner.first_kv_head = 1, corner.first_block = 3;
  error_of(ErrorKind::InvalidArgument, [&] { client->reserve(corner); });
  EXPECT_EQ(client->capacity().free_bytes, free_bytes);
  ReserveRequest next = request;
  next.first_block = 4;
  OriginalsSpan more = client->reserve(next);
  seal_known(more, 1, 1, 7);
  EXPECT_EQ(read_copy(*client->reader(), more.id(1, 1, 7), small_shape()).result.status,
            BlockStatus::Ok);
}

TEST(StoreClient, AfterDetachingEverySpanIsUselessAndHarmless) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 2));
  seal_known(span, 0, 0, 0);
  auto reader = client->reader();
  client->detach();
  client->detach();
  EXPECT_EQ(read_copy(*reader, span.id(0, 0, 0), small_shape()).result.status, BlockStatus::Lost);
  error_of(ErrorKind::StoreLost, [&] { seal_known(span, 0, 0, 1); });
  error_of(ErrorKind::StoreLost, [&] { client->reserve(request_of(1, 1, 1)); });
  error_of(ErrorKind::StoreLost, [&] { client->capacity(); });
  auto other = holder.attach();
  EXPECT_EQ(other->capacity().free_bytes, other->capacity().total_bytes);
}

TEST(StoreClient, TheEndOfTheStoreIsNoticedWithinASecondAndOriginalsStayReadable) {
  auto holder = std::make_unique<ThreadHolder>();
  auto client = holder->attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 2));
  seal_known(span, 0, 0, 0);
  EXPECT_FALSE(client->lost());
  client->throw_if_lost();
  const auto start = std::chrono::steady_clock::now();
  holder.reset();
  ASSERT_TRUE(eventually([&] { return client->lost(); }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1) * kDeadlineFactor);
  EXPECT_NE(client->lost_reason().find("lost"), std::string::npos) << client->lost_reason();
  error_of(ErrorKind::StoreLost, [&] { client->throw_if_lost(); });
  error_of(ErrorKind::StoreLost, [&] { seal_known(span, 0, 0, 1); });
  error_of(ErrorKind::StoreLost, [&] { client->reserve(request_of(1, 1, 1)); });
  const Copied c = read_copy(*client->reader(), span.id(0, 0, 0), small_shape());
  EXPECT_EQ(c.result.status, BlockStatus::Ok) << "this rank's mapping outlives the store";
  EXPECT_EQ(c.k, known_rows(small_shape(), 0, 0, 0, false));
  BlockId elsewhere = span.id(0, 0, 0);
  ++elsewhere.owner.lo;
  EXPECT_EQ(read_copy(*client->reader(), elsewhere, small_shape()).result.status,
            BlockStatus::Lost);
}

TEST(StoreClient, WrongCallsOfTheReaderAreNamed) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, 1));
  auto reader = client->reader();
  const BlockId id = span.id(0, 0, 0);
  std::vector<uint16_t> rows(small_shape().elements());
  const Destination no_v{BlockPart::Both, false, rows.data(), nullptr};
  error_of(ErrorKind::InvalidArgument, [&] { reader->read({&id, 1}, {&no_v, 1}, patience()); });
  error_of(ErrorKind::InvalidArgument, [&] { reader->read({&id, 1}, {}, patience()); });
  const Destination nothing{BlockPart(0), true, nullptr, nullptr};
  error_of(ErrorKind::InvalidArgument, [&] { reader->read({&id, 1}, {&nothing, 1}, patience()); });
  ReadTicket empty = reader->read({}, {}, patience());
  EXPECT_TRUE(BlockReader::wait(empty).empty());
}

// Writers seal while readers poll and others reserve and release; run under TSan as well.
TEST(StoreClient, ConcurrentWritersAndReadersSeeWholeBlocksOrNone) {
  ThreadHolder holder;
  auto client = holder.attach();
  constexpr uint32_t kHeads = 3, kBlocks = 24;
  OriginalsSpan span = client->reserve(request_of(1, kHeads, kBlocks));
  auto reader = client->reader();
  std::atomic<bool> done{false};
  std::atomic<uint64_t> wrong{0}, seen{0};
  std::vector<std::thread> threads;
  for (uint32_t h = 0; h < kHeads; ++h) {
    threads.emplace_back([&, h, mine = span]() mutable {
      for (uint32_t b = 0; b < kBlocks; ++b) seal_known(mine, 0, h, b);
    });
  }
  std::vector<std::thread> watchers;
  for (int t = 0; t < 2; ++t) {
    watchers.emplace_back([&] {
      while (!done) {
        for (uint32_t i = 0; i < kHeads * kBlocks; ++i) {
          const uint32_t h = i % kHeads, b = i / kHeads;
          const Copied c = read_copy(*reader, span.id(0, h, b), small_shape());
          if (c.result.status == BlockStatus::Absent) continue;
          ++seen;
          if (c.result.status != BlockStatus::Ok ||
              c.k != known_rows(small_shape(), 0, h, b, false)) {
            ++wrong;
          }
        }
      }
    });
  }
  watchers.emplace_back([&] {
    while (!done) {
      OriginalsSpan other = client->reserve(request_of(1, 1, 2));
      seal_known(other, 0, 0, 1);
    }
  });
  for (auto& t : threads) t.join();
  ASSERT_TRUE(eventually([&] { return seen >= kHeads * kBlocks; }));
  done = true;
  for (auto& t : watchers) t.join();
  EXPECT_EQ(wrong, 0u);
}

TEST(StoreClient, ALargeBatchReadsAWholeHead) {
  constexpr uint32_t kBlocks = 2048;
  ThreadHolder holder(uint64_t(16) << 20);
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(request_of(1, 1, kBlocks));
  std::vector<uint16_t> row(small_shape().elements());
  std::vector<BlockId> ids;
  for (uint32_t b = 0; b < kBlocks; ++b) {
    std::fill(row.begin(), row.end(), uint16_t(b));
    span.seal_block(0, 0, b, row.data(), row.data());
    ids.push_back(span.id(0, 0, b));
  }
  std::vector<uint16_t> k(kBlocks * row.size()), v(k.size());
  std::vector<Destination> to;
  for (uint32_t b = 0; b < kBlocks; ++b) {
    to.push_back({BlockPart::Both, false, &k[b * row.size()], &v[b * row.size()]});
  }
  ids[77].version += 1;
  ReadTicket ticket = client->reader()->read(ids, to, patience());
  const auto results = BlockReader::wait(ticket);
  const ReadSummary s = summarize(results);
  EXPECT_EQ(s.failed, 1u);
  EXPECT_EQ(s.first, 77u);
  for (uint32_t b = 0; b < kBlocks; ++b) {
    ASSERT_EQ(k[(b + 1) * row.size() - 1], b == 77 ? 0 : b);
  }
}

}  // namespace
}  // namespace certkv::test
