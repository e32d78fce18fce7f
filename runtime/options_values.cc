// One value: to text, from text, and whether it is allowed.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <sstream>
#include <type_traits>

#include "kernels/base/error.h"
#include "runtime/byte_size.h"
#include "runtime/options_io.h"

namespace certkv {

namespace {

template <typename T>
inline constexpr bool kIsNumber = std::is_same_v<T, int> || std::is_same_v<T, int64_t> ||
                                  std::is_same_v<T, uint64_t> || std::is_same_v<T, double>;

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    if (end > begin) parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

bool is_word_of(std::string_view text, const char* allowed) {
  const auto words = split(allowed, ' ');
  return std::find(words.begin(), words.end(), text) != words.end();
}

std::string unit_text(const OptionDoc& doc) {
  return *doc.unit == '\0' ? "" : fmt::format(" ({})", doc.unit);
}

template <typename T>
std::string number_allowed(const OptionDoc& doc) {
  if (*doc.allowed != '\0') return fmt::format("{}", fmt::join(split(doc.allowed, ' '), ", "));
  const char* kind = std::is_same_v<T, double> ? "a number" : "a whole number";
  double low = doc.min, high = doc.max;
  if constexpr (std::is_same_v<T, uint64_t>) low = std::max(low, 0.0);
  if (std::isinf(low) && std::isinf(high)) return kind + unit_text(doc);
  if (std::isinf(high)) return fmt::format("{} from {}{}", kind, low, unit_text(doc));
  // 10 digits, so that counts are written out.
  return fmt::format("{} {} {:.10g} {} {:.10g}{}", kind, doc.above_min ? "above" : "from", low,
                     doc.above_min ? "up to" : "to", high, unit_text(doc));
}

// Written so that NaN is outside.
template <typename T>
bool in_range(T value, const OptionDoc& doc) {
  const double x = double(value);
  return (doc.above_min ? x > doc.min : x >= doc.min) && x <= doc.max &&
         (!std::is_same_v<T, double> || std::isfinite(x));
}

template <typename T>
bool parse_number(std::string_view text, T& value) {
  const char* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stopped == end && !text.empty();
}

std::string words_allowed(const OptionDoc& doc, const char* prefix = "") {
  return fmt::format("{}{}", prefix, fmt::join(split(doc.allowed, ' '), ", "));
}

constexpr size_t kMaxStringBytes = 4096;
constexpr size_t kMaxListEntries = 64;

std::string check_string(const std::string& text, const OptionDoc& doc) {
  if (doc.bytes) {
    const bool good = text == "auto" || parse_byte_size(text).value_or(0) > 0;
    return good ? "" : "auto, or a size such as 4GiB or 512MB";
  }
  if (*doc.allowed != '\0') return is_word_of(text, doc.allowed) ? "" : words_allowed(doc);
  if (text.size() > kMaxStringBytes)
    return fmt::format("text of at most {} bytes", kMaxStringBytes);
  if (text.find('\0') != std::string::npos) return "text without NUL bytes";
  return "";
}

std::string check_strings(const std::vector<std::string>& list) {
  if (list.size() > kMaxListEntries) return fmt::format("at most {} entries", kMaxListEntries);
  for (const std::string& s : list) {
    if (s.empty() || s.size() > kMaxStringBytes) {
      return fmt::format("texts of 1 to {} bytes", kMaxStringBytes);
    }
  }
  return "";
}

std::string check_policies(const std::vector<Policy>& list, const OptionDoc& doc) {
  for (size_t i = 0; i < list.size(); ++i) {
    if (std::find(list.begin(), list.begin() + long(i), list[i]) != list.begin() + long(i)) {
      return words_allowed(doc, "each at most once of ");
    }
  }
  return "";
}

std::string tolerance_allowed_text(const OptionDoc& doc) {
  return number_allowed<double>(doc) + ", {relative: number} or {absolute: number}";
}

}  // namespace

std::string option_value_text(const OptionTarget& target) {
  return std::visit(
      [](const auto* value) -> std::string {
        using T = std::remove_cvref_t<decltype(*value)>;
        if constexpr (std::is_same_v<T, std::string>) {
          return *value;
        } else if constexpr (std::is_same_v<T, Policy>) {
          return policy_name(*value);
        } else if constexpr (std::is_same_v<T, Tolerance>) {
          return fmt::format("{} {}", value->is_relative ? "relative" : "absolute", value->value);
        } else if constexpr (std::is_same_v<T, std::vector<Policy>>) {
          std::vector<std::string> names;
          for (const Policy p : *value) names.emplace_back(policy_name(p));
          return fmt::format("{}", fmt::join(names, ","));
        } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
          return fmt::format("{}", fmt::join(*value, ","));
        } else {
          return fmt::format("{}", *value);
        }
      },
      target);
}

