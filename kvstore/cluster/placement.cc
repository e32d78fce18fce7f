#include "kvstore/cluster/placement.h"

#include <xxhash.h>

#include <algorithm>

#include "kernels/base/error.h"

namespace certkv::cluster {

Placement::Placement(const Seeds& seeds, unsigned replicas, PlacementRule rule)
    : replicas_(replicas), rule_(rule) {
  check_seeds(seeds);
  CERTKV_EXPECT(replicas >= 1 && replicas <= kMaxReplicas, InvalidArgument,
                "store.replicas is {}: 1 .. {} copies are kept", replicas, kMaxReplicas);
  for (const Seed& s : seeds) keys_.push_back(XXH3_64bits(s.name.data(), s.name.size()));
}

Placement::Order Placement::order(NodeSet members, const PlacementGroup& group) const {
  struct {
    uint64_t key, hi, lo;
    uint32_t layer, kv_head;
  } hashed{0, group.owner.hi, group.owner.lo, group.layer, group.kv_head};
  static_assert(sizeof hashed == 32);
  std::array<uint64_t, kMaxNodes> score{};
  Order o;
  for (const NodeId n : members& NodeSet::first(unsigned(keys_.size()))) {
    hashed.key = keys_[n];
    score[n] = XXH3_64bits(&hashed, sizeof hashed);
    o.nodes[o.count++] = n;
  }
  std::sort(o.nodes.begin(), o.nodes.begin() + o.count, [&](NodeId a, NodeId b) {
    if (score[a] != score[b]) return score[a] > score[b];
    return keys_[a] != keys_[b] ? keys_[a] > keys_[b] : a < b;
  });
  return o;
}

NodeSet Placement::targets(NodeSet members, const PlacementGroup& group, NodeId home) const {
  NodeSet t;
  if (rule_ == PlacementRule::LocalFirst && members.has(home)) t.add(home);
  const Order o = order(members, group);
  for (unsigned i = 0; i < o.count && t.count() < replicas_; ++i) t.add(o.nodes[i]);
  return t;
}

}  // namespace certkv::cluster
