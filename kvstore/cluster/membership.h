// Membership of a cluster as a state machine: messages, refusals and the time go in, messages and
// events come out. It has no clock, no socket and no thread, so one thread can run many nodes.
//
// WHAT IT PROMISES
//   A view is installed by a node only after a majority of the seeds voted for it. A process votes
//   at most once for a counter, and only above every counter that it voted for or saw, so
//   majorities of processes that remember never agree on two views with one counter; and no two
//   views ever have the same epoch, not even after every node lost its memory (make_epoch in
//   nodes.h). A node is active only while a majority of the seeds (itself included) is known to
//   have been in the very view it is in, at a moment of at most `silence` ago by the node's own
//   clock: what counts is when the question was sent that they answered, not when the answer came.
//   Out of that state it acts no more, at the first call of any function with the new time: a
//   process that was paused is fenced before it does anything. A message is from the process it
//   says: a boot nonce that is new is believed only when it repeats a challenge that was drawn
//   after it had been seen. Late and repeated messages of a process, and all of its former lives,
//   change nothing.
// WHAT IT DOES NOT
//   Nodes that have the key are trusted to follow the protocol. Where A and B cannot reach each
//   other and both reach C, one of them is left out; which one is not promised.
//
// THREADS: one.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "kvstore/cluster/message.h"

