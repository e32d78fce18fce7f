// Where the blocks of one rank's reservations lie, and how a sealed block is checked.
//
// Offsets come from the store once, are checked against the mapping once, and are kept here; the
// bytes they lead to are shared with other processes and are believed only after a copy of them was
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kvstore/arena.h"
#include "kvstore/block.h"
#include "kvstore/client.h"
#include "kvstore/reader.h"

namespace certkv {

// One reservation, immutable once made.
struct SpanRecord {
  ReserveRequest request;
  uint64_t boot_nonce = 0;
  uint64_t fence = 0;
  uint32_t version = 0;
  bool adopted = false;          // another reservation call's: to be read, not written
  std::vector<std::byte*> runs;  // [layers, kv_heads], first slot of each

  bool contains(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    const ReserveRequest& r = request;
    return layer - r.first_layer < r.layers && kv_head - r.first_kv_head < r.kv_heads &&
           block - r.first_block < r.blocks;  // differences wrap to large numbers
  }
  // REQUIRES contains(layer, kv_head, block).
  std::byte* slot(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    const ReserveRequest& r = request;
    const size_t run = size_t(layer - r.first_layer) * r.kv_heads + (kv_head - r.first_kv_head);
    return runs[run] + size_t(block - r.first_block) * r.shape.slot_bytes();
  }
  BlockId id(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    return {boot_nonce, request.owner, layer, kv_head, block, version};
  }
};

uint64_t load_seal(const std::byte* slot);          // acquire
void publish_seal(std::byte* slot, uint64_t seal);  // release

// Copies and checks the header of the slot that should hold `id`. Ok: `out` is that block's header,
// of the record's shape and fence. SOURCE: FORMAT.md, Reading.
BlockStatus check_header(const SpanRecord& record, const BlockId& id, const std::byte* slot,
                         BlockHeader& out);

// THREADS: safe. Readers hold the shared lock while they look and copy, so a record does not go
// away under them.
class SpanDirectory {
 public:
  // False where a live record of this private owner overlaps: the caller's mistake. Of a name that
  // others can ask for there may be several versions, and several records of one.
  bool add(const SpanRecord* record);
  void remove(const SpanRecord* record);

  std::shared_mutex& mutex() const { return mutex_; }
  // REQUIRES the mutex held, shared or not. Null where no record holds the id.
  const SpanRecord* find(const BlockId& id) const;

 private:
  struct Hash {
    size_t operator()(const OwnerId& o) const { return size_t(o.hi * 0x9e3779b97f4a7c15 ^ o.lo); }
  };
  mutable std::shared_mutex mutex_;
  std::unordered_map<OwnerId, std::vector<const SpanRecord*>, Hash> records_;
};

}  // namespace certkv
