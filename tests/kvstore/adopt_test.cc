// Originals that outlive whoever sealed them: counted holders, orphans, misses.
#include <gtest/gtest.h>

#include <random>

#include "kernels/base/error.h"
#include "kvstore/content_owner.h"
#include "kvstore/extent_table.h"
#include "tests/kvstore/raw_client.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

ReserveRequest shared_request(uint32_t layers, uint32_t heads, uint32_t blocks) {
  ReserveRequest r;
  r.owner = lasting_owner();
  r.shape = small_shape();
  r.layers = layers;
  r.kv_heads = heads;
  r.blocks = blocks;
  return r;
}

void seal_all(OriginalsSpan& span) {
  const ReserveRequest& r = span.request();
  for (uint32_t l = 0; l < r.layers; ++l)
    for (uint32_t h = 0; h < r.kv_heads; ++h)
      for (uint32_t b = 0; b < r.blocks; ++b)
        seal_known(span, r.first_layer + l, r.first_kv_head + h, r.first_block + b);
}

void expect_readable(StoreClient& client, const OriginalsSpan& span) {
  const ReserveRequest& r = span.request();
  for (uint32_t l = r.first_layer; l < r.first_layer + r.layers; ++l)
    for (uint32_t h = r.first_kv_head; h < r.first_kv_head + r.kv_heads; ++h)
      for (uint32_t b = r.first_block; b < r.first_block + r.blocks; ++b) {
        const Copied c = read_copy(*client.reader(), span.id(l, h, b), r.shape);
        ASSERT_EQ(c.result.status, BlockStatus::Ok);
        ASSERT_EQ(c.k, known_rows(r.shape, l, h, b, false));
        ASSERT_EQ(c.v, known_rows(r.shape, l, h, b, true));
      }
}

template <typename Body>
void expect_error(ErrorKind kind, Body body) {
  try {
    body();
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
  }
}

TEST(Adopt, AnotherSessionReadsWhatIsSealedAndCannotWrite) {
  ThreadHolder holder;
  auto writer = holder.attach(), other = holder.attach(1);
  OriginalsSpan span = writer->reserve(shared_request(2, 2, 3));
  seal_known(span, 0, 0, 0);
  OriginalsSpan mine = other->adopt(span.request());
  ASSERT_FALSE(mine.empty());
  EXPECT_TRUE(mine.adopted());
  EXPECT_EQ(mine.version(), span.version());
  EXPECT_FALSE(mine.sealed_throughout());
  EXPECT_EQ(read_copy(*other->reader(), mine.id(0, 0, 0), small_shape()).k,
            known_rows(small_shape(), 0, 0, 0, false));
  EXPECT_EQ(read_copy(*other->reader(), mine.id(1, 1, 2), small_shape()).result.status,
            BlockStatus::Absent);
  expect_error(ErrorKind::InvalidArgument, [&] { seal_known(mine, 1, 1, 2); });
  expect_error(ErrorKind::InvalidArgument, [&] { mine.rows(1, 1, 2); });
  seal_known(span, 1, 1, 2);  // its writer goes on, and what it seals is seen
  EXPECT_EQ(read_copy(*other->reader(), mine.id(1, 1, 2), small_shape()).result.status,
            BlockStatus::Ok);
}

TEST(Adopt, APartHasTheBlocksOfItsRanges) {
  ThreadHolder holder;
  auto writer = holder.attach(), other = holder.attach(1);
  ReserveRequest all = shared_request(4, 3, 8);
  all.first_layer = 2, all.first_kv_head = 5, all.first_block = 16;
  OriginalsSpan span = writer->reserve(all);
  seal_all(span);
  ReserveRequest part = all;
  part.first_layer = 3, part.layers = 2;
  part.first_kv_head = 6, part.kv_heads = 2;
  part.first_block = 19, part.blocks = 4;
  OriginalsSpan mine = other->adopt(part);
  ASSERT_FALSE(mine.empty());
  EXPECT_TRUE(mine.sealed_throughout());
  expect_readable(*other, mine);
  EXPECT_THROW(mine.id(2, 6, 19), Error);
}

