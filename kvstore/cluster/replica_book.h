// Which copies of the runs that lie on a node exist elsewhere, which are to be made, and for how
// many blocks as many exist as were asked for. A state machine: views, seals and acknowledgements
// go in, tasks come out; the data path carries them out.
//
// A copy counts when its holder said so to this node, in the epoch of this node's view, and for as
// long as the view admits that very process: one that restarted is asked again. Every holder of a
// run keeps such a book, so copies are made again when the node that wrote the run is gone: then by
// the first of its holders in rendezvous order. Two that both believe to be the first copy twice,
// which costs bytes and nothing else, because blocks never change.
//
// THREADS: one.
#pragma once

#include <compare>
#include <map>
#include <set>
#include <vector>

#include "kvstore/cluster/placement.h"

namespace certkv::cluster {

// One KV head of one layer of one reservation: blocks first_block, first_block + 1, .. in order.
struct RunId {
  uint64_t boot_nonce = 0;  // of the store where the blocks were first sealed
  OwnerId owner;
  uint32_t layer = 0, kv_head = 0;
  uint32_t first_block = 0;
  uint32_t version = 0;
  friend auto operator<=>(const RunId&, const RunId&) = default;
};

struct CopyTask {
  enum class Kind : uint8_t {
    Ask,   // "how many blocks of this run have you verified?"; the answer is an acknowledgement
    Send,  // blocks [first, first + count) of the run
  };
  Kind kind;
  RunId run;
  NodeId to = 0;
  uint32_t first = 0, count = 0;
};

class ReplicaBook {
 public:
  // retry: a task that nothing was heard of is given again after so long.
  ReplicaBook(const Placement& placement, NodeId self, uint64_t boot, Time retry = Time(500'000));
  virtual ~ReplicaBook() = default;

  // At every Installed, Active and Fenced of the membership.
  void set_view(const View& view, bool active);

  // This node holds and has verified the first `blocks` blocks of the run. Grows only. `home`: the
  // node whose ranks wrote it; `original`: they did so into the very memory that lies here, so
  // there is no block that this node has not.
  void hold(const RunId& run, NodeId home, bool original, uint32_t blocks, uint64_t block_bytes);
  void forget(const RunId& run);  // freed here

  // `from` says that it has verified the first `blocks` blocks. Returns whether it counts: not from
  // another epoch, not while fenced, not from a process that the view does not admit, not for a run
  // that is not held here, nor for more blocks than were ever written. Never for more than are held
  // here.
  bool acknowledge(NodeId from, uint64_t from_boot, uint64_t epoch, const RunId& run,
                   uint32_t blocks);

  // Blocks of the run, from its first on, of which as many copies exist as were asked for, this
  // node's included. 0 while fenced. The book learns by set_view() alone that it is: whoever passes
  // this on asks Membership::active() at that moment too.
  uint32_t acknowledged(const RunId& run) const;

  // Appends at most `limit` tasks that are due. count <= max_blocks in each.
  void tasks(Time now, size_t limit, uint32_t max_blocks, std::vector<CopyTask>& out);

  // Of the runs that this node is to copy: what has fewer copies than were asked for.
  uint64_t lag_bytes() const { return lag_bytes_; }
  size_t runs() const { return runs_.size(); }
  size_t open_runs() const { return open_.size(); }

 protected:
  // Rules that a test breaks on purpose, to see that it is noticed.
  virtual bool current(uint64_t epoch) const { return epoch == view_.epoch; }
  virtual bool admitted(NodeId n, uint64_t boot) const { return view_.admits(n, boot); }
  virtual unsigned wanted() const { return placement_.replicas(); }
  virtual unsigned weight(unsigned acknowledgements) const { return acknowledgements != 0; }
  virtual bool may_acknowledge() const { return active_; }

 private:
  struct Copy {
    uint64_t boot = 0;
    uint32_t blocks = 0;
    bool known = false;  // it has answered, in this life of it
    unsigned heard = 0;  // acknowledgements
    Time again{0};       // no task before
  };
  struct Run {
    NodeId home = 0;
    bool original = false;
    uint32_t blocks = 0;
    uint64_t block_bytes = 0;
    NodeSet targets;
    std::map<NodeId, Copy> copies;  // of targets and of whoever acknowledged
    uint64_t lag = 0;
  };
  uint32_t prefix(const Run& run) const;
  bool satisfied(const RunId& id, const Run& run) const;
  bool sends(const RunId& id, const Run& run) const;
  void review(const RunId& id, Run& run);

  const Placement placement_;
  const NodeId self_;
  const uint64_t boot_;
  const Time retry_;
  View view_;
  bool active_ = false;
  std::map<RunId, Run> runs_;
  std::set<RunId> open_;  // runs with work left
  RunId cursor_;
  uint64_t lag_bytes_ = 0;
};

}  // namespace certkv::cluster
