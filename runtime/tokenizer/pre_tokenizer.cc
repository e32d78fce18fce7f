#include "runtime/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/split_pattern.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr size_t kMaxSteps = 32;
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

enum class Behavior { Removed, Isolated, MergedWithPrevious, MergedWithNext, Contiguous };

Behavior behavior_of(const std::string& text, const std::string& name) {
  if (text == "Removed") return Behavior::Removed;
  if (text == "Isolated") return Behavior::Isolated;
  if (text == "MergedWithPrevious") return Behavior::MergedWithPrevious;
  if (text == "MergedWithNext") return Behavior::MergedWithNext;
  if (text == "Contiguous") return Behavior::Contiguous;
  CERTKV_THROW(BadFile,
               "{}: split behavior '{:.40}' is not known; known: Removed, Isolated, "
               "MergedWithPrevious, MergedWithNext, Contiguous",
               name, text);
}

struct Part {
  TextSpan span;
  bool match = false;
};

// Matches and what lies between them, which together are the whole text.
std::vector<Part> parts_of(std::string_view text, const std::vector<TextSpan>& matches,
                           bool invert) {
  std::vector<Part> parts;
  size_t at = 0;
  for (const TextSpan& m : matches) {
    if (at != m.begin) parts.push_back({{at, m.begin}, invert});
    parts.push_back({m, !invert});
    at = m.end;
  }
  if (at != text.size()) parts.push_back({{at, text.size()}, invert});
  return parts;
}

// Joins neighbours according to the behaviour.
std::vector<TextSpan> joined(const std::vector<Part>& parts, Behavior behavior) {
  std::vector<TextSpan> out;
  bool previous = false;
  switch (behavior) {
    case Behavior::Isolated:
      for (const Part& p : parts) out.push_back(p.span);
      break;
    case Behavior::Removed:
      for (const Part& p : parts)
        if (!p.match) out.push_back(p.span);
      break;
    case Behavior::Contiguous:
    case Behavior::MergedWithPrevious:
      for (const Part& p : parts) {
        const bool join =
            behavior == Behavior::Contiguous ? p.match == previous : p.match && !previous;
        if (join && !out.empty())
          out.back().end = p.span.end;
        else
          out.push_back(p.span);
        previous = p.match;
      }
      break;
    case Behavior::MergedWithNext:
      for (size_t i = parts.size(); i-- > 0;) {
        const Part& p = parts[i];
        if (p.match && !previous && !out.empty())
          out.back().begin = p.span.begin;
        else
          out.push_back(p.span);
        previous = p.match;
      }
      std::reverse(out.begin(), out.end());
      break;
  }
  return out;
}

}  // namespace

struct PreTokenizer::Step {
  enum class Kind { Pattern, Text, Digits, Metaspace, Prefix } kind = Kind::Pattern;
  enum class Prepend { Never, First, Always } prepend = Prepend::Never;
  std::optional<SplitPattern> pattern;
  std::string text;  // Text: what is sought; Metaspace: what stands for a space
  Behavior behavior = Behavior::Isolated;
  bool invert = false, split = true;

  std::string_view metaspaced(const Word& word, Words& words) const {
    std::string out;
    const bool wanted = prepend == Prepend::Always || (prepend == Prepend::First && word.at_start);
    if (wanted && !word.text.starts_with(text) && !word.text.starts_with(' ')) out = text;
    for (const char c : word.text) {
      if (c == ' ')
        out += text;
      else
        out += c;
    }
    return words.owned.emplace_back(std::move(out));
  }

  void find(std::string_view in, std::vector<TextSpan>& found) const {
    switch (kind) {
      case Kind::Pattern:
        pattern->find_all(in, found);
        break;
      case Kind::Text:
      case Kind::Metaspace:
        for (size_t at = in.find(text); at != in.npos; at = in.find(text, at + text.size()))
          found.push_back({at, at + text.size()});
        break;
      case Kind::Digits:
        for (size_t at = 0; at < in.size();) {
          const utf8::Scan s = utf8::scan(in, at);
          if (utf8::is_numeric(s.code)) found.push_back({at, at + s.bytes});
          at += s.bytes;
        }
        break;
      case Kind::Prefix:
        break;
    }
  }

