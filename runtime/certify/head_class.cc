#include "runtime/certify/head_class.h"

#include <algorithm>
#include <cmath>

#include "runtime/certify/head_step.h"
#include "runtime/certify/selector.h"

namespace certkv {
namespace {

// A change costs a re-encoding: it must be worth this share of what is read.
constexpr double kWorthwhile = 0.03;
// How far a forecast from one query may be from what steps read, in originals.
constexpr double kMostCalibration = 4;

}  // namespace

const char* class_label(int number) {
  return number == kExactClass ? "exact" : class_layouts()[size_t(number)].data();
}

ClassFormats make_class_formats(int head_dim, int block_tokens) {
  ClassFormats formats;
  for (size_t i = 0; i < formats.size(); ++i)
    formats[i] = std::make_shared<const PageFormat>(
        make_page_format(layout_by_name(class_layouts()[i]), head_dim, block_tokens));
  return formats;
}

PageFormat largest_page_format(const CacheOptions& cache, int head_dim) {
  const std::string_view name =
      cache.layout == kClassesLayout ? class_layouts().back() : std::string_view(cache.layout);
  return make_page_format(layout_by_name(name), head_dim, cache.block_tokens);
}

ClassForecast::ClassForecast(const HeadState& state)
    : state_(state),
      formats_(*state.precision.formats),
      blocks_(state.tier.blocks().size()),
      coded_(double(state.tier.quantised_blocks()) * state.tier.format().block_tokens /
             double(state.tier.tokens())) {
  for (auto& p : promoted_) p.assign(blocks_, 0);
}

// One head under another class: every block from codes, its errors scaled. Returns false where it
// would go to rung 3.
bool ClassForecast::add_head(const StepRules& rules, const ClassRatios& ratios, int now, int number,
                             std::span<const BlockRef> blocks, const PassState& pass, int h,
                             const Certificate& c) {
  const auto n = size_t(number), is = size_t(now);
  const double key = ratios.key[n] / ratios.key[is], value = ratios.value[n] / ratios.value[is];
  std::vector<double> rho;
  block_masses(pass, h, &rho);
  Certificate as = c;
  double s = 0, h2 = 0, e_val = 0;
  as.key_sum = as.den = 0;
  for (size_t b = 0; b < blocks_; ++b) {
    const size_t i = pass.at(h, b);
    if (blocks[b].page != nullptr) {
      scaled_.used[i] = 0;
      scaled_.delta[i] = float(key * double(pass.score_bound[i]) + kEpsW);
      scaled_.c[i] = std::expm1(scaled_.delta[i]);
      scaled_.eta[b] = float(value * double(pass.eta[b]));
    }
    const double weight = double(scaled_.c[i]) * rho[b], eta = double(scaled_.eta[b]);
    s += weight;
    h2 += weight * eta * eta;
    e_val += rho[b] * eta;
    as.key_sum += weight * (double(blocks[b].nu) + c.out_norm);
    as.den += rho[b] * std::exp(-double(scaled_.delta[i]));
  }
  // The spread of the values that R measures is taken to be that of the blocks it was measured on.
  as.r_term = c.s_term > 0 ? c.r_term * std::sqrt(s / c.s_term) : as.key_sum;
  as.s_term = s;
  as.h_term = std::sqrt(h2);
  const double limit =
      rules.tolerance.value * (rules.tolerance.is_relative ? c.s_lo : 1.0) * as.den / kRaise;
  const double key_term = std::min(std::sqrt(s) * (as.r_term + as.h_term), as.key_sum);
  if (key_term + e_val + c.e_acc <= limit) return true;  // certified from codes
  const Promotions p = select_for_budget(scaled_, h, blocks, as, limit, rules.ladder.value_share);
  const double cap = std::ceil(rules.ladder.max_share * double(blocks_));
  if (!p.enough || double(p.keys.size() + p.values.size()) > cap ||
      p.keys.size() > state_.key_quota || p.values.size() > state_.value_quota)
    return false;
  for (const uint32_t b : p.keys) promoted_[n][b] |= kUsedKey;
  for (const uint32_t b : p.values) promoted_[n][b] |= kUsedValue;
  return true;
}

void ClassForecast::add(const StepRules& rules, const ClassRatios& ratios, int now,
                        std::span<const BlockRef> blocks, const PassState& pass,
                        std::span<const Certificate> certificates) {
  ++queries_;
  scaled_ = pass;
  for (int number = 0; number < kExactClass; ++number) {
    bool dense = false;
    for (int h = 0; h < pass.heads; ++h)
      dense |= !add_head(rules, ratios, now, number, blocks, pass, h, certificates[size_t(h)]);
    dense_[size_t(number)] += dense ? 1 : 0;
  }
}

double ClassForecast::base(int number) const {
  const double originals = 4.0 * formats_[0]->head_dim;
  if (number == kExactClass) return originals;
  return coded_ * formats_[size_t(number)]->bytes_per_token() + (1 - coded_) * originals;
}

std::array<double, kClasses> ClassForecast::bytes() const {
  std::array<double, kClasses> out;
  const double originals = 4.0 * formats_[0]->head_dim;
  out[kExactClass] = originals;
  for (int number = 0; number < kExactClass; ++number) {
    const PageFormat& f = *formats_[size_t(number)];
    const double share = double(f.block_tokens) / double(state_.tier.tokens());
    double sum = base(number) + originals * dense_[size_t(number)] / std::max(queries_, 1);
    for (const uint8_t used : promoted_[size_t(number)]) {
      if ((used & kUsedKey) != 0) sum += share * (originals / 2 - f.key_code_bytes());
      if ((used & kUsedValue) != 0) sum += share * (originals / 2 - f.value_bytes());
    }
    out[size_t(number)] = sum;
  }
  return out;
}

int cheapest_class(const std::array<double, kClasses>& bytes) {
  return int(std::min_element(bytes.begin(), bytes.end()) - bytes.begin());
}

bool HeadClass::forecasts_at(const StepWhere& where) const {
  if (formats == nullptr || next != now || !measured) return false;
  // `exact` runs a step of codes only now and then: it may well read everything twice.
  const uint64_t distance = now == kExactClass ? kRevisionSteps : kForecastSteps;
  return where.step % distance == 0;
}

int HeadClass::page_class(const PageFormat& format) const {
  int number = 0;
  while (number + 1 < kExactClass && (*formats)[size_t(number)]->layout.name != format.layout.name)
    ++number;
  return number;
}

int HeadClass::decide() {
  int best = now;
  if (steps > 0 && forecasts > 0) {
    const auto n = double(forecasts);
    const auto is = size_t(now);
    const double mean = read / double(steps);
    std::array<double, kClasses> expected;
    // Of one step a forecast knows the promotions, not what F holds: the present class tells how
    // far the two are apart.
    const double foreseen = forecast[is] / n - base[is] / n, seen = mean - base[is] / n;
    const double calibration = now == kExactClass || !(foreseen > 0)
                                   ? 1
                                   : std::clamp(seen / foreseen, 1.0, kMostCalibration);
    for (size_t i = 0; i < expected.size(); ++i)
      expected[i] = base[i] / n + calibration * (forecast[i] - base[i]) / n;
    expected[is] = now == kExactClass ? base[is] / n : mean;
    const int cheapest = cheapest_class(expected);
    if (expected[size_t(cheapest)] < (1 - kWorthwhile) * expected[is]) best = cheapest;
  }
  steps = forecasts = 0;
  read = 0;
  forecast = base = {};
  return best;
}

}  // namespace certkv
