#include "tests/support/attention_cases.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace certkv {

const char* shape_name(Shape shape) {
  constexpr std::array<const char*, kShapes> kNames = {
      "Random",           "OutlierChannels", "Sink",          "NearDuplicates", "CommonMean",
      "ConstantChannels", "Denormals",       "Huge",          "ZeroValues",     "GridValues",
      "UnweightedGiant",  "OutlierTokens",   "OppositeTwins", "Opposed",        "FlushedRivals"};
  return kNames[size_t(shape)];
}

std::string AttentionCase::describe() const {
  return fmt::format(
      "{} seed {} {} {} d {} block {} heads {} tokens {} steps {} quotas {} {} q {} policy {} "
      "tolerance {} {} attack {}{}",
      shape_name(shape), seed, layout, dtype == DType::BF16 ? "BF16" : "F16", head_dim,
      block_tokens, heads, tokens, steps, key_quota, value_quota, q_scale, int(rules.policy),
      rules.tolerance.value, rules.tolerance.is_relative ? "relative" : "absolute", attack.rounds,
      attack.flip_values ? " flipped" : "");
}

AttentionCase draw_case(Shape shape, uint64_t seed) {
  std::mt19937_64 random(seed * 1000003 + uint64_t(shape));
  const auto pick = [&](auto... options) {
    const std::array list{options...};
    return list[random() % list.size()];
  };
  AttentionCase c;
  c.seed = seed;
  c.shape = shape;
  // In turn rather than by chance, so that few cases reach every pair of layout and head_dim, and
  // of layout and policy.
  const uint64_t all = layouts().size();
  c.layout = layouts()[seed % all].name;
  c.dtype = pick(DType::F16, DType::BF16);
  c.head_dim = std::array{64, 96, 128, 256}[seed / all % 4];
  c.block_tokens = pick(16, 32);
  c.heads = pick(1, 2, 3, 4, 5, 7, 8);
  // Every length from 1 to 300 comes up; half of them lie at the edges of blocks and groups.
  const size_t edge = 16 * (1 + random() % 18) + random() % 3 - 1;
  c.tokens = pick(size_t(1 + random() % 300), edge);
  if (seed % 37 == 0) c.tokens = pick(size_t(1023), size_t(1024), size_t(1025));
  if (seed % 97 == 13) c.tokens = 4096;
  c.steps = c.tokens > 2000 ? 2 : 4;
  c.key_quota = pick(size_t(0), size_t(1), size_t(2), size_t(8), size_t(4096));
  c.value_quota = pick(size_t(0), size_t(1), size_t(2), size_t(8), size_t(4096));
  c.q_scale =
      pick(0.1f, 1.0f, 3.0f, 12.0f, 0.1f, 1.0f, 3.0f, 12.0f, 300.0f);  // 300: Delta of 20 to 90
  c.rules.policy = std::array{Policy::Budget, Policy::Paper,  Policy::Budget,
                              Policy::Naive,  Policy::Budget, Policy::Dense}[seed / all % 6];
  c.rules.tolerance.is_relative = random() % 3 != 0;
  c.rules.tolerance.value =
      c.rules.tolerance.is_relative ? pick(0.005, 0.02, 0.05, 0.2) : pick(0.01, 0.1, 1.0, 1e18);
  c.rules.ladder.ranking = pick(-1, -1, 1, 3);
  c.rules.ladder.exploration = pick(0.0, 0.0, 0.1);
  c.rules.ladder.max_share = pick(0.25, 0.25, 1.0);
  c.rules.paper.value_rule = pick("local", "greedy");
  c.rules.exploration_seed = seed;
  c.rules.skip.share = pick(0.0, 0.1, 0.5);
  const bool opposed = shape == Shape::Opposed, rivals = shape == Shape::FlushedRivals;
  if (rivals) c.q_scale = random() % 2 == 0 ? 88.0f : float(20 + random() % 68);  // see RowMaker
  if (opposed || rivals || random() % 4 == 0) c.attack = {.rounds = 4, .flip_values = opposed};
  return c;
}

