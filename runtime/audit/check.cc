#include "runtime/audit/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/simd.h"

namespace certkv::audit {
namespace {

constexpr double kUnit = 0x1p-24;  // u of FP32
// Rounding of float64 itself: sums of at most 2^12 terms of one sign, each rounded 2^-53 relative.
constexpr double kDouble = 0x1p-40;

// Norms of values are stored as 16 bits of their group's largest, rounded down (2^-16), and those
// of originals computed in FP32 with a margin below 2^-17 (method 12, S).
constexpr double kNormStep = 0x1p-15;

// method 4b
double gamma_n(double n) {
  return n * kUnit / (1 - n * kUnit);
}

// ---- loops over tokens --------------------------------------------------------------------------

using Double8 = double __attribute__((vector_size(64)));
using Code8 = uint16_t __attribute__((vector_size(16)));
template <typename V>
CERTKV_SIMD V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
CERTKV_SIMD double sum(const Double8& v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
CERTKV_SIMD Double8 widen(const float* p) {
  return __builtin_convertvector(load<Float8>(p), Double8);
}
CERTKV_SIMD Double8 widen(const uint16_t* p) {
  return __builtin_convertvector(__builtin_convertvector(load<Code8>(p), Int8x32), Double8);
}

// scores[t] = base + q . x_t
CERTKV_CPU_VERSIONS void dot_rows(const double* q, const float* x, size_t n, size_t d,
                                  double* scores) {
  for (size_t t = 0; t < n; ++t) {
    Double8 s{};
    for (size_t c = 0; c < d; c += 8) s += load<Double8>(q + c) * widen(x + t * d + c);
    scores[t] = sum(s);
  }
}
CERTKV_CPU_VERSIONS void dot_codes(const double* q, const uint16_t* x, size_t n, size_t d,
                                   double base, double* scores) {
  for (size_t t = 0; t < n; ++t) {
    Double8 s{};
    for (size_t c = 0; c < d; c += 8) s += load<Double8>(q + c) * widen(x + t * d + c);
    scores[t] = base + sum(s);
  }
}
CERTKV_CPU_VERSIONS void weigh_rows(const double* w, const float* x, size_t n, size_t d,
                                    double* out) {
  for (size_t t = 0; t < n; ++t) {
    if (w[t] == 0) continue;
    for (size_t c = 0; c < d; c += 8) {
      const Double8 o = load<Double8>(out + c) + w[t] * widen(x + t * d + c);
      __builtin_memcpy(out + c, &o, sizeof o);
    }
  }
}
// Squared distance from `from`.
CERTKV_CPU_VERSIONS double row_distance(const float* x, size_t d, const double* from) {
  Double8 s{};
  for (size_t c = 0; c < d; c += 8) {
    const Double8 v = widen(x + c) - load<Double8>(from + c);
    s += v * v;
  }
  return sum(s);
}
CERTKV_CPU_VERSIONS double code_distance(const uint16_t* x, const double* step, const double* base,
                                         size_t group, size_t d, const double* from) {
  Double8 s{};
  for (size_t c = 0; c < d; c += 8) {
    const Double8 v = base[c / group] + step[c / group] * widen(x + c) - load<Double8>(from + c);
    s += v * v;
  }
  return sum(s);
}

// max(x, 0) that keeps NaN.
double positive(double x) {
  return x > 0 ? x : (x <= 0 ? 0 : std::numeric_limits<double>::quiet_NaN());
}

double norm(const std::vector<double>& x) {
  double s = 0;
  for (double v : x) s += v * v;
  return std::sqrt(s);
}

// ---- one head-step ------------------------------------------------------------------------------

constexpr uint8_t kCertified = 0, kExact = 1, kFailed = 2, kOver = 3;
constexpr uint8_t kKey = 1, kValue = 2, kSkipped = 4;

// A block as the head used it, recomputed.
struct BlockTerms {
  size_t first = 0, count = 0;  // tokens
  bool quantised = false;       // a stored form exists
  double delta = 0;             // Delta_b of method 3: D_b + g_b + eps_w
  double kappa = 0;             // how far log weights and masses may be off by rounding
  double eta = 0, nu = 0;
  double bar = 0;  // what a value passes through while it is summed: vbar_b of codes, else nu_b
  double top = 0, sum = 0;  // weights used: exp(score - top), their sum
  double exact_gap = 0;     // largest |s_t - s^_t|
};

class Checker {
 public:
  Checker(const FileHeader& file, const StreamInfo& stream, const HeadRows& x, const Record& record,
          size_t head, const Report& violation)
      : file_(file),
        stream_(stream),
        x_(x),
        r_(record),
        h_(record.heads[head]),
        report_(violation),
        d_(size_t(file.layout.head_dim)),
        n_(size_t(record.head.tokens)),
        inv_(1 / std::sqrt(double(d_))) {}

  HeadResult run();

 private:
  void expect(bool holds, const char* rule, const std::string& text) {
    if (!holds) report_(rule, text);
  }
  void rules();
  double query_loss(double largest) const;
  void scores();
  void blocks();
  double true_error();
  double served_distance(size_t t) const;
  void masses();
  void bound();
  uint8_t used(size_t b) const { return h_.used[b]; }

  const FileHeader& file_;
  const StreamInfo& stream_;
  const HeadRows& x_;
  const Record& r_;
  const HeadRecord& h_;
  const Report& report_;
  const size_t d_, n_;
  const double inv_;
  std::vector<double> q_, o_;
  double q_norm_ = 0, o_norm_ = 0;
  std::vector<BlockTerms> blocks_;
  std::vector<double> exact_, used_score_;  // [tokens]
  double k_max_ = 0;
  double output_gamma_ = 0;  // rounding of sums over all tokens
  HeadResult result_;
};

// What each outcome and rung promises. SOURCE: method sections 1 and 5.
void Checker::rules() {
  const HeadFigures& f = h_.figures;
  const uint8_t outcome = h_.head.outcome, rung = h_.head.rung;
  const double limit = stream_.tolerance * (stream_.relative ? f.s_lo : 1.0);
  const bool enforces = stream_.policy == "budget" || stream_.policy == "dense";
  expect(rung <= 4, "rung", fmt::format("rung {}", rung));
  if (outcome == kCertified) {
    expect(rung <= 2, "certified", fmt::format("certified on rung {}", rung));
    expect(stream_.policy != "dense", "certified", "policy dense certifies nothing");
    expect(f.bound <= limit, "certified",
           fmt::format("bound {} above the tolerance {}", f.bound, limit));
  } else if (outcome == kExact) {
    expect(rung == 3 || rung == 4, "exact", fmt::format("exact on rung {}", rung));
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (used(b) != (kKey | kValue)) {
        expect(false, "exact", fmt::format("block {} is not from originals ({})", b, used(b)));
        break;
      }
    expect(std::isfinite(f.bound), "exact", fmt::format("bound {}", f.bound));
  } else if (outcome == kOver) {
    expect(!enforces, "over", fmt::format("policy {} returned over", stream_.policy));
    expect(rung <= 2, "over", fmt::format("over on rung {}", rung));
    expect(!(f.bound <= limit), "over",
           fmt::format("bound {} is within the tolerance {}", f.bound, limit));
  }
  if (stream_.policy == "naive") {
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (rung == 0 && blocks_[b].quantised && used(b) != 0) {
        expect(false, "naive", fmt::format("block {} uses originals", b));
        break;
      }
  }
  if (rung == 0)
    expect(h_.head.promoted_keys == 0 && h_.head.promoted_values == 0, "rung",
           "promotions on rung 0");
  // A device promotes for a KV head and counts it once.
  uint64_t keys = h_.head.promoted_keys, values = h_.head.promoted_values;
  if (x_.rules().device) {
    keys = values = 0;
    for (const HeadRecord& h : r_.heads) {
      keys += h.head.promoted_keys;
      values += h.head.promoted_values;
    }
  }
  if (rung == 1) expect(keys > 0 && values == 0, "rung", "rung 1 without keys, or with values");
  if (rung == 2) expect(values > 0, "rung", "rung 2 without values");
}

// How far scores of codes may be off because q step / sqrt(d), whose largest channel is given, was
// rounded to integers: a channel by half a level, and by what computing the level in FP32 adds to
// that (query_levels times 4u); codes are taken about their middle. A statement about the backend:
// Delta_b as charged holds it, what is due here does not.
double Checker::query_loss(double largest) const {
  if (file_.query_levels == 0 || x_.rules().key.read_residual) return 0;
  constexpr double kTinyQuery = 0x1p-99;  // below about this, a backend may take the query for 0
  const double level =
      std::max(largest / file_.query_levels * (0.5 + 4 * kUnit * file_.query_levels),
               largest < kTinyQuery ? largest : 0);
  return 0.5 * double(x_.key_levels() + 1) * double(d_) * level;
}

// Scores as used, and exact; the terms of Delta_b. SOURCE: method D1 and section 3.
void Checker::scores() {
  const LayoutRules& l = x_.rules();
  const size_t group_tokens = size_t(l.group_tokens), block = size_t(l.block_tokens);
  exact_.resize(n_);
  used_score_.resize(n_);
  std::vector<double> scaled(d_);
  for (size_t c = 0; c < d_; ++c) scaled[c] = q_[c] * inv_;
  dot_rows(scaled.data(), x_.k.data(), n_, d_, exact_.data());
  for (size_t t = 0; t < n_; ++t) k_max_ = std::max(k_max_, x_.k_norm(t));

  std::vector<double> q_step(d_);
  double base = 0, sum_step = 0, sum_bound = 0, lost = 0;
  size_t prepared = std::numeric_limits<size_t>::max();
  for (size_t b = 0; b < blocks_.size(); ++b) {
    BlockTerms& t = blocks_[b];
    t.first = b * block;
    t.count = std::min(block, n_ - t.first);
    const size_t group = t.first / group_tokens;
    t.quantised =
        (group + 1) * group_tokens <= n_ - (l.device ? 1 : 0) && x_.groups[group].quantised;
    double k_norm = 0;
    for (size_t i = t.first; i < t.first + t.count; ++i) {
      k_norm = std::max(k_norm, x_.k_norm(i));
      t.nu = std::max(t.nu, x_.v_norm(i));
    }
    if (t.quantised && (used(b) & kKey) == 0) {
      if (prepared != group) {
        prepared = group;
        base = sum_step = sum_bound = 0;
        double largest = 0;
        for (size_t c = 0; c < d_; ++c) {
          const double step = x_.k_step[group * d_ + c], offset = x_.k_base[group * d_ + c];
          q_step[c] = scaled[c] * step;
          base += scaled[c] * offset;
          sum_step += std::abs(scaled[c]) * step;
          largest = std::max(largest, std::abs(scaled[c]) * step);
          sum_bound += std::abs(scaled[c]) * (std::abs(offset) + x_.key_levels() * step);
        }
        lost = query_loss(largest);
      }
      dot_codes(q_step.data(), x_.k_code.data() + t.first * d_, t.count, d_, base,
                used_score_.data() + t.first);
      const HeadRows::Block& stored = x_.blocks[b];
      const double d_b = std::min(stored.kappa * sum_step, q_norm_ * inv_ * stored.e);
      const double g_b = gamma_n(file_.chain_codes) * sum_bound;
      t.delta = d_b + g_b + file_.eps_w;
      t.kappa = g_b + lost + file_.eps_w + output_gamma_;
      for (size_t i = t.first; i < t.first + t.count; ++i)
        t.exact_gap = std::max(t.exact_gap, std::abs(exact_[i] - used_score_[i]));
    } else {
      std::copy_n(exact_.data() + t.first, t.count, used_score_.data() + t.first);
      const double g_b = gamma_n(file_.chain_originals) * q_norm_ * inv_ * k_norm;
      t.delta = g_b + file_.eps_w;
      t.kappa = g_b + file_.eps_w + output_gamma_;
    }
    t.bar = t.nu;
    if (t.quantised && (used(b) & kValue) == 0) {
      const bool skipped = (used(b) & kSkipped) != 0;  // method E6: the values counted as 0
      t.eta = skipped ? t.nu : x_.blocks[b].eta;
      t.bar = skipped ? 0 : x_.blocks[b].vbar;
    }
    t.top = *std::max_element(used_score_.begin() + long(t.first),
                              used_score_.begin() + long(t.first + t.count));
    for (size_t i = t.first; i < t.first + t.count; ++i) t.sum += std::exp(used_score_[i] - t.top);
  }
}

// What was charged for each block covers what it must: the first block that does not is named.
void Checker::blocks() {
  const auto first = [&](const char* rule, auto&& holds, auto&& text) {
    for (size_t b = 0; b < blocks_.size(); ++b)
      if (!holds(b)) return expect(false, rule, fmt::format("block {}: {}", b, text(b)));
  };
  first(
      "sources",
      [&](size_t b) {
        const bool skipped = (used(b) & kSkipped) != 0;
        if (skipped && stream_.policy != "budget") return false;
        return blocks_[b].quantised ? used(b) <= (skipped ? kKey | kSkipped : kKey | kValue)
                                    : used(b) == (kKey | kValue);
      },
      [&](size_t b) { return fmt::format("used {} cannot be", used(b)); });
  // Annotations are rounded up; float64's own error is kDouble.
  first(
      "delta", [&](size_t b) { return h_.delta[b] >= blocks_[b].delta * (1 - kDouble); },
      [&](size_t b) {
        return fmt::format("Delta {} was charged, {} is due", h_.delta[b], blocks_[b].delta);
      });
  // The promise itself, whatever formula it came from. g_b holds float64's error many times.
  first(
      "score error", [&](size_t b) { return blocks_[b].exact_gap <= h_.delta[b]; },
      [&](size_t b) {
        return fmt::format("Delta {} was charged, a score is off by {}", h_.delta[b],
                           blocks_[b].exact_gap);
      });
  first(
      "eta", [&](size_t b) { return h_.eta[b] >= blocks_[b].eta * (1 - kDouble); },
      [&](size_t b) {
        return fmt::format("eta {} was charged, {} is due", h_.eta[b], blocks_[b].eta);
      });
  first(
      "nu", [&](size_t b) { return r_.nu[b] >= blocks_[b].nu * (1 - kDouble); },
      [&](size_t b) {
        return fmt::format("nu {} was charged, {} is due", r_.nu[b], blocks_[b].nu);
      });
}

// ||O_ref - O||, less what float64 itself may be off by.
double Checker::true_error() {
  const double m = *std::max_element(exact_.begin(), exact_.end());
  std::vector<double> w(n_), exact(d_, 0.0);
  double z = 0, mean_norm = 0;
  for (size_t t = 0; t < n_; ++t) z += w[t] = std::exp(exact_[t] - m);
  for (size_t t = 0; t < n_; ++t) mean_norm += w[t] * x_.v_norm(t);
  weigh_rows(w.data(), x_.v.data(), n_, d_, exact.data());
  double error2 = 0;
  for (size_t c = 0; c < d_; ++c) {
    const double e = exact[c] / z - o_[c];
    error2 += e * e;
  }
  // n + d roundings of sums, and weights off by the scores' rounding (d terms of |q||k|).
  const double own =
      0x1p-52 * (double(n_ + d_) + double(d_) * q_norm_ * inv_ * k_max_) * (mean_norm / z);
  return positive(std::sqrt(error2) - own);
}

// The recorded masses are those of the data used. A weight is exp of a score that is off by at most
// g_b, itself off by eps_w, and so is the sum of all; sums are off by output_gamma_.
void Checker::masses() {
  double top = -std::numeric_limits<double>::infinity(), z = 0, kappa = 0, total = 0;
  for (const BlockTerms& b : blocks_) {
    top = std::max(top, b.top);
    kappa = std::max(kappa, b.kappa);
  }
  for (const BlockTerms& b : blocks_) z += b.sum * std::exp(b.top - top);
  const double flush = 2 * double(n_) * file_.exp_absolute;  // weights that became 0
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const BlockTerms& b = blocks_[i];
    const double due = b.sum * std::exp(b.top - top) / z, slack = b.kappa + kappa + kDouble;
    total += h_.mass[i];
    if (h_.mass[i] <= due * std::exp(slack) + flush && h_.mass[i] >= due * std::exp(-slack) - flush)
      continue;
    return expect(false, "mass",
                  fmt::format("block {}: mass {} was recorded, {} is due (+- {})", i, h_.mass[i],
                              due, due * std::expm1(slack)));
  }
  expect(std::abs(total - 1) <= 2 * output_gamma_ + kDouble, "mass",
         fmt::format("the masses sum to {}", total));
}

// ||v^_t - O||^2 of a value served from its codes.
double Checker::served_distance(size_t t) const {
  if (x_.rules().device) return row_distance(x_.v_served.data() + t * d_, d_, o_.data());
  const size_t width = size_t(x_.rules().value_group), at = t * (d_ / width);
  return code_distance(x_.v_code.data() + t * d_, x_.v_step.data() + at, x_.v_base.data() + at,
                       width, d_, o_.data());
}

// E1, E2, E3 and E4 from recorded masses and charges, which were found to be what is due or more,
// and recomputed vectors: lower bounds of what the record must state. SOURCE: method sections 4,
// 4b.
void Checker::bound() {
  const HeadFigures& f = h_.figures;
  // T, quantised keys: E2. The others enter by their masses and norms alone.
  double s = 0, h2 = 0, by_sum = 0, originals = 0, m2 = 0;
  double den = 0, e_val = 0, passed = 0, flushed = 0;
  double s_up = 0, s_down = 0, nu_max = 0, eta_max = 0;
  const double top =
      std::max_element(blocks_.begin(), blocks_.end(), [](const auto& a, const auto& b) {
        return a.top < b.top;
      })->top;
  constexpr double kSure = -80;      // above this below the top no weight was flushed to 0
  constexpr double kTiny = 0x1p-46;  // lighter tokens are left out of lower bounds: only for speed
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const BlockTerms& b = blocks_[i];
    const double rho = h_.mass[i], delta = h_.delta[i], eta = h_.eta[i], nu = r_.nu[i];
    const double c = std::expm1(delta);
    const bool in_t = b.quantised && (used(i) & kKey) == 0;
    const bool from_codes = b.quantised && (used(i) & kValue) == 0;
    (in_t ? by_sum : originals) += c * rho * (nu + o_norm_);
    if (in_t) s += c * rho;
    if (in_t) h2 += c * rho * eta * eta;
    den += rho * std::exp(-delta);
    e_val += rho * eta;
    passed += rho * b.bar;
    nu_max = std::max(nu_max, b.nu);
    eta_max = std::max(eta_max, b.eta);
    double block_m2 = 0, block_s = 0, block_low = 0, largest = 0;
    const double norm_step = from_codes ? kNormStep * x_.served_max[i] : 0;
    const bool skipped = from_codes && (used(i) & kSkipped) != 0;
    if (skipped && in_t) block_m2 = o_norm_ * o_norm_;
    for (size_t t = b.first; t < b.first + b.count && !skipped; ++t) {
      const double share = std::exp(used_score_[t] - b.top) / b.sum;
      const double served = from_codes ? x_.served_norm[t] : x_.v_norm(t);
      block_s += share * served;
      block_low += share * std::max(0.0, served * (1 - kNormStep) - norm_step);
      largest = std::max(largest, served);
      if (!in_t || used_score_[t] - top < kSure || share * rho < kTiny) continue;
      block_m2 += share * (from_codes ? served_distance(t)
                                      : row_distance(x_.v.data() + t * d_, d_, o_.data()));
    }
    // Shares within a block: each weight is off by kappa, and so is their sum.
    const double off = 2 * b.kappa;
    m2 += c * rho * block_m2 * std::exp(-off);
    flushed += double(b.count) * (1 + c) * file_.exp_absolute;
    const double lost = 2 * double(b.count) * file_.exp_absolute * largest;
    s_up += rho * block_s * std::exp(off) + lost;
    s_down += rho * block_low * std::exp(-off) - lost;
  }
  // R is about O as it was returned: nothing of the output's rounding enters.
  const double by_distance = std::sqrt(s) * (std::sqrt(m2) + std::sqrt(h2));
  const double key = (by_distance <= by_sum ? by_distance : by_sum) + originals;
  // E_acc without its smallest terms.
  const double n_out = file_.chain_output + 2.0 * h_.head.corrections + 3;
  double e_acc = gamma_n(n_out) * (passed + o_norm_) + 3 * kUnit * o_norm_;
  if (h_.head.corrections == 0)  // each weight is 1 at most: what flushed ones may be in truth
    e_acc += flushed / (double(n_) * (1 + gamma_n(n_out))) * (nu_max + eta_max + o_norm_);
  const double due = (1 + 0x1p-10) * (key + e_val + e_acc) / den;
  const double slack = 1 - 4 * kDouble;
  result_.due = due;
  expect(f.bound >= due * slack, "E4",
         fmt::format("bound {} was recorded, {} is due", f.bound, due));
  expect(f.e_key >= key / den * slack, "E2",
         fmt::format("key term {} was recorded, {} is due", f.e_key, key / den));
  expect(f.e_val >= e_val / den * slack, "E1",
         fmt::format("value term {} was recorded, {} is due", f.e_val, e_val / den));
  expect(f.e_acc >= e_acc * slack, "E3",
         fmt::format("E_acc {} was recorded, {} is due", f.e_acc, e_acc));
  expect(f.den <= den / slack, "E2", fmt::format("den {} was recorded, {} is due", f.den, den));

