#include "tests/support/transport_contract.h"

#include <gmock/gmock.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {

using std::chrono::milliseconds;
using testing::HasSubstr;
using Bytes = std::vector<std::byte>;

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransportContract);

// ---- the server's side --------------------------------------------------------------------------

void fill_pattern(std::span<std::byte> out, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < out.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(out.data() + i, &word, std::min<size_t>(8, out.size() - i));
  }
}

TransportHandler contract_handler(std::shared_ptr<std::atomic<bool>> stop) {
  const auto count = std::make_shared<std::atomic<uint64_t>>(0);
  return [count, stop](const TransportRequest& request, TransportReply& reply) {
    const auto word = [&](size_t i, auto x) {
      if (request.body.size() >= (i + 1) * sizeof x) {
        std::memcpy(&x, request.body.data() + i * sizeof x, sizeof x);
      }
      return x;
    };
    switch (request.op) {
      case kSleep:
        for (auto left = milliseconds(word(0, uint32_t(0)));
             left.count() > 0 && (stop == nullptr || !*stop); left -= milliseconds(10)) {
          std::this_thread::sleep_for(std::min(left, milliseconds(10)));
        }
        [[fallthrough]];
      case kEcho: {
        const auto to = reply.reserve(request.body.size());
        if (!to.empty()) std::memcpy(to.data(), request.body.data(), to.size());
        break;
      }
      case kThrow:
        CERTKV_THROW(InvalidArgument, "refused on purpose");
      case kFill:
        fill_pattern(reply.reserve(word(0, uint64_t(0))), word(1, uint64_t(0)));
        break;
      case kCount: {
        const uint64_t n = count->load();
        std::memcpy(reply.reserve(sizeof n).data(), &n, sizeof n);
        break;
      }
      default:
        CERTKV_THROW(InvalidArgument, "operation {} is not known", request.op);
    }
    ++*count;
  };
}

TransportOptions contract_options() {
  TransportOptions o;
  o.heartbeat = milliseconds(100);
  o.silence = milliseconds(1500);
  o.limits.request_bytes = size_t(1) << 20;
  o.limits.reply_bytes = size_t(2) << 20;
  o.limits.window_bytes = size_t(24) << 20;
  o.limits.calls = 8;
  o.limits.handler_threads = 2;
  return o;
}

namespace {

Deadline patience() {
  return Deadline::after(milliseconds(20000));
}

Bytes pattern(size_t bytes, uint64_t seed) {
  Bytes out(bytes);
  fill_pattern(out, seed);
  return out;
}

template <typename... T>
Bytes words(T... x) {
  Bytes out((sizeof x + ...));
  size_t at = 0;
  ((std::memcpy(out.data() + at, &x, sizeof x), at += sizeof x), ...);
  return out;
}

struct Connected {
  explicit Connected(const TransportKind& kind, TransportOptions options = contract_options())
      : world(kind.make()), server(world->server()), client(world->client(options, false)) {
    peer = client->connect(server->address(), patience());
  }
  std::unique_ptr<TransportKind::World> world;
  std::unique_ptr<ContractServer> server;
  std::unique_ptr<Transport> client;
  PeerId peer;

