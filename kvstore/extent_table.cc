#include "kvstore/extent_table.h"

#include <algorithm>
#include <utility>

namespace certkv {
namespace {

uint64_t granules(uint64_t bytes) {
  return (bytes + kArenaGranule - 1) / kArenaGranule * kArenaGranule;
}

}  // namespace

ExtentTable::ExtentTable(uint64_t offset, uint64_t bytes, Zero zero)
    : total_(bytes), free_bytes_(bytes), zero_(std::move(zero)) {
  if (bytes > 0) clean_[offset] = bytes;
}

// Best fit: the smallest hole that is large enough.
bool ExtentTable::place(uint64_t bytes, std::vector<Piece>& out) {
  auto best = clean_.end();
  for (auto it = clean_.begin(); it != clean_.end(); ++it) {
    if (it->second >= bytes && (best == clean_.end() || it->second < best->second)) best = it;
  }
  if (best == clean_.end()) return false;
  out.push_back({best->first, bytes});
  const Piece rest{best->first + bytes, best->second - bytes};
  clean_.erase(best);
  if (rest.bytes > 0) clean_[rest.offset] = rest.bytes;
  return true;
}

bool ExtentTable::place_all(uint64_t run_bytes, uint64_t runs, std::vector<Piece>& out) {
  if (place(granules(run_bytes * runs), out)) return true;
  if (runs == 1) return false;
  for (uint64_t i = 0; i < runs; ++i) {
    if (place(granules(run_bytes), out)) continue;
    for (const Piece& p : out) give_back_clean(p);
    out.clear();
    return false;
  }
  return true;
}

std::optional<ExtentTable::Reservation> ExtentTable::allocate(uint64_t session,
                                                              const AllocateRequest& request) {
  const uint64_t runs = uint64_t(request.layers) * request.kv_heads;
  const uint64_t bytes = run_bytes(request);
  if (bytes * runs > total_ || next_version_ == UINT32_MAX) return std::nullopt;
  std::vector<Piece> pieces;
  const auto now = Clock::now();
  while (!place_all(bytes, runs, pieces)) {
    if (!dirty_.empty()) {
      scrub(std::max(bytes * runs, uint64_t(kArenaGranule)));
    } else if (!evict_one(now)) {
      return std::nullopt;
    }
  }
  Reservation r;
  r.version = next_version_++;
  r.run_bytes = bytes;
  for (uint64_t i = 0; i < runs; ++i) {
    r.offsets.push_back(pieces.size() == 1 ? pieces[0].offset + i * bytes : pieces[i].offset);
  }
  Held held;
  held.fence = session;
  held.holders[session] = 1;
  held.request = request;
  held.offsets = r.offsets;
  if (held.content()) versions_[request.owner].insert(r.version);
  for (const Piece& p : pieces) held.bytes += p.bytes;
  held.pieces = std::move(pieces);
  free_bytes_ -= held.bytes;
  held_.emplace(r.version, std::move(held));
  return r;
}

void ExtentTable::give_back_clean(Piece piece) {
  auto [it, fresh] = clean_.emplace(piece.offset, piece.bytes);
  if (!fresh) return;
  if (const auto next = std::next(it);
      next != clean_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    clean_.erase(next);
  }
  if (it != clean_.begin()) {
    const auto before = std::prev(it);
    if (before->first + before->second == it->first) {
      before->second += it->second;
      clean_.erase(it);
    }
  }
}

std::optional<ExtentTable::Adoption> ExtentTable::adopt(uint64_t session,
                                                        const AdoptRequest& request) {
  const AllocateRequest& want = request.ranges;
  const auto known = versions_.find(want.owner);
  if (known == versions_.end()) return std::nullopt;
  const auto covers = [](uint32_t first, uint32_t count, uint32_t a, uint32_t a_count) {
    return a >= first && uint64_t(a) + a_count <= uint64_t(first) + count;
  };
  for (auto v = known->second.rbegin(); v != known->second.rend(); ++v) {
    if (request.older_than != 0 && *v >= request.older_than) continue;
    Held& held = held_.at(*v);
    const AllocateRequest& has = held.request;
    if (shape_of(has) != shape_of(want) ||
        !covers(has.first_layer, has.layers, want.first_layer, want.layers) ||
        !covers(has.first_kv_head, has.kv_heads, want.first_kv_head, want.kv_heads) ||
        !covers(has.first_block, has.blocks, want.first_block, want.blocks))
      continue;
    Adoption a;
    a.version = *v;
    a.fence = held.fence;
    a.run_bytes = run_bytes(want);
    const uint64_t skipped = (want.first_block - has.first_block) * shape_of(has).slot_bytes();
    for (uint32_t l = 0; l < want.layers; ++l)
      for (uint32_t h = 0; h < want.kv_heads; ++h) {
        const size_t run = size_t(want.first_layer - has.first_layer + l) * has.kv_heads +
                           (want.first_kv_head - has.first_kv_head + h);
        a.offsets.push_back(held.offsets[run] + skipped);
      }
    ++held.holders[session];
    return a;
  }
  return std::nullopt;
}

void ExtentTable::free_held(std::map<uint32_t, Held>::iterator it) {
  for (const Piece& p : it->second.pieces) dirty_.push_back(p);
  free_bytes_ += it->second.bytes;
  if (const auto known = versions_.find(it->second.request.owner); known != versions_.end()) {
    known->second.erase(it->first);
    if (known->second.empty()) versions_.erase(known);
  }
  held_.erase(it);
}

void ExtentTable::make_orphan(Held& held, bool spared, Clock::time_point now) {
  held.spared = spared;
  held.orphaned = now;
}

bool ExtentTable::release(uint64_t session, uint32_t version, bool keep) {
  const auto it = held_.find(version);
  if (it == held_.end()) return false;
  Held& held = it->second;
  const auto mine = held.holders.find(session);
  if (mine == held.holders.end()) return false;
  held.keep = held.keep || (keep && held.content());
  if (--mine->second == 0) held.holders.erase(mine);
  if (!held.orphan()) return true;
  if (held.keep)
    make_orphan(held, false, Clock::now());
  else
    free_held(it);
  return true;
}

void ExtentTable::release_session(uint64_t session, Clock::time_point now) {
  for (auto it = held_.begin(); it != held_.end();) {
    const auto next = std::next(it);
    Held& held = it->second;
    if (held.holders.erase(session) != 0 && held.orphan()) {
      if (held.content())
        make_orphan(held, true, now);
      else
        free_held(it);
    }
    it = next;
  }
}

void ExtentTable::orphan_session(uint64_t session, Clock::time_point now) {
  for (auto& [version, held] : held_)
    if (held.holders.erase(session) != 0 && held.orphan()) make_orphan(held, true, now);
}

bool ExtentTable::evict_one(Clock::time_point now) {
  auto oldest = held_.end();
  for (auto it = held_.begin(); it != held_.end(); ++it) {
    const Held& h = it->second;
    if (!h.orphan() || (h.spared && now - h.orphaned < grace_)) continue;
    if (oldest == held_.end() || h.orphaned < oldest->second.orphaned) oldest = it;
  }
  if (oldest == held_.end()) return false;
  free_held(oldest);
  return true;
}

bool ExtentTable::scrub(uint64_t bytes) {
  while (!dirty_.empty() && bytes > 0) {
    Piece& front = dirty_.front();
    const Piece now{front.offset, std::min(front.bytes, granules(bytes))};
    zero_(now);
    give_back_clean(now);
    bytes -= std::min(bytes, now.bytes);
    front.offset += now.bytes;
    front.bytes -= now.bytes;
    if (front.bytes == 0) dirty_.pop_front();
  }
  return !dirty_.empty();
}

void ExtentTable::list(uint32_t after, const std::function<bool(const Listed&)>& visit) const {
  for (auto it = held_.upper_bound(after); it != held_.end(); ++it) {
    const Held& h = it->second;
    if (!visit({it->first, h.fence, h.orphan(), h.request, h.offsets})) return;
  }
}

uint64_t ExtentTable::largest_bytes() const {
  uint64_t largest = 0;
  for (const auto& [offset, bytes] : clean_) largest = std::max(largest, bytes);
  for (const Piece& p : dirty_) largest = std::max(largest, p.bytes);
  return largest;
}

uint64_t ExtentTable::dirty_bytes() const {
  uint64_t sum = 0;
  for (const Piece& p : dirty_) sum += p.bytes;
  return sum;
}

size_t ExtentTable::orphans() const {
  return size_t(
      std::count_if(held_.begin(), held_.end(), [](const auto& h) { return h.second.orphan(); }));
}

uint64_t ExtentTable::bytes_of(uint64_t session) const {
  uint64_t sum = 0;
  for (const auto& [version, held] : held_) {
    if (held.holders.contains(session)) sum += held.bytes;
  }
  return sum;
}

}  // namespace certkv
