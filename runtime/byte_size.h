// Sizes in bytes as people write them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace certkv {

// "4GiB", "1.5 GiB", "512MB", "4096": KiB MiB GiB TiB are powers of 1024, kB (KB) MB GB TB powers
// of 1000, B or nothing means bytes. Fractions round down. Empty for anything else, for negative
// numbers and for 2^63 and above.
std::optional<uint64_t> parse_byte_size(std::string_view text);

// "1.5 GiB", "512 B": at most 2 decimals, for people.
std::string byte_size_text(uint64_t bytes);

}  // namespace certkv
