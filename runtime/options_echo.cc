// What a table says about itself: --help, and the echo stored with results.
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "runtime/options_io.h"

namespace certkv {

namespace {

// A double-quoted YAML scalar. Bytes from 0x80 on are UTF-8 and stay.
std::string double_quoted(std::string_view text) {
  std::string out = "\"";
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += char(c);
    } else if (c < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", c);
    } else if (c == 0xc2 && i + 1 < text.size() &&
               static_cast<unsigned char>(text[i + 1]) < 0xa0) {  // U+0080 to U+009F
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(text[++i]));
    } else {
      out += char(c);
    }
  }
  return out + '"';
}

std::string yaml_value(const OptionTarget& target) {
  if (const auto* text = std::get_if<std::string*>(&target)) return double_quoted(**text);
  if (const auto* tolerance = std::get_if<Tolerance*>(&target)) {
    return fmt::format("{{{}: {}}}", (*tolerance)->is_relative ? "relative" : "absolute",
                       (*tolerance)->value);
  }
  if (std::holds_alternative<std::vector<Policy>*>(target)) {
    return fmt::format("[{}]", option_value_text(target));
  }
  if (const auto* list = std::get_if<std::vector<std::string>*>(&target)) {
    std::string out;
    for (const std::string& entry : **list) out += (out.empty() ? "" : ", ") + double_quoted(entry);
    return fmt::format("[{}]", out);
  }
  return option_value_text(target);
}

nlohmann::ordered_json json_value(const OptionTarget& target) {
  return std::visit(
      [](const auto* value) -> nlohmann::ordered_json {
        using T = std::remove_cvref_t<decltype(*value)>;
        if constexpr (std::is_same_v<T, Policy>) {
          return policy_name(*value);
        } else if constexpr (std::is_same_v<T, Tolerance>) {
          return nlohmann::ordered_json::object(
              {{value->is_relative ? "relative" : "absolute", value->value}});
        } else if constexpr (std::is_same_v<T, std::vector<Policy>>) {
          auto list = nlohmann::ordered_json::array();
          for (const Policy p : *value) list.push_back(policy_name(p));
          return list;
        } else {
          return *value;
        }
      },
      target);
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return text;
}

std::string metavariable(const OptionField& field) {
  if (std::holds_alternative<bool*>(field.target)) return "";
  if (field.doc.path) return " PATH";
  if (field.doc.bytes) return " SIZE";
  if (std::holds_alternative<double*>(field.target)) return " X";
  if (std::holds_alternative<Tolerance*>(field.target)) return " X";
  if (std::holds_alternative<std::vector<Policy>*>(field.target)) return " A,B";
  if (std::holds_alternative<std::string*>(field.target) ||
      std::holds_alternative<Policy*>(field.target) ||
      std::holds_alternative<std::vector<std::string>*>(field.target)) {
    return " TEXT";
  }
  return " N";
}

std::string words(const char* text, const char* before, const char* between) {
  std::string out;
  for (const char* p = text; *p != '\0'; ++p) {
    if (p == text) out += before;
    if (*p == ' ') {
      out += between;
    } else {
      out += *p;
    }
  }
  return out;
}

// Breaks at spaces so that lines stay within `width`.
std::string wrapped(const std::string& text, size_t indent, size_t width) {
  std::string out, line(indent, ' ');
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (line.size() > indent && line.size() + 1 + word.size() > width) {
      out += line + '\n';
      line.assign(indent, ' ');
    }
    line += (line.size() > indent ? " " : "") + word;
    begin = end + 1;
  }
  return out + line + '\n';
}

}  // namespace

std::string option_text(const OptionField& field) {
  const bool is_word = std::holds_alternative<bool*>(field.target) ||
                       std::holds_alternative<std::string*>(field.target) ||
                       std::holds_alternative<Policy*>(field.target) ||
                       std::holds_alternative<std::vector<Policy>*>(field.target);
  std::string text = fmt::format("{} [", field.doc.meaning);
  if (*field.doc.unit != '\0') text += fmt::format("{}; ", field.doc.unit);
  if (*field.doc.allowed != '\0') text += words(field.doc.allowed, "", ", ") + "; ";
  text += fmt::format("default {}", field.default_text.empty() ? "none" : field.default_text);
  if (*field.doc.cost != '\0') {
    text +=
        fmt::format("; {}: {}", is_word && !field.doc.bytes ? "cost" : "larger", field.doc.cost);
  }
  return text + "]";
}

std::string OptionTable::help() const {
  std::string out =
      "  --config FILE\n"
      "      read keys from a YAML file; may be repeated, later files override earlier ones, and\n"
      "      flags override files\n";
  for (const OptionField& field : fields_) {
    out += fmt::format("  --{}{}", field.key, metavariable(field));
    out += words(field.doc.flags, ", --", ", --");
    if (std::holds_alternative<Tolerance*>(field.target)) {
      out += fmt::format(", --{0}-relative X, --{0}-absolute X", field.key);
    }
    out += '\n';
    out += wrapped(option_text(field), 6, 100);
  }
  return out;
}

std::string OptionTable::echo_yaml() const {
  std::string out, group;
  for (const OptionField& field : fields_) {
    const size_t dot = field.key.rfind('.');
    const std::string parent = dot == std::string::npos ? "" : field.key.substr(0, dot);
    if (parent != group && !parent.empty()) out += parent + ":\n";
    group = parent;
    out += fmt::format("{}{}: {}  # {}\n", parent.empty() ? "" : "  ",
                       dot == std::string::npos ? field.key : field.key.substr(dot + 1),
                       yaml_value(field.target), one_line(field.source.text()));
  }
  return out;
}

std::string OptionTable::echo_json() const {
  nlohmann::ordered_json values = nlohmann::ordered_json::object();
  nlohmann::ordered_json sources = nlohmann::ordered_json::object();
  for (const OptionField& field : fields_) {
    const size_t dot = field.key.rfind('.');
    auto& parent = dot == std::string::npos ? values : values[field.key.substr(0, dot)];
    parent[dot == std::string::npos ? field.key : field.key.substr(dot + 1)] =
        json_value(field.target);
    sources[field.key] = field.source.text();
  }
  const nlohmann::ordered_json echo = {{"options", values}, {"sources", sources}};
  return echo.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace certkv
