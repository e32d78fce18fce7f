#include "kvstore/fallback_reader.h"

#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/digest.h"
#include "kvstore/reader_batch.h"

namespace certkv {
namespace {

int severity(BlockStatus status) {
  switch (status) {
    case BlockStatus::Corrupt:
      return 3;
    case BlockStatus::Lost:
      return 2;
    case BlockStatus::Absent:
      return 1;
    default:
      return 0;
  }
}

struct Kept {
  BlockPart part = BlockPart::Both;
  std::vector<uint16_t> k, v;
  BlockResult result;
};

}  // namespace

struct FallbackReader::Shared {
  std::vector<std::shared_ptr<BlockReader>> readers;
  BlockShape shape;
  FallbackOptions options;
  std::mutex mutex;  // guards everything below
  std::map<BlockId, std::unique_ptr<Kept>> kept;
  std::vector<std::unique_ptr<Kept>> replaced;  // views of these may still be about
  size_t kept_bytes = 0;
  bool said_full = false;
  FallbackCounts counts;

  // A block that was rescued before, verified again where it lies.
  bool show_kept(const BlockId& id, BlockPart part, BlockResult& result) {
    const std::lock_guard lock(mutex);
    const auto it = kept.find(id);
    if (it == kept.end()) return false;
    const Kept& k = *it->second;
    const size_t bytes = shape.payload_bytes();
    if ((wants_k(part) &&
         (!wants_k(k.part) || payload_digest(k.k.data(), bytes) != k.result.k_digest)) ||
        (wants_v(part) &&
         (!wants_v(k.part) || payload_digest(k.v.data(), bytes) != k.result.v_digest))) {
      return false;
    }
    result = k.result;
    result.k = wants_k(part) ? k.k.data() : nullptr;
    result.v = wants_v(part) ? k.v.data() : nullptr;
    return true;
  }

  // Room for a copy that stays; null where the limit is met.
  std::unique_ptr<Kept> make_kept(BlockPart part) {
    const size_t parts = size_t(wants_k(part)) + size_t(wants_v(part));
    const size_t bytes = parts * shape.payload_bytes();
    {
      const std::lock_guard lock(mutex);
      if (kept_bytes + bytes > options.kept_bytes) {
        if (!std::exchange(said_full, true)) {
          log_error(
              "{} bytes of originals were fetched from other nodes and are kept: no more are "
              "fetched for views",
              kept_bytes);
        }
        return nullptr;
      }
      kept_bytes += bytes;
    }
    auto k = std::make_unique<Kept>();
    k->part = part;
    if (wants_k(part)) k->k.resize(shape.elements());
    if (wants_v(part)) k->v.resize(shape.elements());
    return k;
  }
  void drop_kept(BlockPart part) {
    const std::lock_guard lock(mutex);
    kept_bytes -= (size_t(wants_k(part)) + size_t(wants_v(part))) * shape.payload_bytes();
  }
};

class FallbackReader::Batch : public ReadBatch {
 public:
  Batch(std::shared_ptr<Shared> shared, std::span<const BlockId> ids,
        std::span<const Destination> destinations, Deadline deadline)
      : shared_(std::move(shared)),
        ids_(ids),
        destinations_(destinations),
        deadline_(deadline),
        results_(ids.size()) {
    ticket_ = shared_->readers[0]->read(ids_, destinations_, share());
    if (BlockReader::poll(ticket_)) advance();
  }

  ~Batch() override {
    ticket_ = {};  // nothing is written to the room any more
    drop_room();
  }

  bool poll() override {
    while (!done_ && BlockReader::poll(ticket_)) advance();
    return done_;
  }
  void wait() override {
    while (!done_) {
      BlockReader::wait(ticket_);
      advance();
    }
  }
  void cancel() override {
    if (done_) return;
    BlockReader::cancel(ticket_);
    cancelled_ = true;
    wait();
  }
  std::span<const BlockResult> results() const override { return results_; }

 private:
  // The part of the deadline that the reader whose turn it is may take.
  Deadline share() const {
    const auto left = shared_->readers.size() - turn_;
    const auto at = deadline_.at();
    if (at == Deadline::Clock::time_point::max() || left <= 1) return deadline_;
    const auto now = Deadline::Clock::now();
    return at <= now ? deadline_ : Deadline::at(now + (at - now) / int64_t(left));
  }

