#include "kvstore/cluster/membership.h"

#include <algorithm>

#include "kernels/base/error.h"

namespace certkv::cluster {

const char* event_name(Event::Kind kind) {
  switch (kind) {
    case Event::Kind::Installed:
      return "installed";
    case Event::Kind::Active:
      return "active";
    case Event::Kind::Fenced:
      return "fenced";
    case Event::Kind::PeerUp:
      return "peer up";
    case Event::Kind::PeerDown:
      return "peer down";
  }
  return "?";
}

Membership::Membership(size_t seeds, NodeId self, uint64_t boot, Time now, const Timing& timing)
    : seeds_(seeds),
      self_(self),
      boot_(boot),
      timing_(timing),
      next_beat_(now),
      next_tick_(now),
      random_(boot) {
  CERTKV_EXPECT(seeds >= 1 && seeds <= kMaxNodes && self < seeds, InvalidArgument,
                "node {} of {} seeds: 1 .. {} seeds, and a node that is one of them, are needed",
                self, seeds, kMaxNodes);
  CERTKV_EXPECT(boot != 0 && now > Time(0), InvalidArgument,
                "a boot nonce and a clock that are not 0 are needed");
}

void check_local_state(const LocalState& local) {
  const std::string& a = local.data_address;
  const bool printable =
      std::all_of(a.begin(), a.end(), [](char c) { return c > ' ' && c < '\x7f'; });
  CERTKV_EXPECT(a.size() <= kMaxDataAddress && printable, InvalidArgument,
                "data address of {} bytes: at most {} printable ASCII characters are sent to peers",
                a.size(), kMaxDataAddress);
}

void Membership::set_local(const LocalState& local) {
  check_local_state(local);
  local_.address = {};
  std::copy(local.data_address.begin(), local.data_address.end(), local_.address.begin());
  local_.address_bytes = uint8_t(local.data_address.size());
  local_.lag_bytes = local.lag_bytes;
  local_.free_bytes = local.free_bytes;
}

LocalState Membership::local() const {
  return {std::string(local_.data_address()), local_.lag_bytes, local_.free_bytes};
}

bool Membership::peer_alive(const Peer& p, Time now) const {
  return p.boot != 0 && !p.refused && p.fresh != Time(0) && now - p.fresh <= timing_.silence;
}

NodeSet Membership::alive(Time now) const {
  NodeSet s;
  s.add(self_);
  for (size_t n = 0; n < seeds_; ++n)
    if (n != self_ && peer_alive(peers_[n], now)) s.add(NodeId(n));
  return s;
}

bool Membership::active(Time now) const {
  if (view_.epoch == 0 || !view_.admits(self_, boot_)) return false;
  unsigned support = 1;
  for (size_t n = 0; n < seeds_; ++n) {
    const Peer& p = peers_[n];
    support += n != self_ && p.boot != 0 && !p.refused && same_view(p.epoch) &&
               p.supports != Time(0) && now - p.supports <= lease();
  }
  return support >= majority();
}

bool Membership::accepts(NodeId from, uint64_t from_boot, uint64_t epoch, Time now) const {
  return same_view(epoch) && view_.admits(from, from_boot) && active(now);
}

PeerState Membership::peer(NodeId n, Time now) const {
  if (n >= seeds_) return {};
  const Peer& p = peers_[n];
  return {peer_alive(p, now),
          p.boot,
          p.epoch,
          p.lag_bytes,
          p.free_bytes,
          p.heard_at,
          std::string(p.address.data(), p.address_bytes)};
}

uint64_t Membership::draw() {  // splitmix64
  uint64_t z = random_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) | 1;  // never 0
}

Time Membership::jitter() {
  return Time(int64_t(draw() % uint64_t(timing_.stagger.count())));
}

unsigned Membership::place(NodeSet among) const {
  return (among & NodeSet::first(self_)).count();
}

Message& Membership::send(MessageKind kind, NodeId to, Time now, Output& out) {
  Peer& p = peers_[to];
  Message& m = out.messages.emplace_back(local_);
  m.kind = kind;
  m.from = self_;
  m.to = to;
  m.from_boot = boot_;
  m.to_boot = kind == MessageKind::Hello && p.asked_boot != 0 ? p.asked_boot : p.boot;
  m.sequence = ++p.sent;
  m.stamp = uint64_t(now.count());
  m.echo = m.to_boot == p.boot ? p.stamp : 0;
  m.challenge = p.challenge;
  m.answer = p.answer;
  m.epoch = view_.epoch;
  m.floor = seen_;
  m.heard = alive(now);
  return m;
}

void Membership::send_view(MessageKind kind, NodeId to, const View& v, Time now, Output& out) {
  Message& m = send(kind, to, now, out);
  m.proposal = v.epoch;
  m.members = v.members;
  m.boots = v.boots;
}

void Membership::beat(Time now, Output& out) {
  for (size_t n = 0; n < seeds_; ++n) {
    if (n == self_) continue;
    Peer& p = peers_[n];
    if (p.boot == 0) {
      if (p.challenge == 0) p.challenge = draw();
      send(MessageKind::Hello, NodeId(n), now, out);
    } else {
      send(MessageKind::Heartbeat, NodeId(n), now, out);
    }
  }
}