TEST(Adopt, WhatDiffersIsAMiss) {
  ThreadHolder holder;
  auto client = holder.attach();
  OriginalsSpan span = client->reserve(shared_request(2, 2, 4));
  const ReserveRequest& is = span.request();
  EXPECT_FALSE(client->adopt(is).empty());
  ReserveRequest r = is;
  r.owner.lo ^= 1;
  EXPECT_TRUE(client->adopt(r).empty());
  r = is, r.shape.dtype = DType::F16;
  EXPECT_TRUE(client->adopt(r).empty());
  r = is, r.shape.block_tokens = 32, r.blocks = 1;
  EXPECT_TRUE(client->adopt(r).empty());
  r = is, r.first_block = 1;
  EXPECT_TRUE(client->adopt(r).empty());
  r = is, r.first_kv_head = 1;
  EXPECT_TRUE(client->adopt(r).empty());
  r = is, r.layers = 3;
  EXPECT_TRUE(client->adopt(r).empty());
  EXPECT_TRUE(client->adopt(is, span.version()).empty());
  r = is, r.owner = private_owner();
  expect_error(ErrorKind::InvalidArgument, [&] { client->adopt(r); });
}

TEST(Adopt, OlderReservationsOfAnOwnerCanBeAskedForToo) {
  ThreadHolder holder;
  auto a = holder.attach(), b = holder.attach(1), c = holder.attach(2);
  const ReserveRequest r = shared_request(1, 1, 2);
  OriginalsSpan first = a->reserve(r);
  seal_all(first);
  OriginalsSpan second = b->reserve(r);
  OriginalsSpan newest = c->adopt(r);
  EXPECT_EQ(newest.version(), second.version());
  OriginalsSpan older = c->adopt(r, newest.version());
  EXPECT_EQ(older.version(), first.version());
  EXPECT_TRUE(older.sealed_throughout());
  expect_readable(*c, older);
  EXPECT_EQ(read_copy(*c->reader(), newest.id(0, 0, 0), r.shape).result.status,
            BlockStatus::Absent);
}

TEST(Adopt, SpaceStaysUntilTheLastHolderIsGone) {
  ThreadHolder holder;
  auto writer = holder.attach(), one = holder.attach(1), two = holder.attach(2);
  const uint64_t all = writer->capacity().free_bytes;
  OriginalsSpan span = writer->reserve(shared_request(1, 1, 4));
  seal_all(span);
  OriginalsSpan first = one->adopt(span.request()), again = one->adopt(span.request());
  OriginalsSpan second = two->adopt(span.request());
  span.reset();
  first.reset();
  two.reset();  // detaches
  EXPECT_LT(one->capacity().free_bytes, all);
  expect_readable(*one, again);
  again.reset();
  EXPECT_TRUE(eventually([&] { return writer->capacity().free_bytes == all; }))
      << "nobody asked to keep it";
}

