#include "tests/support/adversary.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "kvstore/device_tier.h"

namespace certkv {
namespace {

using Vector = std::vector<double>;

// How far from its middle a cell is used: codes are rounded to nearest, so 1/2 is its end, and what
// the scale's own rounding needs is left.
constexpr double kReach = 0.4995;

// What codes stand for, and where their originals may move without changing them.
struct Cells {
  std::vector<bool> coded;        // [tokens]
  Vector k, v;                    // [tokens, d] served; originals where not coded
  Vector k_step, v_step;          // [tokens, d]; 0: fixed
  Vector k_lo, k_hi, v_lo, v_hi;  // ends of the ranges that scales were fitted to
};

Vector decode_all(DType dtype, const std::vector<uint16_t>& bits) {
  const Vector& value_of = oracle::decoded(dtype);
  Vector out;
  out.reserve(bits.size());
  for (uint16_t b : bits) out.push_back(value_of[b]);
  return out;
}

Cells read_cells(const PageFormat& f, const oracle::Originals& x) {
  DeviceTier tier(std::make_shared<const PageFormat>(f), x.dtype, std::make_shared<TierAccount>());
  tier.append(x.k.data(), x.v.data(), x.tokens(), {});
  const size_t d = size_t(f.head_dim), n = size_t(f.group_tokens), width = size_t(f.value_group);
  Cells cells{std::vector<bool>(x.tokens()),
              decode_all(x.dtype, x.k),
              decode_all(x.dtype, x.v),
              {},
              {},
              {},
              {},
              {},
              {}};
  for (Vector* a :
       {&cells.k_step, &cells.v_step, &cells.k_lo, &cells.k_hi, &cells.v_lo, &cells.v_hi})
    a->assign(x.k.size(), 0.0);
  const Vector k = cells.k, v = cells.v;
  for (size_t first = 0; first < tier.sealed_blocks(); first += size_t(f.blocks())) {
    const BlockRef& ref = tier.blocks()[first];
    if (ref.page == nullptr) continue;
    const oracle::Served served = oracle::decode_page(f, ref.page);
    const size_t at = first * size_t(f.block_tokens) * d;
    std::copy(served.k.begin(), served.k.end(), cells.k.begin() + long(at));
    std::copy(served.v.begin(), served.v.end(), cells.v.begin() + long(at));
    for (size_t c = 0; c < d; ++c) {
      double lo = k[at + c], hi = lo;
      for (size_t t = 0; t < n; ++t) {
        lo = std::min(lo, k[at + t * d + c]);
        hi = std::max(hi, k[at + t * d + c]);
      }
      for (size_t i = at + c; i < at + n * d; i += d) {
        cells.k_lo[i] = lo;
        cells.k_hi[i] = hi;
        cells.k_step[i] = k[i] == lo || k[i] == hi ? 0 : served.key_step[c];
      }
    }
    for (size_t t = 0; t < n; ++t) {
      cells.coded[at / d + t] = true;
      for (size_t c = 0; c < d; c += width) {
        const size_t i = at + t * d + c;
        const auto [lo, hi] = std::minmax_element(v.begin() + long(i), v.begin() + long(i + width));
        for (size_t j = i; j < i + width; ++j) {
          cells.v_lo[j] = *lo;
          cells.v_hi[j] = *hi;
          cells.v_step[j] = v[j] == *lo || v[j] == *hi
                                ? 0
                                : served.value_step[t * size_t(f.value_groups) + c / width];
        }
      }
    }
  }
  return cells;
}

// The original furthest in `direction` within the cell; `now` where there is none.
uint16_t end_of_cell(DType dtype, uint16_t now, double served, double step, double lo, double hi,
                     double direction) {
  if (step == 0 || direction == 0) return now;
  const double bottom = std::max(served - kReach * step, lo),
               top = std::min(served + kReach * step, hi);
  const double end = direction > 0 ? top : bottom;
  uint16_t bits = oracle::encode(dtype, end);
  const double got = oracle::decode(dtype, bits);
  if (direction > 0 ? got > end : got < end) {  // rounded out of the cell: the neighbour within
    if (got == 0) return now;                   // its neighbours are subnormal: leave it
    bits = uint16_t((got > 0) == (direction > 0) ? bits - 1 : bits + 1);
  }
  const double x = oracle::decode(dtype, bits);
  return bottom <= x && x <= top ? bits : now;
}

struct Softmax {
  Vector weight, out;
};

Softmax attend(const Vector& k, const Vector& v, size_t d, const float* q) {
  const size_t n = k.size() / d;
  Softmax r{Vector(n), Vector(d)};
  double m = -INFINITY, z = 0;
  for (size_t t = 0; t < n; ++t) {
    double s = 0;
    for (size_t c = 0; c < d; ++c) s += double(q[c]) * k[t * d + c];
    r.weight[t] = s / std::sqrt(double(d));
    m = std::max(m, r.weight[t]);
  }
  for (double& w : r.weight) z += w = std::exp(w - m);
  for (size_t t = 0; t < n; ++t) {
    r.weight[t] /= z;
    for (size_t c = 0; c < d; ++c) r.out[c] += r.weight[t] * v[t * d + c];
  }
  return r;
}

double norm(const Vector& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

Vector difference(const Vector& a, const Vector& b) {
  Vector out(a.size());
  for (size_t i = 0; i < a.size(); ++i) out[i] = a[i] - b[i];
  return out;
}

// Direction in which weighted values spread most: a few steps of the power method.
Vector widest(const Softmax& served, const Vector& v) {
  const size_t d = served.out.size();
  Vector g(d, 1.0);
  for (int step = 0; step < 4; ++step) {
    Vector next(d, 0.0);
    for (size_t t = 0; t < served.weight.size(); ++t) {
      double along = 0;
      for (size_t c = 0; c < d; ++c) along += g[c] * (v[t * d + c] - served.out[c]);
      for (size_t c = 0; c < d; ++c)
        next[c] += served.weight[t] * along * (v[t * d + c] - served.out[c]);
    }
    const double size = norm(next);
    if (!(size > 0) || !std::isfinite(size)) return g;
    for (size_t c = 0; c < d; ++c) g[c] = next[c] / size;
  }
  return g;
}

// Heaviest first, each value goes to the lighter side of the widest direction.
void flip_values(const Softmax& served, const Vector& v, oracle::Originals* x) {
  const size_t d = served.out.size();
  const Vector g = widest(served, v);
  std::vector<size_t> order(served.weight.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return served.weight[a] > served.weight[b]; });
  double above = 0, below = 0;
  for (size_t t : order) {
    double along = 0;
    for (size_t c = 0; c < d; ++c) along += g[c] * v[t * d + c];
    const bool wants_above = above <= below;
    (wants_above ? above : below) += served.weight[t];
    if ((along >= 0) == wants_above) continue;
    for (size_t c = 0; c < d; ++c) x->v[t * d + c] ^= 0x8000;
  }
}

}  // namespace

AttackResult attack(const PageFormat& format, const Attack& how, const float* q,
                    oracle::Originals* x) {
  const size_t d = size_t(format.head_dim);
  Cells cells = read_cells(format, *x);
  Softmax served = attend(cells.k, cells.v, d, q);
  AttackResult result;
  if (how.flip_values) {
    flip_values(served, cells.v, x);
    cells = read_cells(format, *x);
    served = attend(cells.k, cells.v, d, q);
  }
  const auto error_of = [&](const oracle::Originals& y) {
    return difference(attend(decode_all(y.dtype, y.k), decode_all(y.dtype, y.v), d, q).out,
                      served.out);
  };
  const oracle::Originals start = *x;
  const Vector own = error_of(start);
  result.before = result.after = norm(own);
  for (Vector g : {own, widest(served, cells.v)}) {
    oracle::Originals y = start;
    for (int round = 0; round < how.rounds; ++round) {
      for (size_t t = 0; t < y.tokens(); ++t) {
        if (!cells.coded[t]) continue;
        double side = 0;  // of the token's value, seen from the output
        for (size_t c = 0; c < d; ++c) side += g[c] * (cells.v[t * d + c] - served.out[c]);
        for (size_t i = t * d; i < (t + 1) * d; ++i) {
          const double along = g[i - t * d];
          y.k[i] = end_of_cell(y.dtype, start.k[i], cells.k[i], cells.k_step[i], cells.k_lo[i],
                               cells.k_hi[i], side * double(q[i - t * d]));
          y.v[i] = end_of_cell(y.dtype, start.v[i], cells.v[i], cells.v_step[i], cells.v_lo[i],
                               cells.v_hi[i], along);
        }
      }
      const Vector error = error_of(y);
      const double size = norm(error);
      if (!(size > 0) || !std::isfinite(size)) break;
      if (size > result.after) {
        result.after = size;
        *x = y;
      }
      for (size_t c = 0; c < d; ++c) g[c] = error[c] / size;
    }
  }
  const Cells now = read_cells(format, *x);
  for (size_t t = 0; t < x->tokens(); ++t) {
    if (!cells.coded[t]) continue;
    result.codes += 2 * d;
    for (size_t i = t * d; i < (t + 1) * d; ++i)
      result.changed += size_t(now.k[i] != cells.k[i]) + size_t(now.v[i] != cells.v[i]);
  }
  return result;
}

}  // namespace certkv
