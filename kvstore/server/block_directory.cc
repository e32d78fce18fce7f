#include "kvstore/server/block_directory.h"

#include <xxhash.h>

#include <atomic>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

uint64_t key_of(const OwnerId& owner, uint32_t version) {
  return owner.hi * 0x9e3779b97f4a7c15 ^ owner.lo ^ version;
}

// A sound header of the slot, whatever block it may be of.
bool sound_header(const std::byte* slot, BlockHeader& out) {
  const uint64_t seal = load_seal(slot);
  if (seal == 0) return false;
  std::memcpy(static_cast<void*>(&out), slot, offsetof(BlockHeader, seal));
  out.seal = seal;
  return block_seal(out) == seal && out.magic == kBlockMagic && out.format == kFormatVersion;
}

}  // namespace

OwnerId replica_owner(const BlockId& run) {
  BlockId key = run;
  key.block = 0;
  const XXH128_hash_t h = XXH3_128bits_withSeed(&key, sizeof key, /*"REPLICA"*/ 0x5245504c494341);
  return {h.high64 | uint64_t(1) << 63, h.low64};
}

BlockDirectory::BlockDirectory(std::shared_ptr<StoreClient> client, std::chrono::milliseconds least)
    : client_(std::move(client)), least_(least), index_(std::make_shared<Index>()) {}

BlockDirectory::Held BlockDirectory::held_of(ListedReservation listed) const {
  auto record = std::make_shared<SpanRecord>();
  record->request = listed.request;
  record->boot_nonce = client_->boot_nonce();
  record->fence = listed.fence;
  record->version = listed.version;
  record->runs = listed.runs;
  bool replica = false;
  // A copy is a run of its own, under a name that its blocks' identity gives.
  const ReserveRequest& r = listed.request;
  if (r.owner.is_content() && r.runs() == 1) {
    BlockHeader header;
    for (uint32_t i = 0; i < r.blocks && !replica; ++i) {
      const std::byte* slot = listed.runs[0] + i * r.shape.slot_bytes();
      if (load_seal(slot) == 0) break;  // copies come in order, as blocks are sealed
      if (!sound_header(slot, header)) continue;
      if (replica_owner(header.id) != r.owner || header.id.block != r.first_block + i ||
          header.id.layer != r.first_layer || header.id.kv_head != r.first_kv_head) {
        break;
      }
      replica = true;
      record->request.owner = header.id.owner;
      record->boot_nonce = header.id.boot_nonce;
      record->version = header.id.version;
      record->fence = header.fence;
    }
  }
  return {std::move(record), std::move(listed), replica};
}

std::vector<BlockDirectory::Held> BlockDirectory::refresh() {
  const std::lock_guard lock(asking_);
  std::unordered_map<uint32_t, Held> known;
  std::vector<Held> all;
  auto index = std::make_shared<Index>();
  for (ListedReservation& listed : client_->list()) {
    const uint32_t version = listed.version;
    const auto before = known_.find(version);
    // What a reservation is of may show only when its first block is sealed.
    const bool settled =
        before != known_.end() && (before->second.replica || listed.request.runs() != 1 ||
                                   !listed.request.owner.is_content());
    Held held = settled ? before->second : held_of(listed);
    held.listed.orphan = listed.orphan;
    const SpanRecord& r = *held.record;
    (*index)[key_of(r.request.owner, r.version)].push_back(held.record);
    all.push_back(held);
    known.emplace(version, std::move(held));
  }
  known_ = std::move(known);
  asked_ = Deadline::Clock::now();
  const std::lock_guard inner(mutex_);
  index_ = std::move(index);
  return all;
}

BlockDirectory::Found BlockDirectory::look_up(const Index& index, const BlockId& id) const {
  Found found;
  const auto it = index.find(key_of(id.owner, id.version));
  if (it == index.end()) return found;
  // The newest first: what a copy of a damaged block was made into lies behind it.
  for (auto at = it->second.rbegin(); at != it->second.rend(); ++at) {
    const auto& r = *at;
    if (r->boot_nonce != id.boot_nonce || r->version != id.version ||
        r->request.owner != id.owner || !r->contains(id.layer, id.kv_head, id.block)) {
      continue;
    }
    BlockHeader header;
    const std::byte* slot = r->slot(id.layer, id.kv_head, id.block);
    if (check_header(*r, id, slot, header) == BlockStatus::Ok) return {r, true};
    if (found.record == nullptr) found.record = r;
  }
  return found;
}

std::shared_ptr<const SpanRecord> BlockDirectory::find(const BlockId& id) {
  const auto now = [&] {
    const std::lock_guard lock(mutex_);
    return index_;
  };
  if (const Found found = look_up(*now(), id); found.holds) return found.record;
  {
    const std::lock_guard lock(asking_);
    if (Deadline::Clock::now() - asked_ < least_) return look_up(*now(), id).record;
  }
  refresh();
  return look_up(*now(), id).record;
}

}  // namespace certkv
