#include "tests/kvstore/cluster_sim_verdict.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <queue>

#include "parallel/verdict_reduce.h"
#include "tests/kvstore/cluster_sim_network.h"

namespace certkv::test {
namespace {

constexpr uint64_t kEndUs = 6'000'000;
constexpr uint64_t kDeadlineUs = 2'000'000;  // a rank that waits longer ends, by name
constexpr uint64_t kResendUs = 20'000;
constexpr unsigned kSteps = 40;

struct Frame {
  uint64_t rank = 0;
  uint64_t step = 0;  // epoch << 32 | step
  VerdictRecord record;
};
static_assert(std::has_unique_object_representations_v<Frame>);

// What the observer knows of a step: bounds and outcomes as plain numbers, by rank.
struct Truth {
  std::map<unsigned, std::pair<float, Outcome>> by_rank;
};

struct Rank {
  bool alive = true, paused = false, ended = false;
  uint64_t step = 0, since = 0;
  uint64_t seen = 0;  // ranks merged
  VerdictRecord own, merged;
  std::map<uint64_t, VerdictRecord> sent;  // own records of this epoch, to be repeated on request
};

class Job {
 public:
  Job(uint64_t seed, VerdictMutation m, const std::function<void(const std::string&)>& log)
      : random_(seed), network_(seed + 17), mutation_(m), log_(log) {
    ranks_.resize(2 + random_.below(4));
    network_.faults.loss = random_.between(0, 0.3);
    network_.faults.replay = random_.between(0, 0.5);
    network_.faults.corruption = random_.between(0, 0.1);
    network_.faults.late = random_.between(0, 0.3);
  }
  VerdictSimResult run() {
    begin_epoch();
    at(random_.below(500'000), [this] { fault(); });
    while (!queue_.empty() && queue_.top().time <= kEndUs && result_.violation.empty()) {
      Scheduled next = std::move(const_cast<Scheduled&>(queue_.top()));
      queue_.pop();
      now_ = next.time;
      next.what();
    }
    // Liveness: a rank that lives goes on, or has ended by name; none waits beyond its deadline.
    for (size_t r = 0; r < ranks_.size() && result_.violation.empty(); ++r) {
      const Rank& k = ranks_[r];
      if (k.alive && !k.paused && !k.ended && now_ - k.since > kDeadlineUs + 2 * kResendUs)
        result_.violation = fmt::format("rank {} waits without an end", r);
    }
    return result_;
  }

 private:
  struct Scheduled {
    uint64_t time, tie;
    std::function<void()> what;
    bool operator>(const Scheduled& o) const {
      return time != o.time ? time > o.time : tie > o.tie;
    }
  };
  void at(uint64_t time, std::function<void()> what) {
    queue_.push({time, tie_++, std::move(what)});
  }
  void say(const std::string& text) {
    if (log_) log_(fmt::format("{:>9.3f} ms  {}", double(now_) / 1000, text));
  }
  unsigned world() const { return unsigned(ranks_.size()); }

  // The job is started anew, from its journal: all ranks, the next epoch, steps from the first on.
  void begin_epoch() {
    ++epoch_;
    say(fmt::format("epoch {} begins with {} ranks", epoch_, world()));
    for (unsigned r = 0; r < world(); ++r) {
      ranks_[r] = Rank{};
      begin_step(r, 1);
      at(now_ + random_.below(kResendUs), [this, r, e = epoch_] { tick(r, e); });
    }
  }
  void begin_step(unsigned r, uint64_t step) {
    Rank& k = ranks_[r];
    k.step = uint64_t(epoch_) << 32 | step;
    k.since = now_;
    float bound = float(random_.between(0, 0.1));
    Outcome outcome = Outcome::Certified;
    switch (random_.below(12)) {
      case 0:
        bound = std::numeric_limits<float>::quiet_NaN();
        outcome = Outcome::Failed;
        break;
      case 1:
        bound = std::numeric_limits<float>::infinity();
        outcome = Outcome::Over;
        break;
      case 2:
        outcome = Outcome::Exact;
        break;
      case 3:
        bound = std::numeric_limits<float>::quiet_NaN();
        break;  // a rank that is wrong as well
      default:
        break;
    }
    k.own = VerdictRecord{};
    k.own.max.severity = severity(outcome);
    k.own.max.bound = bound_key(bound);
    set_step(k.own, k.step);
    k.own.sum.votes = 1;
    truth_[k.step].by_rank[r] = {bound, outcome};
    k.sent[k.step] = k.own;
    k.merged = VerdictRecord{};
    k.seen = 0;
    merge(r, r, k.own);
  }
  void merge(unsigned r, unsigned from, const VerdictRecord& record) {
    Rank& k = ranks_[r];
    if ((k.seen >> from & 1) != 0 && mutation_ != VerdictMutation::RankCountedTwice) return;
    k.seen |= uint64_t(1) << from;
    const uint64_t before = k.merged.max.bound;
    merge_verdict(k.merged, record);
    if (mutation_ == VerdictMutation::FloatMaximum) {
      const float a = std::bit_cast<float>(uint32_t(before));
      const float b = std::bit_cast<float>(uint32_t(record.max.bound));
      k.merged.max.bound = std::bit_cast<uint32_t>(std::fmax(a, b));
    }
  }
  void decide(unsigned r) {
    Rank& k = ranks_[r];
    const bool agreed = mutation_ == VerdictMutation::StepNotCompared
                            ? k.merged.sum.votes == world()
                            : verdict_agreed(k.merged, world(), k.step);
    if (!agreed && mutation_ != VerdictMutation::VotesNotCounted) return;
    observe(r);
    ++result_.accepted;
    const uint64_t step = k.step & 0xffffffffu;
    if (step < kSteps)
      begin_step(r, step + 1);
    else
      k.ended = true;
  }
  // A token leaves rank r: then every rank voted at this step, and the worst of all is known.
  void observe(unsigned r) {
    const Rank& k = ranks_[r];
    const auto& by_rank = truth_.at(k.step).by_rank;
    if (by_rank.size() != world()) {
      result_.violation = fmt::format("rank {} has output at step {:x} with {} of {} verdicts", r,
                                      k.step, by_rank.size(), world());
      return;
    }
    uint64_t worst = 0;
    bool nan = false;
    float most = 0;
    for (const auto& [rank, what] : by_rank) {
      worst = std::max(worst, severity(what.second));
      nan |= std::isnan(what.first);
      if (!std::isnan(what.first)) most = std::max(most, what.first);
    }
    // The oracle decides on numbers: a NaN anywhere must not fulfil any tolerance.
    const float read = std::bit_cast<float>(uint32_t(k.merged.max.bound));
    const bool right = k.merged.max.severity == worst && (nan ? std::isnan(read) : read == most);
    if (!right)
      result_.violation =
          fmt::format("rank {} reads bound {} severity {} at step {:x}: it is {} {}", r, read,
                      k.merged.max.severity, k.step, nan ? NAN : most, worst);
  }
  void tick(unsigned r, uint64_t epoch) {
    Rank& k = ranks_[r];
    if (epoch != epoch_ || !k.alive || k.ended) return;
    at(now_ + kResendUs, [this, r, epoch] { tick(r, epoch); });
    if (k.paused) return;
    if (now_ - k.since > kDeadlineUs) {
      k.ended = true;
      ++result_.ended;
      say(fmt::format("rank {} ends: a peer showed no life", r));
      return end_job();
    }
    // This step's record, and the last one's, for those that have not come so far.
    for (auto it = k.sent.lower_bound(k.step - 1); it != k.sent.end(); ++it)
      for (unsigned to = 0; to < world(); ++to)
        if (to != r) transmit(r, to, {r, it->first, it->second});
  }
  void end_job() {
    if (ending_) return;
    ending_ = true;
    at(now_ + 100'000, [this] {
      ending_ = false;
      if (now_ < kEndUs - kDeadlineUs)
        begin_epoch();
      else
        for (Rank& k : ranks_) k.ended = true;
    });
  }
  void transmit(unsigned from, unsigned to, const Frame& f) {
    Bytes bytes(sizeof f + 8);
    std::memcpy(bytes.data(), &f, sizeof f);
    const uint64_t sum = XXH3_64bits(&f, sizeof f);
    std::memcpy(bytes.data() + sizeof f, &sum, 8);
    std::vector<SimNetwork::Delivery> deliveries;
    network_.send(from, to, bytes, deliveries);
    for (auto& d : deliveries)
      at(now_ + d.after_us, [this, d = std::move(d)] { receive(d.to, d.bytes); });
  }
  void receive(unsigned r, const Bytes& bytes) {
    Rank& k = ranks_[r];
    if (!k.alive || k.ended) return;
    if (k.paused) return;
    Frame f;
    if (bytes.size() != sizeof f + 8) return;
    std::memcpy(&f, bytes.data(), sizeof f);
    uint64_t sum;
    std::memcpy(&sum, bytes.data() + sizeof f, 8);
    if (sum != XXH3_64bits(&f, sizeof f) || f.rank >= world()) return;
    if (f.step >> 32 > k.step >> 32) {  // a newer epoch: it was paused, and is no longer wanted
      k.ended = true;
      ++result_.ended;
      return;
    }
    if (f.step != k.step && mutation_ != VerdictMutation::StepNotCompared) return;
    merge(r, unsigned(f.rank), f.record);
    decide(r);
  }
  void fault() {
    const unsigned r = unsigned(random_.below(world()));
    if (random_.chance(0.3)) {
      ranks_[r].alive = false;
      say(fmt::format("rank {} dies", r));
    } else {
      ranks_[r].paused = true;
      say(fmt::format("rank {} is paused", r));
      at(now_ + random_.below(3'000'000), [this, r] {
        ranks_[r].paused = false;
        ranks_[r].since = now_;  // a waiter that was itself stopped counts anew
      });
    }
    at(now_ + 200'000 + random_.below(2'500'000), [this] { fault(); });
  }

  SimRandom random_;
  SimNetwork network_;
  const VerdictMutation mutation_;
  const std::function<void(const std::string&)>& log_;
  std::vector<Rank> ranks_;
  std::map<uint64_t, Truth> truth_;
  std::priority_queue<Scheduled, std::vector<Scheduled>, std::greater<>> queue_;
  uint64_t now_ = 0, tie_ = 0;
  uint32_t epoch_ = 0;
  bool ending_ = false;
  VerdictSimResult result_;
};

}  // namespace

const char* verdict_mutation_name(VerdictMutation m) {
  switch (m) {
    case VerdictMutation::None:
      return "none";
    case VerdictMutation::VotesNotCounted:
      return "VotesNotCounted";
    case VerdictMutation::RankCountedTwice:
      return "RankCountedTwice";
    case VerdictMutation::StepNotCompared:
      return "StepNotCompared";
    case VerdictMutation::FloatMaximum:
      return "FloatMaximum";
  }
  return "?";
}

VerdictSimResult simulate_verdicts(uint64_t seed, VerdictMutation mutation,
                                   const std::function<void(const std::string&)>& log) {
  return Job(seed, mutation, log).run();
}

}  // namespace certkv::test
