#include "kvstore/span_directory.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "kernels/base/failpoint.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

bool overlap(uint32_t a, uint32_t a_count, uint32_t b, uint32_t b_count) {
  return uint64_t(a) < uint64_t(b) + b_count && uint64_t(b) < uint64_t(a) + a_count;
}

bool overlap(const ReserveRequest& a, const ReserveRequest& b) {
  return overlap(a.first_layer, a.layers, b.first_layer, b.layers) &&
         overlap(a.first_kv_head, a.kv_heads, b.first_kv_head, b.kv_heads) &&
         overlap(a.first_block, a.blocks, b.first_block, b.blocks);
}

uint64_t* seal_word(const std::byte* slot) {
  return reinterpret_cast<uint64_t*>(const_cast<std::byte*>(slot) + offsetof(BlockHeader, seal));
}

}  // namespace

uint64_t load_seal(const std::byte* slot) {
  return std::atomic_ref<uint64_t>(*seal_word(slot)).load(std::memory_order_acquire);
}

void publish_seal(std::byte* slot, uint64_t seal) {
  std::atomic_ref<uint64_t>(*seal_word(slot)).store(seal, std::memory_order_release);
}

BlockStatus check_header(const SpanRecord& record, const BlockId& id, const std::byte* slot,
                         BlockHeader& out) {
  uint64_t seal = load_seal(slot);
  CERTKV_FAILPOINT_BYTES(reader_seal, &seal, sizeof seal);
  if (seal == 0) return BlockStatus::Absent;
  std::memcpy(static_cast<void*>(&out), slot, offsetof(BlockHeader, seal));
  CERTKV_FAILPOINT_BYTES(reader_header, &out, offsetof(BlockHeader, seal));
  out.seal = seal;
  if (block_seal(out) != seal) return BlockStatus::Corrupt;
  if (out.magic != kBlockMagic || out.format != kFormatVersion ||
      out.header_bytes != kBlockHeaderBytes) {
    return BlockStatus::Corrupt;
  }
  if (out.id != id || out.fence != record.fence) return BlockStatus::Absent;
  const BlockShape& shape = record.request.shape;
  if (out.dtype != uint8_t(shape.dtype) || out.block_tokens != shape.block_tokens ||
      out.head_dim != shape.head_dim || out.tokens < 1 || out.tokens > shape.block_tokens ||
      out.reserved0 != 0 || std::ranges::any_of(out.reserved, [](uint64_t x) { return x != 0; })) {
    return BlockStatus::Corrupt;
  }
  return BlockStatus::Ok;
}

bool SpanDirectory::add(const SpanRecord* record) {
  const std::unique_lock lock(mutex_);
  auto& list = records_[record->request.owner];
  for (const SpanRecord* other : list) {
    if (!record->request.owner.is_content() && overlap(other->request, record->request))
      return false;
  }
  list.push_back(record);
  return true;
}

void SpanDirectory::remove(const SpanRecord* record) {
  const std::unique_lock lock(mutex_);
  const auto it = records_.find(record->request.owner);
  if (it == records_.end()) return;
  std::erase(it->second, record);
  if (it->second.empty()) records_.erase(it);
}

const SpanRecord* SpanDirectory::find(const BlockId& id) const {
  const auto it = records_.find(id.owner);
  if (it == records_.end()) return nullptr;
  for (const SpanRecord* r : it->second) {
    if (r->version == id.version && r->boot_nonce == id.boot_nonce &&
        r->contains(id.layer, id.kv_head, id.block)) {
      return r;
    }
  }
  return nullptr;
}

}  // namespace certkv