// Whether the message is the newest of the process that the peer now is.
bool Membership::fresh(const Message& m, Peer& p, Time now, Output& out) {
  if (m.from_boot != p.boot) {
    if (m.to_boot == boot_ && proves_life(m, p.challenge)) {
      if (p.up) out.events.push_back({Event::Kind::PeerDown, m.from, view_.epoch});
      const uint64_t sent = p.sent, answer = p.answer, asked = p.asked_boot;
      p = Peer{};
      p.boot = m.from_boot;
      p.sent = sent;
      if (asked == m.from_boot) {
        p.answer = answer;
        p.asked_boot = asked;
      }
    } else {
      // Unknown, or of a former life. A challenge drawn from here on can only be repeated by a
      // process that still lives.
      if (p.challenge == 0) p.challenge = draw();
      if (m.challenge != 0) {
        p.answer = m.challenge;
        p.asked_boot = m.from_boot;
      }
      if (now - p.hello_at >= timing_.heartbeat / 8 || p.hello_at == Time(0)) {
        p.hello_at = now;
        send(MessageKind::Hello, m.from, now, out);
      }
      return false;
    }
  }
  if (m.to_boot != boot_ && !(m.kind == MessageKind::Hello && m.challenge != 0)) return false;
  if (!in_order(m.sequence, p.sequence)) return false;
  p.sequence = m.sequence;
  if (m.to_boot == boot_ && m.answer == p.challenge) p.challenge = 0;  // an old life's: it is dead
  if (m.challenge != 0) {
    p.answer = m.challenge;
    p.asked_boot = m.from_boot;
    send(MessageKind::Hello, m.from, now, out);
  }
  return m.to_boot == boot_;
}

void Membership::note(const Message& m, Peer& p, Time now) {
  p.heard_at = now;
  p.refused = false;
  p.stamp = m.stamp;
  p.epoch = m.epoch;
  p.floor = std::max(p.floor, m.floor);
  seen_ = std::max({seen_, m.floor, epoch_counter(m.epoch)});
  p.heard = m.heard;
  p.lag_bytes = m.lag_bytes;
  p.free_bytes = m.free_bytes;
  p.address = m.address;
  p.address_bytes = m.address_bytes;
  const Time asked = evidence(m, now);
  if (asked > p.fresh) p.fresh = asked;
  p.supports = asked;
}

void Membership::receive(const Message& m, Time now, Output& out) {
  update(now, out);
  if (m.from >= seeds_ || m.from == self_ || m.to != self_) {
    ++dropped_;
    return;
  }
  Peer& p = peers_[m.from];
  if (!fresh(m, p, now, out)) {
    ++dropped_;
    return;
  }
  note(m, p, now);
  switch (m.kind) {
    case MessageKind::Hello:
    case MessageKind::Heartbeat:
      break;
    case MessageKind::Propose:
      on_propose(m, now, out);
      break;
    case MessageKind::Vote:
      on_vote(m, now, out);
      break;
    case MessageKind::Refuse:
      if (open_ && open_->epoch == m.proposal) open_until_ = std::min(open_until_, now);
      break;
    case MessageKind::Install:
      install(m.proposal, m.members, m.boots, now, out);
      break;
  }
  // Who has not heard of the view yet learns it from whoever has.
  if (m.epoch < view_.epoch && now - p.install_at >= timing_.heartbeat / 2) {
    p.install_at = now;
    send_view(MessageKind::Install, m.from, view_, now, out);
  }
  update(now, out);
  plan(now, out);
}

void Membership::refused(NodeId node, Time now, Output& out) {
  if (node < seeds_ && node != self_) peers_[node].refused = true;
  update(now, out);
  plan(now, out);
}

void Membership::tick(Time now, Output& out) {
  update(now, out);
  if (now >= next_beat_) {
    next_beat_ = now + timing_.heartbeat;
    beat(now, out);
  }
  if (open_ && now >= open_again_) {
    open_again_ = now + timing_.heartbeat / 2;
    for (const NodeId n : open_->members.without(votes_))
      send_view(MessageKind::Propose, n, *open_, now, out);
  }
  plan(now, out);
  next_tick_ = std::min(next_beat_, now + timing_.heartbeat / 4);
}

void Membership::update(Time now, Output& out) {
  for (size_t n = 0; n < seeds_; ++n) {
    if (n == self_) continue;
    Peer& p = peers_[n];
    const bool up = peer_alive(p, now);
    if (up == p.up) continue;
    p.up = up;
    out.events.push_back(
        {up ? Event::Kind::PeerUp : Event::Kind::PeerDown, NodeId(n), view_.epoch});
  }
  if (!learned_ && alive(now).count() >= majority()) {
    learned_ = true;
    floor_ = std::max(floor_, seen_);
  }
  const bool is = active(now);
  if (is == active_) return;
  active_ = is;
  out.events.push_back({is ? Event::Kind::Active : Event::Kind::Fenced, self_, view_.epoch});
}

