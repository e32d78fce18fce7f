#include "kvstore/scratch_cache.h"

#include <algorithm>

#include "kernels/base/failpoint.h"
#include "kernels/digest.h"

namespace certkv {

ScratchCache::ScratchCache(size_t capacity, size_t block_elements)
    : capacity_(capacity), block_elements_(block_elements) {}

const uint16_t* ScratchCache::find(uint32_t block) const {
  const uint32_t slot = slot_of(block);
  return slot == kNone ? nullptr : slots_[slot].data.get();
}

uint16_t* ScratchCache::insert(uint32_t block, uint32_t* evicted) {
  *evicted = kNone;
  if (CERTKV_FAILPOINT_FORCED(scratch_full)) return nullptr;
  uint32_t index;
  if (!free_.empty()) {
    index = free_.back();
    free_.pop_back();
  } else if (slots_.size() < capacity_) {
    index = uint32_t(slots_.size());
    slots_.emplace_back();
    slots_.back().data = std::make_unique<uint16_t[]>(block_elements_);
  } else {
    // Lowest score leaves; ties by block number, so that the choice is the same on every rank.
    const Slot* victim = nullptr;
    for (const Slot& s : slots_)
      if (s.block != kNone && !s.pinned &&
          (victim == nullptr || s.score < victim->score ||
           (s.score == victim->score && s.block < victim->block)))
        victim = &s;
    if (victim == nullptr) return nullptr;
    index = uint32_t(victim - slots_.data());
    *evicted = victim->block;
    slot_of_[victim->block] = kNone;
  }
  Slot& s = slots_[index];
  s.block = block;
  s.pinned = true;
  s.sealed = false;
  s.score = s.now = 0;
  if (slot_of_.size() <= block) slot_of_.resize(size_t(block) + 1, kNone);
  slot_of_[block] = index;
  return s.data.get();
}

void ScratchCache::erase(uint32_t block) {
  const uint32_t slot = slot_of(block);
  if (slot == kNone) return;
  slots_[slot].block = kNone;
  slots_[slot].pinned = false;
  free_.push_back(slot);
  slot_of_[block] = kNone;
}

void ScratchCache::seal(uint32_t block) {
  Slot& s = slots_.at(slot_of(block));
  s.digest = payload_digest(s.data.get(), block_elements_ * 2);
  s.sealed = true;
  CERTKV_FAILPOINT_BYTES(scratch_slot, s.data.get(), block_elements_ * 2);
}

bool ScratchCache::sound(uint32_t block) const {
  const Slot& s = slots_.at(slot_of(block));
  return s.sealed && payload_digest(s.data.get(), block_elements_ * 2) == s.digest;
}

#if CERTKV_FAILPOINTS
void ScratchCache::rot() const {
  for (const Slot& s : slots_)
    if (s.block != kNone)
      failpoint::change(failpoint::Point::scratch_rot, s.data.get(), block_elements_ * 2);
}
#endif

void ScratchCache::pin(uint32_t block) { slots_.at(slot_of(block)).pinned = true; }

void ScratchCache::unpin_all() {
  for (Slot& s : slots_) s.pinned = false;
}

void ScratchCache::score(uint32_t block, double now) { slots_.at(slot_of(block)).now = now; }

void ScratchCache::age(double decay, double keep, std::vector<uint32_t>* dropped) {
  dropped->clear();
  for (Slot& s : slots_) {
    if (s.block == kNone) continue;
    s.score = std::max(decay * s.score, s.now);
    s.now = 0;
    if (!(s.score >= keep)) dropped->push_back(s.block);
  }
  std::sort(dropped->begin(), dropped->end());
  for (uint32_t block : *dropped) erase(block);
}

std::vector<uint32_t> ScratchCache::blocks() const {
  std::vector<uint32_t> out;
  out.reserve(resident());
  for (const Slot& s : slots_)
    if (s.block != kNone) out.push_back(s.block);
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace certkv
