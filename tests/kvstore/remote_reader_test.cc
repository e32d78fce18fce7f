// Reading another node's store: the server's answers, the checks on the reader's side, and falling
// back from one copy to the next. Nodes are holders in threads, the network is in this process; the
// same over UCX and with real processes is in server_process_test.cc.
#include "kvstore/remote_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "kernels/base/error.h"
#include "kvstore/fallback_reader.h"
#include "kvstore/server/block_server.h"
#include "kvstore/server/wire.h"
#include "kvstore/tier_adaptors.h"
#include "parallel/local_transport.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// A node: its holder, the session of its server, and the server.
struct Node {
  Node(const std::shared_ptr<LocalNetwork>& network, const JobKey& key,
       const std::string& listen = "local:0")
      : session(holder.attach(7)),
        server(std::make_shared<BlockDirectory>(session, milliseconds(0))) {
    TransportOptions o;
    o.listen = listen;
    o.silence = milliseconds(600);
    o.heartbeat = milliseconds(100);
    transport = network->make(key, o, [this](const TransportRequest& q, TransportReply& r) {
      TransportHandler instead;
      {
        const std::lock_guard lock(mutex);
        instead = tamper;
      }
      if (instead) return instead(q, r);
      server.read(q, r);
    });
  }
  void answer_by(TransportHandler handler) {
    const std::lock_guard lock(mutex);
    tamper = std::move(handler);
  }
  ThreadHolder holder;
  std::shared_ptr<StoreClient> session;
  BlockServer server;
  std::mutex mutex;
  TransportHandler tamper;  // guarded by it
  std::unique_ptr<Transport> transport;
};

class Remote : public testing::Test {
 protected:
  Remote() : node(network, key), writer(node.holder.attach(0)) {
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = small_shape();
    r.first_layer = 3;
    r.layers = 2;
    r.kv_heads = 2;
    r.blocks = 40;
    span = writer->reserve(r);
    for (uint32_t l = 3; l < 5; ++l) {
      for (uint32_t h = 0; h < 2; ++h) {
        for (uint32_t b = 0; b < 39; ++b) {  // the last one stays unsealed
          seal_known(span, l, h, b);
          ids.push_back(span.id(l, h, b));
        }
      }
    }
    TransportOptions o;
    o.silence = milliseconds(600);
    o.heartbeat = milliseconds(100);
    client = network->make(key, o, [](const TransportRequest&, TransportReply&) {});
    peer = std::make_shared<RemotePeer>(client, node.transport->address());
  }

  RemoteReader reader(RemoteReaderOptions options = {}) {
    return RemoteReader(peer, small_shape(), options);
  }

  const JobKey key = JobKey::generate();
  std::shared_ptr<LocalNetwork> network = LocalNetwork::create();
  Node node;
  std::shared_ptr<StoreClient> writer;
  OriginalsSpan span;
  std::vector<BlockId> ids;
  std::shared_ptr<Transport> client;
  std::shared_ptr<RemotePeer> peer;
};

struct Buffers {
  explicit Buffers(size_t n, BlockPart part = BlockPart::Both)
      : k(n * small_shape().elements(), 0x5555), v(k) {
    for (size_t i = 0; i < n; ++i) {
      const size_t at = i * small_shape().elements();
      destinations.push_back({part, false, &k[at], &v[at]});
    }
  }
  std::vector<uint16_t> k, v;
  std::vector<Destination> destinations;
};

bool same(const BlockId& id, const BlockResult& r) {
  const BlockShape shape = small_shape();
  const auto k = known_rows(shape, id.layer, id.kv_head, id.block, false);
  const auto v = known_rows(shape, id.layer, id.kv_head, id.block, true);
  return r.k != nullptr && r.v != nullptr && std::equal(k.begin(), k.end(), r.k) &&
         std::equal(v.begin(), v.end(), r.v);
}

TEST_F(Remote, BlocksArriveBitForBitHoweverABatchIsCut) {
  for (const RemoteReaderOptions& o : {RemoteReaderOptions{1, 1, 4}, RemoteReaderOptions{7, 3, 4},
                                       RemoteReaderOptions{1024, 8, 4}}) {
    Buffers b(ids.size());
    RemoteReader r = reader(o);
    ReadTicket ticket = r.read(ids, b.destinations, patience());
    const auto got = BlockReader::wait(ticket);
    ASSERT_EQ(got.size(), ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_EQ(got[i].status, BlockStatus::Ok);
      ASSERT_TRUE(same(ids[i], got[i])) << i;
      ASSERT_EQ(got[i].tokens, small_shape().block_tokens);
    }
  }
  EXPECT_EQ(node.server.counts().ok, 3 * ids.size());
}