RowMaker::RowMaker(const AttentionCase& c) : c_(c), random_(c.seed * 7919 + 17) {
  const size_t d = size_t(c.head_dim);
  for (size_t i = 0; i < d; ++i) {
    key_mean_.push_back(normal());
    value_mean_.push_back(normal());
    pattern_.push_back(random_() % 2 == 0 ? 1 : -1);
  }
  for (size_t i = 0; i < size_t(c.heads) * d; ++i) q_.push_back(float(normal()) * c.q_scale);
  if (c.shape ==
      Shape::FlushedRivals) {  // keys between -1 and 1 in 255 steps: D_b shall be q_scale
    double size = 0;
    for (size_t i = 0; i < d; ++i) size += std::abs(q_[i]);
    for (float& x : q_) x *= float(c.q_scale * 255 * std::sqrt(double(d)) / size);
  }
  for (size_t i = 0; i < d; ++i) q_norm2_ += double(q_[i]) * q_[i];
  std::vector<size_t> order(d);
  std::iota(order.begin(), order.end(), size_t(0));
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return std::abs(q_[a]) > std::abs(q_[b]); });
  balanced_.resize(d);
  double sum = 0;  // of the larger terms: each smaller one brings it back towards 0
  for (size_t i : order) {
    balanced_[i] = sum * q_[i] > 0 ? -1 : 1;
    sum += balanced_[i] * q_[i];
  }
}

uint16_t RowMaker::bits(double x) const {
  const double largest = c_.dtype == DType::BF16 ? 3e38 : 65504;
  return oracle::encode(c_.dtype, std::clamp(x, -largest, largest));
}

void RowMaker::append(size_t tokens, oracle::Originals* x) {
  const bool bf16 = c_.dtype == DType::BF16;
  const double tiny = bf16 ? 1e-39 : 3e-7, huge = bf16 ? 1e20 : 3e4;
  for (size_t n = 0; n < tokens; ++n, ++made_) {
    const size_t family = random_() % 3;
    const double side = random_() % 2 == 0 ? 1 : -1;
    const bool newest = made_ >= c_.tokens / 64 * 64;  // open under scale groups of 64
    const double above = 86 + 0.1 * double(random_() % 25);
    for (int c = 0; c < c_.head_dim; ++c) {
      const auto i = size_t(c);
      double k = normal(), v = normal();
      switch (c_.shape) {
        case Shape::Random:
          break;
        case Shape::OutlierChannels:
          if (c % 29 == 3) k *= 50;
          if (c % 31 == 5) v *= 50;
          break;
        case Shape::Sink:
          if (made_ == 0) k = 6.0 * q_[i] / (c_.q_scale * c_.q_scale);
          break;
        case Shape::NearDuplicates:
          k = key_mean_[(i + 11 * family) % key_mean_.size()] + 0.01 * k;
          v = value_mean_[(i + 11 * family) % value_mean_.size()] + 0.01 * v;
          break;
        case Shape::CommonMean:
          v = (bf16 ? 30 : 1000) * value_mean_[i] + v;
          break;
        case Shape::ConstantChannels:
          if (c % 3 == 0) k = key_mean_[i];
          if (c / 16 % 2 == 0) v = value_mean_[i / 16];
          break;
        case Shape::Denormals:
          if (c % 2 == 0) k *= tiny;
          v *= tiny;
          break;
        case Shape::Huge:
          v *= huge;
          if (c % 17 == 2) k *= 100;
          break;
        case Shape::ZeroValues:
          v = 0;
          break;
        case Shape::GridValues:
          v = family == 0 ? 15 * pattern_[i] : 0;
          break;
        case Shape::UnweightedGiant:
          v = family == 0 ? 15 * std::abs(pattern_[i]) : 0;
          if (made_ == 0) {
            k = -40.0 * q_[i] / (c_.q_scale * c_.q_scale);
            v = (bf16 ? 1e30 : 6e4);
          }
          break;
        case Shape::OutlierTokens:
          if (made_ % 13 == 5) {
            k *= 20;
            v *= 50;
          }
          break;
        case Shape::OppositeTwins:
          k = key_mean_[(i + 11 * family) % key_mean_.size()] + 0.01 * k;
          v = side * value_mean_[i];
          break;
        case Shape::FlushedRivals: {
          if (newest) {
            k = above * std::sqrt(double(c_.head_dim)) * q_[i] / q_norm2_;
          } else {  // near the middle of a cell, but for two tokens of each group at the range's
                    // ends
            const double edge = made_ % 16 == 0 ? 1 : made_ % 16 == 1 ? -1 : 0;
            k = edge != 0 ? edge * balanced_[i] : balanced_[i] / 255 + 0.0005 * k;
          }
          break;
        }
        case Shape::Opposed:
          v = side * pattern_[i] + 0.1 * v;
          break;
      }
      x->k.push_back(bits(k));
      x->v.push_back(bits(v));
    }
  }
}

