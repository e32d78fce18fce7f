#include "tests/kvstore/cluster_sim.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <deque>

#include "tests/kvstore/cluster_sim_mutants.h"

namespace certkv::test {
namespace {

using namespace certkv::cluster;

constexpr uint64_t kFaultsUs = 6'000'000;  // while faults happen
// After the faults: 2 s until the silence of what died is noticed, at most 2.3 s until a proposal
// is due (settle, 7 places of stagger, jitter, one of another's under way), the same again where
// the first is refused, and 1 s for copies with their retries at 0.3 s.
constexpr uint64_t kBoundUs = 10'000'000;
constexpr uint64_t kCalmUs = 2'000'000;  // in which then no view may change
constexpr uint64_t kSilenceUs = 2'000'000;
constexpr uint32_t kBlockBytes = 4096;

// The data path in small: asks, copies and acknowledgements.
struct DataFrame {
  uint32_t kind = 0;  // 1 ask, 2 copy, 3 acknowledgement
  uint32_t from = 0;
  uint64_t from_boot = 0, epoch = 0;
  RunId run;
  uint32_t home = 0, first = 0, count = 0, whole = 0;
};
static_assert(std::has_unique_object_representations_v<DataFrame>);

// Stands in for the authenticated frame: whatever was damaged is not delivered.
void seal(Bytes& frame) {
  const uint64_t sum = XXH3_64bits_withSeed(frame.data(), frame.size(), 0x5eed);
  const size_t at = frame.size();
  frame.resize(at + 8);
  std::memcpy(frame.data() + at, &sum, 8);
}
bool unseal(Bytes& frame) {
  if (frame.size() < 9) return false;
  uint64_t sum;
  std::memcpy(&sum, frame.data() + frame.size() - 8, 8);
  frame.resize(frame.size() - 8);
  return sum == XXH3_64bits_withSeed(frame.data(), frame.size(), 0x5eed);
}

struct Held {
  NodeId home = 0;
  uint32_t blocks = 0;
  bool original = false;
};

struct Node {
  std::unique_ptr<MutantMembership> member;  // none: the process is not there
  std::unique_ptr<MutantBook> book;
  std::map<RunId, Held> memory;  // verified blocks
  std::map<RunId, uint32_t> acknowledged;
  uint64_t boot = 0;
  unsigned life = 0;
  uint64_t clock_offset = 0;  // its clock has an origin of its own
  bool paused = false;
  std::deque<std::pair<unsigned, Bytes>> inbox;  // while paused
  uint64_t busy = 0;                             // generation of its tick events
  uint32_t next_version = 1;
  // What the observer knows: views it was in, and until when.
  std::vector<std::pair<uint64_t, uint64_t>> epochs;  // (epoch, since), in order
};

class World {
 public:
  World(uint64_t seed, Mutation mutation, const std::function<void(const std::string&)>& log)
      : random_(seed), network_(seed ^ 0x9e3779b97f4a7c15u), mutation_(mutation), log_(log) {
    count_ = 3 + unsigned(random_.below(5));
    for (unsigned n = 0; n < count_; ++n)
      seeds_.push_back({fmt::format("node-{}", n), "127.0.0.1:1"});
    const auto rule = random_.chance(0.5) ? PlacementRule::LocalFirst : PlacementRule::Spread;
    placement_.emplace(seeds_, 1 + unsigned(random_.below(3)), rule);
    const auto some = [this](double most) {
      return random_.chance(0.4) ? 0 : random_.between(0, most);
    };
    network_.faults.loss = some(0.3);
    network_.faults.replay = some(0.5);
    network_.faults.corruption = some(0.1);
    network_.faults.late = some(0.2);
    nodes_.resize(count_);
  }