TEST_F(Remote, KeysAloneAndValuesAloneCrossTheWireAlone) {
  RemoteReader r = reader();
  for (const BlockPart part : {BlockPart::K, BlockPart::V}) {
    const uint64_t before = node.server.counts().bytes;
    const Copied c = read_copy(r, ids[5], small_shape(), part);
    ASSERT_EQ(c.result.status, BlockStatus::Ok);
    const bool keys = part == BlockPart::K;
    EXPECT_EQ(c.result.v == nullptr, keys);
    EXPECT_EQ(c.result.k == nullptr, !keys);
    EXPECT_EQ(keys ? c.k : c.v,
              known_rows(small_shape(), ids[5].layer, ids[5].kv_head, ids[5].block, !keys));
    EXPECT_EQ(node.server.counts().bytes - before,
              8 + 8 + kBlockHeaderBytes + small_shape().payload_bytes());
  }
}

TEST_F(Remote, AnIdThatDiffersInAnyFieldAndAnUnsealedBlockAreAbsent) {
  RemoteReader r = reader();
  const auto status = [&](const BlockId& id) {
    return read_copy(r, id, small_shape()).result.status;
  };
  const BlockId good = ids[0];
  ASSERT_EQ(status(good), BlockStatus::Ok);
  EXPECT_EQ(status(span.id(3, 0, 39)), BlockStatus::Absent);
  for (int field = 0; field < 7; ++field) {
    BlockId id = good;
    if (field == 0) id.boot_nonce ^= 1;
    if (field == 1) id.owner.hi ^= 1;
    if (field == 2) id.owner.lo ^= 1;
    if (field == 3) id.layer += 2;
    if (field == 4) id.kv_head += 2;
    if (field == 5) id.block += 100;
    if (field == 6) id.version += 1;
    EXPECT_EQ(status(id), BlockStatus::Absent) << field;
  }
  span.reset();
  ASSERT_TRUE(eventually([&] { return status(good) == BlockStatus::Absent; }));
}

TEST_F(Remote, WhatIsSealedAfterTheServerLookedIsFound) {
  RemoteReader r = reader();
  const BlockId late = span.id(3, 0, 39);
  EXPECT_EQ(read_copy(r, late, small_shape()).result.status, BlockStatus::Absent);
  seal_known(span, 3, 0, 39);
  ReserveRequest request = span.request();
  request.owner = private_owner();
  OriginalsSpan another = writer->reserve(request);
  seal_known(another, 4, 1, 2);
  for (const BlockId& id : {late, another.id(4, 1, 2)}) {
    const Copied c = read_copy(r, id, small_shape());
    EXPECT_EQ(c.result.status, BlockStatus::Ok);
    EXPECT_TRUE(same(id, c.result));
  }
}

// Every bit of a block's slot, flipped where it lies: never the wrong bytes with Ok.
TEST_F(Remote, EveryFlippedBitIsNoticedOnTheReadersSide) {
  RemoteReader r = reader();
  const BlockId id = ids[11];
  auto* slot = const_cast<std::byte*>(span.run(id.layer, id.kv_head)) +
               id.block * small_shape().slot_bytes();
  std::mt19937_64 random(3);
  for (size_t i = 0; i < 700; ++i) {
    const size_t bit = i < 128 * 8 / 2 ? i * 2 : random() % (small_shape().slot_bytes() * 8);
    slot[bit / 8] ^= std::byte(1 << bit % 8);
    const Copied c = read_copy(r, id, small_shape());
    EXPECT_TRUE(c.result.status == BlockStatus::Corrupt || c.result.status == BlockStatus::Absent)
        << bit << " " << block_status_name(c.result.status);
    slot[bit / 8] ^= std::byte(1 << bit % 8);
  }
  EXPECT_EQ(read_copy(r, id, small_shape()).result.status, BlockStatus::Ok);
}