  CallStatus fill(size_t bytes, uint64_t seed, Bytes* out = nullptr) {
    auto call = client->call(peer, kFill, words(uint64_t(bytes), seed), bytes, patience());
    const CallStatus status = call.wait();
    if (out != nullptr) out->assign(call.reply().begin(), call.reply().end());
    return status;
  }
};

// ---- the suite ----------------------------------------------------------------------------------

TEST_P(TransportContract, RequestsAndRepliesOfEverySizeArriveByteForByte) {
  Connected c(GetParam());
  const auto& limits = contract_options().limits;
  for (const size_t bytes : {size_t(0), size_t(1), size_t(100), size_t(4095), size_t(16384),
                             size_t(16385), size_t(70000), size_t(1000001), limits.request_bytes}) {
    const Bytes request = pattern(bytes, bytes + 1);
    // Cut in three, one of them empty: parts are one body.
    const std::span<const std::byte> all(request);
    const std::span<const std::byte> parts[] = {all.first(bytes / 3), {}, all.subspan(bytes / 3)};
    auto call = c.client->call(c.peer, kEcho, parts, bytes, patience());
    ASSERT_EQ(call.wait(), CallStatus::Ok) << bytes << ": " << call.why();
    ASSERT_TRUE(std::ranges::equal(call.reply(), request)) << bytes;
  }
  Bytes reply;
  ASSERT_EQ(c.fill(limits.reply_bytes, 9, &reply), CallStatus::Ok);
  EXPECT_EQ(reply, pattern(limits.reply_bytes, 9));
}

TEST_P(TransportContract, SizesBeyondALimitAreRefusedBeforeAnythingIsSent) {
  Connected c(GetParam());
  const auto& limits = contract_options().limits;
  const Bytes big(limits.request_bytes + 1);
  EXPECT_THAT(thrown_by([&] { c.client->call(c.peer, kEcho, big, 0, patience()); }),
              HasSubstr("InvalidArgument"));
  EXPECT_THAT(thrown_by([&] {
                c.client->call(c.peer, kEcho, Bytes(), limits.reply_bytes + 1, patience());
              }),
              HasSubstr("InvalidArgument"));
  auto count = c.client->call(c.peer, kCount, Bytes(), 8, patience());
  ASSERT_EQ(count.wait(), CallStatus::Ok);
  EXPECT_TRUE(std::ranges::equal(count.reply(), words(uint64_t(0))));
}

TEST_P(TransportContract, AReplyBeyondWhatWasAskedForIsTooLargeAndHarmless) {
  Connected c(GetParam());
  auto call = c.client->call(c.peer, kFill, words(uint64_t(5000), uint64_t(1)), 4999, patience());
  EXPECT_EQ(call.wait(), CallStatus::TooLarge);
  EXPECT_TRUE(call.reply().empty());
  EXPECT_EQ(c.fill(5000, 1), CallStatus::Ok);
}

TEST_P(TransportContract, WhatAHandlerThrowsIsToldToItsCallerAlone) {
  Connected c(GetParam());
  auto call = c.client->call(c.peer, kThrow, Bytes(), 4096, patience());
  EXPECT_EQ(call.wait(), CallStatus::Refused);
  EXPECT_THAT(call.why(), HasSubstr("refused on purpose"));
  EXPECT_TRUE(call.reply().empty());
  auto unknown = c.client->call(c.peer, 77, Bytes(), 4096, patience());
  EXPECT_EQ(unknown.wait(), CallStatus::Refused);
  EXPECT_EQ(c.fill(10, 1), CallStatus::Ok);
}

TEST_P(TransportContract, ADeadlineEndsItsCallAndLeavesTheConnection) {
  Connected c(GetParam());
  auto slow =
      c.client->call(c.peer, kSleep, words(uint32_t(600)), 64, Deadline::after(milliseconds(50)));
  EXPECT_EQ(slow.poll(), CallStatus::Pending);
  EXPECT_EQ(slow.wait(), CallStatus::Deadline);
  EXPECT_EQ(c.fill(100000, 3), CallStatus::Ok);
  EXPECT_TRUE(c.client->alive(c.peer));
}

TEST_P(TransportContract, ACancelledCallEndsAtOnceAndItsLateReplyIsDropped) {
  Connected c(GetParam());
  for (int i = 0; i < 20; ++i) {
    auto call = c.client->call(c.peer, kSleep, words(uint32_t(1)), 64, patience());
    call.cancel();
    EXPECT_NE(call.wait(), CallStatus::Pending);
    if (i % 2 == 0) call = {};  // dropped, too
    Bytes reply;
    ASSERT_EQ(c.fill(3000, uint64_t(i), &reply), CallStatus::Ok);
    ASSERT_EQ(reply, pattern(3000, uint64_t(i)));
  }
}

TEST_P(TransportContract, CallsOfManyThreadsDoNotMix) {
  Connected c(GetParam());
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int i = 0; i < 50; ++i) {
        const size_t bytes = random() % (random() % 4 == 0 ? 300000 : 3000);
        const uint64_t seed = random();
        Bytes reply;
        if (c.fill(bytes, seed, &reply) == CallStatus::Ok && reply == pattern(bytes, seed)) ++right;
      }
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(right, 200);
}

TEST_P(TransportContract, MoreCallsThanAreAllowedAreBusyAndNoneHangs) {
  Connected c(GetParam());
  std::vector<TransportCall> calls;
  for (int i = 0; i < 20; ++i) {
    calls.push_back(c.client->call(c.peer, kSleep, words(uint32_t(50)), 64, patience()));
  }
  int ok = 0, busy = 0;
  for (auto& call : calls) {
    const CallStatus status = call.wait();
    ok += status == CallStatus::Ok;
    busy += status == CallStatus::Busy;
  }
  EXPECT_GE(ok, int(contract_options().limits.calls));
  EXPECT_GT(busy, 0);
  EXPECT_EQ(ok + busy, 20);
}

TEST_P(TransportContract, MemoryForMessagesIsBoundedAndComesBack) {
  Connected c(GetParam());
  const size_t most = contract_options().limits.reply_bytes;
  for (int round = 0; round < 3; ++round) {
    std::vector<TransportCall> calls;
    std::string error;
    while (error.empty() && calls.size() < 100) {
      error = thrown_by([&] {
        calls.push_back(
            c.client->call(c.peer, kFill, words(uint64_t(1), uint64_t(1)), most, patience()));
      });
    }
    EXPECT_THAT(error, HasSubstr("OutOfMemory"));
    for (auto& call : calls) EXPECT_NE(call.wait(), CallStatus::PeerLost);
  }
}

