#include "kvstore/remote_reader.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/digest.h"
#include "kvstore/control.h"
#include "kvstore/reader_batch.h"
#include "kvstore/server/wire.h"

namespace certkv {
namespace {

using Clock = Deadline::Clock;
using std::chrono::milliseconds;

constexpr milliseconds kPause{10};  // before a repetition

// Checks what came for one block and moves it to its destination. `body` starts at its header.
BlockStatus take_block(const BlockId& id, const BlockShape& shape, const Destination& to,
                       const std::byte* body, BlockResult& result) {
  BlockHeader header;
  std::memcpy(static_cast<void*>(&header), body, sizeof header);
  if (header.seal == 0 || block_seal(header) != header.seal || header.magic != kBlockMagic ||
      header.format != kFormatVersion || header.header_bytes != kBlockHeaderBytes) {
    return BlockStatus::Corrupt;
  }
  if (header.id != id) return BlockStatus::Absent;
  if (header.dtype != uint8_t(shape.dtype) || header.block_tokens != shape.block_tokens ||
      header.head_dim != shape.head_dim || header.tokens < 1 ||
      header.tokens > shape.block_tokens) {
    return BlockStatus::Corrupt;
  }
  const std::byte* at = body + sizeof header;
  const size_t bytes = shape.payload_bytes();
  if (wants_k(to.part)) {
    if (copy_and_digest(to.k, at, bytes) != header.k_digest) return BlockStatus::Corrupt;
    at += wire_part_bytes(shape);
  }
  if (wants_v(to.part) && copy_and_digest(to.v, at, bytes) != header.v_digest) {
    return BlockStatus::Corrupt;
  }
  result.tokens = header.tokens;
  result.k_digest = header.k_digest;
  result.v_digest = header.v_digest;
  if (wants_k(to.part)) result.k = to.k;
  if (wants_v(to.part)) result.v = to.v;
  return BlockStatus::Ok;
}

size_t block_bytes(const BlockShape& shape, BlockPart part) {
  return kBlockHeaderBytes +
         (size_t(wants_k(part)) + size_t(wants_v(part))) * wire_part_bytes(shape);
}

}  // namespace

class RemoteReader::Batch : public ReadBatch {
 public:
  Batch(const RemoteReader& reader, std::span<const BlockId> ids,
        std::span<const Destination> destinations, Deadline deadline)
      : peer_(reader.peer_),
        shape_(reader.shape_),
        options_(reader.options_),
        ids_(ids),
        destinations_(destinations),
        deadline_(deadline),
        results_(ids.size()) {
    for (size_t first = 0; first < ids.size(); first += options_.blocks) {
      pieces_.push_back({first, std::min(options_.blocks, ids.size() - first), {}, 0, {}, false});
    }
    step(false);
  }

  bool poll() override {
    step(false);
    return done();
  }
  void wait() override {
    while (!done()) step(true);
  }
  void cancel() override {
    for (Piece& p : pieces_) give_up(p, "cancelled");
  }
  std::span<const BlockResult> results() const override { return results_; }

 private:
  struct Piece {
    size_t first, count;
    TransportCall call;
    int attempts;
    Clock::time_point not_before;
    bool decided;
  };

  bool done() const { return next_ == pieces_.size(); }

  // Moves on whatever can be moved on; `waits` for the first that is under way if nothing can.
  void step(bool waits) {
    bool moved = false;
    size_t under_way = 0;
    for (size_t i = next_; i < pieces_.size() && under_way < options_.requests; ++i) {
      Piece& p = pieces_[i];
      if (p.decided) continue;
      ++under_way;
      if (!p.call.valid()) {
        moved = start(p) || moved;
      } else if (const CallStatus status = p.call.poll(); status != CallStatus::Pending) {
        take(p, status);
        moved = true;
      }
    }
    while (!done() && pieces_[next_].decided) ++next_;
    if (moved || !waits || done()) return;
    Piece& p = pieces_[next_];
    if (p.call.valid()) {
      p.call.wait();
    } else {
      const auto now = Clock::now();
      std::this_thread::sleep_for(
          std::clamp<Clock::duration>(p.not_before - now, milliseconds(1), kPause));
    }
  }

