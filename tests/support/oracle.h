// The independent judge of the certified core: attention in float64 and the rules a returned
// certificate must obey, written from the method's text alone. Nothing of the product is called, not
// even its conversions; of its headers only plain data is used.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/layout.h"

namespace certkv::oracle {

// 16-bit floats by their definition (IEEE 754 binary16, bfloat16).
double decode(DType dtype, uint16_t bits);
// decode() of every bit pattern.
const std::vector<double>& decoded(DType dtype);
// The nearest one, ties to even; beyond the range: infinity.
uint16_t encode(DType dtype, double value);

// Originals of one KV head, [tokens, head_dim] each.
struct Originals {
  DType dtype = DType::BF16;
  int head_dim = 0;
  std::vector<uint16_t> k, v;
  size_t tokens() const { return k.size() / size_t(head_dim); }
};

// Exact attention of one query over the first `tokens` tokens.
struct Exact {
  std::vector<double> out;    // [head_dim]
  std::vector<double> score;  // [tokens] q.k / sqrt(d)
  double z = 0, m = 0;        // sum of exp(score - m), m the largest score
  double weight(size_t t) const;
};
Exact attention(const Originals& x, size_t tokens, const float* q);

// Served values of one page, read from the bytes that kernels/layout.h documents; [group_tokens,
// head_dim] each.
struct Served {
  std::vector<double> k, v;
  std::vector<double> key_step;  // [head_dim] of the planes that are read
  std::vector<double> key_bar;   // [head_dim] |base| + largest code * step
  std::vector<double> norm_below, norm_above;  // [group_tokens] what the page says of ||v^_t||
  std::vector<double> bar2;      // [group_tokens] || |base| + code step ||^2
  std::vector<double> value_step;  // [group_tokens, value_groups] of the planes that are read
};
Served decode_page(const PageFormat& format, const std::byte* page);

// Annotations of one block, measured on served values. SOURCE: method section 2.
struct Measured {
  double eta = 0, nu = 0, kappa = 0, e = 0, k_norm = 0, vbar = 0;
};
Measured measure(const PageFormat& format, const Served& served, const Originals& x, int block);

// ---- what a certificate promises ----------------------------------------------------------------

struct Claim {  // of one head at one step
  enum class Kind { Certified, Exact, Over, Failed } kind = Kind::Failed;
  double bound = 0;
  double s = 0;  // S of method E5, as reported
  bool enforces = true;
  bool relative = true;
  double tolerance = 0;
};

struct Verdict {
  bool holds = true;
  std::string why;
  double error = 0;  // ||exact - out||_2
};

// The one checking function: true error <= bound for every outcome but failed; bound <= tolerance
// (times S) for certified; a finite bound for exact; no `over` from a policy that enforces.
Verdict check(const Exact& exact, std::span<const float> out, const Claim& claim);

}  // namespace certkv::oracle
