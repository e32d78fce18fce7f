// Copies what is sealed on this node to others.
//
// It follows the seals of the node's reservations, a cursor per run, since the blocks of a run are
// sealed in order. A peer answers how many first blocks of a run it has verified; nothing else
// counts as a copy. After a peer was lost it is asked again what it has before anything is sent.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kvstore/remote_peer.h"
#include "kvstore/server/block_directory.h"
#include "kvstore/server/wire.h"

namespace certkv {

// Where the copies of a run belong, best first: addresses of peers. Asked again with every look at
// the list, so it may change its mind.
using ReplicaPlacement =
    std::function<std::vector<std::string>(const OwnerId& owner, uint32_t layer, uint32_t kv_head)>;

struct ReplicatorOptions {
  unsigned replicas = 1;  // copies in all, this node's included: 1 copies nothing
  uint64_t lag_limit_bytes = uint64_t(256) << 20;  // sealing waits above it; 0: never
  std::chrono::milliseconds look{2};               // at the seals
  std::chrono::milliseconds list{50};              // between two questions to the holder
  std::chrono::milliseconds answer{5000};          // a peer has for an acknowledgement
  size_t message_bytes = size_t(1) << 20;
  size_t messages = 4;  // under way to one peer
};

struct ReplicationStatus {
  uint64_t runs = 0;           // that are followed
  uint64_t sealed_blocks = 0;  // in them
  uint64_t copied_blocks = 0;  // acknowledged by as many peers as were asked for
  uint64_t lag_bytes = 0;      // not yet acknowledged, over all copies that have a place
  // Runs times copies for which there is no peer, or none that is reached and takes them. They are
  // said here and hold nobody up.
  uint64_t missing_copies = 0;
  uint64_t damaged_runs = 0;  // a block here is not what its header says: not copied further
};

class Replicator {
 public:
  // Starts its thread. The lag is written to the arena's header while it lives.
  Replicator(std::shared_ptr<StoreClient> client, std::shared_ptr<BlockDirectory> directory,
             std::shared_ptr<Transport> transport, ReplicaPlacement placement,
             ReplicatorOptions options);
  ~Replicator();
  Replicator(const Replicator&) = delete;
  Replicator& operator=(const Replicator&) = delete;

  ReplicationStatus status() const;  // THREADS: safe

 private:
  struct Copy {
    bool known = false;  // it has said what it has
    uint32_t verified = 0;
    bool under_way = false;
    bool refused = false;  // for lack of room, or for another reason that it gave
    Deadline::Clock::time_point not_before{};
  };
  struct Run {
    std::shared_ptr<const SpanRecord> record;
    uint32_t sealed = 0;
    bool damaged = false, listed = true;
    std::map<std::string, Copy> copies;  // by peer
    std::vector<std::string> targets;
  };
  struct Message {
    TransportCall call;
    ReplicateRequest head;
    bool forget = false;
  };
  struct Peer {
    std::shared_ptr<RemotePeer> way;
    std::vector<Message> messages;
    std::vector<ReplicateRequest> forgotten;  // to be told
    bool reached = true;                      // at the last attempt
  };

  void work();
  bool step();
  void look_at_list();
  bool follow(const WireRun& key, Run& run);
  bool take_answers(const std::string& address, Peer& peer);
  void take_answer(const std::string& address, Peer& peer, Message& message, CallStatus status);
  void look_for_damage(Run& run, const ReplicateRequest& sent);
  bool send(const std::string& address, Peer& peer);
  ReplicateRequest head_of(const WireRun& key, const Run& run) const;
  void publish();
  Peer& peer(const std::string& address);

  const std::shared_ptr<StoreClient> client_;
  const std::shared_ptr<BlockDirectory> directory_;
  const std::shared_ptr<Transport> transport_;
  const ReplicaPlacement placement_;
  const ReplicatorOptions options_;
  std::map<WireRun, Run> runs_;  // working thread only, as what follows
  std::map<std::string, Peer> peers_;
  Deadline::Clock::time_point next_list_{};
  mutable std::mutex mutex_;  // guards status_
  ReplicationStatus status_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace certkv
