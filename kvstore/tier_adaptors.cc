#include "kvstore/tier_adaptors.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/digest.h"
#include "kvstore/reader_batch.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;

enum class Fault : uint8_t { None, Absent, Lost, Corrupt };

struct Planned {
  Fault fault = Fault::None;
  uint64_t bit = 0;  // drawn for every corrupt block; taken modulo the bits fetched
};

void check_share(double x, const char* name) {
  CERTKV_EXPECT(x >= 0 && x <= 1, InvalidArgument, "share of {} blocks is {}: 0 .. 1", name, x);
}

// Flips one bit of the parts fetched and verifies them as after a transfer.
class Damage {
 public:
  explicit Damage(BlockShape shape) : shape_(shape) {}

  void apply(const Destination& destination, uint64_t bit, BlockResult& result) {
    if (result.status != BlockStatus::Ok) return;
    const bool k = result.k != nullptr, v = result.v != nullptr;
    const size_t part_bits = shape_.payload_bytes() * 8;
    bit %= part_bits * (size_t(k) + size_t(v));
    const bool in_k = k && bit < part_bits;
    const uint16_t*& shown = in_k ? result.k : result.v;
    uint16_t* own = in_k ? destination.k : destination.v;
    if (own == nullptr || shown != own) own = private_copy(shown);
    shown = own;
    const size_t at = bit % part_bits;
    own[at / 16] = uint16_t(own[at / 16] ^ (1U << (at % 16)));
    const uint64_t sealed = in_k ? result.k_digest : result.v_digest;
    if (payload_digest(own, shape_.payload_bytes()) == sealed) return;
    result = BlockResult{};
    result.status = BlockStatus::Corrupt;
  }

 private:
  uint16_t* private_copy(const uint16_t* from) {
    copies_.emplace_back(from, from + shape_.elements());
    return copies_.back().data();
  }
  BlockShape shape_;
  std::deque<std::vector<uint16_t>> copies_;
};

class FaultyBatch : public ReadBatch {
 public:
  FaultyBatch(BlockReader& inner, std::span<const BlockId> ids,
              std::span<const Destination> destinations, Deadline deadline, BlockShape shape,
              std::vector<Planned> plan, Clock::time_point ready)
      : ids_(ids),
        destinations_(destinations),
        inner_(inner),
        deadline_(deadline),
        plan_(std::move(plan)),
        ready_(ready),
        damage_(shape),
        results_(ids.size()) {}

  bool poll() override {
    if (done_) return true;
    if (Clock::now() >= ready_ && ready_ < deadline_.at()) {
      if (!ticket_.valid()) ticket_ = inner_.read(ids_, destinations_, deadline_);
      if (BlockReader::poll(ticket_)) finish();
    } else if (deadline_.passed()) {
      cancel();
    }
    return done_;
  }
  void wait() override {
    if (done_) return;
    std::this_thread::sleep_until(std::min(ready_, deadline_.at()));
    if (ready_ >= deadline_.at()) return cancel();
    if (!ticket_.valid()) ticket_ = inner_.read(ids_, destinations_, deadline_);
    finish();
  }
  void cancel() override {
    if (done_) return;
    done_ = true;
    if (ticket_.valid()) BlockReader::cancel(ticket_);
    for (BlockResult& r : results_) r.status = BlockStatus::Lost;
  }
  std::span<const BlockResult> results() const override { return results_; }

 private:
  void finish() {
    const auto got = BlockReader::wait(ticket_);
    std::copy(got.begin(), got.end(), results_.begin());
    for (size_t i = 0; i < plan_.size(); ++i) {
      BlockResult& r = results_[i];
      if (plan_[i].fault == Fault::Corrupt) damage_.apply(destinations_[i], plan_[i].bit, r);
      if (plan_[i].fault != Fault::Absent && plan_[i].fault != Fault::Lost) continue;
      r = BlockResult{};
      r.status = plan_[i].fault == Fault::Absent ? BlockStatus::Absent : BlockStatus::Lost;
    }
    done_ = true;
  }

  std::span<const BlockId> ids_;
  std::span<const Destination> destinations_;
  BlockReader& inner_;
  Deadline deadline_;
  std::vector<Planned> plan_;
  Clock::time_point ready_;
  Damage damage_;
  std::vector<BlockResult> results_;
  ReadTicket ticket_;
  bool done_ = false;
};

}  // namespace

FaultInjectingReader::FaultInjectingReader(std::shared_ptr<BlockReader> inner, BlockShape shape,
                                           const ReaderFaults& faults)
    : inner_(std::move(inner)), shape_(shape), random_(faults.seed) {
  set(faults);
}

