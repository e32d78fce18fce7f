// Copies on other nodes: made, acknowledged, found again, given back. Nodes are holders in threads,
// the network is in this process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "kernels/base/error.h"
#include "kvstore/remote_reader.h"
#include "kvstore/server/block_server.h"
#include "kvstore/server/replica_store.h"
#include "kvstore/server/replicator.h"
#include "parallel/local_transport.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// A node's server: what kvstore/server/server_process.cc puts together.
struct Server {
  Server(ThreadHolder& holder, const std::shared_ptr<LocalNetwork>& network, const JobKey& key,
         const std::string& listen = "local:0")
      : session(holder.attach(9)),
        directory(std::make_shared<BlockDirectory>(session, milliseconds(0))),
        blocks(directory),
        copies(session, directory) {
    TransportOptions o;
    o.listen = listen;
    o.heartbeat = milliseconds(100);
    o.silence = milliseconds(1000);
    transport = network->make(key, o, [this](const TransportRequest& q, TransportReply& r) {
      std::this_thread::sleep_for(milliseconds(delay_ms.load()));
      if (ServerOp(q.op) == ServerOp::Replicate) return copies.take(q, r);
      if (ServerOp(q.op) == ServerOp::Forget) return copies.forget(q, r);
      blocks.read(q, r);
    });
  }
  std::atomic<int> delay_ms{0};
  std::shared_ptr<StoreClient> session;
  std::shared_ptr<BlockDirectory> directory;
  BlockServer blocks;
  ReplicaStore copies;
  std::shared_ptr<Transport> transport;
};

class Replication : public testing::Test {
 protected:
  Replication() : home(here, network, key), one(there, network, key), two(third, network, key) {
    writer = here.attach(0);
  }

  OriginalsSpan reserve(uint32_t layers, uint32_t heads, uint32_t blocks) {
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = small_shape();
    r.layers = layers;
    r.kv_heads = heads;
    r.first_block = 3;
    r.blocks = blocks;
    return writer->reserve(r);
  }
  static void seal(OriginalsSpan& span, uint32_t from, uint32_t to) {
    const ReserveRequest& r = span.request();
    for (uint32_t b = from; b < to; ++b) {
      for (uint32_t l = 0; l < r.layers; ++l) {
        for (uint32_t h = 0; h < r.kv_heads; ++h) seal_known(span, l, h, r.first_block + b);
      }
    }
  }
  std::unique_ptr<Replicator> replicator(unsigned replicas, ReplicatorOptions options = {}) {
    options.replicas = replicas;
    options.list = milliseconds(5);
    const std::vector<std::string> peers{one.transport->address(), two.transport->address()};
    return std::make_unique<Replicator>(
        home.session, home.directory, home.transport,
        [peers](const OwnerId&, uint32_t, uint32_t) { return peers; }, options);
  }
  // Reads a block from a node's server by the identity that it was sealed under.
  BlockStatus read_at(Server& server, const BlockId& id) {
    RemoteReader r(std::make_shared<RemotePeer>(home.transport, server.transport->address()),
                   small_shape());
    const Copied c = read_copy(r, id, small_shape());
    if (c.result.status == BlockStatus::Ok) {
      EXPECT_EQ(c.k, known_rows(small_shape(), id.layer, id.kv_head, id.block, false));
      EXPECT_EQ(c.v, known_rows(small_shape(), id.layer, id.kv_head, id.block, true));
    }
    return c.result.status;
  }
  uint64_t copied(Replicator& r) { return r.status().copied_blocks; }

  const JobKey key = JobKey::generate();
  std::shared_ptr<LocalNetwork> network = LocalNetwork::create();
  ThreadHolder here, there, third;
  Server home, one, two;
  std::shared_ptr<StoreClient> writer;
};