namespace certkv::cluster {

struct Timing {
  Time heartbeat{200'000};       // between two messages to a peer
  Time silence{2'000'000};       // a peer with which no message went to and fro for longer is down
  Time settle{100'000};          // between a reason for another view and proposing it
  Time stagger{150'000};         // the next node in line waits so much longer
  Time proposal_limit{600'000};  // until a proposal without a majority is given up
};

struct Event {
  enum class Kind : uint8_t {
    Installed,  // the view changed; `view()` is the new one
    Active,     // in the view `epoch`, with a majority
    Fenced,     // no longer: acknowledge nothing, take nothing
    PeerUp,     // messages go to and fro with `node`
    PeerDown,   // they do not
  };
  Kind kind;
  NodeId node = 0;
  uint64_t epoch = 0;
  friend bool operator==(const Event&, const Event&) = default;
};
const char* event_name(Event::Kind kind);

// Cleared and filled by the caller's choice; the machine only appends.
struct Output {
  std::vector<Message> messages;
  std::vector<Event> events;
  void clear() {
    messages.clear();
    events.clear();
  }
};

// What a node tells the others about itself.
struct LocalState {
  std::string data_address;  // at most kMaxDataAddress printable characters
  uint64_t lag_bytes = 0, free_bytes = 0;
};

// Throws InvalidArgument for an address that cannot be sent.
void check_local_state(const LocalState& local);

struct PeerState {
  bool alive = false;  // messages go to and fro
  uint64_t boot = 0;   // 0: never heard
  uint64_t epoch = 0;  // of its view
  uint64_t lag_bytes = 0, free_bytes = 0;
  Time last_heard{0};  // by this node's clock; 0: never
  std::string data_address;
};

class Membership {
 public:
  // REQUIRES boot != 0 and unlike that of any former life; now > 0 and never going back.
  // Throws InvalidArgument.
  Membership(size_t seeds, NodeId self, uint64_t boot, Time now, const Timing& timing = {});
  virtual ~Membership() = default;

  // To be called at next_tick() or as soon after it as possible.
  void tick(Time now, Output& out);
  Time next_tick() const { return next_tick_; }
  void receive(const Message& message, Time now, Output& out);
  // A connection to the node was refused or broke: it is down until it is heard again.
  void refused(NodeId node, Time now, Output& out);
  void set_local(
      const LocalState& local);  // throws InvalidArgument for an address that is too long

  const View& view() const { return view_; }
  // Whether the node may act for its view now.
  bool active(Time now) const;
  // Whether a request of `from` under `epoch` may be served, or its acknowledgement be counted.
  bool accepts(NodeId from, uint64_t from_boot, uint64_t epoch, Time now) const;
  NodeSet alive(Time now) const;  // with this node
  PeerState peer(NodeId n, Time now) const;
  LocalState local() const;  // as set
  NodeId self() const { return self_; }
  uint64_t boot() const { return boot_; }
  size_t seeds() const { return seeds_; }
  uint64_t dropped() const { return dropped_; }  // messages that changed nothing

 protected:
  // Rules that a test breaks on purpose, to see that it is noticed.
  virtual unsigned majority() const { return majority_of(seeds_); }
  virtual bool votes_at(uint32_t counter) const { return counter > floor_; }
  virtual bool newer(uint64_t epoch) const { return epoch > view_.epoch; }
  virtual bool proves_life(const Message& m, uint64_t challenge) const {
    return challenge != 0 && m.answer == challenge;
  }
  virtual bool in_order(uint64_t sequence, uint64_t last) const { return sequence > last; }
  virtual Time lease() const { return timing_.silence; }
  // Since when what the message says can have been so: it was not written before this node sent
  // what it repeats.
  virtual Time evidence(const Message& m, Time now) const {
    return Time(int64_t(std::min<uint64_t>(m.echo, uint64_t(now.count()))));
  }
  virtual bool same_view(uint64_t epoch) const { return epoch == view_.epoch; }

 private:
  struct Peer {
    uint64_t boot = 0;        // believed; 0: none yet
    uint64_t sequence = 0;    // last received of that boot
    uint64_t sent = 0;        // last sent
    uint64_t challenge = 0;   // outstanding; 0: none
    uint64_t asked_boot = 0;  // whose challenge `answer` is
    uint64_t answer = 0;
    uint64_t stamp = 0;  // its newest, to be echoed
    Time fresh{0};       // when the question was sent that its last answer is to
    Time supports{0};    // the same, of the last answer, for `epoch`
    Time heard_at{0};
    Time hello_at{0}, install_at{0};
    uint64_t epoch = 0;
    uint32_t floor = 0;
    NodeSet heard;
    bool refused = false, up = false;
    uint64_t lag_bytes = 0, free_bytes = 0;
    std::array<char, kMaxDataAddress> address{};
    uint8_t address_bytes = 0;
  };

  bool peer_alive(const Peer& p, Time now) const;
  bool fresh(const Message& m, Peer& p, Time now, Output& out);
  void note(const Message& m, Peer& p, Time now);
  void update(Time now, Output& out);  // fences and wakes, notices peers that come and go
  void plan(Time now, Output& out);    // proposes another view where one is due
  std::optional<View> desired(Time now) const;
  void propose(const View& wanted, Time now, Output& out);
  void on_propose(const Message& m, Time now, Output& out);
  void on_vote(const Message& m, Time now, Output& out);
  void install(uint64_t epoch, NodeSet members, const std::array<uint64_t, kMaxNodes>& boots,
               Time now, Output& out);
  Message& send(MessageKind kind, NodeId to, Time now, Output& out);
  void send_view(MessageKind kind, NodeId to, const View& v, Time now, Output& out);
  void beat(Time now, Output& out);
  uint64_t draw();
  Time jitter();
  unsigned place(NodeSet among) const;  // how many of them stand before this node

  const size_t seeds_;
  const NodeId self_;
  const uint64_t boot_;
  const Timing timing_;
  std::array<Peer, kMaxNodes> peers_{};
  Message local_;  // the part of every message that set_local gives
  View view_;
  uint32_t floor_ = 0;        // highest counter voted for or installed
  uint32_t seen_ = 0;         // highest counter that anybody told of; at least floor_
  bool learned_ = false;      // what a majority of the seeds has seen
  uint64_t voted_ = 0;        // the epoch of the last vote
  bool active_ = false;       // as last reported
  std::optional<View> open_;  // own proposal
  NodeSet votes_;
  Time open_until_{0}, open_again_{0}, propose_at_{0}, next_beat_{0}, next_tick_{0};
  uint64_t random_;
  uint64_t dropped_ = 0;
};

}  // namespace certkv::cluster