// A peer that has the key and lies: bytes of its answers are changed, cut and grown at random.
TEST_F(Remote, AnAnswerThatIsNotRightIsNeverTakenForOk) {
  std::mt19937_64 random(4);
  node.answer_by([&](const TransportRequest& q, TransportReply& reply) {
    // What the server would have said.
    TransportReply honest(WindowPool(size_t(1) << 20), size_t(1) << 20, q.deadline);
    node.server.read(q, honest);
    std::vector<std::byte> bytes(honest.body().begin(), honest.body().end());
    switch (random() % 3) {
      case 0:
        bytes[random() % bytes.size()] ^= std::byte(1 + random() % 255);
        break;
      case 1:
        bytes.resize(random() % bytes.size());
        break;
      case 2:
        std::swap_ranges(bytes.begin(), bytes.begin() + 64, bytes.end() - 64);
        break;
    }
    const auto to = reply.reserve(bytes.size());
    if (!bytes.empty()) std::memcpy(to.data(), bytes.data(), bytes.size());
  });
  RemoteReader r = reader({8, 1, 1});
  const std::vector<BlockId> some(ids.begin(), ids.begin() + 4);
  int refused = 0;
  for (int i = 0; i < 400; ++i) {
    Buffers b(some.size());
    ReadTicket ticket = r.read(some, b.destinations, patience());
    const auto got = BlockReader::wait(ticket);
    for (size_t j = 0; j < some.size(); ++j) {
      if (got[j].status != BlockStatus::Ok)
        ++refused;
      else
        ASSERT_TRUE(same(some[j], got[j])) << "wrong bytes with success";
    }
  }
  EXPECT_GE(refused, 400);
}

TEST_F(Remote, BlocksOfAnotherShapeAreCorruptAndMalformedRequestsAreRefused) {
  RemoteReader other(peer, BlockShape{DType::F16, 16, 64});
  EXPECT_EQ(read_copy(other, ids[0], small_shape()).result.status, BlockStatus::Corrupt);
  const PeerId id = *peer->connection(patience());
  std::mt19937_64 random(5);
  for (int i = 0; i < 300; ++i) {
    std::vector<std::byte> body(random() % 200);
    for (auto& b : body) b = std::byte(random() % 4);
    auto call = client->call(id, uint32_t(ServerOp::Read), body, size_t(1) << 20, patience());
    ASSERT_EQ(call.wait(), CallStatus::Refused);
  }
  const ReadRequestHead head{2000, uint16_t(DType::BF16), 16, 64, 0, 0};
  auto call = client->call(id, uint32_t(ServerOp::Read), std::as_bytes(std::span(&head, 1)),
                           size_t(1) << 20, patience());
  EXPECT_EQ(call.wait(), CallStatus::Refused);
  RemoteReader r = reader();
  EXPECT_EQ(read_copy(r, ids[0], small_shape()).result.status, BlockStatus::Ok);
}

TEST_F(Remote, ViewsCannotBeShownAndThatIsNamed) {
  RemoteReader r = reader();
  const Destination view{BlockPart::Both, true, nullptr, nullptr};
  EXPECT_THAT(thrown_by([&] {
                r.read({&ids[0], 1}, {&view, 1}, patience());
              }),
              HasSubstr("InvalidArgument"));
}

TEST_F(Remote, ADeadOrSilentOrSlowStoreIsLostWithinTheDeadlineAndFoundAgain) {
  RemoteReader r = reader();
  const auto status = [&](milliseconds within) {
    Buffers b(1);
    ReadTicket ticket = r.read({&ids[0], 1}, b.destinations, Deadline::after(within));
    return BlockReader::wait(ticket)[0].status;
  };
  ASSERT_EQ(status(milliseconds(5000)), BlockStatus::Ok);
  // Slow: its answer comes after the deadline.
  node.answer_by([&](const TransportRequest& q, TransportReply& reply) {
    std::this_thread::sleep_for(milliseconds(300) * kDeadlineFactor);
    node.server.read(q, reply);
  });
  EXPECT_EQ(status(milliseconds(50)), BlockStatus::Lost);
  node.answer_by({});
  ASSERT_TRUE(eventually([&] { return status(milliseconds(2000)) == BlockStatus::Ok; }));
  // Silent: it stands still.
  const std::string address = node.transport->address();
  network->pause(address);
  EXPECT_EQ(status(milliseconds(1200)), BlockStatus::Lost);
  network->resume(address);
  ASSERT_TRUE(eventually([&] { return status(milliseconds(2000)) == BlockStatus::Ok; }));
  // Dead, and back under the same address.
  network->kill(address);
  EXPECT_EQ(status(milliseconds(5000)), BlockStatus::Lost);
  TransportOptions o;
  o.listen = address;
  const auto again = network->make(key, o, [&](const TransportRequest& q, TransportReply& reply) {
    node.server.read(q, reply);
  });
  EXPECT_TRUE(eventually([&] { return status(milliseconds(2000)) == BlockStatus::Ok; }));
}

