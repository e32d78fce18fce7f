#include "tests/support/tightness.h"

#include <fmt/core.h>

#include <algorithm>

namespace certkv {

void Tightness::add(const std::string& group, std::span<const float> ratios) {
  std::vector<float>& all = ratios_[group];
  all.insert(all.end(), ratios.begin(), ratios.end());
}

float Tightness::largest(const std::string& group) const {
  const auto at = ratios_.find(group);
  return at == ratios_.end() || at->second.empty()
             ? 0.0f
             : *std::max_element(at->second.begin(), at->second.end());
}

size_t Tightness::count() const {
  size_t sum = 0;
  for (const auto& [name, ratios] : ratios_) sum += ratios.size();
  return sum;
}

std::string Tightness::table(const std::string& title) const {
  std::string out = fmt::format("{:<34} {:>9} {:>9} {:>9}\n", title, "bounds", "median", "largest");
  for (const auto& [name, ratios] : ratios_) {
    if (ratios.empty()) continue;
    std::vector<float> sorted = ratios;
    std::nth_element(sorted.begin(), sorted.begin() + long(sorted.size() / 2), sorted.end());
    out += fmt::format("{:<34} {:>9} {:>9.2e} {:>9.3f}\n", name, sorted.size(),
                       sorted[sorted.size() / 2], *std::max_element(sorted.begin(), sorted.end()));
  }
  return out;
}

}  // namespace certkv