  SimResult run() {
    for (unsigned n = 0; n < count_; ++n) {
      nodes_[n].clock_offset = 1 + random_.below(uint64_t(1) << 40);
      at(random_.below(500'000), [this, n] { start(n); });
    }
    at(random_.below(1'000'000), [this] { fault(); });
    at(kFaultsUs, [this] { calm(); });
    drain(kFaultsUs + kBoundUs);
    if (result_.violation.empty()) expect_whole("liveness: ");
    const uint64_t epoch = nodes_[0].member ? nodes_[0].member->view().epoch : 0;
    drain(kFaultsUs + kBoundUs + kCalmUs);
    if (result_.violation.empty() && nodes_[0].member->view().epoch != epoch)
      violated("the view changed although nothing happened");
    result_.views = views_.size();
    return result_;
  }

 private:
  struct Scheduled {
    uint64_t time, tie;
    std::function<void()> what;
    bool operator>(const Scheduled& o) const {
      return time != o.time ? time > o.time : tie > o.tie;
    }
  };
  void at(uint64_t time, std::function<void()> what) {
    queue_.push({time, tie_++, std::move(what)});
  }
  void drain(uint64_t until) {
    while (!queue_.empty() && queue_.top().time <= until && result_.violation.empty()) {
      Scheduled next = std::move(const_cast<Scheduled&>(queue_.top()));  // it goes in any case
      queue_.pop();
      now_ = next.time;
      next.what();
      ++result_.events;
    }
  }
  template <typename... Args>
  void say(fmt::format_string<Args...> f, Args&&... args) {
    if (log_)
      log_(fmt::format("{:>9.3f} ms  {}", double(now_) / 1000,
                       fmt::format(f, std::forward<Args>(args)...)));
  }
  void violated(const std::string& what) {
    if (!result_.violation.empty()) return;
    result_.violation = fmt::format("at {:.3f} ms: {}", double(now_) / 1000, what);
    say("VIOLATION: {}", what);
  }
  Time clock(const Node& n) const { return Time(int64_t(now_ + n.clock_offset)); }

  // --- processes ---

  void start(unsigned n) {
    Node& node = nodes_[n];
    ++node.life;
    node.boot = (uint64_t(n + 1) << 32 | node.life) * 0x9e3779b97f4a7c15u | 1;
    lives_[node.boot] = {n, node.life};
    node.member =
        std::make_unique<MutantMembership>(mutation_, count_, NodeId(n), node.boot, clock(node));
    node.book = std::make_unique<MutantBook>(mutation_, *placement_, NodeId(n), node.boot);
    node.acknowledged.clear();
    for (const auto& [run, held] : node.memory) {
      node.book->hold(run, held.home, held.original, held.blocks, kBlockBytes);
      verified_[run].insert_or_assign(node.boot, held.blocks);
    }
    say("node {} starts, life {}, holds {} runs", n, node.life, node.memory.size());
    schedule_tick(n, ++node.busy);
    at(now_ + random_.below(400'000), [this, n, life = node.life] { work(n, life); });
  }
  void kill(unsigned n) {
    Node& node = nodes_[n];
    ++node.busy;
    node.member.reset();
    node.book.reset();
    node.inbox.clear();
    node.paused = false;
    const bool keeps = random_.chance(0.5);  // its holder lives on, or does not
    if (!keeps) node.memory.clear();
    close(node);
    ++result_.restarts;
    say("node {} is killed{}", n, keeps ? ", its memory stays" : "");
  }
  // In no view from now on, for the observer.
  void close(Node& node) {
    if (!node.epochs.empty()) node.epochs.emplace_back(0, now_);
  }
  void schedule_tick(unsigned n, uint64_t generation) {
    Node& node = nodes_[n];
    const int64_t due = node.member->next_tick().count() - int64_t(node.clock_offset);
    at(std::max<uint64_t>(now_ + 1, uint64_t(std::max<int64_t>(due, 0))) + random_.below(2000),
       [this, n, generation] {
         Node& at_node = nodes_[n];
         if (at_node.busy != generation || at_node.paused) return;
         step(n, [&](Output& out) { at_node.member->tick(clock(at_node), out); });
         schedule_tick(n, generation);
       });
  }
  void pause(unsigned n) {
    nodes_[n].paused = true;
    ++nodes_[n].busy;
    say("node {} is paused", n);
  }
  void resume(unsigned n) {
    Node& node = nodes_[n];
    if (!node.paused) return;
    node.paused = false;
    say("node {} goes on, {} frames wait", n, node.inbox.size());
    while (!node.inbox.empty() && node.member) {
      auto [from, bytes] = std::move(node.inbox.front());
      node.inbox.pop_front();
      receive(n, from, std::move(bytes));
    }
    if (node.member) schedule_tick(n, ++node.busy);
  }
  // Its ranks seal blocks.
  void work(unsigned n, unsigned life) {
    Node& node = nodes_[n];
    if (!node.member || node.life != life) return;
    if (!node.paused && now_ < kFaultsUs) {
      step(n, [&](Output& out) { node.member->tick(clock(node), out); });
      const RunId run{node.boot, {n + 1, node.boot}, uint32_t(random_.below(3)), 0, 0, 1};
      Held& held = node.memory[run];
      held.home = NodeId(n);
      held.original = true;
      held.blocks += 1 + uint32_t(random_.below(4));
      verified_[run][node.boot] = held.blocks;
      node.book->hold(run, NodeId(n), true, held.blocks, kBlockBytes);
      after(n);
    }
    at(now_ + 50'000 + random_.below(600'000), [this, n, life] { work(n, life); });
  }

  // --- steps of a node ---

  template <typename F>
  void step(unsigned n, F&& f) {
    Node& node = nodes_[n];
    output_.clear();
    f(output_);
    const Output out = output_;
    for (const Event& e : out.events) {
      if (e.kind == Event::Kind::Installed) installed(n);
      if (e.kind == Event::Kind::Fenced) ++result_.fences;
      say("node {}: {} {} epoch {:x}", n, event_name(e.kind), e.node, e.epoch);
      if (e.kind <= Event::Kind::Fenced)
        node.book->set_view(node.member->view(), node.member->active(clock(node)));
    }
    for (const Message& m : out.messages) {
      observe(n, m);
      Bytes frame{std::byte('M')};
      encode(m, frame);
      transmit(n, m.to, std::move(frame));
    }
    tasks(n);
    after(n);
  }
  void tasks(unsigned n) {
    Node& node = nodes_[n];
    tasks_.clear();
    node.book->tasks(clock(node), 8, 4, tasks_);
    for (const CopyTask& t : tasks_) {
      const Held& held = node.memory.at(t.run);
      DataFrame d{t.kind == CopyTask::Kind::Ask ? 1u : 2u,
                  n,
                  node.boot,
                  node.member->view().epoch,
                  t.run,
                  held.home,
                  t.first,
                  t.count,
                  held.blocks};
      send_data(n, t.to, d);
    }
  }
  void send_data(unsigned from, unsigned to, const DataFrame& d) {
    Bytes frame(1 + sizeof d, std::byte('D'));
    std::memcpy(frame.data() + 1, &d, sizeof d);
    transmit(from, to, std::move(frame));
  }
  void transmit(unsigned from, unsigned to, Bytes frame) {
    seal(frame);
    deliveries_.clear();
    network_.send(from, to, frame, deliveries_);
    for (SimNetwork::Delivery& d : deliveries_) {
      at(now_ + d.after_us, [this, d = std::move(d)]() mutable {
        Node& node = nodes_[d.to];
        if (node.paused) {
          node.inbox.emplace_back(d.from, std::move(d.bytes));
        } else if (node.member) {
          receive(d.to, d.from, std::move(d.bytes));
        }
      });
    }
    // A machine that runs without the process says so, where it can be reached.
    if (!nodes_[to].member && !network_.is_down(from, to) && !network_.is_down(to, from) &&
        random_.chance(0.5)) {
      at(now_ + 200, [this, from, to] {
        if (!nodes_[from].member || nodes_[from].paused || nodes_[to].member) return;
        step(from,
             [&](Output& o) { nodes_[from].member->refused(NodeId(to), clock(nodes_[from]), o); });
      });
    }
  }
  void receive(unsigned n, unsigned from, Bytes frame) {
    if (!unseal(frame)) return;
    Node& node = nodes_[n];
    const std::span<const std::byte> body = std::span<const std::byte>(frame).subspan(1);
    if (frame[0] == std::byte('M')) {
      const auto m = decode(body, count_);
      if (!m) return violated("a message that a node sent cannot be decoded");
      step(n, [&](Output& out) { node.member->receive(*m, clock(node), out); });
      check_belief(n, from);
    } else if (body.size() == sizeof(DataFrame)) {
      DataFrame d;
      std::memcpy(&d, body.data(), sizeof d);
      step(n, [&](Output& out) { node.member->tick(clock(node), out); });
      data(n, d);
    }
  }
  void data(unsigned n, const DataFrame& d) {
    Node& node = nodes_[n];
    const Time now = clock(node);
    if (d.kind == 3) {
      if (!node.book->acknowledge(NodeId(d.from), d.from_boot, d.epoch, d.run, d.count)) return;
      if (d.epoch != node.member->view().epoch)
        violated("an acknowledgement of another epoch counted");
      return after(n);
    }
    if (!node.member->accepts(NodeId(d.from), d.from_boot, d.epoch, now)) return;
    if (d.kind == 2) {
      Held& held = node.memory[d.run];
      if (held.blocks == 0) held.home = NodeId(d.home);
      if (d.first <= held.blocks) held.blocks = std::max(held.blocks, d.first + d.count);
      verified_[d.run][node.boot] = held.blocks;
      node.book->hold(d.run, held.home, held.original, held.blocks, kBlockBytes);
    }
    const auto held = node.memory.find(d.run);
    acted(n, "acknowledges a copy");
    send_data(n, d.from,
              {3, n, node.boot, d.epoch, d.run, 0, 0,
               held == node.memory.end() ? 0 : held->second.blocks, 0});
    after(n);
  }

  // --- the observer ---

  void observe(unsigned n, const Message& m) {
    if (m.kind != MessageKind::Vote && m.kind != MessageKind::Propose) return;
    const auto [old, fresh] =
        voted_.try_emplace({nodes_[n].boot, epoch_counter(m.proposal)}, m.proposal);
    if (!fresh && old->second != m.proposal)
      violated(
          fmt::format("node {} voted for two views with counter {}", n, epoch_counter(m.proposal)));
    votes_[m.proposal].insert(n);
  }
  void installed(unsigned n) {
    const View& v = nodes_[n].member->view();
    const auto [old, fresh] = views_.try_emplace(v.epoch, v);
    if (!(old->second == v)) violated(fmt::format("two views with epoch {:x}", v.epoch));
    if (votes_[v.epoch].size() < majority_of(count_))
      violated(fmt::format("node {} installed a view that {} of {} voted for", n,
                           votes_[v.epoch].size(), count_));
    auto& epochs = nodes_[n].epochs;
    if (!epochs.empty() && epochs.back().first > v.epoch)
      violated(fmt::format("node {} went back to an older view", n));
    epochs.emplace_back(v.epoch, now_);
    if (epochs.size() > 64) epochs.erase(epochs.begin(), epochs.begin() + 32);
  }
  // A node acts for its view: then a majority was in it at some moment of the last two seconds.
  void acted(unsigned n, const char* what) {
    const uint64_t epoch = nodes_[n].member->view().epoch;
    const uint64_t from = now_ > kSilenceUs ? now_ - kSilenceUs : 0;
    unsigned support = 0;
    for (const Node& z : nodes_) {
      for (size_t i = 0; i < z.epochs.size(); ++i) {
        const uint64_t until = i + 1 < z.epochs.size() ? z.epochs[i + 1].second : now_;
        if (z.epochs[i].first == epoch && until >= from) {
          ++support;
          break;
        }
      }
    }
    if (support < majority_of(count_))
      violated(fmt::format("node {} {} for a view in which {} of {} were of late", n, what, support,
                           count_));
  }
  // No node believes a former life after a later one, nor older news of a life after later ones.
  void check_belief(unsigned n, unsigned from) {
    const PeerState peer = nodes_[n].member->peer(NodeId(from), clock(nodes_[n]));
    const uint64_t boot = peer.boot;
    if (boot == 0) return;
    uint64_t& epoch = known_[{nodes_[n].boot, boot}];
    if (peer.epoch < epoch)
      violated(fmt::format("node {} knew a later view of node {} already", n, from));
    epoch = std::max(epoch, peer.epoch);
    unsigned& newest = believed_[{nodes_[n].boot, from}];
    const auto [who, life] = lives_.at(boot);
    if (who != from || life < newest)
      violated(
          fmt::format("node {} believes life {} of node {} after life {}", n, life, from, newest));
    newest = std::max(newest, life);
  }
  // What was acknowledged is in as many memories as were asked for, each of a process of the view.
  void after(unsigned n) {
    Node& node = nodes_[n];
    for (const auto& [run, held] : node.memory) {
      if (!held.original) continue;
      const uint32_t blocks = node.book->acknowledged(run);
      uint32_t& before = node.acknowledged[run];
      if (blocks <= before) continue;
      result_.acknowledged_blocks += blocks - before;
      before = blocks;
      acted(n, "acknowledges");
      if (!node.member->active(clock(node))) violated("a fenced node acknowledged");
      std::set<unsigned> holders;
      for (const auto& [boot, have] : verified_[run]) {
        const auto [who, life] = lives_.at(boot);
        if (have >= blocks && node.member->view().admits(NodeId(who), boot)) holders.insert(who);
      }
      if (holders.size() < placement_->replicas())
        violated(fmt::format("node {} acknowledged {} blocks with {} copies of {}", n, blocks,
                             holders.size(), placement_->replicas()));
    }
  }
  void expect_whole(const std::string& what) {
    uint64_t epoch = 0;
    for (unsigned n = 0; n < count_; ++n) {
      const Node& node = nodes_[n];
      const View& v = node.member->view();
      if (n == 0) epoch = v.epoch;
      if (v.epoch != epoch || v.members != NodeSet::first(count_) ||
          !node.member->active(clock(node)))
        return violated(fmt::format("{}node {} is {} in view {:x} of {:x}", what, n,
                                    node.member->active(clock(node)) ? "active" : "fenced", v.epoch,
                                    v.members.bits()));
    }
    std::map<RunId, std::vector<uint32_t>> copies;
    for (const Node& node : nodes_)
      for (const auto& [run, held] : node.memory) copies[run].push_back(held.blocks);
    for (auto& [run, blocks] : copies) {
      std::sort(blocks.rbegin(), blocks.rend());
      if (blocks.size() < placement_->replicas() || blocks[placement_->replicas() - 1] < blocks[0])
        return violated(what + "a run has fewer whole copies than asked");
    }
    for (unsigned n = 0; n < count_; ++n)
      if (nodes_[n].book->lag_bytes() != 0)
        return violated(
            fmt::format("{}node {} lags by {} bytes", what, n, nodes_[n].book->lag_bytes()));
  }

  // --- faults ---

  void fault() {
    if (now_ >= kFaultsUs) return;
    const unsigned n = unsigned(random_.below(count_));
    const uint64_t later = now_ + 50'000 + random_.below(3'500'000);
    switch (random_.below(6)) {
      case 0: {  // a partition, of one or both directions
        const uint64_t side = 1 + random_.below((uint64_t(1) << count_) - 2);
        const bool one_way = random_.chance(0.4);
        for (unsigned a = 0; a < count_; ++a)
          for (unsigned b = 0; b < count_; ++b)
            if ((side >> a & 1) != (side >> b & 1) && (!one_way || (side >> a & 1)))
              network_.cut(a, b, true);
        say("partition {:x}{}", side, one_way ? ", one way" : "");
        at(later, [this] { heal(); });
        break;
      }
      case 1:  // one link
        network_.cut(n, unsigned(random_.below(count_)), true);
        at(later, [this] { heal(); });
        break;
      case 2:
      case 3:
        if (!nodes_[n].member) break;
        kill(n);
        at(later, [this, n] {
          if (!nodes_[n].member) start(n);
        });
        break;
      case 4:
        if (!nodes_[n].member || nodes_[n].paused) break;
        pause(n);
        at(later, [this, n] { resume(n); });
        break;
      case 5:  // all at once
        if (!random_.chance(0.15)) break;
        for (unsigned i = 0; i < count_; ++i) {
          if (!nodes_[i].member) continue;
          kill(i);
          at(now_ + random_.below(300'000), [this, i] {
            if (!nodes_[i].member) start(i);
          });
        }
        break;
    }
    at(now_ + 30'000 + random_.below(1'200'000), [this] { fault(); });
  }
  void heal() {
    network_.heal();
    say("all links are whole");
  }
  void calm() {
    heal();
    network_.faults = {};
    for (unsigned n = 0; n < count_; ++n) {
      if (!nodes_[n].member) start(n);
      resume(n);
    }
    say("no more faults");
  }

  SimRandom random_;
  SimNetwork network_;
  const Mutation mutation_;
  const std::function<void(const std::string&)>& log_;
  unsigned count_ = 0;
  Seeds seeds_;
  std::optional<Placement> placement_;
  std::vector<Node> nodes_;
  std::priority_queue<Scheduled, std::vector<Scheduled>, std::greater<>> queue_;
  uint64_t now_ = 0, tie_ = 0;
  Output output_;
  std::vector<CopyTask> tasks_;
  std::vector<SimNetwork::Delivery> deliveries_;
  SimResult result_;
  std::map<uint64_t, std::pair<unsigned, unsigned>> lives_;     // boot: node, life
  std::map<std::pair<uint64_t, uint32_t>, uint64_t> voted_;     // boot, counter: epoch
  std::map<uint64_t, std::set<unsigned>> votes_;                // epoch: voters
  std::map<uint64_t, View> views_;                              // by epoch
  std::map<std::pair<uint64_t, unsigned>, unsigned> believed_;  // boot, peer: newest life
  std::map<std::pair<uint64_t, uint64_t>, uint64_t> known_;     // boots: epoch
  std::map<RunId, std::map<uint64_t, uint32_t>> verified_;      // by boot: blocks
};

}  // namespace

SimResult simulate_cluster(uint64_t seed, Mutation mutation,
                           const std::function<void(const std::string&)>& log) {
  return World(seed, mutation, log).run();
}

}  // namespace certkv::test