TEST_F(Remote, RetriesEndWhenTheirBudgetDoes) {
  RetryPolicy policy;
  policy.most = 5;
  policy.first_pause = policy.longest_pause = milliseconds(1);
  peer = std::make_shared<RemotePeer>(client, "local:999", policy);
  int retries = 0;
  while (retries < 100 && peer->may_retry()) ++retries;
  EXPECT_EQ(retries, 5);
  for (int i = 0; i < 25; ++i) peer->succeeded();  // earns two and a half
  retries = 0;
  while (retries < 100 && peer->may_retry()) ++retries;
  EXPECT_EQ(retries, 2);
  EXPECT_EQ(read_copy(*std::make_unique<RemoteReader>(peer, small_shape()), ids[0], small_shape())
                .result.status,
            BlockStatus::Lost);
  EXPECT_THAT(peer->last_error(), HasSubstr("nobody listens"));
}

TEST_F(Remote, ADroppedTicketWritesNothingAnyMore) {
  node.answer_by([&](const TransportRequest& q, TransportReply& reply) {
    std::this_thread::sleep_for(milliseconds(30));
    node.server.read(q, reply);
  });
  RemoteReader r = reader();
  Buffers b(4);
  const auto k = b.k, v = b.v;
  { ReadTicket ticket = r.read({ids.data(), 4}, b.destinations, patience()); }
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(b.k, k);
  EXPECT_EQ(b.v, v);
}

// ---- falling back -------------------------------------------------------------------------------

// One local arena and two "remote" copies of the same blocks, each behind its faults.
class Fallback : public Remote {
 protected:
  std::shared_ptr<FaultInjectingReader> copy(const ReaderFaults& faults, bool local) {
    std::shared_ptr<BlockReader> inner =
        local ? writer->reader() : std::make_shared<RemoteReader>(peer, small_shape());
    return std::make_shared<FaultInjectingReader>(inner, small_shape(), faults);
  }
  static ReaderFaults all(double ReaderFaults::*fault) {
    ReaderFaults f;
    f.*fault = 1;
    return f;
  }
  std::vector<BlockResult> read(FallbackReader& r, bool view = false) {
    buffers = std::make_unique<Buffers>(ids.size());
    for (auto& d : buffers->destinations) {
      if (view) d = {BlockPart::Both, true, nullptr, nullptr};
    }
    ReadTicket ticket = r.read(ids, buffers->destinations, patience());
    const auto got = BlockReader::wait(ticket);
    return {got.begin(), got.end()};
  }
  std::unique_ptr<Buffers> buffers;
};

TEST_F(Fallback, ABlockThatIsDamagedHereAndGoodElsewhereComesBackRight) {
  for (const auto fault : {&ReaderFaults::corrupt, &ReaderFaults::absent, &ReaderFaults::lost}) {
    FallbackReader r({copy(all(fault), true), copy({}, false)}, small_shape());
    const auto got = read(r);
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_EQ(got[i].status, BlockStatus::Ok);
      ASSERT_TRUE(same(ids[i], got[i]));
    }
    EXPECT_EQ(r.counts().rescued, ids.size());
    EXPECT_EQ(r.counts().failed, 0u);
  }
}

TEST_F(Fallback, WhatNoCopyDeliversHasTheWorstOfItsStatuses) {
  const auto corrupt = &ReaderFaults::corrupt, absent = &ReaderFaults::absent,
             lost = &ReaderFaults::lost;
  const auto expect = [&](double ReaderFaults::*a, double ReaderFaults::*b, BlockStatus status) {
    FallbackReader r({copy(all(a), true), copy(all(b), false)}, small_shape());
    for (const auto& got : read(r)) EXPECT_EQ(got.status, status);
    EXPECT_EQ(r.counts().failed, ids.size());
  };
  expect(corrupt, corrupt, BlockStatus::Corrupt);
  expect(absent, absent, BlockStatus::Absent);
  expect(lost, lost, BlockStatus::Lost);
  expect(corrupt, absent, BlockStatus::Corrupt);
  expect(absent, corrupt, BlockStatus::Corrupt);
  expect(lost, corrupt, BlockStatus::Corrupt);
  expect(absent, lost, BlockStatus::Lost);
  expect(lost, absent, BlockStatus::Lost);
}