TEST_P(TransportContract, NobodyAtAnAddressIsNamedWithinTheDeadline) {
  const auto world = GetParam().make();
  const auto client = world->client(contract_options(), false);
  std::string gone;
  {
    const auto server = world->server();
    gone = server->address();
    server->kill();
  }
  EXPECT_THAT(thrown_by([&] { client->connect(gone, patience()); }), HasSubstr("CommError"));
  for (const char* bad : {"", "nowhere", "host:", "host:x", ":7", "host:70000"}) {
    EXPECT_THAT(thrown_by([&] { client->connect(bad, patience()); }), HasSubstr("InvalidArgument"))
        << bad;
  }
}

TEST_P(TransportContract, AnotherKeyIsRefusedAtBothEnds) {
  Connected c(GetParam());
  const auto stranger = c.world->client(contract_options(), true);
  EXPECT_THAT(thrown_by([&] { stranger->connect(c.server->address(), patience()); }),
              HasSubstr("CommError"));
  EXPECT_EQ(c.fill(1000, 1), CallStatus::Ok);
}

TEST_P(TransportContract, AKilledPeerEndsItsCallsAndANewOneIsReachedByANewConnection) {
  Connected c(GetParam());
  auto pending = c.client->call(c.peer, kSleep, words(uint32_t(30000)), 64, patience());
  ASSERT_EQ(c.fill(1000, 1), CallStatus::Ok);
  c.server->kill();
  EXPECT_EQ(pending.wait(), CallStatus::PeerLost);
  EXPECT_FALSE(pending.why().empty());
  EXPECT_FALSE(c.client->alive(c.peer));
  EXPECT_FALSE(c.client->why_lost(c.peer).empty());
  EXPECT_EQ(c.fill(1, 1), CallStatus::PeerLost);

  const PeerId old = c.peer;
  c.server = c.world->server();
  c.peer = c.client->connect(c.server->address(), patience());
  EXPECT_NE(c.peer, old);
  EXPECT_EQ(c.fill(100000, 2), CallStatus::Ok);
  EXPECT_EQ(c.client->call(old, kEcho, Bytes(), 0, patience()).wait(), CallStatus::PeerLost);
}

TEST_P(TransportContract, ASilentPeerIsLostWithoutAnyErrorOfTheNetwork) {
  Connected c(GetParam());
  ASSERT_EQ(c.fill(1000, 1), CallStatus::Ok);
  c.server->pause();
  auto large = c.client->call(c.peer, kEcho, Bytes(500000), 500000, patience());
  auto small = c.client->call(c.peer, kCount, Bytes(), 8, patience());
  EXPECT_EQ(small.wait(), CallStatus::PeerLost) << small.why();
  EXPECT_EQ(large.wait(), CallStatus::PeerLost);
  EXPECT_THAT(small.why(), HasSubstr("no sign of life"));
  c.server->resume();
  c.peer = c.client->connect(c.server->address(), patience());
  EXPECT_EQ(c.fill(200000, 5), CallStatus::Ok);
}

TEST_P(TransportContract, AnIdleConnectionLivesOnHeartbeatsAlone) {
  TransportOptions options = contract_options();
  options.heartbeat = milliseconds(50);
  Connected c(GetParam(), options);
  std::this_thread::sleep_for(milliseconds(2200));  // longer than the silence of either end
  EXPECT_TRUE(c.client->alive(c.peer)) << c.client->why_lost(c.peer);
  EXPECT_EQ(c.fill(100, 1), CallStatus::Ok);
}

TEST_P(TransportContract, HandlesOfNobodyAndOfEndedConnectionsReachNobody) {
  Connected c(GetParam());
  EXPECT_EQ(c.client->call(PeerId{}, kEcho, Bytes(), 0, patience()).wait(), CallStatus::PeerLost);
  EXPECT_EQ(c.client->call(PeerId{12345}, kEcho, Bytes(), 0, patience()).wait(),
            CallStatus::PeerLost);
  auto pending = c.client->call(c.peer, kSleep, words(uint32_t(5000)), 64, patience());
  c.client->disconnect(c.peer);
  EXPECT_EQ(pending.wait(), CallStatus::PeerLost);
  EXPECT_EQ(c.fill(1, 1), CallStatus::PeerLost);
  const PeerId again = c.client->connect(c.server->address(), patience());
  EXPECT_NE(again, c.peer);
  EXPECT_FALSE(c.client->alive(c.peer));
}

TEST_P(TransportContract, ClosingTheTransportEndsEveryCall) {
  Connected c(GetParam());
  auto pending = c.client->call(c.peer, kSleep, words(uint32_t(200)), 64, patience());
  c.client.reset();
  EXPECT_EQ(pending.wait(), CallStatus::PeerLost);
}

}  // namespace
}  // namespace certkv::test
