// What the holder says of all it holds, and of other nodes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <thread>

#include "kernels/base/error.h"
#include "tests/kvstore/raw_client.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

using testing::HasSubstr;

ReserveRequest request_of(uint32_t layers, uint32_t heads, uint32_t first_block, uint32_t blocks) {
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  r.first_layer = 2;
  r.layers = layers;
  r.first_kv_head = 5;
  r.kv_heads = heads;
  r.first_block = first_block;
  r.blocks = blocks;
  return r;
}

TEST(List, NamesTheReservationsOfEverySessionAndWhereTheyLie) {
  ThreadHolder holder;
  auto one = holder.attach(0), two = holder.attach(1), asks = holder.attach(2);
  EXPECT_TRUE(asks->list().empty());
  OriginalsSpan a = one->reserve(request_of(2, 3, 7, 4)), b = two->reserve(request_of(1, 1, 0, 9));
  const auto all = asks->list();
  ASSERT_EQ(all.size(), 2u);
  const std::pair<const OriginalsSpan&, uint64_t> expected[] = {{a, one->session()},
                                                                {b, two->session()}};
  for (size_t i = 0; i < 2; ++i) {
    const auto& [span, fence] = expected[i];
    const ReserveRequest& r = span.request();
    EXPECT_EQ(all[i].request.owner, r.owner);
    EXPECT_EQ(all[i].request.shape, r.shape);
    EXPECT_EQ(all[i].request.first_layer, r.first_layer);
    EXPECT_EQ(all[i].request.layers, r.layers);
    EXPECT_EQ(all[i].request.first_kv_head, r.first_kv_head);
    EXPECT_EQ(all[i].request.kv_heads, r.kv_heads);
    EXPECT_EQ(all[i].request.first_block, r.first_block);
    EXPECT_EQ(all[i].request.blocks, r.blocks);
    EXPECT_EQ(all[i].version, span.version());
    EXPECT_EQ(all[i].fence, fence);
    EXPECT_FALSE(all[i].orphan);
    ASSERT_EQ(all[i].runs.size(), r.runs());
  }
  // The same bytes, through the mapping of whoever asks.
  for (uint32_t l = 2; l < 4; ++l) {
    for (uint32_t h = 5; h < 8; ++h) {
      seal_known(a, l, h, 8);
      const auto* header = reinterpret_cast<const BlockHeader*>(all[0].runs[(l - 2) * 3 + (h - 5)] +
                                                                a.request().shape.slot_bytes());
      EXPECT_EQ(header->id, a.id(l, h, 8));
    }
  }
}

TEST(List, WhatIsFreedIsGoneAndWhatADeadRankLeftIsAnOrphan) {
  ThreadHolder holder;
  auto asks = holder.attach(0);
  auto owner = holder.attach(1);
  OriginalsSpan kept = asks->reserve(request_of(1, 1, 0, 1));
  OriginalsSpan freed = owner->reserve(request_of(1, 1, 0, 1));
  const uint32_t version = kept.version();
  freed.reset();
  ASSERT_TRUE(eventually([&] { return asks->list().size() == 1; }));
  EXPECT_EQ(asks->list()[0].version, version);
  {
    RawClient dies(holder.socket());
    const uint64_t session = dies.attach();
    const AllocateRequest r{private_owner(), 0, 1, 0, 1, 0, 1, uint16_t(DType::BF16), 16, 64, 0};
    dies.send_bytes(
        make_frame(uint16_t(ControlOp::Allocate), ControlStatus::Ok, 2, session, payload_of(r)));
    FrameHeader h;
    std::vector<std::byte> payload;
    ASSERT_TRUE(dies.receive_frame(h, payload));
  }
  ASSERT_TRUE(eventually([&] {
    const auto all = asks->list();
    return all.size() == 2 && all[1].orphan;
  }));
  EXPECT_FALSE(asks->list()[0].orphan);
}