  void apply(Words& words) const {
    std::vector<Word> out;
    std::vector<TextSpan> found;
    for (Word word : words.list) {
      if (word.text.empty()) continue;
      if (kind == Kind::Metaspace) word.text = metaspaced(word, words);
      if (kind == Kind::Prefix && !word.text.starts_with(' '))
        word.text = words.owned.emplace_back(" " + std::string(word.text));
      if (kind == Kind::Prefix || (kind == Kind::Metaspace && !split)) {
        out.push_back(word);
        continue;
      }
      found.clear();
      find(word.text, found);
      for (const TextSpan& s : joined(parts_of(word.text, found, invert), behavior)) {
        if (s.begin == s.end) continue;
        out.push_back({word.text.substr(s.begin, s.end - s.begin), word.at_start && s.begin == 0});
      }
    }
    words.list = std::move(out);
  }
};

PreTokenizer::PreTokenizer() = default;
PreTokenizer::~PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;

PreTokenizer::PreTokenizer(const json& spec, const std::string& name) {
  add(spec, name);
}

void PreTokenizer::add(const json& spec, const std::string& name) {
  if (spec.is_null()) return;
  const std::string where = name + ": pre_tokenizer";
  const std::string& type = json_string(spec, "type", where);
  if (type == "Sequence") {
    const json& list = json_member(spec, "pretokenizers", where);
    CERTKV_EXPECT(list.is_array(), BadFile, "{}: pretokenizers must be a list", where);
    for (const json& one : list) add(one, name);
    return;
  }
  CERTKV_EXPECT(steps_.size() < kMaxSteps, BadFile, "{}: more than {} steps", where, kMaxSteps);
  CERTKV_EXPECT(!byte_level_, BadFile, "{}: '{:.60}' after ByteLevel; ByteLevel must come last",
                where, type);
  auto step = std::make_unique<Step>();
  if (type == "ByteLevel") {
    byte_level_ = true;
    if (json_bool_or(spec, "add_prefix_space", true, where)) {
      auto prefix = std::make_unique<Step>();
      prefix->kind = Step::Kind::Prefix;
      steps_.push_back(std::move(prefix));
    }
    if (!json_bool_or(spec, "use_regex", true, where)) return;
    step->pattern.emplace(kGpt2Pattern, name);
  } else if (type == "Split") {
    const json& pattern = json_member(spec, "pattern", where);
    step->behavior = behavior_of(json_string(spec, "behavior", where), where);
    step->invert = json_bool_or(spec, "invert", false, where);
    if (pattern.is_object() && pattern.contains("Regex")) {
      step->pattern.emplace(json_string(pattern, "Regex", where), name);
    } else {
      step->kind = Step::Kind::Text;
      step->text = json_string(pattern, "String", where);
      CERTKV_EXPECT(!step->text.empty(), BadFile, "{}: Split at an empty string", where);
    }
  } else if (type == "Metaspace") {
    step->kind = Step::Kind::Metaspace;
    step->text = json_string(spec, "replacement", where);
    CERTKV_EXPECT(!step->text.empty() && utf8::scan(step->text, 0).bytes == step->text.size(),
                  BadFile, "{}: replacement must be one character", where);
    const auto scheme = spec.find("prepend_scheme");
    const std::string chosen = scheme != spec.end() && !scheme->is_null()
                                   ? json_string(spec, "prepend_scheme", where)
                               : json_bool_or(spec, "add_prefix_space", true, where) ? "always"
                                                                                     : "never";
    if (chosen == "always")
      step->prepend = Step::Prepend::Always;
    else if (chosen == "first")
      step->prepend = Step::Prepend::First;
    else
      CERTKV_EXPECT(chosen == "never", BadFile,
                    "{}: prepend_scheme '{:.40}' is not known; known: always, first, never", where,
                    chosen);
    step->split = json_bool_or(spec, "split", true, where);
    step->behavior = Behavior::MergedWithNext;
  } else if (type == "Digits") {
    step->kind = Step::Kind::Digits;
    step->behavior = json_bool_or(spec, "individual_digits", false, where) ? Behavior::Isolated
                                                                           : Behavior::Contiguous;
  } else {
    CERTKV_THROW(BadFile,
                 "{}: '{:.60}' is not supported; supported: Sequence, Split, ByteLevel, Metaspace, "
                 "Digits",
                 where, type);
  }
  steps_.push_back(std::move(step));
}

void PreTokenizer::apply(Words& words) const {
  for (const auto& step : steps_) step->apply(words);
  std::erase_if(words.list, [](const Word& w) { return w.text.empty(); });
}

}  // namespace certkv
