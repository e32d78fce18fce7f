// A network between simulated nodes that does to frames whatever a network can: it loses, delays,
// reorders, repeats (also much later), damages them, and cuts links, one way or both. It knows
// bytes and nothing of what they mean.
#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <vector>

namespace certkv::test {

using Bytes = std::vector<std::byte>;

class SimRandom {
 public:
  explicit SimRandom(uint64_t seed) : engine_(seed) {}
  uint64_t below(uint64_t n) { return engine_() % n; }
  bool chance(double p) { return double(engine_() >> 11) * 0x1p-53 < p; }
  double between(double a, double b) { return a + (b - a) * double(engine_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 engine_;
};

struct NetworkFaults {
  double loss = 0, replay = 0, corruption = 0;
  double late = 0;  // share of frames that take up to late_us more
  uint64_t late_us = 300'000;
};

class SimNetwork {
 public:
  static constexpr unsigned kMost = 8;  // nodes
  struct Delivery {
    uint64_t after_us;
    unsigned from, to;
    Bytes bytes;
  };

  explicit SimNetwork(uint64_t seed) : random_(seed) {}
  NetworkFaults faults;

  void cut(unsigned from, unsigned to, bool down) { down_[from][to] = down; }
  void heal() { down_ = {}; }
  bool is_down(unsigned from, unsigned to) const { return down_[from][to]; }

  // What becomes of one frame: appended to `out`, nothing or more than one delivery.
  void send(unsigned from, unsigned to, const Bytes& bytes, std::vector<Delivery>& out) {
    if (!down_[from][to] && !random_.chance(faults.loss)) deliver(from, to, bytes, out);
    remember(from, to, bytes);
    if (faults.replay > 0 && random_.chance(faults.replay)) {
      // Whatever lies in the memory, from any former time, on its own link.
      const Old& old = memory_[random_.below(memory_.size())];
      if (!down_[old.from][old.to]) deliver(old.from, old.to, old.bytes, out);
    }
  }

 private:
  struct Old {
    unsigned from, to;
    Bytes bytes;
  };
  void deliver(unsigned from, unsigned to, const Bytes& bytes, std::vector<Delivery>& out) {
    uint64_t after = 100 + random_.below(1500);
    if (random_.chance(faults.late)) after += random_.below(faults.late_us);
    out.push_back({after, from, to, bytes});
    if (!bytes.empty() && random_.chance(faults.corruption)) {
      Bytes& damaged = out.back().bytes;
      const size_t at = random_.below(damaged.size());
      switch (random_.below(3)) {
        case 0:
          damaged[at] ^= std::byte(1 << random_.below(8));
          break;
        case 1:
          damaged.resize(at);
          break;
        default:
          damaged.insert(damaged.end(), 1 + random_.below(40), std::byte(random_.below(256)));
      }
    }
  }
  void remember(unsigned from, unsigned to, const Bytes& bytes) {
    if (faults.replay <= 0) return;
    if (memory_.size() < 256) {
      memory_.push_back({from, to, bytes});
    } else {
      memory_[random_.below(memory_.size())] = {from, to, bytes};
    }
  }

  SimRandom random_;
  std::array<std::array<bool, kMost>, kMost> down_{};
  std::vector<Old> memory_;
};

}  // namespace certkv::test