TEST_F(Replication, SealedBlocksAreReadElsewhereUnderTheirOwnIdentity) {
  OriginalsSpan span = reserve(2, 2, 8);
  seal(span, 0, 3);
  const auto r = replicator(2);
  ASSERT_TRUE(eventually([&] { return copied(*r) == 12; }));
  seal(span, 3, 8);
  ASSERT_TRUE(eventually([&] { return copied(*r) == 32; }));
  EXPECT_EQ(r->status().lag_bytes, 0u);
  EXPECT_EQ(one.copies.counts().blocks, 32u);
  EXPECT_EQ(two.copies.counts().blocks, 0u) << "one copy elsewhere was asked for";
  for (uint32_t l = 0; l < 2; ++l) {
    for (uint32_t b = 3; b < 11; ++b) {
      EXPECT_EQ(read_at(one, span.id(l, 1, b)), BlockStatus::Ok);
      EXPECT_EQ(read_at(two, span.id(l, 1, b)), BlockStatus::Absent);
    }
  }
  BlockId other = span.id(0, 0, 3);
  other.boot_nonce ^= 2;
  EXPECT_EQ(read_at(one, other), BlockStatus::Absent);
}

TEST_F(Replication, NoFewerCopiesThanWereAskedForCount) {
  OriginalsSpan span = reserve(1, 2, 5);
  seal(span, 0, 5);
  network->pause(two.transport->address());
  const auto r = replicator(3);
  ASSERT_TRUE(eventually([&] { return one.copies.counts().blocks == 10; }));
  ASSERT_TRUE(eventually([&] { return r->status().missing_copies == 2; }));
  EXPECT_EQ(copied(*r), 0u);
  network->resume(two.transport->address());
  EXPECT_TRUE(eventually([&] { return copied(*r) == 10; }));
  EXPECT_EQ(two.copies.counts().blocks, 10u);
  EXPECT_EQ(r->status().missing_copies, 0u);
}

TEST_F(Replication, ARunWithFewerPeersThanCopiesIsSaidToLackThem) {
  OriginalsSpan span = reserve(1, 1, 2);
  seal(span, 0, 2);
  ReplicatorOptions options;
  options.replicas = 2;
  options.list = milliseconds(5);
  Replicator r(
      home.session, home.directory, home.transport,
      [](const OwnerId&, uint32_t, uint32_t) { return std::vector<std::string>(); }, options);
  ASSERT_TRUE(eventually([&] { return r.status().missing_copies == 1; }));
  EXPECT_EQ(r.status().copied_blocks, 0u);
  EXPECT_EQ(r.status().sealed_blocks, 2u);
}

// A server that dies leaves its copies to its holder; its successor finds, checks and serves them,
// and goes on where they end.
TEST_F(Replication, ARestartedServerFindsTheCopiesItHeld) {
  OriginalsSpan span = reserve(1, 3, 9);
  seal(span, 0, 4);
  auto dying = std::make_unique<Server>(there, network, key);
  const std::string address = dying->transport->address();
  ReplicatorOptions options;
  options.replicas = 2;
  options.list = milliseconds(5);
  Replicator r(
      home.session, home.directory, home.transport,
      [&](const OwnerId&, uint32_t, uint32_t) { return std::vector<std::string>{address}; },
      options);
  ASSERT_TRUE(eventually([&] { return copied(r) == 12; }));
  network->kill(address);
  dying.reset();
  // One copy is damaged while nobody looks.
  for (const auto& listed : one.session->list()) {
    EXPECT_TRUE(listed.orphan);
    if (listed.request.first_kv_head != 2) continue;
    listed.runs[0][2 * small_shape().slot_bytes() + 200] ^= std::byte(1);
  }
  Server successor(there, network, key, address);
  EXPECT_EQ(successor.copies.counts().blocks, 4u + 4 + 2);
  EXPECT_EQ(successor.copies.counts().refused, 1u);
  for (uint32_t h = 0; h < 2; ++h) {
    EXPECT_EQ(read_at(successor, span.id(0, h, 6)), BlockStatus::Ok);
  }
  for (const auto& listed : one.session->list()) EXPECT_FALSE(listed.orphan);
  // What it lacks comes again, and what is sealed now as well.
  seal(span, 4, 9);
  ASSERT_TRUE(eventually([&] { return copied(r) == 27; }));
  for (uint32_t h = 0; h < 3; ++h) {
    for (uint32_t b = 3; b < 12; ++b) {
      EXPECT_EQ(read_at(successor, span.id(0, h, b)), BlockStatus::Ok) << h << " " << b;
    }
  }
}

