// A regular expression of a tokenizer file, run by PCRE2 within limits.
//
// The files write their patterns for Oniguruma (Ruby syntax). The common subset is accepted; what
// the two engines read differently is translated (\s, \S: property White_Space) or refused by name.
//
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

struct TextSpan {
  size_t begin = 0, end = 0;  // bytes, half open
};

class SplitPattern {
 public:
  // ERRORS: BadFile, with `name` (the file) in the message.
  SplitPattern(std::string_view pattern, const std::string& name);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;

  // Appends every match, left to right, not overlapping. REQUIRES valid UTF-8.
  // ERRORS: BadFile where the pattern needs more steps or memory than any sane one does.
  void find_all(std::string_view text, std::vector<TextSpan>& out) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace certkv
