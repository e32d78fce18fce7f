#include "runtime/tokenizer/byte_alphabet.h"

#include <array>

#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

constexpr bool stands_for_itself(unsigned b) {
  return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

constexpr unsigned kCharacters = 0x100 + 68;

struct Tables {
  std::array<char32_t, 256> character{};
  std::array<int16_t, kCharacters> byte{};
  constexpr Tables() {
    for (auto& b : byte) b = -1;
    char32_t next = 0x100;
    for (unsigned b = 0; b < 256; ++b) {
      character[b] = stands_for_itself(b) ? char32_t(b) : next++;
      byte[character[b]] = int16_t(b);
    }
  }
};
constexpr Tables kTables;
static_assert(kTables.character[255] == 255 && kTables.character[' '] == 0x120);

}  // namespace

char32_t alphabet_character(uint8_t byte) {
  return kTables.character[byte];
}

std::optional<std::string> alphabet_to_bytes(std::string_view key) {
  std::string bytes;
  for (size_t i = 0; i < key.size();) {
    const utf8::Scan s = utf8::scan(key, i);
    if (s.code >= kCharacters || kTables.byte[s.code] < 0) return std::nullopt;
    bytes += char(kTables.byte[s.code]);
    i += s.bytes;
  }
  return bytes;
}

}  // namespace certkv
