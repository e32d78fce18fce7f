// Nodes over loopback: what the simulation cannot show, because it has no sockets, keys or clocks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <future>
#include <random>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/log.h"
#include "kvstore/cluster/channel.h"
#include "kvstore/cluster/cluster_node.h"
#include "tests/support/thrown_by.h"

namespace certkv::cluster {
namespace {

namespace asio = boost::asio;
using Tcp = asio::ip::tcp;
using std::chrono::milliseconds;
using std::chrono::seconds;

#if defined(CERTKV_SANITIZED)
constexpr int kFrames = 10'000;
#else
constexpr int kFrames = 100'000;
#endif

// --- channels, without sockets ---

struct Pair {
  explicit Pair(const JobKey& key)
      : low{key, 0, 100, 7, 3},
        high{key, 1, 101, 7, 3},
        called(low, std::nullopt),
        caller(high, 0) {}
  // Both hellos and both confirmations.
  void shake_hands() {
    Channel::Bytes a, b;
    caller.greet(a);
    hello = a;
    EXPECT_EQ(deliver(called, a, b), nullptr);
    a.clear();
    EXPECT_EQ(deliver(caller, b, a), nullptr);
    confirm = a;
    Channel::Bytes none;
    EXPECT_EQ(deliver(called, a, none), nullptr);
    EXPECT_TRUE(called.authenticated() && caller.authenticated() && none.empty());
  }
  // What the channel says of the frames in `bytes`, one after the other, up to the first defect.
  static const char* deliver(Channel& to, std::span<const std::byte> bytes, Channel::Bytes& answer,
                             std::optional<Message>* last = nullptr) {
    while (!bytes.empty()) {
      ClusterFrame f;
      if (bytes.size() < sizeof f) return "cut";
      std::memcpy(&f, bytes.data(), sizeof f);
      if (const char* defect = to.defect(f)) return defect;
      bytes = bytes.subspan(sizeof f);
      if (bytes.size() < f.payload_bytes) return "cut";
      std::optional<Message> m;
      const char* wrong = to.take(f, bytes.first(f.payload_bytes), answer, m);
      if (last != nullptr && m) *last = m;
      if (wrong != nullptr) return wrong;
      bytes = bytes.subspan(f.payload_bytes);
    }
    return nullptr;
  }
  ChannelIdentity low, high;
  Channel called, caller;
  Channel::Bytes hello, confirm;  // of the caller
};

Message a_message(uint64_t sequence) {
  Message m;
  m.from = 1;
  m.to = 0;
  m.from_boot = 101;
  m.to_boot = 100;
  m.sequence = sequence;
  return m;
}

TEST(ClusterChannel, CarriesMessagesInOrderBetweenHoldersOfOneKey) {
  Pair p(JobKey::generate());
  p.shake_hands();
  for (uint64_t i = 1; i < 100; ++i) {
    Channel::Bytes frame, answer;
    p.caller.seal(a_message(i), frame);
    std::optional<Message> m;
    ASSERT_EQ(Pair::deliver(p.called, frame, answer, &m), nullptr);
    ASSERT_TRUE(m.has_value());
    EXPECT_EQ(*m, a_message(i));
  }
}

TEST(ClusterChannel, RefusesAnotherKeyAnotherClusterAndAnotherNode) {
  const JobKey key = JobKey::generate();
  const auto verdict = [&](const JobKey& k, NodeId from, uint64_t digest, NodeId to) {
    Pair p(key);
    const ChannelIdentity identity{k, from, 101, digest, 3};
    Channel caller(identity, to);
    Channel::Bytes a, b, c, d;
    caller.greet(a);
    if (const char* wrong = Pair::deliver(p.called, a, b)) return std::string(wrong);
    if (const char* wrong = Pair::deliver(caller, b, c)) return std::string("caller: ") + wrong;
    const char* wrong = Pair::deliver(p.called, c, d);
    return std::string(wrong == nullptr ? "" : wrong);
  };
  EXPECT_EQ(verdict(key, 1, 7, 0), "");
  EXPECT_EQ(verdict(JobKey::generate(), 1, 7, 0), "caller: a wrong tag or number");
  EXPECT_EQ(verdict(key, 1, 8, 0), "another seed list");
  EXPECT_EQ(verdict(key, 1, 7, 2), "it wants another node");
  EXPECT_EQ(verdict(key, 0, 7, 0), "a node that does not dial this one");
}

TEST(ClusterChannel, AHundredThousandForgedAndReplayedFramesChangeNothing) {
  const JobKey key = JobKey::generate();
  std::mt19937_64 random(5);
  Channel::Bytes recorded;  // a whole conversation of another connection
  {
    Pair p(key);
    p.shake_hands();
    recorded = p.confirm;
    for (uint64_t i = 1; i < 20; ++i) p.caller.seal(a_message(i), recorded);
  }
  int refused = 0;
  for (int i = 0; i < kFrames;) {
    Pair p(key);
    p.shake_hands();
    Channel::Bytes first, second, other, answer;
    p.caller.seal(a_message(1), first);
    p.caller.seal(a_message(2), second);
    p.called.seal(a_message(1), other);
    Channel::Bytes attack;
    bool first_is_good = false;
    switch (i % 6) {
      case 0:  // one bit of a good frame
        attack = first;
        attack[random() % attack.size()] ^= std::byte(1 << random() % 8);
        break;
      case 1:  // one is left out
        attack = second;
        break;
      case 2:  // one comes twice
        attack = first;
        attack.insert(attack.end(), first.begin(), first.end());
        first_is_good = true;
        break;
      case 3:  // of another connection between the same nodes
        attack = recorded;
        break;
      case 4:  // its own, sent back
        attack = other;
        break;
      case 5:  // anything
        attack.resize(first.size());
        for (std::byte& b : attack) b = std::byte(random());
        if (random() % 2) std::memcpy(attack.data(), first.data(), 24);  // with a sound head
        break;
    }
    std::optional<Message> m;
    const char* wrong = Pair::deliver(p.called, attack, answer, &m);
    ASSERT_NE(wrong, nullptr) << "attack " << i % 6 << " was let through";
    ASSERT_EQ(m.has_value(), first_is_good);
    ASSERT_TRUE(answer.empty());
    ++refused;
    // Where the connection would be ended, a right frame comes too late.
    if (std::strcmp(wrong, "a wrong tag or number") == 0) {
      ASSERT_NE(Pair::deliver(p.called, first_is_good ? second : first, answer, &m), nullptr);
    }
    ++i;
  }
  EXPECT_EQ(refused, kFrames);
}

// --- nodes, over loopback ---

uint16_t free_port() {
  asio::io_context io;
  return Tcp::acceptor(io, Tcp::endpoint(asio::ip::address_v4::loopback(), 0))
      .local_endpoint()
      .port();
}

Timing quick() {
  Timing t;
  t.heartbeat = Time(50'000) * kDeadlineFactor;
  t.silence = Time(600'000) * kDeadlineFactor;
  t.settle = Time(30'000) * kDeadlineFactor;
  t.stagger = Time(50'000) * kDeadlineFactor;
  t.proposal_limit = Time(300'000) * kDeadlineFactor;
  return t;
}

// A node with a thread of its own.
class Running {
 public:
  Running(const JobKey& key, ClusterOptions o) {
    node_ = std::make_unique<ClusterNode>(
        io_, key, std::move(o),
        ClusterCallbacks{
            [this](const View& v, bool active) { views_.emplace_back(v.epoch, active); }, {}});
    thread_ = std::thread([this] { io_.run(); });
  }
  ~Running() {  // as if the process were killed: the sockets close, nobody says farewell
    asio::post(io_, [this] { node_.reset(); });
    io_.stop();
    thread_.join();
    io_.restart();
    io_.poll();
    node_.reset();
    io_.poll();
  }
  ClusterSnapshot see() const { return node_->snapshot(); }
  void pause(milliseconds d) {
    asio::post(io_, [d] { std::this_thread::sleep_for(d); });
  }
  ClusterNode& node() { return *node_; }
  uint16_t port() const { return node_->port(); }

 private:
  asio::io_context io_;
  std::vector<std::pair<uint64_t, bool>> views_;
  std::unique_ptr<ClusterNode> node_;
  std::thread thread_;
};

class Nodes {
 public:
  explicit Nodes(size_t n, Timing timing = quick()) : timing_(timing) {
    log_set_level(LogLevel::Warning);
    for (size_t i = 0; i < n; ++i)
      seeds.push_back({"node-" + std::to_string(i), "127.0.0.1:" + std::to_string(free_port())});
    nodes.resize(n);
    for (size_t i = 0; i < n; ++i) start(i);
  }
  ClusterOptions options(size_t i) const {
    ClusterOptions o;
    o.seeds = seeds;
    o.name = seeds[i].name;
    o.timing = timing_;
    o.max_strangers = 16;
    o.handshake = milliseconds(300);
    return o;
  }
  void start(size_t i) { nodes[i] = std::make_unique<Running>(key, options(i)); }
  // All of `members`, and nobody else, in one view that they may act for.
  bool whole(const std::vector<size_t>& members) const {
    uint64_t epoch = 0;
    for (const size_t i : members) {
      const ClusterSnapshot s = nodes[i]->see();
      if (!s.active || (epoch != 0 && s.epoch != epoch)) return false;
      epoch = s.epoch;
      for (size_t j = 0; j < s.nodes.size(); ++j)
        if (s.nodes[j].member != (std::find(members.begin(), members.end(), j) != members.end()))
          return false;
    }
    return true;
  }
  bool whole_within(const std::vector<size_t>& members, milliseconds d) const {
    const Deadline deadline = Deadline::after(d);
    while (!deadline.passed()) {
      if (whole(members)) return true;
      std::this_thread::sleep_for(milliseconds(5));
    }
    return false;
  }
  const JobKey key = JobKey::generate();
  Seeds seeds;
  Timing timing_;
  std::vector<std::unique_ptr<Running>> nodes;
};

TEST(ClusterNodes, FormAViewLoseAKilledNodeWithinThreeSecondsAndTakeItBack) {
  Timing standard;  // the figures that users get
  standard.heartbeat *= kDeadlineFactor;
  standard.silence *= kDeadlineFactor;
  Nodes c(3, standard);
  ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  for (const size_t victim : {2, 0}) {
    const uint64_t boot = c.nodes[victim]->see().nodes[victim].boot;
    std::vector<size_t> rest{0, 1, 2};
    rest.erase(rest.begin() + long(victim));
    const auto killed = Deadline::Clock::now();
    c.nodes[victim].reset();
    EXPECT_TRUE(c.whole_within(rest, seconds(3))) << "node " << victim << " was killed";
    std::printf(
        "node %zu: the others' view without it after %lld ms\n", victim,
        static_cast<long long>(
            std::chrono::duration_cast<milliseconds>(Deadline::Clock::now() - killed).count()));
    c.start(victim);
    ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
    EXPECT_NE(c.nodes[victim]->see().nodes[victim].boot, boot);
  }
}

TEST(ClusterNodes, APausedNodeIsLeftOutAndJoinsAgainWhenItWakes) {
  Nodes c(3);
  ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  const uint64_t epoch = c.nodes[1]->see().epoch;
  c.nodes[1]->pause(milliseconds(1800) * kDeadlineFactor);
  EXPECT_TRUE(c.whole_within({0, 2}, seconds(20)));
  EXPECT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  EXPECT_GT(c.nodes[1]->see().epoch, epoch);
}

TEST(ClusterNodes, SpreadDataAddressesAndLag) {
  Nodes c(2);
  c.nodes[0]->node().set_local({"127.0.0.1:9999", 12345, 678});
  EXPECT_NE(thrown_by([&] {
              c.nodes[0]->node().set_local({"a b", 0, 0});
            }).find("printable"),
            std::string::npos);
  const Deadline deadline = Deadline::after(seconds(20));
  ClusterNodeState seen;
  while (!deadline.passed() && seen.data_address.empty()) {
    seen = c.nodes[1]->see().nodes[0];
    std::this_thread::sleep_for(milliseconds(5));
  }
  EXPECT_EQ(seen.data_address, "127.0.0.1:9999");
  EXPECT_EQ(seen.lag_bytes, 12345u);
  EXPECT_EQ(seen.free_bytes, 678u);
}

TEST(ClusterNodes, WhoHasAnotherKeyIsNoMember) {
  Nodes c(3);
  ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  c.nodes[2].reset();
  c.nodes[2] = std::make_unique<Running>(JobKey::generate(), c.options(2));
  ASSERT_TRUE(c.whole_within({0, 1}, seconds(20)));
  const Deadline deadline = Deadline::after(seconds(20));
  while (!deadline.passed() && c.nodes[2]->see().rejected < 3)
    std::this_thread::sleep_for(milliseconds(5));
  EXPECT_GE(c.nodes[2]->see().rejected, 3u) << "it tried and was refused";
  EXPECT_TRUE(c.whole({0, 1}));
  EXPECT_FALSE(c.nodes[2]->see().active);
  EXPECT_FALSE(c.nodes[0]->see().nodes[2].alive);
}

// A socket of somebody without the key. Everything has a limit.
class Stranger {
 public:
  explicit Stranger(uint16_t port) : socket_(io_) {
    boost::system::error_code error;
    socket_.connect({asio::ip::address_v4::loopback(), port}, error);
    connected_ = !error;
  }
  void send(std::span<const std::byte> bytes) {
    boost::system::error_code ignored;  // it may be gone already
    asio::write(socket_, asio::buffer(bytes.data(), bytes.size()), ignored);
  }
  // Whether the other side ends the connection.
  bool ended(milliseconds within = seconds(20)) {
    bool over = false;
    read(over);
    io_.restart();
    io_.run_for(within * kDeadlineFactor);
    return over;
  }
  bool connected() const { return connected_; }

 private:
  void read(bool& over) {
    socket_.async_read_some(asio::buffer(buffer_),
                            [this, &over](boost::system::error_code e, size_t) {
                              if (e)
                                over = true;
                              else
                                read(over);
                            });
  }
  asio::io_context io_;
  Tcp::socket socket_;
  std::array<char, 4096> buffer_{};
  bool connected_ = false;
};

Channel::Bytes hello_to(const Nodes& c, NodeId from, NodeId to) {
  const ChannelIdentity identity{JobKey::generate(), from, 4711, seeds_digest(c.seeds),
                                 c.seeds.size()};
  Channel::Bytes bytes;
  Channel(identity, to).greet(bytes);
  return bytes;
}

TEST(ClusterNodes, GarbageEndsItsConnectionAndChangesNothing) {
  Nodes c(3);
  ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  const ClusterSnapshot before = c.nodes[0]->see();
  std::mt19937_64 random(3);
  constexpr int kConnections = 300;
  for (int i = 0; i < kConnections; ++i) {
    Stranger s(c.nodes[0]->port());
    ASSERT_TRUE(s.connected());
    Channel::Bytes bytes;
    if (i % 2) bytes = hello_to(c, NodeId(1 + i / 2 % 2), 0);  // a right hello, then a forged frame
    for (size_t at = 0; at < 600; ++at) bytes.push_back(std::byte(random()));
    s.send(bytes);
    ASSERT_TRUE(s.ended());
  }
  const ClusterSnapshot after = c.nodes[0]->see();
  EXPECT_TRUE(c.whole({0, 1, 2}));
  EXPECT_EQ(after.epoch, before.epoch);
  EXPECT_EQ(after.views, before.views);
  const Deadline deadline = Deadline::after(seconds(5));
  while (!deadline.passed() && c.nodes[0]->see().rejected < before.rejected + kConnections)
    std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(c.nodes[0]->see().rejected, before.rejected + kConnections);
}

TEST(ClusterNodes, SlowAndIdleStrangersAreDroppedAndCannotKeepNodesOut) {
  Nodes c(3);
  ASSERT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  const uint16_t port = c.nodes[0]->port();
  Stranger idle(port), slow(port);
  slow.send(std::array<std::byte, 3>{std::byte('C'), std::byte('K'), std::byte('V')});
  EXPECT_TRUE(idle.ended());
  EXPECT_TRUE(slow.ended());
  // More idle strangers than there is room for, while a node comes back.
  c.nodes[2].reset();
  std::vector<std::unique_ptr<Stranger>> crowd;
  for (int i = 0; i < 60; ++i) crowd.push_back(std::make_unique<Stranger>(port));
  c.start(2);
  EXPECT_TRUE(c.whole_within({0, 1, 2}, seconds(20)));
  EXPECT_GE(c.nodes[0]->see().strangers_dropped, 2u + 60u - 16u);
}

TEST(ClusterNodes, AreRefusedByNameWhereTheyCannotBegin) {
  const JobKey key = JobKey::generate();
  const auto why = [&](Seeds seeds, const std::string& name, const std::string& listen) {
    return thrown_by([&] {
      asio::io_context io;
      ClusterOptions o;
      o.seeds = std::move(seeds);
      o.name = name;
      o.listen = listen;
      ClusterNode node(io, key, o);
    });
  };
  const Seeds good{{"a", "127.0.0.1:0"}, {"b", "127.0.0.1:1"}};
  EXPECT_EQ(why(good, "a", ""), "");
  EXPECT_NE(why(good, "c", "").find("'c' does not stand in the seed list"), std::string::npos);
  EXPECT_NE(why({{"a", "127.0.0.1"}}, "a", "").find("host:port"), std::string::npos);
  EXPECT_NE(why({{"a", "127.0.0.1:70000"}}, "a", "").find("host:port"), std::string::npos);
  asio::io_context io;
  Tcp::acceptor taken(io, Tcp::endpoint(asio::ip::address_v4::loopback(), 0));
  const std::string there = "127.0.0.1:" + std::to_string(taken.local_endpoint().port());
  EXPECT_NE(why(good, "a", there).find(there + ": cannot listen there"), std::string::npos);
}

}  // namespace
}  // namespace certkv::cluster
