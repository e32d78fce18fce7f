// A rank's side of the node store: attaches, maps the arena, reserves space, seals blocks.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/deadline.h"
#include "kvstore/block.h"
#include "kvstore/reader.h"

namespace certkv {

struct StoreClientOptions {
  std::string socket;  // "@name" (abstract) or a path, as the store printed it
  int rank = 0;        // for messages and status only
  // Longest silence of the store, and longest wait for an answer to a request.
  std::chrono::milliseconds deadline{5000};
  std::chrono::milliseconds heartbeat{250};
};

// Space of one owner: blocks [first_block, first_block + blocks) of every (layer, KV head) given.
struct ReserveRequest {
  OwnerId owner;
  BlockShape shape;
  uint32_t first_layer = 0, layers = 1;
  uint32_t first_kv_head = 0, kv_heads = 1;  // global indices
  uint32_t first_block = 0, blocks = 1;

  uint64_t runs() const { return uint64_t(layers) * kv_heads; }
};

struct StoreCapacity {
  uint64_t total_bytes = 0;
  uint64_t free_bytes = 0;     // may be fragmented by less than a granule (4 KiB) per reservation
  uint64_t largest_bytes = 0;  // largest contiguous piece
};

// Bytes that a reservation takes from the arena; saturates at the largest uint64.
uint64_t reservation_bytes(const ReserveRequest& request);

OwnerId private_owner();  // random, never nobody

// A reservation as its node's store lists it. The offsets were checked against the arena.
struct ListedReservation {
  ReserveRequest request;
  uint32_t version = 0;
  uint64_t fence = 0;            // session that made it: what its blocks' headers carry
  bool orphan = false;           // nobody holds it: it may be gone the next moment
  std::vector<std::byte*> runs;  // [layers, kv_heads], first slot of each, in this mapping
};

class StoreClient;
struct StoreClientState;

// A cheap, shared handle of reserved space. Copies share it (forks of one prompt hold the same
// prefix); the last one to go frees it. A moved-from or default handle is empty.
// THREADS: copying and dropping are safe anywhere; different blocks may be sealed by different
// threads; one block is sealed by one.
class OriginalsSpan {
 public:
  OriginalsSpan() = default;
  bool empty() const { return state_ == nullptr; }
  const ReserveRequest& request() const;  // REQUIRES !empty(), as all below
  bool contains(uint32_t layer, uint32_t kv_head, uint32_t block) const;

  // Identity of a block inside the span; InvalidArgument when it is not.
  BlockId id(uint32_t layer, uint32_t kv_head, uint32_t block) const;

  // Copies rows [tokens, head_dim] of k and v into the block, zeroes the rest, writes digests and
  // header, publishes. Throws InvalidArgument when the block lies outside, is sealed already or the
  // token count is not in 1 .. block_tokens; StoreLost when the store is known to be gone. While
  // the copies on other nodes lag by more than the server's limit it waits for them, and throws
  // DeadlineExceeded where that takes longer than StoreClientOptions::deadline.
  void seal_block(uint32_t layer, uint32_t kv_head, uint32_t block, const uint16_t* k,
                  const uint16_t* v, uint16_t tokens);
  void seal_block(uint32_t layer, uint32_t kv_head, uint32_t block, const uint16_t* k,
                  const uint16_t* v) {
    seal_block(layer, kv_head, block, k, v, request().shape.block_tokens);
  }

  // Without a copy: write the rows where they will stay, then seal them. The memory is zero at
  // first. REQUIRES that nobody else writes this block.
  struct Rows {
    uint16_t* k;
    uint16_t* v;
  };
  Rows rows(uint32_t layer, uint32_t kv_head, uint32_t block);
  void seal_in_place(uint32_t layer, uint32_t kv_head, uint32_t block, uint16_t tokens);

