#include "runtime/tokenizer/utf8.h"

#include <utf8proc.h>

namespace certkv::utf8 {
namespace {

uint8_t byte_at(std::string_view s, size_t i) {
  return static_cast<uint8_t>(s[i]);
}

size_t start_of_last(std::string_view s) {
  size_t i = s.size();
  while (i > 0 && (byte_at(s, --i) & 0xc0) == 0x80) {
  }
  return i;
}

bool python_space(char32_t c) {
  return is_space(c) || (c >= 0x1c && c <= 0x1f);
}

}  // namespace

Scan scan(std::string_view text, size_t at) {
  const uint8_t lead = byte_at(text, at);
  if (lead < 0x80) return {Scan::Kind::Character, 1, lead};
  uint8_t length = 0, low = 0x80, high = 0xbf;  // bounds of the second byte
  if (lead >= 0xc2 && lead <= 0xdf)
    length = 2;
  else if (lead >= 0xe0 && lead <= 0xef)
    length = 3;
  else if (lead >= 0xf0 && lead <= 0xf4)
    length = 4;
  else
    return {Scan::Kind::Invalid, 1, 0};
  if (lead == 0xe0)
    low = 0xa0;  // shorter forms
  else if (lead == 0xed)
    high = 0x9f;  // surrogates
  else if (lead == 0xf0)
    low = 0x90;  // shorter forms
  else if (lead == 0xf4)
    high = 0x8f;  // above U+10FFFF
  char32_t code = lead & (0xffu >> (length + 1));
  for (uint8_t i = 1; i < length; ++i) {
    if (at + i == text.size()) return {Scan::Kind::Incomplete, i, 0};
    const uint8_t b = byte_at(text, at + i);
    if (b < low || b > high) return {Scan::Kind::Invalid, i, 0};
    code = code << 6 | (b & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {Scan::Kind::Character, length, code};
}

bool valid(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const Scan s = scan(text, i);
    if (s.kind != Scan::Kind::Character) return false;
    i += s.bytes;
  }
  return true;
}

std::string repaired(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Scan s = scan(text, i);
    out += s.kind == Scan::Kind::Character ? text.substr(i, s.bytes) : kReplacement;
    i += s.bytes;
  }
  return out;
}

void append(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += char(c);
  } else if (c < 0x800) {
    out += {char(0xc0 | c >> 6), char(0x80 | (c & 0x3f))};
  } else if (c < 0x10000) {
    out += {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 0x3f)), char(0x80 | (c & 0x3f))};
  } else {
    out += {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 0x3f)), char(0x80 | (c >> 6 & 0x3f)),
            char(0x80 | (c & 0x3f))};
  }
}

char32_t first(std::string_view s) {
  return s.empty() ? 0 : scan(s, 0).code;
}
char32_t last(std::string_view s) {
  return s.empty() ? 0 : scan(s, start_of_last(s)).code;
}

bool is_space(char32_t c) {
  return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_word(char32_t c) {
  switch (utf8proc_category(utf8proc_int32_t(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      // Join_Control, and the symbols that carry Other_Alphabetic (letters in circles and squares).
      return c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) ||
             (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
             (c >= 0x1f170 && c <= 0x1f189);
  }
}

bool is_numeric(char32_t c) {
  const auto category = utf8proc_category(utf8proc_int32_t(c));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}

std::string_view stripped(std::string_view s) {
  while (!s.empty() && python_space(first(s))) s.remove_prefix(scan(s, 0).bytes);
  while (!s.empty() && python_space(last(s))) s = s.substr(0, start_of_last(s));
  return s;
}

}  // namespace certkv::utf8