std::string option_check(const OptionTarget& target, const OptionDoc& doc) {
  return std::visit(
      [&doc](const auto* value) -> std::string {
        using T = std::remove_cvref_t<decltype(*value)>;
        if constexpr (kIsNumber<T>) {
          const bool good = *doc.allowed != '\0'
                                ? is_word_of(fmt::format("{}", *value), doc.allowed)
                                : in_range(*value, doc);
          return good ? "" : number_allowed<T>(doc);
        } else if constexpr (std::is_same_v<T, std::string>) {
          return check_string(*value, doc);
        } else if constexpr (std::is_same_v<T, Tolerance>) {
          return in_range(value->value, doc) ? "" : tolerance_allowed_text(doc);
        } else if constexpr (std::is_same_v<T, std::vector<Policy>>) {
          return check_policies(*value, doc);
        } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
          return check_strings(*value);
        } else {
          return "";
        }
      },
      target);
}

std::string option_set(const OptionTarget& target, const OptionDoc& doc, std::string_view text) {
  return std::visit(
      [&doc, text](auto* value) -> std::string {
        using T = std::remove_cvref_t<decltype(*value)>;
        T parsed = *value;
        if constexpr (std::is_same_v<T, bool>) {
          if (text != "true" && text != "false") return "true or false";
          parsed = text == "true";
        } else if constexpr (kIsNumber<T>) {
          if (!parse_number(text, parsed)) return number_allowed<T>(doc);
        } else if constexpr (std::is_same_v<T, std::string>) {
          parsed = text;
        } else if constexpr (std::is_same_v<T, Policy>) {
          const auto policy = policy_from_name(text);
          if (!policy) return words_allowed(doc);
          parsed = *policy;
        } else if constexpr (std::is_same_v<T, Tolerance>) {
          parsed.is_relative = true;
          if (!parse_number(text, parsed.value)) return tolerance_allowed_text(doc);
        } else if constexpr (std::is_same_v<T, std::vector<Policy>>) {
          parsed.clear();
          for (const std::string& word : split(text, ',')) {
            const auto policy = policy_from_name(word);
            if (!policy) return words_allowed(doc, "a list of ");
            parsed.push_back(*policy);
          }
        } else {
          static_assert(std::is_same_v<T, std::vector<std::string>>);
          parsed.clear();
          if (!text.empty()) parsed.emplace_back(text);
        }
        const std::string wrong = option_check(OptionTarget(&parsed), doc);
        if (wrong.empty()) *value = std::move(parsed);
        return wrong;
      },
      target);
}

std::string nearest_word(std::string_view word, std::span<const std::string> candidates) {
  std::string best;
  size_t best_distance = std::numeric_limits<size_t>::max();
  for (const std::string& candidate : candidates) {
    // Rows of the edit-distance table: the last two and the one being filled. A word from outside
    // may be long; only its beginning counts.
    const std::string_view a = word.substr(0, 256);
    const std::string_view b = candidate;
    std::vector<size_t> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) last[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
      row[0] = i;
      for (size_t j = 1; j <= b.size(); ++j) {
        row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
        if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
          row[j] = std::min(row[j], before[j - 2] + 1);
        }
      }
      std::swap(before, last);
      std::swap(last, row);
    }
    if (last[b.size()] < best_distance) {
      best_distance = last[b.size()];
      best = candidate;
    }
  }
  return best;
}

}  // namespace certkv
