#define PCRE2_CODE_UNIT_WIDTH 8
#include "runtime/tokenizer/split_pattern.h"

#include <pcre2.h>

#include <optional>

#include "kernels/base/error.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

constexpr size_t kMaxPatternBytes = 16 << 10;
constexpr uint32_t kMatchLimit = 50'000'000;  // a megabyte of white space needs a few million
constexpr uint32_t kDepthLimit = 100'000;
constexpr uint32_t kHeapLimitKiB = 256 << 10;
constexpr size_t kJitStackBytes = 4 << 20;

constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

template <typename T, void (*Free)(T*)>
struct Freed {
  void operator()(T* p) const { Free(p); }
};
template <typename T, void (*Free)(T*)>
using Owned = std::unique_ptr<T, Freed<T, Free>>;
using Code = Owned<pcre2_code, pcre2_code_free>;
using CompileContext = Owned<pcre2_compile_context, pcre2_compile_context_free>;
using MatchContext = Owned<pcre2_match_context, pcre2_match_context_free>;
using MatchData = Owned<pcre2_match_data, pcre2_match_data_free>;
using JitStack = Owned<pcre2_jit_stack, pcre2_jit_stack_free>;

std::string message_of(int code) {
  PCRE2_UCHAR text[160];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

// Ruby syntax to Perl syntax, for the subset that means the same in both.
std::string translated(std::string_view p, const std::string& name) {
  std::string out;
  bool in_class = false;
  const auto refuse = [&](std::string_view what) {
    CERTKV_THROW(BadFile, "{}: split pattern uses {}, which is not supported: '{:.200}'", name,
                 what, p);
  };
  for (size_t i = 0; i < p.size(); ++i) {
    const char c = p[i];
    if (c == '\\') {
      if (++i == p.size()) refuse("a trailing backslash");
      const char e = p[i];
      if (e == 's') {
        out += in_class ? std::string(kWhiteSpace) : "[" + std::string(kWhiteSpace) + "]";
      } else if (e == 'S') {
        if (in_class) refuse("\\S inside a class");
        out += "[^" + std::string(kWhiteSpace) + "]";
      } else if (std::string_view("hHRXKGOCyYQEvV").find(e) != std::string_view::npos) {
        refuse(std::string("\\") + e);
      } else {
        out += {c, e};
        // \p{L} and \x{41} have braces that are no quantifier.
        if (std::string_view("pPx").find(e) != std::string_view::npos && p.substr(i + 1, 1) == "{")
          while (++i < p.size() && (out += p[i], p[i] != '}')) {
          }
      }
    } else if (in_class) {
      if (c == '[') refuse("a class inside a class");
      if (c == '&' && p.substr(i, 2) == "&&") refuse("&& inside a class");
      if (c == ']') in_class = false;
      out += c;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (p.substr(i + 1, 1) == "^") out += p[++i];
      if (p.substr(i + 1, 1) == "]") refuse("an empty class");
    } else if (c == '(' && p.substr(i, 2) == "(*") {
      refuse("a verb (*...)");
    } else if (c == '}' && p.substr(i + 1, 1) == "+") {
      refuse("}+ (possessive in one engine, repeated in the other)");
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

struct SplitPattern::Compiled {
  Code code;
  std::string name, pattern;
};

SplitPattern::SplitPattern(std::string_view pattern, const std::string& name)
    : compiled_(std::make_unique<Compiled>()) {
  CERTKV_EXPECT(pattern.size() <= kMaxPatternBytes, BadFile,
                "{}: a split pattern of {} bytes; at most {} are read", name, pattern.size(),
                kMaxPatternBytes);
  const std::string perl = translated(pattern, name);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  CERTKV_EXPECT(context != nullptr, OutOfMemory, "no memory for a split pattern");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), 64);
  int error = 0;
  PCRE2_SIZE where = 0;
  compiled_->code.reset(pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(perl.data()), perl.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE,
      &error, &where, context.get()));
  CERTKV_EXPECT(compiled_->code != nullptr, BadFile, "{}: split pattern '{:.200}': {} (at {})",
                name, pattern, message_of(error), where);
  // Without JIT the interpreter runs the same pattern more slowly, so its absence is no error.
  pcre2_jit_compile(compiled_->code.get(), PCRE2_JIT_COMPLETE);
  compiled_->name = name;
  compiled_->pattern = pattern;
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

void SplitPattern::find_all(std::string_view text, std::vector<TextSpan>& out) const {
  const pcre2_code* code = compiled_->code.get();
  const MatchData data(pcre2_match_data_create(1, nullptr));
  const MatchContext context(pcre2_match_context_create(nullptr));
  CERTKV_EXPECT(data != nullptr && context != nullptr, OutOfMemory, "no memory for splitting text");
  pcre2_set_match_limit(context.get(), kMatchLimit);
  pcre2_set_depth_limit(context.get(), kDepthLimit);
  pcre2_set_heap_limit(context.get(), kHeapLimitKiB);
  JitStack stack;  // only for patterns that outgrow the 32 KiB they have anyway
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::optional<size_t> last_end;
  for (size_t at = 0; at <= text.size();) {
    int rc =
        pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT && stack == nullptr) {
      stack.reset(pcre2_jit_stack_create(64 << 10, kJitStackBytes, nullptr));
      pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
      continue;
    }
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                       data.get(), context.get());
    }
    if (rc == PCRE2_ERROR_NOMATCH) return;
    CERTKV_EXPECT(rc >= 0, BadFile, "{}: split pattern '{:.200}' gave up at byte {} of {}: {}",
                  compiled_->name, compiled_->pattern, at, text.size(), message_of(rc));
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data.get());
    const size_t begin = found[0], end = found[1];
    CERTKV_EXPECT(begin <= end && begin >= at, BadFile,
                  "{}: split pattern '{:.200}' matches backwards", compiled_->name,
                  compiled_->pattern);
    if (begin == end &&
        last_end == end) {  // an empty match right after the last one does not count
      if (at == text.size()) return;
      at += utf8::scan(text, at).bytes;
      continue;
    }
    out.push_back({begin, end});
    at = end;
    last_end = end;
  }
}

}  // namespace certkv
