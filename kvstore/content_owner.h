// Names of the originals of a prompt's segments, from what decides their bytes: whoever computes
// the same name has, or would make, the same originals.
//
// SOURCE: kvstore/FORMAT.md, "Owners". SHA-256 chained over segments: the name of a segment stands
// for every token up to its end.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "kvstore/block.h"

namespace certkv {

// Tokens of a segment. A multiple of every block size and scale group, so that a segment ends where
// a page of tier 1 does, and the number of prompt rows that prefill takes through a layer together:
// a prompt that goes on after shared segments then makes the same products of the same shapes, so
// the same bits, as one that began at its first token. Smaller segments would lose that, larger
// ones would share less (half a segment is lost on average at the end of a common prefix).
inline constexpr uint32_t kSegmentTokens = 512;
static_assert(kSegmentTokens % BlockShape::kMaxBlockTokens == 0);

using Sha256 = std::array<std::byte, 32>;

// Throws CommError where the library cannot hash.
Sha256 sha256(std::span<const std::byte> bytes);
Sha256 sha256(std::string_view text);

// What decides the originals besides the tokens.
struct ContentScope {
  Sha256 model{};   // of the weights, and of everything that decides what is computed with them
  Sha256 layout{};  // of how rows are laid out in blocks
  DType dtype = DType::BF16;
};

// One owner for each whole segment of `tokens`, in order; never nobody, always is_content().
std::vector<OwnerId> content_owners(std::span<const int32_t> tokens, const ContentScope& scope);

// A random name that is_content(): others can ask for it, where somebody has kept it for them.
OwnerId lasting_owner();

}  // namespace certkv
