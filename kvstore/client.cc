#include "kvstore/client.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kernels/digest.h"
#include "kvstore/arena.h"
#include "kvstore/arena_reader.h"
#include "kvstore/client_channel.h"
#include "kvstore/span_directory.h"

namespace certkv {

// Mapping and directory outlive the client for as long as a span or a reader needs them.
struct StoreClientState {
  StoreClientState(const StoreClientOptions& o, Deadline deadline)
      : patience(o.deadline),
        channel(o.socket, o.rank, o.deadline, o.heartbeat, deadline),
        arena(Arena::map(channel.take_arena_fd(), channel.attached().arena_bytes,
                         channel.attached().boot_nonce)) {}

  void throw_if_lost() const {
    CERTKV_EXPECT(!gone.load(std::memory_order_acquire), StoreLost,
                  "this rank has detached from its node's store");
    CERTKV_EXPECT(!channel.lost().load(std::memory_order_acquire), StoreLost, "{}",
                  channel.lost_reason());
  }

  // Holds up who seals faster than the node's server copies.
  void wait_for_copies() const {
    Arena::Replication r = arena.replication();
    if (r.lag_bytes <= r.limit_bytes || r.limit_bytes == 0) return;
    const Deadline deadline = Deadline::after(patience);
    while (r.limit_bytes != 0 && r.lag_bytes > r.limit_bytes) {
      throw_if_lost();
      CERTKV_EXPECT(
          !deadline.passed(), DeadlineExceeded,
          "copies of the originals on other nodes lag by {} bytes, and the limit of {} was "
          "not met again within {} ms: the peers or the network are too slow, or are gone",
          r.lag_bytes, r.limit_bytes, patience.count());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      r = arena.replication();
    }
  }

  const std::chrono::milliseconds patience;
  ClientChannel channel;
  Arena arena;
  SpanDirectory directory;
  std::atomic<bool> gone{false};
};

struct OriginalsSpan::State {
  std::shared_ptr<StoreClientState> client;
  SpanRecord record;
  std::atomic<bool> keep{false};

  ~State() {
    if (client == nullptr) return;
    client->directory.remove(&record);
    CERTKV_FAILPOINT(client_release);
    const ReleaseRequest release{record.version, keep ? 1u : 0u};
    client->channel.post(ControlOp::Release, payload_of(release));
  }