  bool sealed(uint32_t layer, uint32_t kv_head, uint32_t block) const;
  // Where a (layer, KV head)'s slots lie in the mapped arena, one after the other (FORMAT.md): for
  // readers that check identity and digest themselves, as a device does.
  const std::byte* run(uint32_t layer, uint32_t kv_head) const;
  // True where all blocks are sealed. What they hold is checked when it is read.
  bool sealed_throughout() const;
  // An adopted span is read only: sealing in it throws InvalidArgument.
  bool adopted() const;
  uint32_t version() const;  // of the reservation
  // The store keeps the space when all its holders have given it back, until somebody needs the
  // room: for whoever asks for this owner later. Of no effect for private owners.
  void keep();
  void reset() { state_.reset(); }  // drops this handle's share

 private:
  friend class StoreClient;
  struct State;
  std::shared_ptr<State> state_;
};

class StoreClient {
 public:
  // Connects, checks that the peer runs under this user, maps the arena and starts the watcher
  // thread. Retries a refused connection until the deadline. Throws StoreLost, DeadlineExceeded,
  // InvalidArgument (malformed socket name) or CommError (the peer is not a store of this format).
  static std::shared_ptr<StoreClient> attach(const StoreClientOptions& options, Deadline deadline);
  // Detaches in good order: private space of this rank is freed at once. Spans that are still about
  // become useless, as after detach().
  ~StoreClient();
  StoreClient(const StoreClient&) = delete;
  StoreClient& operator=(const StoreClient&) = delete;

  // Throws OutOfMemory (says how much was asked, how much is free, and names store.arena),
  // InvalidArgument (shape, range, or an overlap with a live span of the same owner), StoreLost,
  // DeadlineExceeded.
  OriginalsSpan reserve(const ReserveRequest& request);

  // A share of what another session, living or dead, or this one has reserved under an owner that
  // can be asked for: the newest reservation that covers the request and, where older_than is not
  // 0, whose version is below it. Its sealed blocks can be read, and stay while the span lives;
  // which are sealed is the caller's to ask. Empty where there is none: a miss.
  //
  // Writing never changes hands. Every process of this user has the arena mapped writable, so no
  // token in a header would keep a writer that was taken for dead from writing where its successor
  // writes. What an orphan lacks is reserved anew, elsewhere, as another version.
  // Throws InvalidArgument (shape, range, private owner), StoreLost, DeadlineExceeded.
  OriginalsSpan adopt(const ReserveRequest& request, uint32_t older_than = 0);

  // All reservations of the store, of every session, those made while it is asked for perhaps.
  // Throws StoreLost, DeadlineExceeded, CommError (an answer of the wrong form).
  std::vector<ListedReservation> list();

  // How far the copies on other nodes are behind, and from where on sealing waits for them. Written
  // by the node's server, into the arena's header.
  struct ReplicationLag {
    uint64_t lag_bytes = 0, limit_bytes = 0;
  };
  ReplicationLag replication() const;
  void set_replication(ReplicationLag lag);

  // What the node's server last reported of the other nodes (JSON, at most 4096 bytes); empty where
  // nothing was. report() is the server's: it replaces the text.
  std::string peers();
  void report(const std::string& text);

  StoreCapacity capacity();
  std::string status_json();  // the store's own account of itself

  // Set within a second of the store's death, or after `deadline` of silence. Never unset.
  bool lost() const;
  std::string lost_reason() const;  // empty while not lost
  void throw_if_lost() const;       // StoreLost with the reason

  // Sign of life of the working thread, at least once per tile: it is passed on with the heartbeat.
  void stamp_progress();

  // Reads what this client's spans hold, straight from the mapped arena. Lives as long as needed.
  std::shared_ptr<BlockReader> reader();

  // The mapping from the first extent on: to make it known to a device.
  std::span<const std::byte> arena() const;
  uint64_t boot_nonce() const;
  uint64_t session() const;  // fencing token
  int64_t store_pid() const;

  // Ends the session now: spans become useless (sealing throws, reading gives Lost). Idempotent.
  void detach() noexcept;

 private:
  friend class OriginalsSpan;
  explicit StoreClient(std::shared_ptr<StoreClientState> state);
  OriginalsSpan span_of(const ReserveRequest& request, uint32_t version, uint64_t run_bytes,
                        uint32_t runs, std::span<const std::byte> offsets, uint64_t fence,
                        bool adopted);
  std::shared_ptr<StoreClientState> state_;
};

}  // namespace certkv