TEST_F(Fallback, UnderRandomFaultsOfAllCopiesNoBytesAreEverWrong) {
  size_t ok = 0, failed = 0;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const auto faults = [&](uint64_t which) {
      ReaderFaults f;
      f.seed = seed * 3 + which;
      f.corrupt = 0.3;
      f.absent = 0.1;
      f.lost = 0.1;
      return f;
    };
    FallbackReader r({copy(faults(0), true), copy(faults(1), false), copy(faults(2), false)},
                     small_shape());
    const bool view = seed % 2 == 0;
    const auto got = read(r, view);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (got[i].status == BlockStatus::Ok) {
        ASSERT_TRUE(same(ids[i], got[i])) << "wrong bytes with success, seed " << seed;
        ++ok;
      } else {
        ++failed;
      }
    }
  }
  // Each copy fails half of the blocks: an eighth of them is expected to be lost.
  EXPECT_GT(ok, failed * 4);
  EXPECT_GT(failed, 0u);
}

TEST_F(Fallback, RescuedViewsOutliveTheirTicketAndAreCheckedWhenShownAgain) {
  FallbackReader r({copy(all(&ReaderFaults::corrupt), true), copy({}, false)}, small_shape());
  const auto first = read(r, true);  // its ticket is gone now
  for (size_t i = 0; i < ids.size(); ++i) ASSERT_TRUE(same(ids[i], first[i]));
  const uint64_t asked = node.server.counts().blocks;
  auto again = read(r, true);
  EXPECT_EQ(node.server.counts().blocks, asked) << "fetched twice";
  for (size_t i = 0; i < ids.size(); ++i) {
    ASSERT_TRUE(same(ids[i], again[i]));
    EXPECT_EQ(again[i].k, first[i].k);
  }
  const_cast<uint16_t*>(again[0].k)[3] ^= 1;  // the kept copy is damaged
  again = read(r, true);
  EXPECT_TRUE(same(ids[0], again[0]));
  EXPECT_EQ(node.server.counts().blocks, asked + 1);
}

TEST_F(Fallback, ViewsBeyondWhatMayBeKeptAreNotRescuedAndNothingElseSuffers) {
  FallbackOptions options;
  options.kept_bytes = 10 * 2 * small_shape().payload_bytes();
  FallbackReader r({copy(all(&ReaderFaults::corrupt), true), copy({}, false)}, small_shape(),
                   options);
  const auto got = read(r, true);
  size_t ok = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (got[i].status == BlockStatus::Ok) {
      ++ok;
      EXPECT_TRUE(same(ids[i], got[i]));
    } else {
      EXPECT_EQ(got[i].status, BlockStatus::Corrupt);
    }
  }
  EXPECT_EQ(ok, 10u);
  for (const auto& copied : read(r)) EXPECT_EQ(copied.status, BlockStatus::Ok);
}

TEST_F(Fallback, AStoreThatDoesNotAnswerLeavesTimeForTheNextCopy) {
  Node second(network, key);
  const auto slow = std::make_shared<RemotePeer>(client, second.transport->address());
  second.answer_by([](const TransportRequest&, TransportReply&) {
    std::this_thread::sleep_for(milliseconds(700) * kDeadlineFactor);
  });
  FallbackReader r({copy(all(&ReaderFaults::lost), true),
                    std::make_shared<RemoteReader>(slow, small_shape()), copy({}, false)},
                   small_shape());
  Buffers b(1);
  ReadTicket ticket = r.read({ids.data(), 1}, b.destinations, Deadline::after(milliseconds(1200)));
  const auto got = BlockReader::wait(ticket);
  EXPECT_EQ(got[0].status, BlockStatus::Ok);
  EXPECT_TRUE(same(ids[0], got[0]));
}

}  // namespace
}  // namespace certkv::test