  std::byte* slot(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    const ReserveRequest& r = record.request;
    CERTKV_EXPECT(record.contains(layer, kv_head, block), InvalidArgument,
                  "block (layer {}, KV head {}, block {}) lies outside the reservation of layers "
                  "{}+{}, KV heads {}+{}, blocks {}+{}",
                  layer, kv_head, block, r.first_layer, r.layers, r.first_kv_head, r.kv_heads,
                  r.first_block, r.blocks);
    return record.slot(layer, kv_head, block);
  }
  std::byte* unsealed_slot(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    client->throw_if_lost();
    std::byte* s = slot(layer, kv_head, block);
    CERTKV_EXPECT(!record.adopted, InvalidArgument,
                  "block (layer {}, KV head {}, block {}) was adopted: only the session that "
                  "reserved it may write it",
                  layer, kv_head, block);
    CERTKV_EXPECT(load_seal(s) == 0, InvalidArgument,
                  "block (layer {}, KV head {}, block {}) is sealed already and never changes",
                  layer, kv_head, block);
    return s;
  }
  void expect_tokens(uint16_t tokens) const {
    CERTKV_EXPECT(tokens >= 1 && tokens <= record.request.shape.block_tokens, InvalidArgument,
                  "{} tokens in a block of {}", tokens, record.request.shape.block_tokens);
  }
  void publish(std::byte* slot_bytes, const BlockId& id, uint16_t tokens, uint64_t k_digest,
               uint64_t v_digest) const;
};

void OriginalsSpan::State::publish(std::byte* slot_bytes, const BlockId& id, uint16_t tokens,
                                   uint64_t k_digest, uint64_t v_digest) const {
  const BlockShape& shape = record.request.shape;
  BlockHeader header;
  header.magic = kBlockMagic;
  header.format = kFormatVersion;
  header.header_bytes = uint16_t(kBlockHeaderBytes);
  header.id = id;
  header.fence = record.fence;
  header.dtype = uint8_t(shape.dtype);
  header.tokens = tokens;
  header.block_tokens = shape.block_tokens;
  header.head_dim = shape.head_dim;
  header.k_digest = k_digest;
  header.v_digest = v_digest;
  std::memcpy(slot_bytes, &header, offsetof(BlockHeader, seal));
  CERTKV_FAILPOINT_BYTES(client_header, slot_bytes, offsetof(BlockHeader, seal));
  CERTKV_FAILPOINT(client_publish);
  // A store that took this rank for dead may have given the space away.
  client->throw_if_lost();
  publish_seal(slot_bytes, block_seal(header));
}

const ReserveRequest& OriginalsSpan::request() const {
  return state_->record.request;
}

bool OriginalsSpan::contains(uint32_t layer, uint32_t kv_head, uint32_t block) const {
  return state_->record.contains(layer, kv_head, block);
}

BlockId OriginalsSpan::id(uint32_t layer, uint32_t kv_head, uint32_t block) const {
  state_->slot(layer, kv_head, block);
  return state_->record.id(layer, kv_head, block);
}

void OriginalsSpan::seal_block(uint32_t layer, uint32_t kv_head, uint32_t block, const uint16_t* k,
                               const uint16_t* v, uint16_t tokens) {
  const BlockShape& shape = request().shape;
  state_->expect_tokens(tokens);
  state_->client->wait_for_copies();
  const std::shared_lock lock(state_->client->directory.mutex());  // detaching waits for us
  CERTKV_FAILPOINT(client_seal);
  std::byte* slot = state_->unsealed_slot(layer, kv_head, block);
  const size_t bytes = shape.payload_bytes(), used = size_t(tokens) * shape.head_dim * 2;
  const auto put = [&](std::byte* to, const uint16_t* from) {
    std::memcpy(to, from, used);
    std::memset(to + used, 0, bytes - used);
    // Of the source where that is possible, so that a flip on the way is noticed later.
    return used == bytes ? payload_digest(from, bytes) : payload_digest(to, bytes);
  };
  const uint64_t k_digest = put(slot + shape.k_offset(), k);
  const uint64_t v_digest = put(slot + shape.v_offset(), v);
  CERTKV_FAILPOINT_BYTES(client_payload, slot + shape.k_offset(), bytes);
  state_->publish(slot, state_->record.id(layer, kv_head, block), tokens, k_digest, v_digest);
}

OriginalsSpan::Rows OriginalsSpan::rows(uint32_t layer, uint32_t kv_head, uint32_t block) {
  std::byte* slot = state_->unsealed_slot(layer, kv_head, block);
  const BlockShape& shape = request().shape;
  return {reinterpret_cast<uint16_t*>(slot + shape.k_offset()),
          reinterpret_cast<uint16_t*>(slot + shape.v_offset())};
}

void OriginalsSpan::seal_in_place(uint32_t layer, uint32_t kv_head, uint32_t block,
                                  uint16_t tokens) {
  const BlockShape& shape = request().shape;
  state_->expect_tokens(tokens);
  state_->client->wait_for_copies();
  const std::shared_lock lock(state_->client->directory.mutex());  // detaching waits for us
  std::byte* slot = state_->unsealed_slot(layer, kv_head, block);
  const size_t bytes = shape.payload_bytes(), used = size_t(tokens) * shape.head_dim * 2;
  const auto digest = [&](std::byte* rows) {
    std::memset(rows + used, 0, bytes - used);
    return payload_digest(rows, bytes);
  };
  const uint64_t k_digest = digest(slot + shape.k_offset());
  const uint64_t v_digest = digest(slot + shape.v_offset());
  state_->publish(slot, state_->record.id(layer, kv_head, block), tokens, k_digest, v_digest);
}

bool OriginalsSpan::sealed(uint32_t layer, uint32_t kv_head, uint32_t block) const {
  return load_seal(state_->slot(layer, kv_head, block)) != 0;
}

bool OriginalsSpan::sealed_throughout() const {
  const ReserveRequest& r = request();
  const size_t slot = r.shape.slot_bytes();
  for (const std::byte* run : state_->record.runs)
    for (uint32_t b = 0; b < r.blocks; ++b)
      if (load_seal(run + b * slot) == 0) return false;
  return true;
}

bool OriginalsSpan::adopted() const {
  return state_->record.adopted;
}
uint32_t OriginalsSpan::version() const {
  return state_->record.version;
}
void OriginalsSpan::keep() {
  state_->keep = true;
}

const std::byte* OriginalsSpan::run(uint32_t layer, uint32_t kv_head) const {
  return state_->slot(layer, kv_head, state_->record.request.first_block);
}

uint64_t reservation_bytes(const ReserveRequest& request) {
  const uint64_t most = std::numeric_limits<uint64_t>::max();
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(request.runs(), uint64_t(request.blocks), &bytes) ||
      __builtin_mul_overflow(bytes, uint64_t(request.shape.slot_bytes()), &bytes) ||
      bytes > most - kArenaGranule) {
    return most;
  }
  return (bytes + kArenaGranule - 1) / kArenaGranule * kArenaGranule;
}

OwnerId private_owner() {
  OwnerId owner;
  do {
    owner = {random_u64() & ~(uint64_t(1) << 63), random_u64()};
  } while (owner.is_nobody());
  return owner;
}

