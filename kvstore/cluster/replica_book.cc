#include "kvstore/cluster/replica_book.h"

#include <algorithm>

namespace certkv::cluster {
namespace {

PlacementGroup group_of(const RunId& id) {
  return {id.owner, id.layer, id.kv_head};
}

}  // namespace

ReplicaBook::ReplicaBook(const Placement& placement, NodeId self, uint64_t boot, Time retry)
    : placement_(placement), self_(self), boot_(boot), retry_(retry) {}

// The largest n of which `wanted` copies have the first n blocks.
uint32_t ReplicaBook::prefix(const Run& run) const {
  std::vector<uint32_t> have{run.blocks};
  for (const auto& [node, copy] : run.copies)
    have.insert(have.end(), weight(copy.heard), std::min(copy.blocks, run.blocks));
  const unsigned w = wanted();
  if (have.size() < w) return 0;
  std::nth_element(have.begin(), have.begin() + (w - 1), have.end(), std::greater<>());
  return have[w - 1];
}

uint32_t ReplicaBook::acknowledged(const RunId& id) const {
  const auto run = runs_.find(id);
  if (run == runs_.end() || !may_acknowledge() || !view_.admits(self_, boot_)) return 0;
  return prefix(run->second);
}

// Who sends what is missing: the node that wrote it, else the first that is known to have all of
// it.
bool ReplicaBook::sends(const RunId& id, const Run& run) const {
  if (run.original || run.home == self_) return true;
  const auto whole = [&run](NodeId n) {
    const auto c = run.copies.find(n);
    return c != run.copies.end() && c->second.known && c->second.blocks >= run.blocks;
  };
  if (whole(run.home)) return false;
  const Placement::Order o = placement_.order(view_.members, group_of(id));
  for (unsigned i = 0; i < o.count; ++i) {
    if (o.nodes[i] == self_) return true;
    if (whole(o.nodes[i])) return false;
  }
  return true;
}

bool ReplicaBook::satisfied(const RunId& id, const Run& run) const {
  const bool mine = sends(id, run);
  for (const NodeId t : run.targets) {
    if (t == self_) continue;
    const Copy& c = run.copies.at(t);
    if (!c.known || (mine && c.blocks < run.blocks)) return false;
  }
  return true;
}

// After any change of the run: its lag, and whether there is work left.
void ReplicaBook::review(const RunId& id, Run& run) {
  lag_bytes_ -= run.lag;
  run.lag = sends(id, run) ? uint64_t(run.blocks - prefix(run)) * run.block_bytes : 0;
  lag_bytes_ += run.lag;
  if (active_ && !satisfied(id, run)) {
    open_.insert(id);
  } else {
    open_.erase(id);
  }
}

void ReplicaBook::set_view(const View& view, bool active) {
  const bool changed = !(view == view_);
  view_ = view;
  active_ = active && view.admits(self_, boot_);
  for (auto& [id, run] : runs_) {
    if (changed) {
      std::erase_if(run.copies,
                    [this](const auto& c) { return !admitted(c.first, c.second.boot); });
      run.targets = placement_.targets(view_.members, group_of(id), run.home);
      for (const NodeId t : run.targets)
        if (t != self_) run.copies.try_emplace(t, Copy{view_.boots[t], 0, false, 0, Time(0)});
    }
    review(id, run);
  }
}

void ReplicaBook::hold(const RunId& id, NodeId home, bool original, uint32_t blocks,
                       uint64_t block_bytes) {
  auto [at, fresh] = runs_.try_emplace(id);
  Run& run = at->second;
  if (fresh) {
    run.home = home;
    run.original = original;
    run.block_bytes = block_bytes;
    run.targets = placement_.targets(view_.members, group_of(id), home);
    for (const NodeId t : run.targets) {
      if (t == self_) continue;
      Copy& c = run.copies[t];
      c.boot = view_.boots[t];
      c.known = original;  // what it has already it says when it is sent more
    }
  }
  run.blocks = std::max(run.blocks, blocks);
  review(id, run);
}

void ReplicaBook::forget(const RunId& id) {
  const auto run = runs_.find(id);
  if (run == runs_.end()) return;
  lag_bytes_ -= run->second.lag;
  runs_.erase(run);
  open_.erase(id);
}

bool ReplicaBook::acknowledge(NodeId from, uint64_t from_boot, uint64_t epoch, const RunId& id,
                              uint32_t blocks) {
  if (!active_ || !current(epoch) || from == self_ || !admitted(from, from_boot)) return false;
  const auto at = runs_.find(id);
  if (at == runs_.end()) return false;
  Run& run = at->second;
  if (run.original && blocks > run.blocks) return false;  // nobody can have them
  Copy& c = run.copies[from];
  c.boot = from_boot;
  c.known = true;
  c.blocks =
      std::max(c.blocks, blocks);  // another may have more than this node, where neither is home
  ++c.heard;
  c.again = Time(0);
  review(id, run);
  return true;
}

void ReplicaBook::tasks(Time now, size_t limit, uint32_t max_blocks, std::vector<CopyTask>& out) {
  if (!active_ || open_.empty()) return;
  const size_t most = out.size() + limit;
  auto at = open_.upper_bound(cursor_);
  for (size_t seen = 0; seen < open_.size() && seen < 4 * limit; ++seen) {
    if (at == open_.end()) at = open_.begin();
    const RunId& id = *at++;
    Run& run = runs_.at(id);
    const bool mine = sends(id, run);
    for (const NodeId t : run.targets) {
      if (t == self_) continue;
      Copy& c = run.copies.at(t);
      if (now < c.again || (c.known && (!mine || c.blocks >= run.blocks))) continue;
      if (out.size() == most) return;  // the cursor stays before this run
      c.again = now + retry_;
      if (c.known) {
        const uint32_t count = std::min(max_blocks, run.blocks - c.blocks);
        out.push_back({CopyTask::Kind::Send, id, t, id.first_block + c.blocks, count});
      } else {
        out.push_back({CopyTask::Kind::Ask, id, t, 0, 0});
      }
    }
    cursor_ = id;
  }
}

}  // namespace certkv::cluster
