// The alphabet in which byte-level vocabularies are written: one printable character per byte.
//
// Bytes that are printable in Latin-1 stand for themselves; the other 68 take the characters from
// U+0100 on, in order (so a space is U+0120). SOURCE: GPT-2's byte-to-character table.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace certkv {

char32_t alphabet_character(uint8_t byte);

// The bytes that a key stands for; nothing where a character is outside the alphabet.
// REQUIRES valid UTF-8.
std::optional<std::string> alphabet_to_bytes(std::string_view key);

}  // namespace certkv
