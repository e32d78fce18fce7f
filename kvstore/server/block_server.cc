#include "kvstore/server/block_server.h"

#include <cstring>

#include "kernels/base/error.h"
#include "kvstore/server/wire.h"

namespace certkv {
namespace {

// Copies one block behind `to`; what it became.
WireBlock put_block(const SpanRecord& record, const ReadRequestEntry& entry, std::byte*& to) {
  const BlockShape& shape = record.request.shape;
  const std::byte* slot = record.slot(entry.id.layer, entry.id.kv_head, entry.id.block);
  BlockHeader header;
  switch (check_header(record, entry.id, slot, header)) {
    case BlockStatus::Ok:
      break;
    case BlockStatus::Corrupt:
      return WireBlock::Corrupt;
    default:
      return WireBlock::Absent;
  }
  std::byte* at = to;
  std::memcpy(at, &header, sizeof header);
  at += sizeof header;
  const size_t bytes = shape.payload_bytes(), padding = wire_part_bytes(shape) - bytes;
  const auto put = [&](size_t offset) {
    std::memcpy(at, slot + offset, bytes);
    std::memset(at + bytes, 0, padding);
    at += bytes + padding;
  };
  if ((entry.part & 1) != 0) put(shape.k_offset());
  if ((entry.part & 2) != 0) put(shape.v_offset());
  if (load_seal(slot) != header.seal) return WireBlock::Absent;  // freed meanwhile
  to = at;
  return WireBlock::Ok;
}

}  // namespace

void BlockServer::read(const TransportRequest& request, TransportReply& reply) {
  ReadRequestHead head;
  std::span<const std::byte> body = request.body;
  CERTKV_EXPECT(body.size() >= sizeof head, InvalidArgument, "a read request of {} bytes",
                body.size());
  std::memcpy(&head, body.data(), sizeof head);
  body = body.subspan(sizeof head);
  CERTKV_EXPECT(head.count >= 1 && head.count <= kMaxReadBlocks &&
                    body.size() == head.count * sizeof(ReadRequestEntry) && head.reserved == 0 &&
                    head.reserved1 == 0,
                InvalidArgument, "a read request for {} blocks has {} bytes of entries", head.count,
                body.size());
  const BlockShape shape{head.dtype <= uint16_t(DType::U64) ? DType(head.dtype) : DType::U64,
                         head.block_tokens, head.head_dim};
  CERTKV_EXPECT(shape.valid(), InvalidArgument,
                "a read request for blocks of {} tokens, head_dim {}, dtype {}", head.block_tokens,
                head.head_dim, head.dtype);
  const auto entry_at = [&](uint32_t i) {
    ReadRequestEntry e;
    std::memcpy(static_cast<void*>(&e), body.data() + i * sizeof e, sizeof e);
    return e;
  };
  size_t most = sizeof(ReadReplyHead) + wire_padded(head.count * sizeof(uint32_t));
  for (uint32_t i = 0; i < head.count; ++i) {
    const ReadRequestEntry e = entry_at(i);
    CERTKV_EXPECT(e.part >= 1 && e.part <= 3 && e.reserved == 0, InvalidArgument,
                  "a read request for part {} of a block", e.part);
    most += kBlockHeaderBytes + (e.part == 3 ? 2 : 1) * wire_part_bytes(shape);
  }
  const std::span<std::byte> out = reply.reserve(most);
  const ReadReplyHead answer{head.count, 0};
  std::memcpy(out.data(), &answer, sizeof answer);
  std::byte* statuses = out.data() + sizeof answer;
  std::memset(statuses, 0, wire_padded(head.count * sizeof(uint32_t)));
  std::byte* to = statuses + wire_padded(head.count * sizeof(uint32_t));
  uint64_t ok = 0, absent = 0, corrupt = 0;
  std::shared_ptr<const SpanRecord> record;
  for (uint32_t i = 0; i < head.count; ++i) {
    const ReadRequestEntry e = entry_at(i);
    const bool same = record != nullptr && record->request.owner == e.id.owner &&
                      record->version == e.id.version && record->boot_nonce == e.id.boot_nonce &&
                      record->contains(e.id.layer, e.id.kv_head, e.id.block);
    if (!same) record = directory_->find(e.id);
    WireBlock status = WireBlock::Absent;
    const auto put = [&] {
      if (record == nullptr) return WireBlock::Absent;
      return record->request.shape == shape ? put_block(*record, e, to) : WireBlock::Corrupt;
    };
    status = put();
    if (same && status != WireBlock::Ok) {
      record = directory_->find(e.id);
      status = put();
    }
    std::memcpy(statuses + i * sizeof(uint32_t), &status, sizeof status);
    ok += status == WireBlock::Ok;
    absent += status == WireBlock::Absent;
    corrupt += status == WireBlock::Corrupt;
  }
  const size_t bytes = size_t(to - out.data());
  reply.shrink(bytes);
  requests_ += 1;
  blocks_ += head.count;
  ok_ += ok;
  absent_ += absent;
  corrupt_ += corrupt;
  bytes_ += bytes;
}

BlockServerCounts BlockServer::counts() const {
  return {requests_, blocks_, ok_, absent_, corrupt_, bytes_};
}

}  // namespace certkv