  // The parts make the whole. Sums of doubles: 2^-50.
  const double parts = f.e_key + f.e_val + f.e_fp, size = f.e_key + f.e_val + std::abs(f.e_fp);
  expect(std::abs(parts - f.bound) <= 0x1p-50 * (size + f.bound), "parts",
         fmt::format("the parts sum to {}, the bound is {}", parts, f.bound));
  const double whole = (1 + 0x1p-10) * (f.e_key + f.e_val + f.e_acc / f.den);
  expect(f.bound >= whole * (1 - 0x1p-48), "E4",
         fmt::format("bound {} was recorded, its own parts make {}", f.bound, whole));
  expect(f.relative == (f.bound == 0 && f.s == 0 ? 0 : f.bound / f.s), "relative",
         fmt::format("relative {} of bound {} and S {}", f.relative, f.bound, f.s));
  expect(f.out_norm >= o_norm_ * (1 - kDouble), "norm",
         fmt::format("||O|| {} was recorded, it is {}", f.out_norm, o_norm_));

  // E5 with S recomputed, as large as rounding allows it to have been.
  result_.s = s_up;
  expect(f.s_lo <= s_up * (1 + kDouble), "S",
         fmt::format("S of at least {} was recorded, it is at most {}", f.s_lo, s_up));
  // S may be too small, but not by more than norms and sums are rounded down, and than what
  // vanishes: the squares of a norm lose 2^-149 each beside the largest value, which is near 1 in
  // the pass's unit; numbers near FP32's smallest are none.
  constexpr double kVanish = 0x1p-69;  // of the largest norm; sqrt(256 * 2^-149), twice
  const double rounding = 2 * gamma_n(n_out + 16);
  s_down = s_down * (1 - rounding) - (kVanish * nu_max + 0x1p-120);
  if (h_.head.corrections > 0) s_down -= rounding * 8 * (nu_max + eta_max);
  expect(f.s >= s_down, "S", fmt::format("S {} was recorded, it is at least {}", f.s, s_down));
  if (h_.head.outcome == kCertified) {
    const double limit = stream_.tolerance * (stream_.relative ? s_up : 1.0);
    expect(f.bound <= limit * (1 + kDouble), "E5",
           fmt::format("certified with bound {} above the tolerance {}", f.bound, limit));
  }
}

HeadResult Checker::run() {
  const HeadFigures& f = h_.figures;
  result_.outcome = outcome_text(h_.head.outcome);
  if (h_.head.outcome > kOver) {
    expect(false, "outcome", fmt::format("outcome {}", h_.head.outcome));
    return result_;
  }
  const auto widened = [](const std::vector<float>& from) {
    return std::vector<double>(from.begin(), from.end());
  };
  q_ = widened(h_.q);
  o_ = widened(h_.out);
  q_norm_ = norm(q_);
  o_norm_ = norm(o_);
  if (h_.head.outcome == kFailed) {
    expect(o_norm_ == 0, "failed", "an output was returned with outcome failed");
    return result_;
  }
  // A pass is run again once more than 8 times its mass went through it (method 4b): the rounding
  // of what was removed stays.
  output_gamma_ = (h_.head.corrections > 0 ? 8 : 1) * gamma_n(file_.chain_output + 3);
  blocks_.resize(r_.head.blocks);
  scores();
  rules();
  blocks();
  // A bound that is not finite says that nothing is known: only `over` may return one.
  result_.bound = f.bound;
  result_.has_bound = std::isfinite(f.bound);
  if (!result_.has_bound) {
    expect(h_.head.outcome == kOver, "bound", fmt::format("bound {}", f.bound));
    return result_;
  }
  result_.error = true_error();
  expect(result_.error <= f.bound, "error",
         fmt::format("the true error {} exceeds the bound {}", result_.error, f.bound));
  masses();
  bound();
  return result_;
}

}  // namespace

HeadResult check_head(const FileHeader& file, const StreamInfo& stream, const HeadRows& x,
                      const Record& record, size_t head, const Report& violation) {
  return Checker(file, stream, x, record, head, violation).run();
}

// The counter-based choice of runtime/AUDIT.md.
bool must_be_recorded(const FileHeader& file, int64_t request, uint32_t layer, uint32_t kv_head,
                      uint64_t tokens) {
  uint64_t x = file.seed + uint64_t(request) * 0x9e3779b97f4a7c15u;
  for (uint64_t part : {tokens, uint64_t(layer) << 32 | kv_head, uint64_t(0x61756474)}) {
    x = (x ^ part) + 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return double(x >> 11) * 0x1p-53 < file.sample;
}

const char* outcome_text(uint8_t outcome) {
  switch (outcome) {
    case kCertified:
      return "certified";
    case kExact:
      return "exact";
    case kFailed:
      return "failed";
    case kOver:
      return "over";
  }
  return "unknown";
}

}  // namespace certkv::audit
