#include "kvstore/server/replica_store.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/digest.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

// Reads the fixed part. What follows it is `rest`.
ReplicateRequest parse(std::span<const std::byte> body, BlockShape& shape,
                       std::span<const std::byte>& rest) {
  ReplicateRequest r;
  CERTKV_EXPECT(body.size() >= sizeof r, InvalidArgument, "a request on copies of {} bytes",
                body.size());
  std::memcpy(static_cast<void*>(&r), body.data(), sizeof r);
  rest = body.subspan(sizeof r);
  shape = {r.dtype <= uint16_t(DType::U64) ? DType(r.dtype) : DType::U64, r.block_tokens,
           r.head_dim};
  CERTKV_EXPECT(shape.valid() && r.reserved == 0 && r.reserved1 == 0 && r.run.boot_nonce != 0 &&
                    !r.run.owner.is_nobody() && r.blocks >= 1 && r.blocks <= kMaxRunBlocks &&
                    r.first <= r.blocks && r.count <= r.blocks - r.first &&
                    uint64_t(r.run.first_block) + r.blocks <= UINT32_MAX,
                InvalidArgument,
                "a request on copies: blocks {}+{} of {}, {} tokens, head_dim {}, dtype {}",
                r.first, r.count, r.blocks, r.block_tokens, r.head_dim, r.dtype);
  CERTKV_EXPECT(rest.size() == size_t(r.count) * shape.slot_bytes(), InvalidArgument,
                "{} copies of {} bytes each came as {} bytes", r.count, shape.slot_bytes(),
                rest.size());
  return r;
}

// Whether a header is that of this block, whole and of this shape.
bool right_header(const BlockHeader& h, const BlockId& id, const BlockShape& shape) {
  return h.seal != 0 && block_seal(h) == h.seal && h.magic == kBlockMagic &&
         h.format == kFormatVersion && h.header_bytes == kBlockHeaderBytes && h.id == id &&
         h.dtype == uint8_t(shape.dtype) && h.block_tokens == shape.block_tokens &&
         h.head_dim == shape.head_dim && h.tokens >= 1 && h.tokens <= shape.block_tokens;
}

bool right_digests(const std::byte* slot, const BlockHeader& h, const BlockShape& shape) {
  return payload_digest(slot + shape.k_offset(), shape.payload_bytes()) == h.k_digest &&
         payload_digest(slot + shape.v_offset(), shape.payload_bytes()) == h.v_digest;
}

BlockHeader header_at(const std::byte* slot) {
  BlockHeader h;
  std::memcpy(static_cast<void*>(&h), slot, sizeof h);
  return h;
}

}  // namespace

ReplicaStore::ReplicaStore(std::shared_ptr<StoreClient> client,
                           std::shared_ptr<BlockDirectory> directory)
    : client_(std::move(client)), directory_(std::move(directory)) {
  adopt_all();
}

ReplicaStore::~ReplicaStore() {
  for (auto& [key, run] : runs_) {
    for (Part& p : run.parts) p.span.keep();
  }
}

void ReplicaStore::adopt_all() {
  std::map<WireRun, std::vector<BlockDirectory::Held>> found;
  for (auto& held : directory_->refresh()) {
    if (!held.replica) continue;
    const SpanRecord& r = *held.record;
    const ReserveRequest& q = r.request;
    found[{r.boot_nonce, q.owner, q.first_layer, q.first_kv_head, 0, r.version}].push_back(held);
  }
  for (auto& [key, parts] : found) {
    std::ranges::sort(parts, {}, [](const auto& h) { return h.listed.request.first_block; });
    WireRun run_key = key;
    run_key.first_block = parts[0].listed.request.first_block;
    Run run;
    run.shape = parts[0].listed.request.shape;
    bool whole = true;  // no gap so far
    for (const auto& held : parts) {
      const ReserveRequest& q = held.listed.request;
      // Once it is held nobody evicts it; what it holds is looked at after that.
      OriginalsSpan span = client_->adopt(q, held.listed.version + 1);
      if (span.empty() || span.version() != held.listed.version) continue;
      const uint32_t first = q.first_block - run_key.first_block;
      whole = whole && first == run.verified && q.shape == run.shape;
      for (uint32_t i = 0; whole && i < q.blocks; ++i) {
        const std::byte* slot = span.run(q.first_layer, q.first_kv_head) + i * q.shape.slot_bytes();
        if (load_seal(slot) == 0) break;
        const BlockHeader h = header_at(slot);
        if (!right_header(h, run_key.id(q.first_block + i), q.shape) ||
            !right_digests(slot, h, q.shape)) {
          ++refused_;
          break;
        }
        ++run.verified;
      }
      run.parts.push_back({std::move(span), first, q.blocks, false});
    }
    blocks_ += run.verified;
    bytes_ += run.verified * run.shape.slot_bytes();
    runs_.emplace(run_key, std::move(run));
  }
  if (!runs_.empty()) {
    log_info("{} copies of other nodes' blocks in {} runs were found and verified", blocks_,
             runs_.size());
  }
}

