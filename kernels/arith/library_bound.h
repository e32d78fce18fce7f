// What is stated about dense attention by a library whose kernels are not ours, and the bound that
// follows: of policy `dense` on a GPU. kernels/METHOD.md, section "Dense attention by a library",
// has the derivation; tests compare both with float64, on cuDNN too.
//
// Stated of the library, for one query (rounded to 16 bits by us) over N tokens, u = 2^-24:
//   - scores and sums of values are sums of matrix instructions of 16 terms, 24 u each at most and
//     all in a row, whatever the library splits; sums of weights are no worse;
//   - a score, its scale and the exponential's argument lose at most 64 u of ||q|| ||k|| / sqrt(d);
//   - a weight is off by at most kLibraryExponential, and 2 u for each rescale, one for 32 tokens;
//     it is rounded to the originals' type once, in either sum or in both;
//   - what it returns is rounded to the originals' type.
// SOURCE: method section 4b, "exact"
#pragma once

#include <cmath>
#include <limits>

#include "kernels/arith/certificate.h"
#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr double kLibraryMatrix = 24;  // u for 16 terms: kernels/cuda/chains.h
inline constexpr double kLibraryExponential = 0x1p-20;

// What rounding to nearest costs at most: half a place in a relative sense, and where the result is
// subnormal. BF16 has 8 bits, F16 has 11.
CERTKV_HD constexpr double rounding_of_16(DType dtype) {
  return dtype == DType::BF16 ? 0x1p-8 : 0x1p-11;
}
CERTKV_HD constexpr double least_of_16(DType dtype) {
  return dtype == DType::BF16 ? 0x1p-134 : 0x1p-25;
}

// One head's step. Norms rounded up.
struct LibraryStep {
  DType dtype = DType::BF16;
  int head_dim = 0;
  double tokens = 0;
  double query = 0;     // ||q|| / sqrt(d)
  double rounded = 0;   // || q - q as the library read it || / sqrt(d)
  double k_norm = 0;    // largest norm of a key
  double nu = 0;        // of a value
  double out_norm = 0;  // ||O|| as returned
};

CERTKV_HD inline Certificate library_certificate(const LibraryStep& x) {
  const double u = rounding_of_16(x.dtype), tiny = least_of_16(x.dtype), d = x.head_dim;
  const double gamma = gamma_n(kLibraryMatrix * d / 16 + 64);
  // The query as read is at most query + rounded long.
  const double score = (x.rounded + gamma * (x.query + x.rounded)) * x.k_norm;
  const double sums = kLibraryMatrix * (x.tokens / 16 + 4) + 2 * (x.tokens / 32 + 64);
  // |w' / w - 1| <= c for the weights of both sums; each sum's own rounding is in it.
  const double c = std::expm1(score + kLibraryExponential + 2 * sums * kUnit + u);
  const double unrounded = (x.out_norm + std::sqrt(d) * tiny) / (1 - u);
  const double cast = u * unrounded + std::sqrt(d) * tiny;
  // A weight that leaves the type's range: absolute, beside the heaviest, which is 1.
  const double lost = x.tokens * (x.dtype == DType::BF16 ? 0x1p-126 : 0x1p-24);
  const double by_sums = c < 1 ? kRaise * ((2 * c + lost) / (1 - c) * x.nu + cast)
                               : std::numeric_limits<double>::infinity();
  // Exact attention is a mean of values: no longer than the longest.
  const double by_norms = kRaise * (x.out_norm + x.nu);

  Certificate r;
  r.out_norm = x.out_norm;
  r.bound = by_sums <= by_norms ? by_sums : by_norms;
  r.e_fp = r.bound;
  r.den = c < 1 ? 1 - c : 0;
  // S is at least the mean's norm: less than what the library knows, so `relative` is too large.
  r.s = r.s_lo = positive_part((x.out_norm - std::sqrt(d) * tiny) * (1 - 2 * u));
  r.relative = r.bound == 0 && r.s == 0 ? 0 : r.bound / r.s;
  const bool finite = std::isfinite(x.query) && std::isfinite(x.rounded) &&
                      std::isfinite(x.k_norm) && std::isfinite(x.nu) && std::isfinite(x.out_norm);
  if (!(finite && score >= 0 && x.nu >= 0))
    r.bound = r.relative = std::numeric_limits<double>::quiet_NaN();
  return r;
}

}  // namespace certkv
