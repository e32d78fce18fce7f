#include "runtime/needle/codes.h"

#include <array>
#include <bit>
#include <cmath>

namespace certkv::needle {
namespace {

constexpr int kBits = 6;   // x in GF(2)^6: 64 coordinates
constexpr int kForms = 5;  // 5 * 64 = 320 words

// A quadratic form without linear part: bit n of `pairs` is the coefficient of the n-th product
// x_i x_j, i < j. The associated alternating matrix has the same coefficients on both sides.
constexpr uint32_t kAllForms = 1u << (kBits * (kBits - 1) / 2);

std::array<uint32_t, kBits> alternating_rows(uint32_t pairs) {
  std::array<uint32_t, kBits> rows{};
  for (int i = 0, n = 0; i < kBits; ++i) {
    for (int j = i + 1; j < kBits; ++j, ++n) {
      if ((pairs >> n & 1) == 0) continue;
      rows[size_t(i)] |= 1u << j;
      rows[size_t(j)] |= 1u << i;
    }
  }
  return rows;
}

// The form is bent exactly if its alternating matrix is invertible over GF(2).
bool bent(uint32_t pairs) {
  auto rows = alternating_rows(pairs);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] == 0) return false;
    const uint32_t pivot = rows[i] & (~rows[i] + 1);
    for (size_t k = i + 1; k < rows.size(); ++k) {
      if (rows[k] & pivot) rows[k] ^= rows[i];
    }
  }
  return true;
}

int value_of(uint32_t pairs, uint32_t x) {
  int sum = 0;
  for (int i = 0, n = 0; i < kBits; ++i) {
    for (int j = i + 1; j < kBits; ++j, ++n) sum ^= int(pairs >> n & x >> i & x >> j & 1);
  }
  return sum;
}

// Five forms, the first 0, such that the sum of any two is bent. Every choice strikes out
// candidates; should none be left too early, it starts over.
std::array<uint32_t, kForms> pairwise_bent_forms(Random& random) {
  std::vector<uint32_t> all;
  for (uint32_t pairs = 1; pairs < kAllForms; ++pairs) {
    if (bent(pairs)) all.push_back(pairs);
  }
  for (;;) {
    std::array<uint32_t, kForms> chosen{};
    size_t count = 1;
    for (std::vector<uint32_t> left = all; count < kForms && !left.empty(); ++count) {
      const uint32_t form = left[random.below(left.size())];
      chosen[count] = form;
      std::erase_if(left, [form](uint32_t other) { return !bent(other ^ form); });
    }
    if (count == kForms) return chosen;
  }
}

Grid rows_in_random_order(Random& random, const Grid& g) {
  std::vector<int> order(size_t(g.rows));
  for (int i = 0; i < g.rows; ++i) order[size_t(i)] = i;
  random.shuffle(order);
  Grid out(g.rows, g.cols);
  for (int i = 0; i < g.rows; ++i) {
    for (int c = 0; c < g.cols; ++c) out.at(i, c) = g.at(order[size_t(i)], c);
  }
  return out;
}

}  // namespace

Grid orthonormal(Random& random, int n, int k) {
  Grid g(n, k);
  for (int c = 0; c < k; ++c) {
    for (int r = 0; r < n; ++r) g.at(r, c) = random.normal();
    // Gram-Schmidt, twice: the second pass takes away what rounding left in the first.
    for (int pass = 0; pass < 2; ++pass) {
      for (int b = 0; b < c; ++b) {
        double dot = 0;
        for (int r = 0; r < n; ++r) dot += g.at(r, b) * g.at(r, c);
        for (int r = 0; r < n; ++r) g.at(r, c) -= dot * g.at(r, b);
      }
      double norm = 0;
      for (int r = 0; r < n; ++r) norm += g.at(r, c) * g.at(r, c);
      for (int r = 0; r < n; ++r) g.at(r, c) /= std::sqrt(norm);
    }
  }
  return g;
}

Grid kerdock_words(Random& random) {
  Grid words(kForms << kBits, 1 << kBits);
  int row = 0;
  for (const uint32_t form : pairwise_bent_forms(random)) {
    for (uint32_t a = 0; a < 1u << kBits; ++a, ++row) {
      for (uint32_t x = 0; x < 1u << kBits; ++x) {
        const int sign = value_of(form, x) ^ (std::popcount(a & x) & 1);
        words.at(row, int(x)) = sign == 0 ? 1.0 : -1.0;
      }
    }
  }
  return rows_in_random_order(random, words);
}

Grid e8_roots(Random& random) {
  Grid roots(240, 8);
  int row = 0;
  for (int i = 0; i < 8; ++i) {
    for (int j = i + 1; j < 8; ++j) {
      for (int signs = 0; signs < 4; ++signs, ++row) {
        roots.at(row, i) = signs & 1 ? -1 : 1;
        roots.at(row, j) = signs & 2 ? -1 : 1;
      }
    }
  }
  for (uint32_t minus = 0; minus < 256; ++minus) {
    if (std::popcount(minus) % 2 != 0) continue;
    for (int c = 0; c < 8; ++c) roots.at(row, c) = minus >> c & 1 ? -0.5 : 0.5;
    ++row;
  }
  const Grid rotation = orthonormal(random, 8, 8);
  Grid turned(240, 8);
  for (int r = 0; r < 240; ++r) {
    for (int c = 0; c < 8; ++c) {
      double sum = 0;
      for (int k = 0; k < 8; ++k) sum += roots.at(r, k) * rotation.at(k, c);
      turned.at(r, c) = sum / std::sqrt(2.0);
    }
  }
  return rows_in_random_order(random, turned);
}

}  // namespace certkv::needle
