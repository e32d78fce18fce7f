#include "kvstore/server/replicator.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/digest.h"

namespace certkv {
namespace {

using Clock = Deadline::Clock;
using std::chrono::milliseconds;

constexpr milliseconds kAgain{50};  // after a peer was busy or refused

WireRun run_of(const SpanRecord& r, uint32_t layer, uint32_t kv_head) {
  return {r.boot_nonce, r.request.owner, layer, kv_head, r.request.first_block, r.version};
}

}  // namespace

Replicator::Replicator(std::shared_ptr<StoreClient> client,
                       std::shared_ptr<BlockDirectory> directory,
                       std::shared_ptr<Transport> transport, ReplicaPlacement placement,
                       ReplicatorOptions options)
    : client_(std::move(client)),
      directory_(std::move(directory)),
      transport_(std::move(transport)),
      placement_(std::move(placement)),
      options_(options) {
  CERTKV_EXPECT(options.replicas >= 1 && options.replicas <= 3 && options.messages >= 1 &&
                    options.look.count() > 0,
                InvalidArgument, "{} copies of every block were asked for: 1 .. 3 can be kept",
                options.replicas);
  thread_ = std::thread([this] { work(); });
}

Replicator::~Replicator() {
  stop_ = true;
  thread_.join();
  client_->set_replication({});
}

void Replicator::work() {
  while (!stop_) {
    try {
      if (step()) continue;
    } catch (const Error& e) {
      // The holder is gone: the server ends for that reason elsewhere. Anything else may pass.
      log_debug("copying: {}", e.what());
    }
    std::this_thread::sleep_for(options_.look);
  }
}

bool Replicator::step() {
  if (Clock::now() >= next_list_) look_at_list();
  for (auto& [key, run] : runs_) follow(key, run);
  bool moved = false;
  for (auto& [address, peer] : peers_) {
    moved = take_answers(address, peer) || moved;
    moved = send(address, peer) || moved;
  }
  publish();
  return moved;
}

Replicator::Peer& Replicator::peer(const std::string& address) {
  Peer& p = peers_[address];
  if (p.way == nullptr) p.way = std::make_shared<RemotePeer>(transport_, address);
  return p;
}

void Replicator::look_at_list() {
  next_list_ = Clock::now() + options_.list;
  for (auto& [key, run] : runs_) run.listed = false;
  for (const auto& held : directory_->refresh()) {
    if (held.replica || held.record->boot_nonce != client_->boot_nonce()) continue;
    const ReserveRequest& q = held.record->request;
    for (uint32_t l = q.first_layer; l < q.first_layer + q.layers; ++l) {
      for (uint32_t h = q.first_kv_head; h < q.first_kv_head + q.kv_heads; ++h) {
        Run& run = runs_[run_of(*held.record, l, h)];
        run.listed = true;
        run.record = held.record;
        run.targets = placement_(q.owner, l, h);
        if (run.targets.size() > options_.replicas - 1) run.targets.resize(options_.replicas - 1);
        for (const auto& t : run.targets) {
          peer(t);
          run.copies[t];
        }
      }
    }
  }
  std::erase_if(runs_, [&](const auto& entry) {
    const auto& [key, run] = entry;
    if (run.listed) return false;
    for (const auto& [address, copy] : run.copies) {
      if (copy.verified == 0 && copy.known) continue;
      peers_.at(address).forgotten.push_back(head_of(key, run));
    }
    return true;
  });
}

ReplicateRequest Replicator::head_of(const WireRun& key, const Run& run) const {
  const ReserveRequest& q = run.record->request;
  ReplicateRequest r;
  r.run = key;
  r.blocks = q.blocks;
  r.dtype = uint16_t(q.shape.dtype);
  r.block_tokens = q.shape.block_tokens;
  r.head_dim = q.shape.head_dim;
  return r;
}

// Moves the cursor over what is sealed and sound.
bool Replicator::follow(const WireRun& key, Run& run) {
  const SpanRecord& r = *run.record;
  const uint32_t before = run.sealed;
  BlockHeader header;
  while (!run.damaged && run.sealed < r.request.blocks) {
    const uint32_t block = key.first_block + run.sealed;
    const std::byte* slot = r.slot(key.layer, key.kv_head, block);
    const BlockStatus status = check_header(r, r.id(key.layer, key.kv_head, block), slot, header);
    if (status == BlockStatus::Absent) break;  // not yet, or the space was freed
    if (status == BlockStatus::Corrupt) {
      run.damaged = true;
      log_error(
          "layer {} KV head {} block {}: damaged before it was copied; its run is not copied "
          "further",
          key.layer, key.kv_head, block);
      break;
    }
    ++run.sealed;
  }
  return run.sealed != before;
}

bool Replicator::take_answers(const std::string& address, Peer& peer) {
  bool moved = false, lost = false;
  for (Message& m : peer.messages) {
    const CallStatus status = m.call.poll();
    if (status == CallStatus::Pending) continue;
    moved = true;
    lost = lost || status == CallStatus::PeerLost;
    take_answer(address, peer, m, status);
    m.call = {};
  }
  std::erase_if(peer.messages, [](const Message& m) { return !m.call.valid(); });
  if (lost) {
    // It may come back with less than it had.
    peer.reached = false;
    for (auto& [key, run] : runs_) {
      if (const auto it = run.copies.find(address); it != run.copies.end()) {
        it->second.known = false;
        it->second.verified = 0;
      }
    }
  }
  return moved;
}

void Replicator::take_answer(const std::string& address, Peer& peer, Message& m,
                             CallStatus status) {
  if (m.forget) {
    if (status != CallStatus::Ok && status != CallStatus::Refused) {
      peer.forgotten.push_back(m.head);
    }
    return;
  }
  const auto it = runs_.find(m.head.run);
  if (it == runs_.end()) return;
  Run& run = it->second;
  Copy& copy = run.copies[address];
  copy.under_way = false;
  ReplicateReply reply;
  if (status == CallStatus::Ok && m.call.reply().size() == sizeof reply) {
    std::memcpy(&reply, m.call.reply().data(), sizeof reply);
    copy.known = true;
    copy.refused = false;
    copy.verified = std::min(reply.verified, run.sealed);  // never more than is here
    peer.way->succeeded();
    return;
  }
  copy.known = false;
  copy.not_before = Clock::now() + kAgain;
  if (status != CallStatus::Refused && status != CallStatus::Busy) return;
  if (!std::exchange(copy.refused, true)) {
    log_warning("the store at {} does not take a copy ({}): {}", address, call_status_name(status),
                m.call.why());
  }
  if (status == CallStatus::Refused) look_for_damage(run, m.head);
}

// A peer that refuses a block may have found what is wrong here.
void Replicator::look_for_damage(Run& run, const ReplicateRequest& sent) {
  const SpanRecord& r = *run.record;
  const BlockShape& shape = r.request.shape;
  for (uint32_t i = sent.first; i < sent.first + sent.count && i < run.sealed; ++i) {
    const uint32_t block = sent.run.first_block + i;
    const std::byte* slot = r.slot(sent.run.layer, sent.run.kv_head, block);
    BlockHeader h;
    if (check_header(r, sent.run.id(block), slot, h) == BlockStatus::Ok &&
        payload_digest(slot + shape.k_offset(), shape.payload_bytes()) == h.k_digest &&
        payload_digest(slot + shape.v_offset(), shape.payload_bytes()) == h.v_digest) {
      continue;
    }
    run.damaged = true;
    run.sealed = i;
    log_error("layer {} KV head {} block {}: damaged here; its run is not copied further",
              sent.run.layer, sent.run.kv_head, block);
    return;
  }
}

bool Replicator::send(const std::string& address, Peer& peer) {
  bool moved = false;
  std::optional<PeerId> connection;
  const auto connect = [&] {
    if (!connection) connection = peer.way->connection(Deadline::after(milliseconds(1000)));
    return peer.reached = connection.has_value();
  };
  const auto call = [&](ServerOp op, std::span<const std::span<const std::byte>> parts,
                        const ReplicateRequest& head) {
    try {
      peer.messages.push_back(
          {transport_->call(*connection, uint32_t(op), parts, sizeof(ReplicateReply) + 512,
                            Deadline::after(options_.answer)),
           head, op == ServerOp::Forget});
      return true;
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::OutOfMemory) throw;
      return false;  // windows come back
    }
  };
  while (!peer.forgotten.empty() && peer.messages.size() < options_.messages && connect()) {
    const ReplicateRequest head = peer.forgotten.back();
    const std::span<const std::byte> part = std::as_bytes(std::span(&head, 1));
    if (!call(ServerOp::Forget, {&part, 1}, head)) break;
    peer.forgotten.pop_back();
    moved = true;
  }
  const auto now = Clock::now();
  for (auto& [key, run] : runs_) {
    if (peer.messages.size() >= options_.messages) break;
    if (std::ranges::find(run.targets, address) == run.targets.end()) continue;
    Copy& copy = run.copies[address];
    if (run.sealed == 0 || copy.under_way || now < copy.not_before) continue;
    if (copy.known && copy.verified >= run.sealed) continue;
    if (!connect()) break;
    ReplicateRequest head = head_of(key, run);
    const size_t slot_bytes = run.record->request.shape.slot_bytes();
    if (copy.known) {
      head.first = copy.verified;
      head.count = uint32_t(std::min<uint64_t>(
          run.sealed - copy.verified, std::max<size_t>(options_.message_bytes / slot_bytes, 1)));
    }
    const std::span<const std::byte> parts[] = {
        std::as_bytes(std::span(&head, 1)),
        head.count == 0 ? std::span<const std::byte>()
                        : std::span<const std::byte>(run.record->slot(key.layer, key.kv_head,
                                                                      key.first_block + head.first),
                                                     head.count * slot_bytes)};
    if (!call(ServerOp::Replicate, parts, head)) break;
    copy.under_way = true;
    moved = true;
  }
  return moved;
}

void Replicator::publish() {
  ReplicationStatus s;
  for (const auto& [key, run] : runs_) {
    ++s.runs;
    s.sealed_blocks += run.sealed;
    s.damaged_runs += run.damaged;
    s.missing_copies += options_.replicas - 1 - run.targets.size();
    uint32_t everywhere = run.targets.size() + 1 < options_.replicas ? 0 : run.sealed;
    for (const auto& t : run.targets) {
      const Copy& copy = run.copies.at(t);
      const uint32_t verified = copy.verified;
      everywhere = std::min(everywhere, verified);
      if (copy.refused || !peers_.at(t).reached) {
        s.missing_copies += verified < run.sealed;
        continue;
      }
      s.lag_bytes += uint64_t(run.sealed - std::min(verified, run.sealed)) *
                     run.record->request.shape.slot_bytes();
    }
    s.copied_blocks += everywhere;
  }
  client_->set_replication({s.lag_bytes, options_.lag_limit_bytes});
  const std::lock_guard lock(mutex_);
  status_ = s;
}

ReplicationStatus Replicator::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

}  // namespace certkv
