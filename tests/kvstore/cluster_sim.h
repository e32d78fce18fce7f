// Many nodes in one thread: the state machines of kvstore/cluster over a simulated network and
// clock, with a seeded scheduler, and an observer that knows everything and asks after every event
// whether what must never happen has happened.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <set>
#include <string>

#include "kvstore/cluster/membership.h"
#include "kvstore/cluster/replica_book.h"
#include "tests/kvstore/cluster_sim_network.h"

namespace certkv::test {

// What a test may break. Each must be found.
enum class Mutation {
  None,
  MajorityOffByOne,    // half of the seeds suffices
  VotesTwice,          // the counter is not looked at
  OldViewsInstalled,   // the epoch of a view is not looked at
  NoChallenge,         // any boot nonce is believed
  NoLease,             // what was heard once supports a view for ever
  LeaseFromArrival,    // a late message counts from when it came
  ReplayAccepted,      // sequence numbers are not looked at
  AckCountedTwice,     // a copy counts once for each acknowledgement
  OldAckCounts,        // the epoch of an acknowledgement is not looked at
  FormerLifeCounts,    // copies of a process that has restarted count
  OneCopyTooFew,       // acknowledged with one copy less than asked
  FencedAcknowledges,  // a fenced node goes on acknowledging
};

struct SimResult {
  std::string violation;  // empty: none
  uint64_t events = 0, views = 0, acknowledged_blocks = 0, fences = 0, restarts = 0;
};

// One run. log: called with a line for everything that happens; may be empty.
SimResult simulate_cluster(uint64_t seed, Mutation mutation,
                           const std::function<void(const std::string&)>& log);

}  // namespace certkv::test
