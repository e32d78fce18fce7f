#include "runtime/audit/requantise.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace certkv::audit {
namespace {

// IEEE 754 binary16 and bfloat16, by their definition. Both are exact in float.
float decode_bits(bool bf16, uint32_t bits) {
  const int mantissa = bf16 ? 7 : 10, bias = bf16 ? 127 : 15;
  const int top = (1 << (15 - mantissa)) - 1;
  const int exponent = int(bits >> mantissa) & top, fraction = int(bits) & ((1 << mantissa) - 1);
  double x;
  if (exponent == top)
    x = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                      : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    x = std::ldexp(fraction, 1 - bias - mantissa);
  else
    x = std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return float((bits & 0x8000u) != 0 ? -x : x);
}

// The smallest number >= x that the metadata's type holds; inf beyond its range.
double metadata_up(bool half, double x) {
  if (!half) {
    const auto f = float(x);
    return double(f) < x ? std::nextafter(f, std::numeric_limits<float>::infinity()) : f;
  }
  if (x > 65504) return std::numeric_limits<double>::infinity();
  if (x == 0) return 0;
  const int exponent = std::max(std::ilogb(x), -14);
  return std::max(std::ldexp(std::ceil(std::ldexp(x, 10 - exponent)), exponent - 10), -65504.0);
}
double metadata_down(bool half, double x) {
  return -metadata_up(half, -x);
}

struct Line {
  double scale = 0, offset = 0;
  bool ok = true;
};
Line fit(double lo, double hi, const PlaneRules& p) {
  Line l;
  l.offset = metadata_down(p.half_metadata, lo);
  if (!std::isfinite(l.offset) || std::abs(l.offset) > std::numeric_limits<float>::max())
    return {0, 0, false};
  const double width = hi - l.offset;
  if (width == 0) return l;
  l.scale = metadata_up(p.half_metadata, width / ((1 << p.code_bits) - 1));
  if (!std::isfinite(l.scale) || l.scale < double(std::numeric_limits<float>::min()))
    return {0, 0, false};
  return l;
}

int code_of(double x, const Line& l, const PlaneRules& p) {
  if (l.scale == 0) return 0;
  return int(
      std::clamp(std::nearbyint((x - l.offset) / l.scale), 0.0, double((1 << p.code_bits) - 1)));
}

// What is read of a code: all of it, or the base plane at the middle of the codes it covers.
int read_shift(const PlaneRules& p) {
  return p.read_residual ? 0 : p.residual_bits;
}
void read_line(const Line& l, const PlaneRules& p, double* step, double* base) {
  const int shift = read_shift(p);
  *step = std::ldexp(l.scale, shift);
  *base =
      shift == 0 ? l.offset : double(float(l.offset + (std::ldexp(1.0, shift) - 1) / 2 * l.scale));
}

// The nearest binary16 number, ties to even; beyond the range: infinity.
double to_half(double x) {
  if (x == 0) return 0;
  const double place = std::ldexp(1.0, std::max(std::ilogb(x), -14) - 10);
  const double r = std::nearbyint(x / place) * place;
  return std::abs(r) > 65504 ? std::copysign(std::numeric_limits<double>::infinity(), r) : r;
}

// The power of two of a scale group on a device: of its largest step and |base|. A code is a
// multiple of 2^-24 there, so a step is at most 65504 2^-24; a base is at most 16.
int device_exponent(double step, double base) {
  int exponent = std::numeric_limits<int>::min();
  if (step > 0) exponent = std::ilogb(step / (65504 * 0x1p-24)) + 1;
  if (base > 0) exponent = std::max(exponent, std::ilogb(base / 16) + 1);
  return step > 0 || base > 0 ? exponent : 0;
}

double norm(const float* x, size_t d) {
  double sum = 0;
  for (size_t c = 0; c < d; ++c) sum += double(x[c]) * x[c];
  return std::sqrt(sum);
}

}  // namespace

HeadRows::HeadRows(const LayoutRules& rules, bool bf16) : rules_(rules) {
  decoded_.resize(0x10000);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) decoded_[bits] = decode_bits(bf16, bits);
}

int HeadRows::key_levels() const {
  return ((1 << rules_.key.code_bits) - 1) >> read_shift(rules_.key);
}

void HeadRows::append(size_t rows, const uint16_t* k_bits, const uint16_t* v_bits) {
  const size_t d = size_t(rules_.head_dim);
  for (size_t t = 0; t < rows; ++t) {
    const size_t first = k.size();
    for (size_t c = 0; c < d; ++c) {
      k.push_back(decoded_[k_bits[t * d + c]]);
      v.push_back(decoded_[v_bits[t * d + c]]);
    }
    k_norm_.push_back(norm(k.data() + first, d));
    v_norm_.push_back(norm(v.data() + first, d));
    finite_ = finite_ && std::isfinite(k_norm_.back()) && std::isfinite(v_norm_.back());
  }
  while (finite_ && (groups.size() + 1) * size_t(rules_.group_tokens) <= tokens())
    quantise(groups.size());
}

void HeadRows::quantise(size_t group) {
  const size_t n = size_t(rules_.group_tokens), d = size_t(rules_.head_dim), end = (group + 1) * n;
  k_code.resize(end * d);
  v_code.resize(end * d);
  k_step.resize((group + 1) * d);
  k_base.resize((group + 1) * d);
  v_step.resize(end * d / size_t(rules_.value_group));
  v_base.resize(v_step.size());
  served_norm.resize(end);
  blocks.resize(end / size_t(rules_.block_tokens));
  groups.push_back({});
  groups.back().quantised = quantise_keys(group * n) && quantise_values(group * n);
  served_max.resize(blocks.size(),
                    *std::max_element(served_norm.begin() + long(group * n), served_norm.end()));
}

