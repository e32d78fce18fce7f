#include "tests/support/oracle.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>

namespace certkv::oracle {
namespace {

struct Kind {
  int mantissa_bits, bias;
};
Kind kind_of(DType dtype) { return dtype == DType::BF16 ? Kind{7, 127} : Kind{10, 15}; }

}  // namespace

double decode(DType dtype, uint16_t bits) {
  const Kind f = kind_of(dtype);
  const int exponent_mask = (1 << (15 - f.mantissa_bits)) - 1;
  const int exponent = bits >> f.mantissa_bits & exponent_mask;
  const int fraction = bits & ((1 << f.mantissa_bits) - 1);
  double magnitude;
  if (exponent == exponent_mask)
    magnitude = fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    magnitude = std::ldexp(fraction, 1 - f.bias - f.mantissa_bits);
  else
    magnitude = std::ldexp(fraction + (1 << f.mantissa_bits), exponent - f.bias - f.mantissa_bits);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

uint16_t encode(DType dtype, double value) {
  const Kind f = kind_of(dtype);
  const int exponent_mask = (1 << (15 - f.mantissa_bits)) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double a = std::abs(value);
  const auto infinite = uint16_t(exponent_mask << f.mantissa_bits);
  if (std::isnan(value)) return sign | infinite | 1;
  if (std::isinf(value)) return sign | infinite;
  if (a == 0) return sign;
  const int exponent = std::max(std::ilogb(a), 1 - f.bias);  // of the step between neighbours
  // In units of that step the bits of a float are consecutive integers, exponent included.
  const double steps = std::nearbyint(std::ldexp(a, f.mantissa_bits - exponent));
  const double bits = steps + std::ldexp(exponent + f.bias - 1, f.mantissa_bits);
  return sign | uint16_t(std::min(bits, double(infinite)));
}

double Exact::weight(size_t t) const { return std::exp(score[t] - m) / z; }

const std::vector<double>& decoded(DType dtype) {
  const auto make = [](DType t) {
    std::vector<double> table;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) table.push_back(decode(t, uint16_t(bits)));
    return table;
  };
  static const std::vector<double> f16 = make(DType::F16), bf16 = make(DType::BF16);
  return dtype == DType::BF16 ? bf16 : f16;
}

Exact attention(const Originals& x, size_t tokens, const float* q) {
  const size_t d = size_t(x.head_dim);
  const double* value_of = decoded(x.dtype).data();
  Exact r;
  r.score.resize(tokens);
  r.m = -std::numeric_limits<double>::infinity();
  for (size_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (size_t c = 0; c < d; ++c) sum += double(q[c]) * value_of[x.k[t * d + c]];
    r.score[t] = sum / std::sqrt(double(d));
    if (!(r.score[t] <= r.m)) r.m = r.score[t];
  }
  r.out.assign(d, 0.0);
  for (size_t t = 0; t < tokens; ++t) {
    const double w = std::exp(r.score[t] - r.m);
    r.z += w;
    if (w == 0) continue;
    for (size_t c = 0; c < d; ++c) r.out[c] += w * value_of[x.v[t * d + c]];
  }
  for (double& o : r.out) o /= r.z;
  return r;
}

namespace {

double metadata(DType type, const std::byte* section, size_t i) {
  if (type == DType::F32) {
    float f;
    std::memcpy(&f, section + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, section + 2 * i, 2);
  return decode(DType::F16, h);
}

int four_bits(std::byte byte, bool high) { return std::to_integer<int>(byte) >> (high ? 4 : 0) & 15; }

struct Line {
  double step, base;
};
Line line_of(const TensorPlanes& planes, double scale, double offset) {
  if (planes.residual_bits == 0 || planes.read_residual) return {scale, offset};
  const double covered = std::ldexp(1.0, planes.residual_bits);
  return {scale * covered, offset + (covered - 1) / 2 * scale};
}

}  // namespace

Served decode_page(const PageFormat& f, const std::byte* page) {
  const size_t d = size_t(f.head_dim), n = size_t(f.group_tokens);
  const TensorPlanes &kp = f.layout.key, &vp = f.layout.value;
  Served out;
  out.k.resize(n * d);
  out.v.resize(n * d);
  out.bar2.resize(n);
  out.value_step.resize(n * size_t(f.value_groups));
  for (size_t c = 0; c < d; ++c) {
    const Line line = line_of(kp, metadata(kp.metadata, page + f.key_scale, c),
                              metadata(kp.metadata, page + f.key_offset, c));
    out.key_step.push_back(line.step);
    const int top = ((1 << kp.code_bits) - 1) >> (kp.read_residual ? 0 : kp.residual_bits);
    out.key_bar.push_back(std::abs(line.base) + top * line.step);
    for (size_t t = 0; t < n; ++t) {
      const size_t four = t / 16 * (d / 4) + c / 4, lane = t % 16;
      int code = std::to_integer<int>(page[f.key_base + (four * 16 + lane) * 4 + c % 4]);
      if (kp.read_residual)
        code = (code << kp.residual_bits) +
               four_bits(page[f.key_residual + (t / 16 * (d / 2) + c / 2) * 16 + lane], c % 2 == 1);
      out.k[t * d + c] = line.base + line.step * code;
    }
  }
  for (size_t t = 0; t < n; ++t)
    for (size_t c = 0; c < d; ++c) {
      const size_t pair = (c / 32 * n + t) * 16 + c % 16;
      int code = vp.code_bits - vp.residual_bits == 8
                     ? std::to_integer<int>(page[f.value_base + (c / 16 * n + t) * 16 + c % 16])
                     : four_bits(page[f.value_base + pair], c / 16 % 2 == 1);
      if (vp.read_residual)
        code = (code << vp.residual_bits) + four_bits(page[f.value_residual + pair], c / 16 % 2 == 1);
      const size_t at = c / size_t(f.value_group) * n + t;
      const Line line = line_of(vp, metadata(vp.metadata, page + f.value_scale, at),
                                metadata(vp.metadata, page + f.value_offset, at));
      out.v[t * d + c] = line.base + line.step * code;
      const double bar = std::abs(line.base) + line.step * code;
      out.bar2[t] += bar * bar;
      out.value_step[t * size_t(f.value_groups) + c / size_t(f.value_group)] = line.step;
    }
  float norm_step;
  std::memcpy(&norm_step, page + f.notes, 4);
  for (size_t t = 0; t < n; ++t) {
    uint16_t code;
    std::memcpy(&code, page + f.value_norms + 2 * t, 2);
    out.norm_below.push_back(double(norm_step) * code);
    out.norm_above.push_back(double(norm_step) * (code + 1) * (1 + 0x1p-20));
  }
  return out;
}

Measured measure(const PageFormat& f, const Served& served, const Originals& x, int block) {
  const size_t d = size_t(f.head_dim), n = size_t(f.block_tokens);
  Measured out;
  for (size_t t = size_t(block) * n; t < size_t(block + 1) * n; ++t) {
    double v_error = 0, v_norm = 0, k_error = 0, k_norm = 0;
    for (size_t c = 0; c < d; ++c) {
      const double k = decode(x.dtype, x.k[t * d + c]), v = decode(x.dtype, x.v[t * d + c]);
      const double dk = k - served.k[t * d + c], dv = v - served.v[t * d + c];
      v_error += dv * dv;
      v_norm += v * v;
      k_error += dk * dk;
      k_norm += k * k;
      if (served.key_step[c] > 0) out.kappa = std::max(out.kappa, std::abs(dk) / served.key_step[c]);
    }
    out.vbar = std::max(out.vbar, std::sqrt(served.bar2[t]));
    out.eta = std::max(out.eta, std::sqrt(v_error));
    out.nu = std::max(out.nu, std::sqrt(v_norm));
    out.e = std::max(out.e, std::sqrt(k_error));
    out.k_norm = std::max(out.k_norm, std::sqrt(k_norm));
  }
  return out;
}

Verdict check(const Exact& exact, std::span<const float> out, const Claim& claim) {
  Verdict v;
  const auto broken = [&](const char* rule) {
    std::ostringstream why;
    why << rule << ": error " << v.error << ", bound " << claim.bound << ", S " << claim.s
        << ", tolerance " << claim.tolerance << (claim.relative ? " relative" : " absolute");
    v.holds = false;
    v.why += (v.why.empty() ? "" : "; ") + why.str();
  };
  if (claim.kind == Claim::Kind::Failed) return v;
  double error2 = 0;
  for (size_t c = 0; c < out.size(); ++c) {
    const double e = exact.out[c] - double(out[c]);
    error2 += e * e;
  }
  v.error = std::sqrt(error2);
  // A bound that is NaN or infinite says that nothing is known: only `over` may return one.
  const bool unknown = !std::isfinite(claim.bound);
  if (!(claim.kind == Claim::Kind::Over && unknown) && !(v.error <= claim.bound))
    broken("the error exceeds the bound");
  if (claim.kind == Claim::Kind::Certified &&
      !(claim.bound <= claim.tolerance * (claim.relative ? claim.s : 1.0)))
    broken("certified above the tolerance");
  if (claim.kind == Claim::Kind::Exact && unknown) broken("exact without a bound");
  if (claim.kind == Claim::Kind::Over && claim.enforces) broken("an enforcing policy returned over");
  return v;
}

}  // namespace certkv::oracle
