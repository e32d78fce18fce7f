#include "runtime/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/split_pattern.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr size_t kMaxBytes = size_t(64) << 20;
constexpr size_t kMaxSteps = 32;
constexpr size_t kMaxContentBytes = 256;

}  // namespace

std::string unicode_normalized(std::string_view text, UnicodeForm form) {
  const bool ascii = std::all_of(text.begin(), text.end(), [](char c) { return c >= 0; });
  if (ascii) return std::string(text);
  const bool compose = form == UnicodeForm::Nfc || form == UnicodeForm::Nfkc;
  const bool compatible = form == UnicodeForm::Nfkc || form == UnicodeForm::Nfkd;
  const int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0);
  std::vector<utf8proc_int32_t> codes;
  codes.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const utf8::Scan s = utf8::scan(text, i);
    i += s.bytes;
    std::array<utf8proc_int32_t, 32> part{};  // the longest decomposition has 18
    const auto n = utf8proc_decompose_char(utf8proc_int32_t(s.code), part.data(),
                                           utf8proc_ssize_t(part.size()),
                                           static_cast<utf8proc_option_t>(options), nullptr);
    CERTKV_EXPECT(n >= 0 && size_t(n) <= part.size(), InvalidArgument,
                  "U+{:04X} cannot be decomposed", uint32_t(s.code));
    codes.insert(codes.end(), part.begin(), part.begin() + n);
  }
  // Canonical ordering: runs of combining marks by their class, equal classes in order of the text.
  const auto combining = [](utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  };
  for (auto at = codes.begin(); at != codes.end();) {
    if (combining(*at) == 0) {
      ++at;
      continue;
    }
    const auto end = std::find_if(at, codes.end(), [&](auto c) { return combining(c) == 0; });
    std::stable_sort(at, end, [&](auto a, auto b) { return combining(a) < combining(b); });
    at = end;
  }
  if (compose) {
    const auto n = utf8proc_normalize_utf32(
        codes.data(), utf8proc_ssize_t(codes.size()),
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    CERTKV_EXPECT(n >= 0, InvalidArgument, "text cannot be composed: {}", utf8proc_errmsg(n));
    codes.resize(size_t(n));
  }
  std::string out;
  out.reserve(text.size());
  for (const auto c : codes) utf8::append(out, char32_t(c));
  return out;
}

struct Normalizer::Step {
  enum class Kind { Form, Prepend, ReplaceText, ReplacePattern } kind = Kind::Form;
  UnicodeForm form = UnicodeForm::Nfc;
  std::string text;     // ReplaceText: what is sought
  std::string content;  // what is put there
  std::optional<SplitPattern> pattern;

  std::string apply(std::string_view in) const {
    switch (kind) {
      case Kind::Form:
        return unicode_normalized(in, form);
      case Kind::Prepend:
        return in.empty() ? std::string() : content + std::string(in);
      case Kind::ReplaceText:
        return replace(in, [&] {
          std::vector<TextSpan> found;
          for (size_t at = in.find(text); at != in.npos; at = in.find(text, at + text.size()))
            found.push_back({at, at + text.size()});
          return found;
        }());
      case Kind::ReplacePattern: {
        std::vector<TextSpan> found;
        pattern->find_all(in, found);
        return replace(in, found);
      }
    }
    return {};
  }

  std::string replace(std::string_view in, const std::vector<TextSpan>& found) const {
    std::string out;
    size_t at = 0;
    for (const TextSpan& f : found) {
      out.append(in, at, f.begin - at).append(content);
      at = f.end;
      CERTKV_EXPECT(out.size() <= kMaxBytes, InvalidArgument,
                    "normalising text of {} bytes makes more than {} bytes of it", in.size(),
                    kMaxBytes);
    }
    return out.append(in, at);
  }
};

Normalizer::Normalizer() = default;
Normalizer::~Normalizer() = default;
Normalizer::Normalizer(Normalizer&&) noexcept = default;
Normalizer& Normalizer::operator=(Normalizer&&) noexcept = default;

Normalizer::Normalizer(const json& spec, const std::string& name) {
  add(spec, name);
}

void Normalizer::add(const json& spec, const std::string& name) {
  if (spec.is_null()) return;
  const std::string& type = json_string(spec, "type", name + ": normalizer");
  if (type == "Sequence") {
    const json& list = json_member(spec, "normalizers", name + ": normalizer");
    CERTKV_EXPECT(list.is_array(), BadFile, "{}: normalizers must be a list", name);
    for (const json& one : list) add(one, name);
    return;
  }
  CERTKV_EXPECT(steps_.size() < kMaxSteps, BadFile, "{}: more than {} normalizers", name,
                kMaxSteps);
  auto step = std::make_unique<Step>();
  static const std::array<std::pair<const char*, UnicodeForm>, 4> kForms{
      {{"NFC", UnicodeForm::Nfc},
       {"NFD", UnicodeForm::Nfd},
       {"NFKC", UnicodeForm::Nfkc},
       {"NFKD", UnicodeForm::Nfkd}}};
  const auto form =
      std::find_if(kForms.begin(), kForms.end(), [&](const auto& f) { return type == f.first; });
  if (form != kForms.end()) {
    step->form = form->second;
  } else if (type == "Prepend") {
    step->kind = Step::Kind::Prepend;
    step->content = json_string(spec, "prepend", name + ": Prepend");
  } else if (type == "Replace") {
    step->content = json_string(spec, "content", name + ": Replace");
    const json& pattern = json_member(spec, "pattern", name + ": Replace");
    if (pattern.is_object() && pattern.contains("Regex")) {
      step->kind = Step::Kind::ReplacePattern;
      step->pattern.emplace(json_string(pattern, "Regex", name + ": Replace"), name);
    } else {
      step->kind = Step::Kind::ReplaceText;
      step->text = json_string(pattern, "String", name + ": Replace");
      CERTKV_EXPECT(!step->text.empty(), BadFile, "{}: Replace of an empty string", name);
    }
  } else {
    CERTKV_THROW(BadFile,
                 "{}: normalizer '{:.60}' is not supported; supported: Sequence, NFC, NFD, NFKC, "
                 "NFKD, Prepend, Replace",
                 name, type);
  }
  CERTKV_EXPECT(step->content.size() <= kMaxContentBytes, BadFile,
                "{}: normalizer {} inserts {} bytes; at most {}", name, type, step->content.size(),
                kMaxContentBytes);
  steps_.push_back(std::move(step));
}

std::string Normalizer::apply(std::string_view text) const {
  std::string out(text);
  for (const auto& step : steps_) out = step->apply(out);
  return out;
}

}  // namespace certkv
