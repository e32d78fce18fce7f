// Who may belong to a cluster, and views: who does belong to it now.
//
// A node is a line of the configuration, not a host: its name is what it is called there, its
// number the place of the name in the seed list, which is the same on every node. Everything here
// has a fixed size, so nothing that a peer claims can make a node allocate.
#pragma once

#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace certkv::cluster {

using NodeId = uint8_t;  // index in the seed list
inline constexpr unsigned kMaxNodes = 64;
inline constexpr size_t kMaxNodeName = 64;  // UNITS: bytes

// A set of nodes, bit i for node i.
class NodeSet {
 public:
  constexpr NodeSet() = default;
  constexpr explicit NodeSet(uint64_t bits) : bits_(bits) {}
  static constexpr NodeSet first(unsigned n) {
    return NodeSet(n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1);
  }
  constexpr bool has(NodeId n) const { return n < kMaxNodes && (bits_ >> n & 1) != 0; }
  constexpr void add(NodeId n) { bits_ |= uint64_t(1) << n; }
  constexpr void drop(NodeId n) { bits_ &= ~(uint64_t(1) << n); }
  constexpr unsigned count() const { return unsigned(std::popcount(bits_)); }
  constexpr uint64_t bits() const { return bits_; }
  constexpr NodeSet operator&(NodeSet o) const { return NodeSet(bits_ & o.bits_); }
  constexpr NodeSet without(NodeSet o) const { return NodeSet(bits_ & ~o.bits_); }
  friend constexpr bool operator==(NodeSet, NodeSet) = default;

  // for (NodeId n : set): in ascending order.
  class iterator {
   public:
    constexpr explicit iterator(uint64_t rest) : rest_(rest) {}
    constexpr NodeId operator*() const { return NodeId(std::countr_zero(rest_)); }
    constexpr iterator& operator++() {
      rest_ &= rest_ - 1;
      return *this;
    }
    friend constexpr bool operator==(iterator, iterator) = default;

   private:
    uint64_t rest_;
  };
  constexpr iterator begin() const { return iterator(bits_); }
  constexpr iterator end() const { return iterator(0); }

 private:
  uint64_t bits_ = 0;
};

struct Seed {
  std::string name;     // of the node, 1 .. kMaxNodeName printable characters, no two alike
  std::string address;  // of its control port, host:port; the state machines do not read it
};
using Seeds = std::vector<Seed>;

// Throws InvalidArgument naming the seed: 1 .. kMaxNodes of them, names as above.
void check_seeds(const Seeds& seeds);
// What both ends of a connection must agree upon: XXH3 over the names in order.
uint64_t seeds_digest(const Seeds& seeds);

constexpr unsigned majority_of(size_t seeds) {
  return unsigned(seeds / 2 + 1);
}

// An epoch is 32 bits of a counter, 6 bits of the node that proposed it and 26 bits of that node's
// boot nonce. Voters see to it that counters grow and that no two majorities of nodes that remember
// agree on one counter twice. Nodes that lost their memory cannot keep that promise; the lower bits
// make two epochs differ even then.
constexpr uint64_t make_epoch(uint32_t counter, NodeId proposer, uint64_t boot) {
  return uint64_t(counter) << 32 | uint64_t(proposer & 63u) << 26 | (boot & 0x3ffffffu);
}
constexpr uint32_t epoch_counter(uint64_t epoch) {
  return uint32_t(epoch >> 32);
}
constexpr bool epoch_is_of(uint64_t epoch, NodeId proposer, uint64_t boot) {
  return epoch == make_epoch(epoch_counter(epoch), proposer, boot);
}

// Members, each with the boot nonce of the process that was admitted: one that has restarted is
// somebody else and must be admitted again.
struct View {
  uint64_t epoch = 0;  // 0: none yet
  NodeSet members;
  std::array<uint64_t, kMaxNodes> boots{};  // of the members; 0 elsewhere

  bool admits(NodeId n, uint64_t boot) const {
    return members.has(n) && boot != 0 && boots[n] == boot;
  }
  friend bool operator==(const View&, const View&) = default;
};

// Monotonic, with an origin of the node's own. The state machines are told it and never ask for it.
using Time = std::chrono::microseconds;

}  // namespace certkv::cluster