bool HeadRows::quantise_keys(size_t first) {
  const size_t n = size_t(rules_.group_tokens), d = size_t(rules_.head_dim), group = first / n;
  std::vector<double> error2(n, 0.0);
  for (size_t c = 0; c < d; ++c) {
    double lo = k[first * d + c], hi = lo;
    for (size_t t = 1; t < n; ++t) {
      lo = std::min(lo, double(k[(first + t) * d + c]));
      hi = std::max(hi, double(k[(first + t) * d + c]));
    }
    const Line l = fit(lo, hi, rules_.key);
    if (!l.ok) return false;
    double step, base;
    read_line(l, rules_.key, &step, &base);
    k_step[group * d + c] = step;
    k_base[group * d + c] = base;
    for (size_t t = 0; t < n; ++t) {
      const double x = k[(first + t) * d + c];
      const int code = code_of(x, l, rules_.key) >> read_shift(rules_.key);
      k_code[(first + t) * d + c] = uint16_t(code);
      const double error = std::abs(x - (base + step * code));
      error2[t] += error * error;
      double& kappa = blocks[(first + t) / size_t(rules_.block_tokens)].kappa;
      if (l.scale > 0)
        kappa = std::max(kappa, error / step);
      else if (error != 0)
        return false;
    }
  }
  for (size_t t = 0; t < n; ++t) {
    double& e = blocks[(first + t) / size_t(rules_.block_tokens)].e;
    e = std::max(e, std::sqrt(error2[t]));
  }
  return true;
}

bool HeadRows::quantise_values(size_t first) {
  const size_t n = size_t(rules_.group_tokens), d = size_t(rules_.head_dim);
  const size_t width = size_t(rules_.value_group), per_token = d / width;
  for (size_t t = first; t < first + n; ++t) {
    double error2 = 0, bar2 = 0, served2 = 0;
    for (size_t g = 0; g < per_token; ++g) {
      const float* x = v.data() + t * d + g * width;
      double lo = x[0], hi = lo;
      for (size_t i = 1; i < width; ++i) {
        lo = std::min(lo, double(x[i]));
        hi = std::max(hi, double(x[i]));
      }
      const Line l = fit(lo, hi, rules_.value);
      if (!l.ok) return false;
      double step, base;
      read_line(l, rules_.value, &step, &base);
      v_step[t * per_token + g] = step;
      v_base[t * per_token + g] = base;
      for (size_t i = 0; i < width; ++i) {
        const int code = code_of(x[i], l, rules_.value) >> read_shift(rules_.value);
        v_code[t * d + g * width + i] = uint16_t(code);
        const double served = base + step * code, error = x[i] - served;
        const double bar = std::abs(base) + step * code;
        error2 += error * error;
        served2 += served * served;
        bar2 += bar * bar;
      }
    }
    served_norm[t] = std::sqrt(served2);
    Block& b = blocks[t / size_t(rules_.block_tokens)];
    b.eta = std::max(b.eta, std::sqrt(error2));
    b.vbar = std::max(b.vbar, std::sqrt(bar2));
  }
  if (rules_.device) serve_halves(first);
  return true;
}

// What a device makes of codes, steps and bases: fma(code 2^-24, step, base) in binary16, where the
// codes of the second 8 of 16 tokens stand 4 bits higher. Replaces what was measured on the lines.
void HeadRows::serve_halves(size_t first) {
  const size_t n = size_t(rules_.group_tokens), d = size_t(rules_.head_dim);
  const size_t width = size_t(rules_.value_group), per_token = d / width;
  double largest_step = 0, largest_base = 0;
  for (size_t i = first * per_token; i < (first + n) * per_token; ++i) {
    largest_step = std::max(largest_step, v_step[i]);
    largest_base = std::max(largest_base, std::abs(v_base[i]));
  }
  const int exponent = device_exponent(largest_step, largest_base);
  v_served.resize((first + n) * d);
  for (size_t b = first; b < first + n; b += size_t(rules_.block_tokens)) {
    Block& block = blocks[b / size_t(rules_.block_tokens)];
    block.eta = block.vbar = 0;
    for (size_t t = b; t < b + size_t(rules_.block_tokens); ++t) {
      const int raised = t % 16 >= 8 ? 4 : 0;
      double error2 = 0, served2 = 0;
      for (size_t c = 0; c < d; ++c) {
        const size_t line = t * per_token + c / width;
        const double step = to_half(std::ldexp(v_step[line], 24 - raised - exponent));
        const double base = to_half(std::ldexp(v_base[line], -exponent));
        const double code = std::ldexp(v_code[t * d + c], raised - 24);
        const double served = std::ldexp(to_half(code * step + base), exponent);
        const double error = v[t * d + c] - served;
        v_served[t * d + c] = float(served);
        error2 += error * error;
        served2 += served * served;
      }
      served_norm[t] = std::sqrt(served2);
      block.eta = std::max(block.eta, std::sqrt(error2));
      block.vbar = std::max(block.vbar, served_norm[t]);  // sums run over v^ itself
    }
  }
}

}  // namespace certkv::audit
