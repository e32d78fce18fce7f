// Originals of one KV head kept near the compute: a bounded set of blocks of keys, or of values.
//
// The quota belongs to the request and KV head, so that what is resident (and with it F) depends
// neither on the number of ranks nor on neighbours in the batch. SOURCE: method sections 5.4, 8.
// THREADS: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/base/failpoint.h"

namespace certkv {

class ScratchCache {
 public:
  // capacity: blocks; block_elements: 16-bit elements of one block. Slots are allocated when first
  // used.
  ScratchCache(size_t capacity, size_t block_elements);

  size_t capacity() const { return capacity_; }
  size_t resident() const { return slots_.size() - free_.size(); }
  uint64_t bytes() const { return slots_.size() * block_elements_ * 2; }

  // The block's originals, or nullptr. A block that is not resident never has an address.
  const uint16_t* find(uint32_t block) const;

  // A slot for a block that is not resident. When all are taken the block with the lowest score that
  // is not pinned leaves (its number is written to *evicted, else kNone); nullptr if every one is
  // pinned. The new block is pinned until unpin_all().
  static constexpr uint32_t kNone = UINT32_MAX;
  uint16_t* insert(uint32_t block, uint32_t* evicted);
  void erase(uint32_t block);

  // Once the originals are in the slot: takes their digest. REQUIRES resident.
  void seal(uint32_t block);
  // Whether the slot still holds what seal() saw; false too where it was never sealed. Reads the
  // whole block. REQUIRES resident.
  bool sound(uint32_t block) const;

#if CERTKV_FAILPOINTS
  void rot() const;  // meets scratch.rot once for each resident block
#endif

  void pin(uint32_t block);  // REQUIRES resident
  void unpin_all();

  // Memory of the set: score = max(decay * score, now); blocks below `keep` leave (into *dropped).
  void score(uint32_t block, double now);  // REQUIRES resident; at most once a step
  void age(double decay, double keep, std::vector<uint32_t>* dropped);

  std::vector<uint32_t> blocks() const;  // resident ones, ascending
  // Calls body(block) for every resident block, in no particular order.
  template <typename Body>
  void for_each(Body body) const {
    for (const Slot& s : slots_)
      if (s.block != kNone) body(s.block);
  }

 private:
  struct Slot {
    uint32_t block = kNone;
    bool pinned = false, sealed = false;
    uint64_t digest = 0;
    double score = 0, now = 0;
    std::unique_ptr<uint16_t[]> data;
  };
  size_t capacity_, block_elements_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> slot_of_;  // by block, kNone where not resident; as long as has been needed

  uint32_t slot_of(uint32_t block) const {
    return block < slot_of_.size() ? slot_of_[block] : kNone;
  }
};

}  // namespace certkv
