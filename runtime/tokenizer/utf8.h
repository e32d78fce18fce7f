// UTF-8 as the tokenizers need it: characters, repair, and the classes of characters that matter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace certkv::utf8 {

inline constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // U+FFFD

// What stands at text[at]. bytes >= 1 where at < text.size().
struct Scan {
  enum class Kind : uint8_t {
    Character,   // a whole, valid character
    Invalid,     // a maximal invalid part: becomes one U+FFFD
    Incomplete,  // the text ends inside a character that is valid so far
  };
  Kind kind = Kind::Invalid;
  uint8_t bytes = 0;
  char32_t code = 0;  // of a Character
};

// REQUIRES at < text.size(). SOURCE: Unicode 15, section 3.9, table 3-7 and "maximal subpart".
Scan scan(std::string_view text, size_t at);

bool valid(std::string_view text);

// Replaces every maximal invalid part by U+FFFD, as Python's errors="replace" does.
std::string repaired(std::string_view text);

void append(std::string& out, char32_t code);  // REQUIRES a scalar value

// The first or last character of valid text, 0 where it is empty.
char32_t first(std::string_view valid_text);
char32_t last(std::string_view valid_text);

bool is_space(char32_t c);    // property White_Space
bool is_word(char32_t c);     // \w: letters, marks, digits, connectors, joiners
bool is_numeric(char32_t c);  // categories Nd, Nl, No

// Without leading and trailing white space as Python's str.strip() sees it.
std::string_view stripped(std::string_view valid_text);

}  // namespace certkv::utf8
