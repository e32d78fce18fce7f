// Random numbers that are the same on every machine: counter n of a stream is the SplitMix64 mixing
// function of start + n * odd constant; normal ones come in pairs by Box and Muller. The standard
// library's distributions are not used, because each library has its own.
//
// SOURCE: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); Box, Muller
// (1958).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <utility>
#include <vector>

namespace certkv::needle {

class Random {
 public:
  // Streams of one seed are independent of one another: what one part of the model draws does not
  // move what the others get.
  Random(uint64_t seed, uint64_t stream) : state_(mix(mix(seed) + stream * kStep)) {}

  uint64_t bits() { return mix(state_ += kStep); }
  // Uniform in [0, n), without bias. REQUIRES n >= 1
  uint64_t below(uint64_t n) {
    const uint64_t reject = (0 - n) % n;  // 2^64 mod n
    for (;;) {
      const uint64_t x = bits();
      if (x >= reject) return x % n;
    }
  }
  double normal() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double u = (double(bits() >> 11) + 1) * 0x1p-53;  // (0, 1]
    const double turn = 2 * std::numbers::pi * double(bits() >> 11) * 0x1p-53;
    const double radius = std::sqrt(-2 * std::log(u));
    spare_ = radius * std::sin(turn);
    has_spare_ = true;
    return radius * std::cos(turn);
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
  static constexpr uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
  double spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace certkv::needle