TEST_F(Replication, CopiesGoWhenTheirFirstGoes) {
  OriginalsSpan span = reserve(2, 1, 4);
  seal(span, 0, 4);
  const auto r = replicator(2);
  ASSERT_TRUE(eventually([&] { return copied(*r) == 8; }));
  EXPECT_FALSE(one.session->list().empty());
  span.reset();
  EXPECT_TRUE(
      eventually([&] { return one.session->list().empty() && one.copies.counts().runs == 0; }));
}

TEST_F(Replication, ABlockThatWasDamagedHereIsNeverACopyElsewhere) {
  OriginalsSpan span = reserve(1, 2, 6);
  seal(span, 0, 6);
  const BlockId bad = span.id(0, 1, 5);
  auto* slot = const_cast<std::byte*>(span.run(0, 1)) + 2 * small_shape().slot_bytes();
  slot[small_shape().v_offset() + 77] ^= std::byte(8);
  const auto r = replicator(2);
  ASSERT_TRUE(eventually([&] { return r->status().damaged_runs == 1; }));
  EXPECT_TRUE(eventually([&] { return one.copies.counts().blocks == 6 + 2; }));
  EXPECT_EQ(read_at(one, bad), BlockStatus::Absent);
  EXPECT_EQ(read_at(one, span.id(0, 1, 4)), BlockStatus::Ok);
  EXPECT_TRUE(eventually([&] { return r->status().lag_bytes == 0; }));
}

TEST_F(Replication, APeerWithoutRoomIsSaidAndHoldsNobodyUp) {
  OriginalsSpan big = reserve(1, 1, 900);  // the peer's arena of 4 MiB has no room for a second
  ReserveRequest fill = big.request();
  fill.owner = private_owner();
  auto hog = there.attach(1);
  OriginalsSpan hogged = hog->reserve(fill);
  seal(big, 0, 5);
  ReplicatorOptions options;
  options.lag_limit_bytes = 1;
  const auto r = replicator(2, options);
  ASSERT_TRUE(eventually([&] { return r->status().missing_copies == 1; }));
  seal(big, 5, 50);
  EXPECT_EQ(copied(*r), 0u);
  hogged.reset();
  EXPECT_TRUE(eventually([&] { return copied(*r) == 50; }));
}

TEST_F(Replication, WhoSealsWaitsWhileCopiesLagAndNotForEver) {
  OriginalsSpan span = reserve(1, 1, 200);
  seal(span, 0, 1);
  const uint64_t slot = small_shape().slot_bytes();
  ReplicatorOptions options;
  options.lag_limit_bytes = 10 * slot;
  options.message_bytes = 8 * slot;
  const auto r = replicator(2, options);
  ASSERT_TRUE(eventually([&] { return copied(*r) == 1; }));
  // Slow, but it comes: everything is sealed, and the lag was met on the way.
  one.delay_ms = 3;
  bool lagged = false;
  for (uint32_t b = 1; b < 60; ++b) {
    seal(span, b, b + 1);
    for (int i = 0; i < 2 && b % 12 == 0; ++i) std::this_thread::sleep_for(milliseconds(4));
    lagged = lagged || writer->replication().lag_bytes > 0;
  }
  EXPECT_TRUE(lagged);
  ASSERT_TRUE(eventually([&] { return copied(*r) == 60; }));
  // It does not come: sealing ends by name within the deadline of the rank.
  one.delay_ms = 1500 * kDeadlineFactor;
  StoreClientOptions impatient;
  impatient.socket = here.socket();
  impatient.deadline = milliseconds(200);
  impatient.heartbeat = milliseconds(50);
  auto rank = StoreClient::attach(impatient, patience());
  ReserveRequest q = span.request();
  q.owner = private_owner();
  OriginalsSpan own = rank->reserve(q);
  seal(own, 0, 20);
  ASSERT_TRUE(eventually([&] {
    const auto lag = rank->replication();
    return lag.lag_bytes > lag.limit_bytes;
  }));
  EXPECT_THAT(thrown_by([&] { seal(own, 20, 21); }),
              AllOf(HasSubstr("DeadlineExceeded"), HasSubstr("lag by")));
  one.delay_ms = 0;
  EXPECT_TRUE(eventually([&] { return thrown_by([&] { seal(own, 20, 21); }).empty(); }));
}