std::byte* ReplicaStore::writable_slot(const WireRun& key, Run& run, uint32_t index,
                                       uint32_t blocks) {
  const uint32_t block = key.first_block + index;
  for (Part& p : run.parts) {
    if (!p.writable || index < p.first || index - p.first >= p.blocks) continue;
    const OriginalsSpan::Rows rows = p.span.rows(key.layer, key.kv_head, block);
    return reinterpret_cast<std::byte*>(rows.k) - run.shape.k_offset();
  }
  // What a dead server left half-filled is not written by another one: the rest lies elsewhere.
  ReserveRequest q;
  q.owner = replica_owner(key.id(0));
  q.shape = run.shape;
  q.first_layer = key.layer;
  q.first_kv_head = key.kv_head;
  q.first_block = block;
  q.blocks = blocks - index;
  run.parts.push_back({client_->reserve(q), index, q.blocks, true});
  return writable_slot(key, run, index, blocks);
}

void ReplicaStore::take(const TransportRequest& request, TransportReply& reply) {
  BlockShape shape;
  std::span<const std::byte> slots;
  const ReplicateRequest r = parse(request.body, shape, slots);
  CERTKV_EXPECT(r.run.boot_nonce != client_->boot_nonce(), InvalidArgument,
                "these blocks were first sealed here: their store's peers name itself");
  const std::lock_guard lock(mutex_);
  if (r.count > 0 || runs_.contains(r.run)) {
    Run& run = runs_.try_emplace(r.run, Run{shape, {}, 0}).first->second;
    CERTKV_EXPECT(run.shape == shape, InvalidArgument, "copies of one run in two shapes");
    for (uint32_t i = 0; i < r.count; ++i) {
      const uint32_t index = r.first + i;
      if (index < run.verified) continue;
      if (index > run.verified) break;
      const std::byte* from = slots.data() + i * shape.slot_bytes();
      const BlockHeader header = header_at(from);
      const BlockId id = r.run.id(r.run.first_block + index);
      const auto refuse = [&](const char* what) {
        ++refused_;
        CERTKV_THROW(Corrupt, "copy of layer {} KV head {} block {}: its {}", id.layer, id.kv_head,
                     id.block, what);
      };
      if (!right_header(header, id, shape)) refuse("header does not match");
      std::byte* slot = writable_slot(r.run, run, index, r.blocks);
      std::memcpy(slot + shape.k_offset(), from + shape.k_offset(), 2 * shape.payload_stride());
      std::memcpy(slot, &header, offsetof(BlockHeader, seal));
      // Of what has arrived, where it is going to stay.
      if (!right_digests(slot, header, shape)) refuse("digest does not match");
      publish_seal(slot, header.seal);
      ++run.verified;
      ++blocks_;
      bytes_ += shape.slot_bytes();
    }
  }
  const auto known = runs_.find(r.run);
  const ReplicateReply answer{known == runs_.end() ? 0 : known->second.verified, 0};
  std::memcpy(reply.reserve(sizeof answer).data(), &answer, sizeof answer);
}

void ReplicaStore::forget(const TransportRequest& request, TransportReply& reply) {
  BlockShape shape;
  std::span<const std::byte> none;
  const ReplicateRequest r = parse(request.body, shape, none);
  CERTKV_EXPECT(r.count == 0, InvalidArgument, "a run is forgotten without blocks");
  const std::lock_guard lock(mutex_);
  if (const auto it = runs_.find(r.run); it != runs_.end()) {
    blocks_ -= it->second.verified;
    bytes_ -= it->second.verified * it->second.shape.slot_bytes();
    runs_.erase(it);
  }
  const ReplicateReply answer{};
  std::memcpy(reply.reserve(sizeof answer).data(), &answer, sizeof answer);
}

ReplicaCounts ReplicaStore::counts() const {
  const std::lock_guard lock(mutex_);
  return {runs_.size(), blocks_, bytes_, refused_};
}

}  // namespace certkv