// Nodes that all reach each other, as far as this one knows.
std::optional<View> Membership::desired(Time now) const {
  NodeSet candidates = alive(now);
  const auto hears = [&](NodeId a, NodeId b) {
    return a == self_ ? candidates.has(b) : peers_[a].heard.has(b);
  };
  for (;;) {
    unsigned worst = 0;
    NodeId who = 0;
    for (const NodeId a : candidates) {
      unsigned missing = 0;
      for (const NodeId b : candidates) missing += a != b && !(hears(a, b) && hears(b, a));
      const bool outsider = !view_.members.has(a);
      // Of those that are equally cut off, who is not a member, and then the last, is left out.
      if (missing > worst ||
          (missing == worst && missing != 0 && outsider >= !view_.members.has(who))) {
        worst = missing;
        who = a;
      }
    }
    if (worst == 0) break;
    candidates.drop(who);
  }
  if (!candidates.has(self_) || candidates.count() < majority()) return std::nullopt;
  if (!view_.admits(self_, boot_)) {
    // Whoever stands outside does not throw out members that the others still hear.
    for (const NodeId gone : view_.members.without(candidates))
      for (const NodeId c : candidates)
        if (c != self_ && gone != self_ && peers_[c].heard.has(gone)) return std::nullopt;
  }
  View v;
  v.members = candidates;
  for (const NodeId n : candidates) v.boots[n] = n == self_ ? boot_ : peers_[n].boot;
  return v;
}

void Membership::plan(Time now, Output& out) {
  if (open_ && now >= open_until_) {
    open_.reset();
    propose_at_ = now + timing_.stagger + jitter();
  }
  if (open_) return;
  const std::optional<View> wanted = desired(now);
  if (!wanted || (wanted->members == view_.members && wanted->boots == view_.boots)) {
    propose_at_ = Time(0);
    return;
  }
  if (propose_at_ == Time(0)) {
    propose_at_ = now + timing_.settle + place(wanted->members) * timing_.stagger + jitter() / 2;
  } else if (now >= propose_at_) {
    propose(*wanted, now, out);
  }
}

void Membership::propose(const View& wanted, Time now, Output& out) {
  if (!learned_ || seen_ == UINT32_MAX)
    return;  // four billion views: this cluster has come to its end
  open_ = wanted;
  open_->epoch = make_epoch(++seen_, self_, boot_);
  floor_ = seen_;
  voted_ = open_->epoch;
  votes_ = NodeSet();
  votes_.add(self_);
  open_until_ = now + timing_.proposal_limit;
  open_again_ = now + timing_.heartbeat / 2;
  for (const NodeId n : open_->members)
    if (n != self_) send_view(MessageKind::Propose, n, *open_, now, out);
  if (votes_.count() >= majority()) {  // alone
    const View v = *open_;
    install(v.epoch, v.members, v.boots, now, out);
  }
}

void Membership::on_propose(const Message& m, Time now, Output& out) {
  const bool for_us = m.members.has(self_) && m.boots[self_] == boot_ && m.members.has(m.from) &&
                      m.boots[m.from] == m.from_boot &&
                      epoch_is_of(m.proposal, m.from, m.from_boot) &&
                      m.members.count() >= majority();
  if (!for_us || !newer(m.proposal)) return;  // what is new comes with Install and heartbeats
  if (m.proposal != voted_ && !(learned_ && votes_at(epoch_counter(m.proposal)))) {
    send(MessageKind::Refuse, m.from, now, out).proposal = m.proposal;
    return;
  }
  if (m.proposal != voted_) {
    voted_ = m.proposal;
    floor_ = epoch_counter(m.proposal);
    seen_ = std::max(seen_, floor_);
    open_.reset();  // another's is under way
    propose_at_ = now + timing_.proposal_limit + place(m.members) * timing_.stagger + jitter();
  }
  send(MessageKind::Vote, m.from, now, out).proposal = m.proposal;
}

void Membership::on_vote(const Message& m, Time now, Output& out) {
  if (!open_ || m.proposal != open_->epoch || !open_->admits(m.from, m.from_boot)) return;
  votes_.add(m.from);
  if (votes_.count() < majority()) return;
  const View v = *open_;
  install(v.epoch, v.members, v.boots, now, out);
}

void Membership::install(uint64_t epoch, NodeSet members,
                         const std::array<uint64_t, kMaxNodes>& boots, Time now, Output& out) {
  if (!newer(epoch)) return;
  if (active_) {  // what was true of the former view is not of this one
    active_ = false;
    out.events.push_back({Event::Kind::Fenced, self_, view_.epoch});
  }
  view_.epoch = epoch;
  view_.members = members;
  view_.boots = boots;
  floor_ = std::max(floor_, epoch_counter(epoch));
  seen_ = std::max(seen_, floor_);
  open_.reset();
  propose_at_ = Time(0);
  out.events.push_back({Event::Kind::Installed, self_, epoch});
  for (size_t n = 0; n < seeds_; ++n) {
    if (n == self_ || peers_[n].boot == 0) continue;
    peers_[n].install_at = now;
    send_view(MessageKind::Install, NodeId(n), view_, now, out);
  }
  update(now, out);
}

}  // namespace certkv::cluster
