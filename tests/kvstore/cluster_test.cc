// Placement, the book of copies, messages, and membership where nothing goes wrong by chance. What
// chance does is the business of cluster_sim_test.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/base/error.h"
#include "kvstore/cluster/membership.h"
#include "kvstore/cluster/replica_book.h"
#include "tests/support/thrown_by.h"

namespace certkv::cluster {
namespace {

Seeds seeds_named(std::vector<std::string> names) {
  Seeds s;
  for (std::string& n : names) s.push_back({std::move(n), "127.0.0.1:1"});
  return s;
}
Seeds seven() {
  return seeds_named({"a", "b", "c", "d", "e", "f", "g"});
}

PlacementGroup group(uint64_t i) {
  return {{0x1234 + i / 64, i * i}, uint32_t(i / 8 % 8), uint32_t(i % 8)};
}
constexpr uint64_t kGroups = 4000;

// A share p of kGroups groups, each placed by an independent hash, is binomial: it errs by more
// than six standard deviations once in 5e8 tries, and the hash is fixed, so a pass stays a pass.
double six_sigma(double p) {
  return 6 * std::sqrt(kGroups * p * (1 - p));
}

TEST(Placement, ALeavingMemberMovesItsOwnCopiesAndNoOthers) {
  const NodeSet all = NodeSet::first(7);
  for (const unsigned replicas : {1u, 2u, 3u}) {
    const Placement p(seven(), replicas, PlacementRule::Spread);
    for (const NodeId leaver : all) {
      NodeSet rest = all;
      rest.drop(leaver);
      uint64_t moved = 0;
      for (uint64_t i = 0; i < kGroups; ++i) {
        const NodeSet before = p.targets(all, group(i), 0), after = p.targets(rest, group(i), 0);
        ASSERT_EQ(after.count(), replicas);
        // Rendezvous: the order of the others does not change, so the targets are those before
        // without the leaver, and one more exactly if it was among them.
        ASSERT_EQ(before.without(after).count(), before.has(leaver));
        ASSERT_EQ(after.without(before).count(), before.has(leaver));
        moved += before.has(leaver);
      }
      const double share = replicas / 7.0;  // no placement can move fewer: these copies are gone
      EXPECT_NEAR(double(moved), share * kGroups, six_sigma(share));
    }
  }
}

TEST(Placement, AMemberThatComesTakesCopiesAndMovesNoneBetweenOthers) {
  const Placement p(seven(), 2, PlacementRule::LocalFirst);
  NodeSet six = NodeSet::first(6);
  for (uint64_t i = 0; i < kGroups; ++i) {
    const NodeSet before = p.targets(six, group(i), 2),
                  after = p.targets(NodeSet::first(7), group(i), 2);
    for (const NodeId n : after.without(before)) ASSERT_EQ(n, 6);
  }
}

TEST(Placement, LocalFirstKeepsTheFirstCopyAtHomeAndSharesTheOthersEqually) {
  const Placement p(seven(), 3, PlacementRule::LocalFirst);
  const NodeSet all = NodeSet::first(7);
  std::array<uint64_t, 7> held{};
  for (uint64_t i = 0; i < kGroups; ++i) {
    const NodeSet t = p.targets(all, group(i), 4);
    ASSERT_TRUE(t.has(4));
    ASSERT_EQ(t.count(), 3u);
    for (const NodeId n : t) ++held[n];
  }
  for (const NodeId n : all)
    if (n != 4) {
      EXPECT_NEAR(double(held[n]), kGroups / 3.0, six_sigma(1 / 3.0)) << int(n);
    }
}

TEST(Placement, FollowsNamesAndNotTheOrderOfTheSeedList) {
  const Placement p(seven(), 2, PlacementRule::Spread);
  const Placement q(seeds_named({"g", "f", "e", "d", "c", "b", "a"}), 2, PlacementRule::Spread);
  for (uint64_t i = 0; i < 500; ++i) {
    const Placement::Order a = p.order(NodeSet::first(7), group(i));
    const Placement::Order b = q.order(NodeSet::first(7), group(i));
    ASSERT_EQ(a.count, 7u);
    for (unsigned k = 0; k < 7; ++k) ASSERT_EQ(a.nodes[k], 6 - b.nodes[k]);
  }
}

TEST(Placement, FewerMembersThanCopiesAreAllTargetsAndNoMore) {
  const Placement p(seven(), 3, PlacementRule::LocalFirst);
  EXPECT_EQ(p.targets(NodeSet::first(2), group(1), 0), NodeSet::first(2));
  EXPECT_EQ(p.targets(NodeSet(), group(1), 0), NodeSet());
}

TEST(Seeds, AreRefusedByNameWhereTheyCannotBeACluster) {
  EXPECT_NE(thrown_by([] { check_seeds({}); }).find("0 seeds"), std::string::npos);
  const auto twice = seeds_named({"a", "b", "a"});
  EXPECT_NE(thrown_by([&] { check_seeds(twice); }).find("'a' stands twice"), std::string::npos);
  const auto blank = seeds_named({"a b"});
  EXPECT_NE(thrown_by([&] { check_seeds(blank); }).find("printable"), std::string::npos);
  EXPECT_NE(thrown_by([] { Placement(seven(), 4, PlacementRule::Spread); }).find("store.replicas"),
            std::string::npos);
  EXPECT_NE(seeds_digest(seven()), seeds_digest(seeds_named({"a"})));
}

Message sample() {
  Message m;
  m.kind = MessageKind::Propose;
  m.from = 1;
  m.to = 2;
  m.from_boot = 11;
  m.to_boot = 12;
  m.sequence = 13;
  m.stamp = 14;
  m.echo = 15;
  m.challenge = 16;
  m.answer = 17;
  m.epoch = 18;
  m.floor = 19;
  m.heard = NodeSet(6);
  m.lag_bytes = 20;
  m.free_bytes = 21;
  m.proposal = 22;
  m.members = NodeSet(5);
  m.boots[0] = 23;
  m.boots[2] = 24;
  m.address_bytes = 3;
  m.address = {'a', ':', '1'};
  return m;
}

TEST(ClusterMessage, ComesBackAsItWas) {
  std::vector<std::byte> bytes;
  encode(sample(), bytes);
  EXPECT_EQ(bytes.size(), kMessageHeadBytes + 2 * 8 + 3);
  const auto back = decode(bytes, 3);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(*back, sample());
}

TEST(ClusterMessage, IsRefusedWhereAnyByteIsOutOfPlace) {
  std::vector<std::byte> good;
  encode(sample(), good);
  for (size_t n = 0; n < good.size(); ++n)
    EXPECT_FALSE(decode(std::span(good).first(n), 3)) << "cut at " << n;
  auto longer = good;
  longer.push_back(std::byte(0));
  EXPECT_FALSE(decode(longer, 3));
  EXPECT_FALSE(decode(good, 2)) << "a node beyond the seeds";
  const auto with = [&](size_t at, uint8_t value) {
    auto bytes = good;
    bytes[at] = std::byte(value);
    return decode(bytes, 3).has_value();
  };
  EXPECT_FALSE(with(0, 0)) << "no kind";
  EXPECT_FALSE(with(0, 7)) << "unknown kind";
  EXPECT_FALSE(with(0, 2)) << "a heartbeat with members";
  EXPECT_FALSE(with(2, 1)) << "to itself";
  EXPECT_FALSE(with(3, 200)) << "a longer address than there may be";
  EXPECT_FALSE(with(8, 0)) << "no boot nonce";
  EXPECT_FALSE(with(72, 8)) << "hears a node that is no seed";
  EXPECT_FALSE(with(104, 9)) << "a member that is no seed";
  EXPECT_FALSE(with(112, 1)) << "reserved";
  EXPECT_FALSE(with(120, 0)) << "a member without a boot nonce";
  EXPECT_FALSE(with(137, 0x1b)) << "an address with a control character";
  EXPECT_TRUE(with(136, 'b'));
}

// Nodes whose messages all arrive, in order, 1 ms later.
class Lab {
 public:
  explicit Lab(size_t n) {
    for (size_t i = 0; i < n; ++i) start(NodeId(i));
  }
  void start(NodeId n) {
    if (nodes.size() <= n) nodes.resize(n + 1u);
    nodes[n] = std::make_unique<Membership>(3, n, 100 * ++lives + n, now);
  }
  void run(std::chrono::milliseconds d) {
    for (const Time end = now + d; now < end; now += std::chrono::milliseconds(1)) {
      std::vector<Message> arriving;
      arriving.swap(flying);
      for (const Message& m : arriving) {
        if (!nodes[m.to] || stopped.has(m.to)) continue;
        if (cut.has(m.from) != cut.has(m.to)) continue;
        call([&](Output& o) { nodes[m.to]->receive(m, now, o); });
      }
      for (const auto& n : nodes)
        if (n && !stopped.has(n->self()) && now >= n->next_tick())
          call([&](Output& o) { n->tick(now, o); });
    }
  }
  void kill(NodeId n) {
    nodes[n].reset();
    for (const auto& other : nodes)
      if (other) call([&](Output& o) { other->refused(n, now, o); });
  }
  template <typename F>
  void call(F&& f) {
    Output o;
    f(o);
    flying.insert(flying.end(), o.messages.begin(), o.messages.end());
    events.insert(events.end(), o.events.begin(), o.events.end());
  }
  bool one_view(NodeSet members) {
    for (const NodeId n : members)
      if (!nodes[n]->active(now) || nodes[n]->view().members != members ||
          nodes[n]->view().epoch != nodes[*members.begin()]->view().epoch)
        return false;
    return true;
  }
  Time now{1'000'000};
  uint64_t lives = 0;
  std::vector<std::unique_ptr<Membership>> nodes;
  std::vector<Message> flying;
  std::vector<Event> events;
  NodeSet stopped, cut;
};

TEST(Membership, FormsAViewAndKeepsIt) {
  Lab lab(3);
  lab.run(std::chrono::seconds(2));
  ASSERT_TRUE(lab.one_view(NodeSet::first(3)));
  const uint64_t epoch = lab.nodes[0]->view().epoch;
  lab.run(std::chrono::seconds(20));
  EXPECT_TRUE(lab.one_view(NodeSet::first(3)));
  EXPECT_EQ(lab.nodes[0]->view().epoch, epoch) << "the view changed without a reason";
}

TEST(Membership, ARefusedConnectionChangesTheViewWithinASecondSilenceWithinThree) {
  Lab lab(3);
  lab.run(std::chrono::seconds(2));
  lab.kill(1);
  lab.run(std::chrono::seconds(1));
  EXPECT_TRUE(lab.one_view(NodeSet(5)));
  lab.start(1);
  lab.run(std::chrono::seconds(2));
  ASSERT_TRUE(lab.one_view(NodeSet(7))) << "it restarted and was not admitted again";
  EXPECT_TRUE(lab.nodes[0]->view().admits(1, lab.nodes[1]->boot()));
  lab.stopped.add(1);
  lab.run(std::chrono::seconds(3));
  EXPECT_TRUE(lab.one_view(NodeSet(5)));
}

TEST(Membership, APausedNodeIsFencedBeforeItDoesAnything) {
  Lab lab(3);
  lab.run(std::chrono::seconds(2));
  lab.stopped.add(2);
  EXPECT_TRUE(lab.nodes[2]->active(lab.now));
  const Message before = [&] {
    lab.run(std::chrono::milliseconds(250));
    for (const Message& m : lab.flying)
      if (m.to == 2) return m;
    return Message{};
  }();
  lab.run(std::chrono::seconds(5));
  const uint64_t epoch = lab.nodes[2]->view().epoch;
  EXPECT_FALSE(lab.nodes[2]->accepts(0, lab.nodes[0]->boot(), epoch, lab.now));
  Output o;
  lab.nodes[2]->receive(before, lab.now, o);
  ASSERT_FALSE(o.events.empty());
  EXPECT_TRUE(std::any_of(o.events.begin(), o.events.end(),
                          [](const Event& e) { return e.kind == Event::Kind::Fenced; }));
  EXPECT_FALSE(lab.nodes[2]->active(lab.now)) << "a message from before the pause made it active";
  lab.stopped = NodeSet();
  lab.run(std::chrono::seconds(3));
  EXPECT_TRUE(lab.one_view(NodeSet(7)));
  EXPECT_GT(lab.nodes[2]->view().epoch, epoch);
}

TEST(Membership, AMinorityFencesItselfAndRejoins) {
  Lab lab(3);
  lab.run(std::chrono::seconds(2));
  lab.cut = NodeSet(1);
  lab.run(std::chrono::seconds(4));
  EXPECT_TRUE(lab.one_view(NodeSet(6)));
  EXPECT_FALSE(lab.nodes[0]->active(lab.now));
  lab.cut = NodeSet();
  lab.run(std::chrono::seconds(3));
  EXPECT_TRUE(lab.one_view(NodeSet(7)));
}

TEST(Membership, AloneItIsAMajorityOfOne) {
  Membership m(1, 0, 5, Time(1));
  Output o;
  for (Time t(1); t < Time(1'000'000); t += Time(10'000)) m.tick(t, o);
  EXPECT_TRUE(m.active(Time(1'000'000)));
  EXPECT_TRUE(o.messages.empty());
}

TEST(Membership, SpreadsWhatANodeSaysOfItself) {
  Lab lab(3);
  lab.nodes[1]->set_local({"10.0.0.1:7000", 4096, 8192});
  lab.run(std::chrono::seconds(1));
  const PeerState p = lab.nodes[2]->peer(1, lab.now);
  EXPECT_TRUE(p.alive);
  EXPECT_EQ(p.data_address, "10.0.0.1:7000");
  EXPECT_EQ(p.lag_bytes, 4096u);
  EXPECT_EQ(p.free_bytes, 8192u);
  const LocalState bad{std::string(200, 'x'), 0, 0};
  EXPECT_NE(thrown_by([&] { lab.nodes[1]->set_local(bad); }).find("200 bytes"), std::string::npos);
}

// --- the book of copies ---

View view_of(uint64_t epoch, NodeSet members) {
  View v;
  v.epoch = epoch;
  v.members = members;
  for (const NodeId n : members) v.boots[n] = 100u + n;
  return v;
}
RunId run_id(uint32_t layer) {
  return {7, {1, 2}, layer, 0, 0, 1};
}
Seeds four() {
  return seeds_named({"a", "b", "c", "d"});
}

TEST(ReplicaBook, CountsAsManyCopiesAsWereAskedForAndNoCopyTwice) {
  ReplicaBook book(Placement(four(), 3, PlacementRule::LocalFirst), 0, 100);
  book.set_view(view_of(1, NodeSet::first(4)), true);
  book.hold(run_id(0), 0, true, 10, 1000);
  EXPECT_EQ(book.lag_bytes(), 10'000u);
  EXPECT_TRUE(book.acknowledge(1, 101, 1, run_id(0), 8));
  EXPECT_TRUE(book.acknowledge(1, 101, 1, run_id(0), 8));
  EXPECT_EQ(book.acknowledged(run_id(0)), 0u) << "two copies are not three";
  EXPECT_TRUE(book.acknowledge(2, 102, 1, run_id(0), 6));
  EXPECT_EQ(book.acknowledged(run_id(0)), 6u);
  EXPECT_EQ(book.lag_bytes(), 4000u);
  EXPECT_FALSE(book.acknowledge(2, 102, 1, run_id(0), 11)) << "more than was written";
  EXPECT_FALSE(book.acknowledge(2, 999, 1, run_id(0), 10)) << "a former life";
  EXPECT_FALSE(book.acknowledge(2, 102, 0, run_id(0), 10)) << "an older epoch";
  EXPECT_FALSE(book.acknowledge(2, 102, 1, run_id(1), 1)) << "a run that is not held";
  EXPECT_EQ(book.acknowledged(run_id(0)), 6u);
  book.set_view(view_of(1, NodeSet::first(4)), false);
  EXPECT_EQ(book.acknowledged(run_id(0)), 0u) << "fenced";
  EXPECT_FALSE(book.acknowledge(2, 102, 1, run_id(0), 10)) << "fenced";
  book.set_view(view_of(2, NodeSet::first(4)), true);
  EXPECT_EQ(book.acknowledged(run_id(0)), 6u) << "the same processes hold them still";
}

// Carries out all tasks at once, for books of nodes 0 .. n - 1.
using Memory = std::map<std::pair<NodeId, RunId>, uint32_t>;  // blocks that a node has
unsigned carry_out(std::vector<ReplicaBook*> books, Memory& have, uint64_t epoch, Time now) {
  unsigned sent = 0;
  for (int round = 0; round < 20; ++round, now += Time(1'000'000)) {
    for (size_t n = 0; n < books.size(); ++n) {
      if (books[n] == nullptr) continue;
      std::vector<CopyTask> tasks;
      books[n]->tasks(now, 100, 4, tasks);
      for (const CopyTask& t : tasks) {
        uint32_t& held = have[{t.to, t.run}];
        if (t.kind == CopyTask::Kind::Send && t.first <= held) {
          sent += t.count;
          held = std::max(held, t.first + t.count);
          books[t.to]->hold(t.run, 0, false, held, 1000);
        }
        EXPECT_TRUE(books[n]->acknowledge(t.to, 100u + t.to, epoch, t.run, held));
      }
    }
  }
  return sent;
}

TEST(ReplicaBook, CopiesAreMadeOnceAndMadeAgainAfterTheirNodeOrTheirHomeIsGone) {
  const Placement placement(four(), 2, PlacementRule::LocalFirst);
  std::vector<std::unique_ptr<ReplicaBook>> own;
  std::vector<ReplicaBook*> books;
  for (NodeId n = 0; n < 4; ++n) {
    own.push_back(std::make_unique<ReplicaBook>(placement, n, 100u + n));
    own[n]->set_view(view_of(1, NodeSet::first(4)), true);
    books.push_back(own[n].get());
  }
  constexpr uint32_t kRuns = 12;
  Memory have;
  for (uint32_t i = 0; i < kRuns; ++i) {
    books[0]->hold(run_id(i), 0, true, 10, 1000);
    have[{0, run_id(i)}] = 10;
  }
  EXPECT_EQ(carry_out(books, have, 1, Time(1)), kRuns * 10) << "one copy of each elsewhere";
  EXPECT_EQ(books[0]->lag_bytes(), 0u);
  EXPECT_EQ(books[0]->open_runs(), 0u);
  size_t copies = 0;
  for (NodeId n = 1; n < 4; ++n) copies += books[n]->runs();
  EXPECT_EQ(copies, kRuns);

  // Node 0 is gone: every run has one copy left, whose holder makes the second.
  books[0] = nullptr;
  for (NodeId n = 1; n < 4; ++n) books[n]->set_view(view_of(2, NodeSet(14)), true);
  for (NodeId n = 1; n < 4; ++n) EXPECT_EQ(books[n]->lag_bytes(), books[n]->runs() * 10'000);
  EXPECT_EQ(carry_out(books, have, 2, Time(100'000'000)), kRuns * 10);
  for (NodeId n = 1; n < 4; ++n) {
    EXPECT_EQ(books[n]->open_runs(), 0u);
    EXPECT_EQ(books[n]->lag_bytes(), 0u);
  }
}

TEST(ReplicaBook, GivesNoTasksWhileFencedAndRepeatsThemWhenNothingWasHeard) {
  ReplicaBook book(Placement(four(), 2, PlacementRule::LocalFirst), 0, 100, Time(500));
  std::vector<CopyTask> tasks;
  book.set_view(view_of(1, NodeSet::first(4)), false);
  book.hold(run_id(0), 0, true, 10, 1000);
  book.tasks(Time(1), 10, 4, tasks);
  EXPECT_TRUE(tasks.empty());
  book.set_view(view_of(1, NodeSet::first(4)), true);
  book.tasks(Time(2), 10, 4, tasks);
  ASSERT_EQ(tasks.size(), 1u);
  EXPECT_EQ(tasks[0].count, 4u);
  book.tasks(Time(3), 10, 4, tasks);
  EXPECT_EQ(tasks.size(), 1u) << "it is under way";
  book.tasks(Time(502), 10, 4, tasks);
  EXPECT_EQ(tasks.size(), 2u);
  book.forget(run_id(0));
  EXPECT_EQ(book.lag_bytes(), 0u);
  EXPECT_EQ(book.open_runs(), 0u);
}

}  // namespace
}  // namespace certkv::cluster
