// The vectors by which needle knows its bytes, and the orthonormal frames in which it hides them.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/needle/random.h"

namespace certkv::needle {

struct Grid {  // row-major [rows, cols]
  int rows = 0, cols = 0;
  std::vector<double> values;

  Grid() = default;
  Grid(int r, int c) : rows(r), cols(c), values(size_t(r) * size_t(c)) {}
  double& at(int r, int c) { return values[size_t(r) * size_t(cols) + size_t(c)]; }
  double at(int r, int c) const { return values[size_t(r) * size_t(cols) + size_t(c)]; }
};

// [n, k] with orthonormal columns, in a random direction. REQUIRES k <= n
Grid orthonormal(Random& random, int n, int k);

// [320, 64], entries +-1, any two rows with an inner product of at most 8 in absolute value, in
// random order. Row (Q, a) is (-1)^(Q(x) + a.x) over x in GF(2)^6 for one of 5 quadratic forms Q:
// two rows of one form are orthogonal, and forms are chosen so that the sum of any two is bent.
// SOURCE: Kerdock (1972); MacWilliams, Sloane, "The Theory of Error-Correcting Codes", chapter 15.
Grid kerdock_words(Random& random);

// [240, 8]: the roots of E8, scaled to length 1 (inner products 0, +-1/2, +-1), in a random
// rotation and order.
Grid e8_roots(Random& random);

}  // namespace certkv::needle