// Reservations of the largest number of runs: one fills half a page, so five take three.
TEST(List, GoesOverAsManyPagesAsItTakes) {
  ThreadHolder holder(uint64_t(40) << 20);
  auto client = holder.attach();
  std::vector<OriginalsSpan> spans;
  for (int i = 0; i < 5; ++i) {
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = {DType::F16, 1, 1};
    r.layers = 128;
    r.kv_heads = i % 2 == 0 ? 128 : 3;
    spans.push_back(client->reserve(r));
  }
  RawClient raw(holder.socket());
  const uint64_t session = raw.attach();
  ListRequest request;
  FrameHeader h;
  std::vector<std::byte> payload;
  size_t pages = 0, seen = 0;
  for (uint64_t sequence = 2;; ++sequence) {
    raw.send_bytes(make_frame(uint16_t(ControlOp::List), ControlStatus::Ok, sequence, session,
                              payload_of(request)));
    ASSERT_TRUE(raw.receive_frame(h, payload));
    ++pages;
    ListReply head;
    std::memcpy(&head, payload.data(), sizeof head);
    size_t at = sizeof head;
    for (uint32_t i = 0; i < head.count; ++i) {
      ListEntry e;
      std::memcpy(static_cast<void*>(&e), payload.data() + at, sizeof e);
      EXPECT_EQ(e.ranges.owner, spans[seen++].request().owner);
      request.after = e.version;
      at += sizeof e + size_t(e.ranges.layers) * e.ranges.kv_heads * 8;
    }
    ASSERT_EQ(at, payload.size());
    if (head.more == 0) break;
  }
  EXPECT_EQ(seen, 5u);
  EXPECT_EQ(pages, 3u);

  const auto all = client->list();
  ASSERT_EQ(all.size(), 5u);
  for (size_t i = 0; i < 5; ++i) {
    for (uint32_t run : {0u, 200u, uint32_t(all[i].request.runs() - 1)}) {
      const auto& r = all[i].request;
      EXPECT_EQ(all[i].runs[run], spans[i].run(run / r.kv_heads, run % r.kv_heads));
    }
  }
}

TEST(List, IsTrueWhileOthersReserveAndFree) {
  ThreadHolder holder(uint64_t(8) << 20);
  auto asks = holder.attach(0), works = holder.attach(1);
  OriginalsSpan stays = works->reserve(request_of(1, 1, 0, 1));
  std::atomic<bool> stop{false};
  std::thread worker([&] {
    while (!stop) OriginalsSpan span = works->reserve(request_of(3, 4, 0, 2));
  });
  for (int i = 0; i < 200; ++i) {
    const auto all = asks->list();
    EXPECT_EQ(std::ranges::count(all, stays.version(), &ListedReservation::version), 1);
    EXPECT_TRUE(std::ranges::is_sorted(all, {}, &ListedReservation::version));
  }
  stop = true;
  worker.join();
}

TEST(List, MalformedRequestsEndTheirConnection) {
  ThreadHolder holder;
  const auto refused = [&](ControlOp op, std::span<const std::byte> payload) {
    RawClient c(holder.socket());
    const uint64_t session = c.attach();
    c.send_bytes(make_frame(uint16_t(op), ControlStatus::Ok, 2, session, payload));
    return c.closed_by_peer();
  };
  const std::vector<std::byte> junk(9);
  EXPECT_TRUE(refused(ControlOp::List, {}));
  EXPECT_TRUE(refused(ControlOp::List, junk));
  const ListRequest reserved{0, 1};
  EXPECT_TRUE(refused(ControlOp::List, payload_of(reserved)));
  EXPECT_TRUE(refused(ControlOp::Peers, junk));
  EXPECT_TRUE(refused(ControlOp::Report, std::vector<std::byte>(kMaxRequestPayload + 1)));
  EXPECT_TRUE(holder.attach()->list().empty());
}

TEST(Peers, AreWhatWasLastReported) {
  ThreadHolder holder;
  auto server = holder.attach(0), rank = holder.attach(1);
  EXPECT_EQ(rank->peers(), "");
  server->report("{\"peers\":[\"10.0.0.1:7000\"]}");
  EXPECT_EQ(rank->peers(), "{\"peers\":[\"10.0.0.1:7000\"]}");
  const std::string longest(kMaxRequestPayload, 'x');
  server->report(longest);
  EXPECT_EQ(rank->peers(), longest);
  EXPECT_THAT(thrown_by([&] { server->report(longest + "x"); }), HasSubstr("InvalidArgument"));
  EXPECT_EQ(rank->peers(), longest);
  server->report("");
  EXPECT_EQ(rank->peers(), "");
}

}  // namespace
}  // namespace certkv::test
