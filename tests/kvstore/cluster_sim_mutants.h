// The state machines with one rule broken each.
#pragma once

#include "tests/kvstore/cluster_sim.h"

namespace certkv::test {

class MutantMembership : public cluster::Membership {
 public:
  MutantMembership(Mutation m, size_t seeds, cluster::NodeId self, uint64_t boot, cluster::Time now)
      : cluster::Membership(seeds, self, boot, now), m_(m) {}

 protected:
  unsigned majority() const override {
    return cluster::Membership::majority() - (m_ == Mutation::MajorityOffByOne);
  }
  bool votes_at(uint32_t c) const override {
    return m_ == Mutation::VotesTwice || cluster::Membership::votes_at(c);
  }
  bool newer(uint64_t e) const override {
    return m_ == Mutation::OldViewsInstalled ? e != view().epoch : cluster::Membership::newer(e);
  }
  bool proves_life(const cluster::Message& m, uint64_t c) const override {
    return m_ == Mutation::NoChallenge || cluster::Membership::proves_life(m, c);
  }
  bool in_order(uint64_t sequence, uint64_t last) const override {
    return m_ == Mutation::ReplayAccepted || cluster::Membership::in_order(sequence, last);
  }
  cluster::Time evidence(const cluster::Message& m, cluster::Time now) const override {
    return m_ == Mutation::LeaseFromArrival ? now : cluster::Membership::evidence(m, now);
  }
  cluster::Time lease() const override {
    return m_ == Mutation::NoLease ? cluster::Time(int64_t(1) << 60) : cluster::Membership::lease();
  }

 private:
  const Mutation m_;
};

class MutantBook : public cluster::ReplicaBook {
 public:
  MutantBook(Mutation m, const cluster::Placement& p, cluster::NodeId self, uint64_t boot)
      : cluster::ReplicaBook(p, self, boot, cluster::Time(300'000)), m_(m) {}

 protected:
  bool current(uint64_t epoch) const override {
    return m_ == Mutation::OldAckCounts || cluster::ReplicaBook::current(epoch);
  }
  bool admitted(cluster::NodeId n, uint64_t boot) const override {
    return m_ == Mutation::FormerLifeCounts || cluster::ReplicaBook::admitted(n, boot);
  }
  unsigned wanted() const override {
    return cluster::ReplicaBook::wanted() -
           (m_ == Mutation::OneCopyTooFew && cluster::ReplicaBook::wanted() > 1);
  }
  unsigned weight(unsigned acks) const override {
    return m_ == Mutation::AckCountedTwice ? acks : cluster::ReplicaBook::weight(acks);
  }
  bool may_acknowledge() const override {
    return m_ == Mutation::FencedAcknowledges || cluster::ReplicaBook::may_acknowledge();
  }

 private:
  const Mutation m_;
};

inline const char* mutation_name(Mutation m) {
  switch (m) {
    case Mutation::None:
      return "none";
    case Mutation::MajorityOffByOne:
      return "MajorityOffByOne";
    case Mutation::VotesTwice:
      return "VotesTwice";
    case Mutation::OldViewsInstalled:
      return "OldViewsInstalled";
    case Mutation::NoChallenge:
      return "NoChallenge";
    case Mutation::NoLease:
      return "NoLease";
    case Mutation::LeaseFromArrival:
      return "LeaseFromArrival";
    case Mutation::ReplayAccepted:
      return "ReplayAccepted";
    case Mutation::AckCountedTwice:
      return "AckCountedTwice";
    case Mutation::OldAckCounts:
      return "OldAckCounts";
    case Mutation::FormerLifeCounts:
      return "FormerLifeCounts";
    case Mutation::OneCopyTooFew:
      return "OneCopyTooFew";
    case Mutation::FencedAcknowledges:
      return "FencedAcknowledges";
  }
  return "?";
}

}  // namespace certkv::test