TEST_F(Replication, NobodyWaitsWhenTheReplicatorIsGone) {
  OriginalsSpan span = reserve(1, 1, 4);
  seal(span, 0, 2);
  {
    ReplicatorOptions options;
    options.lag_limit_bytes = 1;
    const auto r = replicator(2, options);
    ASSERT_TRUE(eventually([&] { return writer->replication().limit_bytes == 1; }));
  }
  EXPECT_EQ(writer->replication().limit_bytes, 0u);
  EXPECT_EQ(writer->replication().lag_bytes, 0u);
  seal(span, 2, 4);
}

// Messages of one who has the key and is wrong: nothing is published but what is right.
TEST_F(Replication, DamagedMessagesAreNeverAcknowledgedAsCopies) {
  OriginalsSpan span = reserve(1, 1, 40);
  seal(span, 0, 40);
  const ReserveRequest& q = span.request();
  ReplicateRequest head;
  head.run = {here.nonce(), q.owner, 0, 0, q.first_block, span.version()};
  head.blocks = q.blocks;
  head.dtype = uint16_t(q.shape.dtype);
  head.block_tokens = q.shape.block_tokens;
  head.head_dim = q.shape.head_dim;
  const size_t slot = q.shape.slot_bytes();
  std::mt19937_64 random(11);
  int refused = 0;
  for (uint32_t done = 0; done < 36;) {
    head.first = done;
    head.count = 2;
    std::vector<std::byte> body(sizeof head + 2 * slot);
    std::memcpy(body.data(), &head, sizeof head);
    std::memcpy(body.data() + sizeof head, span.run(0, 0) + done * slot, 2 * slot);
    const bool damaged = random() % 8 != 0;
    if (damaged) {
      switch (random() % 3) {
        case 0:  // in the fixed part or a header
          body[random() % (sizeof head + kBlockHeaderBytes)] ^= std::byte(1 << random() % 8);
          break;
        case 1:  // in a payload, padding aside: there is none in this shape
          body[sizeof head + kBlockHeaderBytes + random() % (slot - kBlockHeaderBytes)] ^=
              std::byte(1 << random() % 8);
          break;
        case 2:
          body.resize(random() % body.size());
          break;
      }
    }
    const PeerId peer = home.transport->connect(one.transport->address(), patience());
    auto call = home.transport->call(peer, uint32_t(ServerOp::Replicate), body, 1024, patience());
    const CallStatus status = call.wait();
    if (!damaged) {
      ASSERT_EQ(status, CallStatus::Ok) << call.why();
      done += 2;
    } else if (status != CallStatus::Ok) {
      ++refused;
    }
    // Whatever came: what is there under this identity is right.
    for (uint32_t b : {done > 0 ? done - 1 : 0, done}) {
      const BlockStatus got = read_at(one, span.id(0, 0, q.first_block + b));
      EXPECT_TRUE(got == BlockStatus::Ok || got == BlockStatus::Absent);
    }
  }
  EXPECT_GT(refused, 60);
}

}  // namespace
}  // namespace certkv::test