TEST(Adopt, WhatIsKeptIsFoundAgainUntilSomebodyNeedsTheRoomOldestFirst) {
  ThreadHolder holder(uint64_t(1) << 20);
  auto client = holder.attach();
  const ReserveRequest a = shared_request(1, 1, 32), b = shared_request(1, 1, 32);
  for (const ReserveRequest& r : {a, b}) {
    OriginalsSpan span = client->reserve(r);
    seal_all(span);
    span.keep();
  }
  for (const ReserveRequest& r : {b, a}) {  // whoever came last is the newest orphan: a
    OriginalsSpan found = client->adopt(r);
    ASSERT_FALSE(found.empty());
    expect_readable(*client, found);
  }
  const BlockId stale = [&] { return client->adopt(b).id(0, 0, 0); }();
  { OriginalsSpan touch = client->adopt(a); }
  ReserveRequest large = shared_request(1, 1, 32 * 2);
  large.owner = private_owner();
  large.blocks = uint32_t(client->capacity().free_bytes / small_shape().slot_bytes()) + 1;
  OriginalsSpan taken = client->reserve(large);  // no grace: at once
  EXPECT_TRUE(client->adopt(b).empty());
  EXPECT_FALSE(client->adopt(a).empty());
  EXPECT_EQ(read_copy(*client->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
}

// Between finding an owner and reading its blocks the store may give the space away.
TEST(Adopt, EvictionBetweenLookupAndReadIsAMiss) {
  ThreadHolder holder(uint64_t(1) << 20);
  auto client = holder.attach(), other = holder.attach(1);
  const ReserveRequest r = shared_request(1, 1, 16);
  OriginalsSpan span = client->reserve(r);
  seal_all(span);
  span.keep();
  const BlockId id = span.id(0, 0, 3);
  span.reset();
  ReserveRequest all = shared_request(1, 1, 1);
  all.owner = private_owner();
  all.blocks = uint32_t(client->capacity().total_bytes / small_shape().slot_bytes());
  OriginalsSpan taken = other->reserve(all);
  for (uint32_t b = 0; b < all.blocks; ++b) seal_known(taken, 0, 0, b);
  EXPECT_TRUE(client->adopt(r).empty());
  EXPECT_EQ(read_copy(*client->reader(), id, small_shape()).result.status, BlockStatus::Absent);
  EXPECT_EQ(read_copy(*other->reader(), id, small_shape()).result.status, BlockStatus::Absent);
}

TEST(Adopt, WhatAnAdopterHoldsIsNotEvicted) {
  ThreadHolder holder(uint64_t(1) << 20);
  auto client = holder.attach();
  const ReserveRequest r = shared_request(1, 1, 16);
  OriginalsSpan span = client->reserve(r);
  seal_all(span);
  span.keep();
  OriginalsSpan held = client->adopt(r);
  span.reset();
  ReserveRequest all = shared_request(1, 1, 1);
  all.owner = private_owner();
  all.blocks = uint32_t(client->capacity().total_bytes / small_shape().slot_bytes());
  expect_error(ErrorKind::OutOfMemory, [&] { client->reserve(all); });
  expect_readable(*client, held);
}

TEST(Adopt, ADamagedBlockIsFoundByItsDigest) {
  ThreadHolder holder;
  auto writer = holder.attach(), other = holder.attach(1);
  OriginalsSpan span = writer->reserve(shared_request(1, 1, 2));
  seal_all(span);
  OriginalsSpan mine = other->adopt(span.request());
  auto* slot = const_cast<std::byte*>(span.run(0, 0));
  slot[small_shape().v_offset() + 77] ^= std::byte(4);
  EXPECT_EQ(read_copy(*other->reader(), mine.id(0, 0, 0), small_shape()).result.status,
            BlockStatus::Corrupt);
  EXPECT_EQ(read_copy(*other->reader(), mine.id(0, 0, 1), small_shape()).result.status,
            BlockStatus::Ok);
}

// A writer that was taken for dead and wakes writes into its own reservation, which nobody else
// writes: its successor's blocks are elsewhere, under another version.
TEST(Adopt, ASuccessorsBlocksLieWhereTheOldWriterHasNoPointer) {
  ThreadHolder holder;
  auto old = holder.attach(), next = holder.attach(1);
  const ReserveRequest r = shared_request(1, 1, 4);
  OriginalsSpan theirs = old->reserve(r);
  seal_known(theirs, 0, 0, 0);
  OriginalsSpan adopted = next->adopt(r);
  ReserveRequest rest = r;
  rest.first_block = 1, rest.blocks = 3;
  OriginalsSpan mine = next->reserve(rest);
  seal_known(mine, 0, 0, 1);
  seal_known(theirs, 0, 0, 1);  // woken
  EXPECT_NE(mine.id(0, 0, 1), adopted.id(0, 0, 1));
  EXPECT_EQ(read_copy(*next->reader(), mine.id(0, 0, 1), r.shape).result.status, BlockStatus::Ok);
  const std::byte *a = mine.run(0, 0), *b = theirs.run(0, 0);
  EXPECT_TRUE(a + 3 * r.shape.slot_bytes() <= b || b + 4 * r.shape.slot_bytes() <= a);
}

TEST(Adopt, MalformedRequestsEndTheConnectionOrAreRefusedAndTakeNoHold) {
  ThreadHolder holder;
  auto writer = holder.attach();
  const uint64_t all = writer->capacity().free_bytes;
  OriginalsSpan span = writer->reserve(shared_request(1, 1, 2));
  const auto request_of = [&](auto change) {
    AdoptRequest a;
    a.ranges = {span.request().owner, 0, 1, 0, 1, 0, 2, uint16_t(DType::BF16), 16, 64, 0};
    change(a);
    return a;
  };
  std::mt19937 random(3);
  {
    RawClient c(holder.socket());
    const uint64_t session = c.attach();
    uint64_t sequence = 1;
    FrameHeader h;
    std::vector<std::byte> payload;
    for (int i = 0; i < 300; ++i) {
      const AdoptRequest a = request_of([&](AdoptRequest& x) {
        auto* words = reinterpret_cast<uint32_t*>(&x);
        words[4 + random() % 6] = uint32_t(random()) >> random() % 32;  // a range
        if (i % 3 == 0) words[random() % 4] = uint32_t(random());       // the owner
      });
      c.send_bytes(make_frame(uint16_t(ControlOp::Adopt), ControlStatus::Ok, ++sequence, session,
                              payload_of(a)));
      ASSERT_TRUE(c.receive_frame(h, payload)) << i;
      if (h.status != 0) continue;  // else it fits by chance
      AdoptReply head;
      ASSERT_GE(payload.size(), sizeof head);
      std::memcpy(&head, payload.data(), sizeof head);
      EXPECT_EQ(head.part.version, span.version());
      EXPECT_EQ(payload.size(), sizeof head + 8 * head.part.runs);
    }
    const AdoptRequest bad = request_of([](AdoptRequest& x) { x.reserved = 1; });
    c.send_bytes(make_frame(uint16_t(ControlOp::Adopt), ControlStatus::Ok, ++sequence, session,
                            payload_of(bad)));
    EXPECT_TRUE(c.closed_by_peer());
  }
  span.reset();
  EXPECT_TRUE(eventually([&] { return writer->capacity().free_bytes == all; }));
}

TEST(AdoptTable, AccountsAddUpUnderRandomHoldersDeathsAndDetaches) {
  constexpr uint64_t kBytes = uint64_t(1) << 20;
  std::mt19937 random(17);
  // An oracle of its own: per reservation, how often each session holds it.
  struct Known {
    OwnerId owner;
    bool keep = false;
    std::map<uint64_t, int> holds;
  };
  const auto request = [](OwnerId owner) {
    return AllocateRequest{owner, 0, 1, 0, 1, 0, 1, uint16_t(DType::BF16), 16, 64, 0};
  };
  constexpr uint64_t session = 1;
  size_t adopted = 0;
  for (int round = 0; round < 50; ++round) {
    ExtentTable table(4096, kBytes, [](Piece) {});
    table.set_grace(std::chrono::hours(1));
    std::map<uint32_t, Known> known;
    std::set<uint32_t> orphans;
    // Until the arena might be full, so that nothing is evicted.
    for (int turn = 0; turn < 300 && known.size() < kBytes / 8192; ++turn) {
      const uint64_t who = session + random() % 4;
      const OwnerId owner{uint64_t(random() % 4 != 0) << 63, 1 + random() % 3};
      switch (random() % 6) {
        case 0:
        case 1: {
          const auto got = table.allocate(who, request(owner));
          if (!got) break;
          known[got->version] = {owner, false, {{who, 1}}};
          break;
        }
        case 2: {
          if (!owner.is_content()) break;
          const auto got = table.adopt(who, {request(owner), 0, 0});
          uint32_t newest = 0;
          for (const auto& [version, k] : known)
            if (k.owner == owner) newest = version;
          ASSERT_EQ(got ? got->version : 0, newest);
          if (newest == 0) break;
          ++adopted;
          ++known[newest].holds[who];
          orphans.erase(newest);
          break;
        }
        case 3: {
          if (known.empty()) break;
          const auto at = std::next(known.begin(), ptrdiff_t(random() % known.size()));
          const bool keep = random() % 2 == 0, held = at->second.holds.contains(who);
          ASSERT_EQ(table.release(who, at->first, keep), held);
          if (!held) break;
          at->second.keep |= keep && at->second.owner.is_content();
          if (--at->second.holds[who] == 0) at->second.holds.erase(who);
          if (!at->second.holds.empty()) break;
          if (at->second.keep)
            orphans.insert(at->first);
          else
            known.erase(at);
          break;
        }
        default: {
          if (random() % 20 != 0) break;
          const bool dies = random() % 2 == 0;
          dies ? table.orphan_session(who, ExtentTable::Clock::now())
               : table.release_session(who, ExtentTable::Clock::now());
          for (auto at = known.begin(); at != known.end();) {
            const bool held = at->second.holds.erase(who) != 0;
            if (held && at->second.holds.empty()) {
              if (!dies && !at->second.owner.is_content()) {
                at = known.erase(at);
                continue;
              }
              orphans.insert(at->first);
            }
            ++at;
          }
        }
      }
      ASSERT_EQ(table.reservations(), known.size());
      ASSERT_EQ(table.orphans(), orphans.size());
      ASSERT_EQ(table.free_bytes(), kBytes - known.size() * 8192);
    }
  }
  EXPECT_GT(adopted, 100u);
}

}  // namespace
}  // namespace certkv::test