StoreClient::StoreClient(std::shared_ptr<StoreClientState> state) : state_(std::move(state)) {}

std::shared_ptr<StoreClient> StoreClient::attach(const StoreClientOptions& options,
                                                 Deadline deadline) {
  return std::shared_ptr<StoreClient>(
      new StoreClient(std::make_shared<StoreClientState>(options, deadline)));
}

StoreClient::~StoreClient() {
  detach();
}

namespace {

// What is wrong with a request is found here, before it travels.
AllocateRequest wire_of(const ReserveRequest& r, const char* what) {
  const AllocateRequest wire{r.owner,
                             r.first_layer,
                             r.layers,
                             r.first_kv_head,
                             r.kv_heads,
                             r.first_block,
                             r.blocks,
                             uint16_t(r.shape.dtype),
                             r.shape.block_tokens,
                             r.shape.head_dim,
                             0};
  const std::string defect = allocation_defect(wire);
  CERTKV_EXPECT(defect.empty(), InvalidArgument, "{} originals: {}", what, defect);
  return wire;
}

// The fixed part of a reply that a list of offsets follows.
template <typename Head>
Head head_of(std::span<const std::byte> payload) {
  Head head;
  CERTKV_EXPECT(payload.size() >= sizeof head, CommError,
                "the store's answer about a reservation is too short");
  std::memcpy(&head, payload.data(), sizeof head);
  return head;
}

}  // namespace

OriginalsSpan StoreClient::span_of(const ReserveRequest& request, uint32_t version,
                                   uint64_t run_bytes, uint32_t runs,
                                   std::span<const std::byte> offsets, uint64_t fence,
                                   bool adopted) {
  // Whatever goes wrong from here on, the state's destructor gives the space back.
  auto span = std::make_shared<OriginalsSpan::State>();
  SpanRecord& record = span->record;
  record.request = request;
  record.boot_nonce = state_->channel.attached().boot_nonce;
  record.fence = fence;
  record.version = version;
  record.adopted = adopted;
  span->client = state_;
  CERTKV_FAILPOINT(client_reserve);
  CERTKV_EXPECT(runs == request.runs() &&
                    run_bytes == uint64_t(request.blocks) * request.shape.slot_bytes() &&
                    offsets.size() == runs * sizeof(uint64_t),
                CommError, "the store's answer about a reservation has the wrong form");
  record.runs.reserve(runs);
  for (size_t i = 0; i < runs; ++i) {
    uint64_t offset = 0;
    std::memcpy(&offset, offsets.data() + i * sizeof offset, sizeof offset);
    CERTKV_FAILPOINT_BYTES(client_offset, &offset, sizeof offset);
    record.runs.push_back(state_->arena.at(offset, run_bytes));
  }
  CERTKV_EXPECT(state_->directory.add(&record), InvalidArgument,
                "the owner has a live reservation that overlaps layers {}+{}, KV heads {}+{}, "
                "blocks {}+{}: share its handle, or use another owner",
                request.first_layer, request.layers, request.first_kv_head, request.kv_heads,
                request.first_block, request.blocks);
  OriginalsSpan handle;
  handle.state_ = std::move(span);
  return handle;
}

OriginalsSpan StoreClient::reserve(const ReserveRequest& request) {
  state_->throw_if_lost();
  const AllocateRequest wire = wire_of(request, "reserving space for");
  const auto reply = state_->channel.request(ControlOp::Allocate, payload_of(wire));
  CERTKV_EXPECT(reply.status != ControlStatus::NoSpace, OutOfMemory,
                "the node's store has no room for these originals: {}. Raise store.arena, or let "
                "fewer or shorter requests run at once",
                reply.text());
  CERTKV_EXPECT(reply.status == ControlStatus::Ok, InvalidArgument, "the store refused: {}",
                reply.text());
  const auto head = head_of<AllocateReply>(reply.payload);
  return span_of(request, head.version, head.run_bytes, head.runs,
                 std::span(reply.payload).subspan(sizeof head), state_->channel.attached().session,
                 false);
}

OriginalsSpan StoreClient::adopt(const ReserveRequest& request, uint32_t older_than) {
  state_->throw_if_lost();
  const AdoptRequest wire{wire_of(request, "adopting"), older_than, 0};
  const auto reply = state_->channel.request(ControlOp::Adopt, payload_of(wire));
  if (reply.status == ControlStatus::NotThere) return {};
  CERTKV_EXPECT(reply.status == ControlStatus::Ok, InvalidArgument, "the store refused: {}",
                reply.text());
  const auto head = head_of<AdoptReply>(reply.payload);
  return span_of(request, head.part.version, head.part.run_bytes, head.part.runs,
                 std::span(reply.payload).subspan(sizeof head), head.fence, true);
}

