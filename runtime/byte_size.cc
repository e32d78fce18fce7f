#include "runtime/byte_size.h"

#include <fmt/core.h>

#include <charconv>

namespace certkv {

namespace {

struct Unit {
  std::string_view name;
  uint64_t bytes;
};
constexpr uint64_t kKi = 1024, kK = 1000;
constexpr Unit kUnits[] = {
    {"", 1},
    {"B", 1},
    {"KiB", kKi},
    {"MiB", kKi* kKi},
    {"GiB", kKi* kKi* kKi},
    {"TiB", kKi* kKi* kKi* kKi},
    {"kB", kK},
    {"KB", kK},
    {"MB", kK* kK},
    {"GB", kK* kK* kK},
    {"TB", kK* kK* kK* kK},
};

}  // namespace

std::optional<uint64_t> parse_byte_size(std::string_view text) {
  const size_t digits = text.find_first_not_of("0123456789.");
  const std::string_view number = text.substr(0, digits);
  std::string_view unit = digits == std::string_view::npos ? "" : text.substr(digits);
  if (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  uint64_t factor = 0;
  for (const Unit& u : kUnits) {
    if (u.name == unit) factor = u.bytes;
  }
  if (factor == 0 || number.empty() || number.front() == '.' || number.back() == '.') return {};
  constexpr uint64_t kLimit = uint64_t(1) << 63;
  if (number.find('.') == std::string_view::npos) {  // exact
    uint64_t count = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), count);
    if (error != std::errc() || end != number.data() + number.size()) return {};
    if (count > (kLimit - 1) / factor) return {};
    return count * factor;
  }
  double count = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), count);
  if (error != std::errc() || end != number.data() + number.size()) return {};
  const double bytes = count * double(factor);
  if (!(bytes < double(kLimit))) return {};
  return uint64_t(bytes);
}

std::string byte_size_text(uint64_t bytes) {
  constexpr std::string_view kNames[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = double(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kNames)) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return fmt::format("{} B", bytes);
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : 1, kNames[unit]);
}

}  // namespace certkv