  void drop_room() {
    for (auto& k : room_) {
      if (k != nullptr) shared_->drop_kept(k->part);
    }
    room_.clear();
  }

  size_t index(size_t i) const { return turn_ == 0 ? i : wanted_[i]; }

  void advance() {
    const auto got = BlockReader::wait(ticket_);
    std::vector<size_t> failed;
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t at = index(i);
      BlockResult& result = results_[at];
      if (got[i].status == BlockStatus::Ok) {
        result = got[i];
        if (turn_ > 0) {
          ++rescued_;
          keep(at, i, result);
        }
        continue;
      }
      if (severity(got[i].status) > severity(result.status)) result.status = got[i].status;
      failed.push_back(at);
    }
    if (turn_ == 0) first_ = got.size() - failed.size();
    ticket_ = {};
    drop_room();
    for (++turn_; !failed.empty() && !cancelled_ && turn_ < shared_->readers.size(); ++turn_) {
      if (ask(failed)) return;
    }
    finish();
  }

  // Asks the reader whose turn it is for what failed so far; false where nothing is to be asked.
  bool ask(std::vector<size_t>& failed) {
    wanted_.clear();
    some_ids_.clear();
    some_destinations_.clear();
    std::vector<size_t> unasked;
    for (const size_t at : failed) {
      Destination d = destinations_[at];
      std::unique_ptr<Kept> room;
      if (d.view) {
        BlockResult shown;
        if (shared_->show_kept(ids_[at], d.part, shown)) {
          results_[at] = shown;
          ++rescued_;
          continue;
        }
        room = shared_->make_kept(d.part);
        if (room == nullptr) {
          unasked.push_back(at);
          continue;
        }
        d = {d.part, false, room->k.data(), room->v.data()};
      }
      wanted_.push_back(at);
      some_ids_.push_back(ids_[at]);
      some_destinations_.push_back(d);
      room_.push_back(std::move(room));
    }
    if (wanted_.empty()) {
      failed = std::move(unasked);
      return false;
    }
    ticket_ = shared_->readers[turn_]->read(some_ids_, some_destinations_, share());
    return true;
  }

  // What was fetched for a view stays with the reader.
  void keep(size_t at, size_t i, BlockResult& result) {
    if (room_[i] == nullptr) return;
    room_[i]->result = result;
    const std::lock_guard lock(shared_->mutex);
    auto& place = shared_->kept[ids_[at]];
    if (place != nullptr) shared_->replaced.push_back(std::move(place));
    place = std::move(room_[i]);
  }

  void finish() {
    done_ = true;
    size_t failed = 0;
    for (const BlockResult& r : results_) failed += r.status != BlockStatus::Ok;
    const std::lock_guard lock(shared_->mutex);
    shared_->counts.blocks += results_.size();
    shared_->counts.first += first_;
    shared_->counts.rescued += rescued_;
    shared_->counts.failed += failed;
  }

  const std::shared_ptr<Shared> shared_;
  const std::span<const BlockId> ids_;
  const std::span<const Destination> destinations_;
  const Deadline deadline_;
  std::vector<BlockResult> results_;
  size_t turn_ = 0;
  ReadTicket ticket_;
  std::vector<size_t> wanted_;  // of a later turn: indices into ids_
  std::vector<BlockId> some_ids_;
  std::vector<Destination> some_destinations_;
  std::vector<std::unique_ptr<Kept>> room_;
  size_t first_ = 0, rescued_ = 0;
  bool done_ = false, cancelled_ = false;
};

FallbackReader::FallbackReader(std::vector<std::shared_ptr<BlockReader>> readers, BlockShape shape,
                               FallbackOptions options)
    : shared_(std::make_shared<Shared>()) {
  CERTKV_EXPECT(!readers.empty() && shape.valid(), InvalidArgument,
                "falling back over {} readers of blocks of {} tokens", readers.size(),
                shape.block_tokens);
  shared_->readers = std::move(readers);
  shared_->shape = shape;
  shared_->options = options;
}

ReadTicket FallbackReader::read(std::span<const BlockId> ids,
                                std::span<const Destination> destinations, Deadline deadline) {
  return ReadTicket(std::make_unique<Batch>(shared_, ids, destinations, deadline));
}

FallbackCounts FallbackReader::counts() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->counts;
}

}  // namespace certkv
