// Where the copies of a run of blocks belong: rendezvous hashing over the members of a view.
//
// Every node computes the same order from the same view, with no table to agree upon. A member that
// leaves changes nothing for the groups that had no copy on it, and one copy for those that had; a
// member that comes takes its share and moves nothing else.
// SOURCE: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998).
#pragma once

#include <array>

#include "kvstore/block.h"
#include "kvstore/cluster/nodes.h"

namespace certkv::cluster {

enum class PlacementRule : uint8_t {
  LocalFirst,  // the node whose ranks wrote it, then the others in rendezvous order
  Spread,      // rendezvous order alone: no node's loss takes the copies of its own ranks' requests
};

inline constexpr unsigned kMaxReplicas = 3;

// What is placed as one: the blocks of one KV head of one layer of one context.
struct PlacementGroup {
  OwnerId owner;
  uint32_t layer = 0, kv_head = 0;
};

class Placement {
 public:
  // replicas: copies in all, the first included, 1 .. kMaxReplicas. Throws InvalidArgument.
  Placement(const Seeds& seeds, unsigned replicas, PlacementRule rule);

  struct Order {
    std::array<NodeId, kMaxNodes> nodes{};
    unsigned count = 0;
  };
  // The members, best first. Depends on names, not on numbers, so seeds may be added to the list.
  Order order(NodeSet members, const PlacementGroup& group) const;
  // The min(replicas, members) nodes that shall hold the group. `home`: who wrote it.
  NodeSet targets(NodeSet members, const PlacementGroup& group, NodeId home) const;

  unsigned replicas() const { return replicas_; }
  PlacementRule rule() const { return rule_; }

 private:
  std::vector<uint64_t> keys_;  // of the seeds
  unsigned replicas_;
  PlacementRule rule_;
};

}  // namespace certkv::cluster
