// A node of the cluster over TCP: moves frames between kvstore/cluster/membership.h and the other
// nodes, and has no opinions of its own.
//
// One connection per pair, which the node that stands later in the seed list dials, again and again
// with pauses that grow to a second. Every wait has a limit: a handshake 2 s, a connection without
// a whole frame 5 s, a queue of frames to send 256. A frame that breaks the format, its tag or its
// number ends its connection and changes nothing. Strangers (who have not shown the key yet) are
// at most `max_strangers`: the oldest makes room.
//
// A server that keeps copies puts it together like this: at on_view it tells its ReplicaBook; it
// serves a request of a peer only where membership().accepts() the peer under the request's epoch,
// and passes an acknowledgement on only while membership().active(); it carries out
// ReplicaBook::tasks() from a timer, and tells set_local() its data address and the book's lag.
//
// THREADS: constructed and destroyed where no thread runs the io_context, or in the one that does;
// callbacks come on that thread. snapshot(), set_local() and stop() from any thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/asio.h"
#include "kvstore/cluster/membership.h"
#include "parallel/secure_session.h"

namespace certkv::cluster {

struct ClusterOptions {
  Seeds seeds;         // the same list, in the same order, on every node; addresses are host:port
  std::string name;    // of this node: one of the seeds
  std::string listen;  // host:port; empty: this node's address in the list. Port 0: any
  Timing timing;
  size_t max_strangers = 64;
  std::chrono::milliseconds handshake{2000};
};

struct ClusterCallbacks {
  // At every change of the view and of whether the node may act for it.
  std::function<void(const View& view, bool active)> on_view;
  // A peer's data address or boot nonce may have changed, or it came or went.
  std::function<void(NodeId peer, const PeerState& state)> on_peer;
};

struct ClusterNodeState {
  std::string name, address, data_address;
  bool self = false, alive = false, member = false;
  uint64_t boot = 0, epoch = 0, lag_bytes = 0, free_bytes = 0;
  std::chrono::milliseconds silent{-1};  // since its last message; -1: never heard
};
struct ClusterSnapshot {
  uint64_t epoch = 0;
  bool active = false;
  std::vector<ClusterNodeState> nodes;
  uint64_t frames_in = 0, frames_out = 0;
  uint64_t rejected = 0;           // connections ended for what came over them
  uint64_t strangers_dropped = 0;  // late, idle, or making room
  uint64_t dials = 0;
  uint64_t views = 0;  // installed
};

class ClusterNode {
 public:
  // Listens at once. Throws InvalidArgument naming the seed, name or address that does not do.
  ClusterNode(boost::asio::io_context& io, const JobKey& key, ClusterOptions options,
              ClusterCallbacks callbacks = {});
  ~ClusterNode();
  ClusterNode(const ClusterNode&) = delete;
  ClusterNode& operator=(const ClusterNode&) = delete;

  ClusterSnapshot snapshot() const;
  void set_local(const LocalState& local);
  void stop();  // ends all connections; the node falls silent

  // On the io_context's thread only.
  const Membership& membership() const;
  Time now() const;  // what the membership's functions are to be told
  NodeId self() const;
  uint16_t port() const;

 private:
  struct State;
  class Link;
  std::shared_ptr<State> state_;
};

}  // namespace certkv::cluster
