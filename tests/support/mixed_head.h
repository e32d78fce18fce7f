// A snapshot in which blocks differ in all that a term of a certificate could take from the wrong
// place: scales, errors, masses, and what was read of them.
#pragma once

#include <cmath>
#include <random>
#include <string_view>
#include <vector>

#include "tests/support/certificate_terms.h"

namespace certkv {

inline constexpr int kMixedDim = 64;
// Sums of at most 2^10 FP32 weights and norms: gamma_128 is 8e-6.
inline constexpr double kSums = 1e-4;
// Norms are kept as 16 bits of the page's largest: 2^-16 of it, twice in a square, and once more
// where the largest is four times the others'.
inline constexpr double kNorms = 4 * 2 * 0x1p-16;
struct Mixed {
  SealedHead head;
  std::vector<float> q;
  explicit Mixed(std::string_view layout, DType dtype = DType::F16, double mean = 3)
      : head(layout, dtype, kMixedDim) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    for (int c = 0; c < kMixedDim; ++c) q.push_back(float(0.4 * normal(random)));
    // Seven groups of 64 with keys of growing size, and 21 tokens that stay open or seal otherwise.
    head.add(7 * 64 + 21, [&](size_t t, size_t) {
      const double value_size = std::ldexp(0.1, int(t / 16 % 5));
      return std::pair{(0.3 + 0.2 * double(t / 64)) * normal(random),
                       mean + value_size * normal(random)};
    });
    head.seal();
  }
  bool quantised(size_t b) const { return head.blocks[b].page != nullptr; }
  // Some keys and some values from originals.
  void promote_some() {
    for (size_t b = 0; b < head.blocks.size(); ++b)
      if (quantised(b)) head.blocks[b] = head.promoted(b, b % 4 == 1 || b % 4 == 3, b % 4 >= 2);
  }
  JudgedPass judge() const { return JudgedPass(head, head.blocks, 1, q.data()); }
  oracle::Terms terms(const JudgedPass& j) const {
    return oracle::terms(head, head.blocks, q.data(), j.pass.delta, j.out[0]);
  }
};

}  // namespace certkv