void FaultInjectingReader::set(const ReaderFaults& faults) {
  check_share(faults.absent, "absent");
  check_share(faults.lost, "lost");
  check_share(faults.corrupt, "corrupt");
  check_share(faults.delayed, "delayed");
  const std::lock_guard lock(mutex_);
  faults_ = faults;
}

ReadTicket FaultInjectingReader::read(std::span<const BlockId> ids,
                                      std::span<const Destination> destinations,
                                      Deadline deadline) {
  check_destinations(ids, destinations, /*shows_views=*/true);
  std::vector<Planned> plan(ids.size());
  auto ready = Clock::now();
  {
    const std::lock_guard lock(mutex_);
    const auto share = [&] { return double(random_() >> 11) * 0x1p-53; };
    for (Planned& p : plan) {
      double x = share();
      p.bit = random_();
      const auto meets = [&](double s) {
        const bool yes = x >= 0 && x < s;
        x -= s;
        return yes;
      };
      p.fault = meets(faults_.absent)    ? Fault::Absent
                : meets(faults_.lost)    ? Fault::Lost
                : meets(faults_.corrupt) ? Fault::Corrupt
                                         : Fault::None;
      if (p.fault != Fault::None) injected_.fetch_add(1, std::memory_order_relaxed);
    }
    if (share() < faults_.delayed) ready += faults_.delay;
  }
  return ReadTicket(std::make_unique<FaultyBatch>(*inner_, ids, destinations, deadline, shape_,
                                                  std::move(plan), ready));
}

// ---- statistics ---------------------------------------------------------------------------------

class StatisticsReader::Batch : public ReadBatch {
 public:
  Batch(ReadTicket inner, std::vector<uint8_t> parts, size_t payload_bytes, Clock::time_point start,
        std::shared_ptr<Totals> totals)
      : inner_(std::move(inner)),
        parts_(std::move(parts)),
        payload_bytes_(payload_bytes),
        start_(start),
        totals_(std::move(totals)) {}
  ~Batch() override {
    BlockReader::cancel(inner_);
    count();
  }
  bool poll() override { return BlockReader::poll(inner_); }
  void wait() override {
    BlockReader::wait(inner_);
    count();
  }
  void cancel() override { BlockReader::cancel(inner_); }
  std::span<const BlockResult> results() const override {
    // Decided by now, so this only hands them on.
    return BlockReader::wait(inner_);
  }

 private:
  static constexpr uint8_t kView = 4;
  void count() {
    if (std::exchange(counted_, true)) return;
    const auto results = BlockReader::wait(inner_);
    const auto spent = Clock::now() - start_;
    const std::lock_guard lock(totals_->mutex);
    ReaderStatistics& s = totals_->sum;
    ++s.batches;
    s.blocks += results.size();
    s.microseconds +=
        uint64_t(std::chrono::duration_cast<std::chrono::microseconds>(spent).count());
    for (size_t i = 0; i < results.size(); ++i) {
      const BlockResult& r = results[i];
      s.ok += r.status == BlockStatus::Ok;
      s.absent += r.status == BlockStatus::Absent;
      s.corrupt += r.status == BlockStatus::Corrupt;
      s.lost += r.status == BlockStatus::Lost;
      const size_t bytes = payload_bytes_ * (size_t(r.k != nullptr) + size_t(r.v != nullptr));
      ((parts_[i] & kView) != 0 ? s.viewed_bytes : s.copied_bytes) += bytes;
    }
  }

  mutable ReadTicket inner_;
  std::vector<uint8_t> parts_;
  size_t payload_bytes_;
  Clock::time_point start_;
  std::shared_ptr<Totals> totals_;
  bool counted_ = false;
};

ReadTicket StatisticsReader::read(std::span<const BlockId> ids,
                                  std::span<const Destination> destinations, Deadline deadline) {
  const auto start = Clock::now();
  std::vector<uint8_t> parts;
  parts.reserve(destinations.size());
  for (const Destination& d : destinations) {
    parts.push_back(uint8_t(uint8_t(d.part) | (d.view ? 4 : 0)));
  }
  return ReadTicket(std::make_unique<Batch>(inner_->read(ids, destinations, deadline),
                                            std::move(parts), shape_.payload_bytes(), start,
                                            totals_));
}

ReaderStatistics StatisticsReader::statistics() const {
  const std::lock_guard lock(totals_->mutex);
  return totals_->sum;
}

}  // namespace certkv