std::vector<float> RowMaker::query() {
  std::vector<float> now = q_;
  if (c_.shape == Shape::FlushedRivals) return now;  // scores of 100 and more would drift apart
  for (float& x : now) x += 0.1f * c_.q_scale * float(normal());
  return now;
}

oracle::Claim claim_of(const StepRules& rules, const HeadReport& report) {
  using Kind = oracle::Claim::Kind;
  oracle::Claim claim;
  switch (report.outcome) {
    case Outcome::Certified:
      claim.kind = Kind::Certified;
      break;
    case Outcome::Exact:
      claim.kind = Kind::Exact;
      break;
    case Outcome::Over:
      claim.kind = Kind::Over;
      break;
    case Outcome::Failed:
      claim.kind = Kind::Failed;
      break;
  }
  claim.bound = report.returned.bound;
  claim.s = report.returned.s;
  claim.enforces = rules.policy == Policy::Budget || rules.policy == Policy::Dense;
  claim.relative = rules.tolerance.is_relative;
  claim.tolerance = rules.tolerance.value;
  return claim;
}

CaseResult run_case(const AttentionCase& c) {
  CaseResult result;
  const auto format = std::make_shared<const PageFormat>(
      make_page_format(layout_by_name(c.layout), c.head_dim, c.block_tokens));
  HeadState state(DeviceTier(format, c.dtype, std::make_shared<TierAccount>()), c.key_quota,
                  c.value_quota);
  RowMaker rows(c);
  oracle::Originals x{.dtype = c.dtype, .head_dim = c.head_dim, .k = {}, .v = {}};
  MemoryOriginals originals(x, c.block_tokens);
  const size_t d = size_t(c.head_dim);
  std::vector<float> out(size_t(c.heads) * d);
  for (int step = 0; step < c.steps; ++step) {
    const size_t before = x.tokens();
    rows.append(step == 0 ? c.tokens : 1 + (c.seed + size_t(step)) % 19, &x);
    const std::vector<float> q = rows.query();
    if (step == 0 && c.attack.rounds > 0) result.attack = attack(*format, c.attack, q.data(), &x);
    state.tier.append(x.k.data() + before * d, x.v.data() + before * d, x.tokens() - before, {});
    const StepWhere where{.sequence = int64_t(c.seed), .step = uint64_t(step)};
    GroupReport report;
    head_step(c.rules, where, c.heads, q.data(), &state, originals, out.data(), nullptr, &report);
    result.learned += report.f_blocks + report.x_blocks;
    result.skipped += report.skipped_blocks;
    if (report.broken) {
      ++result.broken;
      dense_step(where, c.heads, (1u << c.heads) - 1, 4, q.data(), &state, originals, out.data(),
                 nullptr, &report);
    }
    for (int h = 0; h < c.heads; ++h) {
      const HeadReport& r = report.heads[size_t(h)];
      ++result.head_steps;
      result.promoted += r.rung == 1 || r.rung == 2;
      switch (r.outcome) {
        case Outcome::Certified:
          ++result.certified;
          break;
        case Outcome::Exact:
          ++result.exact;
          break;
        case Outcome::Over:
          ++result.over;
          break;
        case Outcome::Failed:
          ++result.failed;
          break;
      }
      const oracle::Exact exact = oracle::attention(x, x.tokens(), q.data() + size_t(h) * d);
      const oracle::Verdict v =
          oracle::check(exact, {out.data() + size_t(h) * d, d}, claim_of(c.rules, r));
      const auto violated = [&](std::string_view why) {
        result.violations.push_back(
            fmt::format("{} step {} head {} rung {}: {}", c.describe(), step, h, r.rung, why));
      };
      if (!v.holds) violated(v.why);
      if ((r.outcome == Outcome::Exact) != (r.rung >= 3) && r.outcome != Outcome::Failed)
        violated("exact goes with rungs 3 and 4, and with no others");
      if (r.outcome != Outcome::Failed && std::isfinite(r.returned.bound) && r.returned.bound > 0)
        (r.outcome == Outcome::Exact ? result.use_exact : result.use_coded)
            .push_back(float(v.error / r.returned.bound));
    }
  }
  return result;
}

}  // namespace certkv