std::vector<ListedReservation> StoreClient::list() {
  const Arena& arena = state_->arena;
  std::vector<ListedReservation> all;
  ListRequest request;
  for (;;) {
    const auto reply = state_->channel.request(ControlOp::List, payload_of(request));
    std::span<const std::byte> rest = reply.payload;
    const auto take = [&](void* out, size_t n) {
      CERTKV_EXPECT(rest.size() >= n, CommError, "the store's list ends in the middle of an entry");
      std::memcpy(out, rest.data(), n);
      rest = rest.subspan(n);
    };
    CERTKV_EXPECT(reply.status == ControlStatus::Ok, CommError, "the store lists nothing: {}",
                  reply.text());
    ListReply head;
    take(&head, sizeof head);
    for (uint32_t i = 0; i < head.count; ++i) {
      ListEntry e;
      take(&e, sizeof e);
      const AllocateRequest& r = e.ranges;
      const std::string defect = allocation_defect(r);
      CERTKV_EXPECT(defect.empty() && e.version > request.after && e.orphan <= 1, CommError,
                    "the store lists reservation {} after {}: {}", e.version, request.after,
                    defect);
      request.after = e.version;
      ListedReservation& listed = all.emplace_back();
      listed.request = {r.owner,         shape_of(r), r.first_layer, r.layers,
                        r.first_kv_head, r.kv_heads,  r.first_block, r.blocks};
      listed.version = e.version;
      listed.fence = e.fence;
      listed.orphan = e.orphan != 0;
      CERTKV_EXPECT(rest.size() / sizeof(uint64_t) >= listed.request.runs(), CommError,
                    "the store's list ends in the middle of an entry");
      for (uint64_t run = 0; run < listed.request.runs(); ++run) {
        uint64_t offset = 0;
        take(&offset, sizeof offset);
        listed.runs.push_back(arena.at(offset, run_bytes(r)));
      }
    }
    CERTKV_EXPECT(rest.empty() && head.more <= (head.count > 0 ? 1u : 0u), CommError,
                  "the store's list has the wrong form");
    if (head.more == 0) return all;
  }
}

StoreClient::ReplicationLag StoreClient::replication() const {
  const Arena::Replication r = state_->arena.replication();
  return {r.lag_bytes, r.limit_bytes};
}

void StoreClient::set_replication(ReplicationLag lag) {
  state_->arena.set_replication({lag.lag_bytes, lag.limit_bytes});
}

std::string StoreClient::peers() {
  return state_->channel.request(ControlOp::Peers, {}).text();
}

void StoreClient::report(const std::string& text) {
  CERTKV_EXPECT(text.size() <= kMaxRequestPayload, InvalidArgument,
                "a report of {} bytes on peers: at most {} are kept", text.size(),
                kMaxRequestPayload);
  state_->channel.request(ControlOp::Report, text_payload(text));
}

StoreCapacity StoreClient::capacity() {
  const auto reply = state_->channel.request(ControlOp::Capacity, {});
  CapacityReply c;
  CERTKV_EXPECT(reply.status == ControlStatus::Ok && parse_payload(reply.payload, c), CommError,
                "the store's answer to a query of its capacity has the wrong form");
  return {c.total_bytes, c.free_bytes, c.largest_bytes};
}

std::string StoreClient::status_json() {
  return state_->channel.request(ControlOp::Status, {}).text();
}

bool StoreClient::lost() const {
  return state_->channel.lost().load(std::memory_order_acquire);
}
std::string StoreClient::lost_reason() const {
  return state_->channel.lost_reason();
}
void StoreClient::throw_if_lost() const {
  state_->throw_if_lost();
}
void StoreClient::stamp_progress() {
  state_->channel.stamp_progress();
}

std::shared_ptr<BlockReader> StoreClient::reader() {
  return std::make_shared<ArenaReader>(state_, state_->directory, state_->gone,
                                       state_->channel.lost());
}

std::span<const std::byte> StoreClient::arena() const {
  const Arena& arena = state_->arena;
  return {arena.at(kArenaDataOffset, arena.bytes() - kArenaDataOffset),
          size_t(arena.bytes() - kArenaDataOffset)};
}
uint64_t StoreClient::boot_nonce() const {
  return state_->channel.attached().boot_nonce;
}
uint64_t StoreClient::session() const {
  return state_->channel.attached().session;
}
int64_t StoreClient::store_pid() const {
  return int64_t(state_->channel.attached().store_pid);
}

void StoreClient::detach() noexcept {
  {
    // Once this lock was had, no read is under way, and none that begins later touches the arena.
    const std::unique_lock lock(state_->directory.mutex());
    if (state_->gone.exchange(true, std::memory_order_acq_rel)) return;
  }
  state_->channel.close();
}

}  // namespace certkv