  // True where the piece was sent or decided.
  bool start(Piece& p) {
    if (deadline_.passed()) return give_up(p, "no answer before the deadline");
    if (Clock::now() < p.not_before) return false;
    if (p.attempts >= options_.attempts) return give_up(p, "tried often enough");
    if (p.attempts > 0 && !peer_->may_retry()) return give_up(p, "no retry left in the budget");
    const auto connection = peer_->connection(deadline_);
    if (!connection) {
      ++p.attempts;
      p.not_before = Clock::now() + kPause * p.attempts;
      why_ = peer_->last_error();
      return false;
    }
    size_t reply_bytes = sizeof(ReadReplyHead) + wire_padded(p.count * sizeof(uint32_t));
    request_.resize(sizeof(ReadRequestHead) + p.count * sizeof(ReadRequestEntry));
    const ReadRequestHead head{
        uint32_t(p.count), uint16_t(shape_.dtype), shape_.block_tokens, shape_.head_dim, 0, 0};
    std::memcpy(request_.data(), &head, sizeof head);
    for (size_t i = 0; i < p.count; ++i) {
      const BlockPart part = destinations_[p.first + i].part;
      const ReadRequestEntry entry{ids_[p.first + i], uint32_t(part), 0};
      std::memcpy(request_.data() + sizeof head + i * sizeof entry, &entry, sizeof entry);
      reply_bytes += block_bytes(shape_, part);
    }
    try {
      p.call = peer_->transport().call(*connection, uint32_t(ServerOp::Read), request_, reply_bytes,
                                       deadline_);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::OutOfMemory) throw;
      p.not_before = Clock::now() + kPause;  // others' calls will end
      return false;
    }
    ++p.attempts;
    return true;
  }

  void take(Piece& p, CallStatus status) {
    if (status == CallStatus::Ok) {
      peer_->succeeded();
      const bool sound = decode(p, p.call.reply());
      if (!sound) {
        log_warning("the store at {} gave an answer of the wrong form", peer_->address());
        for (size_t i = 0; i < p.count; ++i) {
          results_[p.first + i] = {};
          results_[p.first + i].status = BlockStatus::Corrupt;
        }
      }
      p.decided = true;
      p.call = {};
      return;
    }
    why_ = p.call.why();
    p.call = {};
    if (status == CallStatus::PeerLost || status == CallStatus::Busy) {
      p.not_before = Clock::now() + kPause * p.attempts;
      return;  // again, if there is time and budget
    }
    give_up(p, call_status_name(status));
  }

  // False where the answer has not the form that it must have.
  bool decode(Piece& p, std::span<const std::byte> reply) {
    ReadReplyHead head;
    const size_t fixed = sizeof head + wire_padded(p.count * sizeof(uint32_t));
    if (reply.size() < fixed) return false;
    std::memcpy(&head, reply.data(), sizeof head);
    if (head.count != p.count || head.reserved != 0) return false;
    const std::byte* statuses = reply.data() + sizeof head;
    size_t at = fixed;
    for (size_t i = 0; i < p.count; ++i) {
      BlockResult& result = results_[p.first + i];
      uint32_t status = 0;
      std::memcpy(&status, statuses + i * sizeof status, sizeof status);
      switch (WireBlock(status)) {
        case WireBlock::Absent:
          result.status = BlockStatus::Absent;
          break;
        case WireBlock::Corrupt:
          result.status = BlockStatus::Corrupt;
          break;
        case WireBlock::Ok: {
          const Destination& to = destinations_[p.first + i];
          const size_t bytes = block_bytes(shape_, to.part);
          if (reply.size() - at < bytes) return false;
          result.status = take_block(ids_[p.first + i], shape_, to, reply.data() + at, result);
          at += bytes;
          break;
        }
        default:
          return false;
      }
    }
    return at == reply.size();
  }

  bool give_up(Piece& p, const char* what) {
    if (p.decided) return true;
    p.call = {};
    p.decided = true;
    for (size_t i = 0; i < p.count; ++i) results_[p.first + i].status = BlockStatus::Lost;
    log_debug("{} blocks of the store at {} are lost: {}{}{}", p.count, peer_->address(), what,
              why_.empty() ? "" : ": ", why_);
    while (!done() && pieces_[next_].decided) ++next_;
    return true;
  }

  const std::shared_ptr<RemotePeer> peer_;
  const BlockShape shape_;
  const RemoteReaderOptions options_;
  const std::span<const BlockId> ids_;
  const std::span<const Destination> destinations_;
  const Deadline deadline_;
  std::vector<BlockResult> results_;
  std::vector<Piece> pieces_;
  size_t next_ = 0;  // the first that is not decided
  std::vector<std::byte> request_;
  std::string why_;
};

RemoteReader::RemoteReader(std::shared_ptr<RemotePeer> peer, BlockShape shape,
                           RemoteReaderOptions options)
    : peer_(std::move(peer)), shape_(shape), options_(options) {
  CERTKV_EXPECT(shape.valid(), InvalidArgument, "remote reads of blocks of {} tokens, head_dim {}",
                shape.block_tokens, shape.head_dim);
  CERTKV_EXPECT(options.blocks >= 1 && options.blocks <= kMaxReadBlocks && options.requests >= 1 &&
                    options.attempts >= 1,
                InvalidArgument,
                "remote reads of {} blocks a request, {} requests at once, {} attempts: 1 .. {} "
                "blocks and at least 1 of the others are needed",
                options.blocks, options.requests, options.attempts, kMaxReadBlocks);
}

ReadTicket RemoteReader::read(std::span<const BlockId> ids,
                              std::span<const Destination> destinations, Deadline deadline) {
  check_destinations(ids, destinations, /*shows_views=*/false);
  return ReadTicket(std::make_unique<Batch>(*this, ids, destinations, deadline));
}

}  // namespace certkv
