#include "kvstore/arena_reader.h"

#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/digest.h"
#include "kvstore/reader_batch.h"

namespace certkv {
namespace {

// Copies or shows one payload; true when its digest is the one sealed.
bool fetch(const std::byte* from, size_t bytes, uint64_t digest, bool view, uint16_t* to,
           const uint16_t*& out) {
  // In the arena itself, where every reader meets it.
  CERTKV_FAILPOINT_BYTES(reader_source, const_cast<std::byte*>(from), bytes);
  if (view) {
    out = reinterpret_cast<const uint16_t*>(from);
    return payload_digest(from, bytes) == digest || CERTKV_FAILPOINT_FORCED(reader_undigested);
  }
  out = to;
  return copy_and_digest(to, from, bytes) == digest || CERTKV_FAILPOINT_FORCED(reader_undigested);
}

void read_block(const SpanRecord& record, const BlockId& id, const Destination& destination,
                BlockResult& result) {
  const std::byte* slot = record.slot(id.layer, id.kv_head, id.block);
  BlockHeader header;
  result.status = check_header(record, id, slot, header);
  if (result.status != BlockStatus::Ok) return;
  const BlockShape& shape = record.request.shape;
  bool sound = true;
  if (wants_k(destination.part)) {
    sound = fetch(slot + shape.k_offset(), shape.payload_bytes(), header.k_digest, destination.view,
                  destination.k, result.k);
  }
  if (wants_v(destination.part) && sound) {
    sound = fetch(slot + shape.v_offset(), shape.payload_bytes(), header.v_digest, destination.view,
                  destination.v, result.v);
  }
  if (!sound || load_seal(slot) != header.seal) {
    // Freed while it was read, or damaged: two different answers.
    result.status = load_seal(slot) == header.seal ? BlockStatus::Corrupt : BlockStatus::Absent;
    result.k = result.v = nullptr;
    return;
  }
  result.tokens = header.tokens;
  result.k_digest = header.k_digest;
  result.v_digest = header.v_digest;
}

}  // namespace

ReadTicket ArenaReader::read(std::span<const BlockId> ids,
                             std::span<const Destination> destinations, Deadline) {
  check_destinations(ids, destinations, /*shows_views=*/true);
  CERTKV_FAILPOINT(reader_batch);
  std::vector<BlockResult> results(ids.size());
  const std::shared_lock lock(directory_.mutex());
  const BlockStatus missing =
      lost_.load(std::memory_order_acquire) ? BlockStatus::Lost : BlockStatus::Absent;
  const SpanRecord* record = nullptr;
  for (size_t i = 0; i < ids.size(); ++i) {
    const BlockId& id = ids[i];
    if (gone_.load(std::memory_order_acquire) || CERTKV_FAILPOINT_FORCED(reader_lost)) {
      results[i].status = BlockStatus::Lost;
      continue;
    }
    const bool same = record != nullptr && record->request.owner == id.owner &&
                      record->version == id.version && record->boot_nonce == id.boot_nonce &&
                      record->contains(id.layer, id.kv_head, id.block);
    if (!same) record = directory_.find(id);
    if (record == nullptr) {
      results[i].status = missing;
      continue;
    }
    read_block(*record, id, destinations[i], results[i]);
  }
  return ReadTicket(std::make_unique<DoneBatch>(std::move(results)));
}

}  // namespace certkv
