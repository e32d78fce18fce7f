// Reading originals: the one interface that shared memory, a remote store and test adaptors share.
//
// A batch of blocks is asked for at once and completes later; shared memory completes before
// read() returns. Nothing is believed before its digest was verified on the reader's side, after
// the transfer: Ok means identity, shape and digest of every part asked for have been checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "kernels/base/deadline.h"
#include "kvstore/block.h"

namespace certkv {

enum class BlockStatus : uint8_t {
  Pending = 0,  // not yet decided; never seen after wait()
  Ok,
  Absent,   // no block of this identity is there (freed, stale, not sealed)
  Corrupt,  // a header or a digest did not match: ask a replica, else the request fails
  Lost,     // the store that had it is gone, or its data did not come before the deadline
};
const char* block_status_name(BlockStatus status);

enum class BlockPart : uint8_t { K = 1, V = 2, Both = 3 };
constexpr bool wants_k(BlockPart p) {
  return (uint8_t(p) & 1) != 0;
}
constexpr bool wants_v(BlockPart p) {
  return (uint8_t(p) & 2) != 0;
}

// Where one block goes. Buffers hold block_tokens * head_dim elements of 16 bits,
// [block_tokens, head_dim], host memory.
struct Destination {
  BlockPart part = BlockPart::Both;
  // true: a pointer into memory that the reader's source keeps will do, and the buffers may be
  // null. A source that cannot show its memory uses the buffers, and refuses (InvalidArgument) if
  // there are none. A view stays valid while the handle of the block's reservation is held.
  bool view = false;
  uint16_t* k = nullptr;
  uint16_t* v = nullptr;
};

struct BlockResult {
  BlockStatus status = BlockStatus::Pending;
  uint16_t tokens = 0;          // rows in use; rows beyond are zero
  const uint16_t* k = nullptr;  // when Ok and asked for: Destination::k or a view
  const uint16_t* v = nullptr;
  uint64_t k_digest = 0;  // as sealed: to verify again after a further move
  uint64_t v_digest = 0;
};

// One batch under way. Made by readers only.
class ReadBatch {
 public:
  virtual ~ReadBatch() = default;  // cancels what is pending
  virtual bool poll() = 0;         // drives progress; true: every block is decided
  virtual void wait() = 0;         // returns when poll() would be true; bounded by the deadline
  virtual void cancel() = 0;       // pending blocks become Lost
  virtual std::span<const BlockResult> results() const = 0;  // one per id, in their order
};

// Owner of a batch. Destroying it cancels the batch: afterwards no destination is written to.
// THREADS: one at a time.
class ReadTicket {
 public:
  ReadTicket() = default;
  explicit ReadTicket(std::unique_ptr<ReadBatch> batch) : batch_(std::move(batch)) {}
  bool valid() const { return batch_ != nullptr; }

 private:
  friend class BlockReader;
  std::unique_ptr<ReadBatch> batch_;
};

class BlockReader {
 public:
  virtual ~BlockReader() = default;

  // Starts reading ids[i] into destinations[i].
  // REQUIRES equal lengths, and that both arrays and all buffers live until the ticket is done or
  // destroyed. Throws InvalidArgument for what is wrong with the call itself; what is wrong with a
  // block is its status. Nothing is written to a destination whose block ends other than Ok, save
  // that its content is then unspecified: use results only.
  // THREADS: any number may read at once.
  virtual ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                          Deadline deadline) = 0;

  // True when every block of the ticket is decided.
  static bool poll(ReadTicket& ticket) { return ticket.batch_->poll(); }

  // Waits until every block is decided; what is pending at the deadline becomes Lost.
  // The results belong to the ticket. ENSURES no Pending among them.
  static std::span<const BlockResult> wait(ReadTicket& ticket) {
    ticket.batch_->wait();
    return ticket.batch_->results();
  }

  // What is still pending becomes Lost at once.
  static void cancel(ReadTicket& ticket) { ticket.batch_->cancel(); }
};

// Results of a batch: how many are not Ok, and the first of them.
struct ReadSummary {
  size_t failed = 0;
  size_t first = 0;  // index of the first that is not Ok; only when failed > 0
};
ReadSummary summarize(std::span<const BlockResult> results);

}  // namespace certkv
