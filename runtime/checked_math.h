// Sizes that come from files: arithmetic that says when it overflows.
#pragma once

#include <cstdint>
#include <limits>

namespace certkv {

// Writes a * b or a + b to *out and returns true, or returns false and leaves *out alone.
inline bool checked_multiply(uint64_t a, uint64_t b, uint64_t* out) {
  if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b) return false;
  *out = a * b;
  return true;
}
inline bool checked_add(uint64_t a, uint64_t b, uint64_t* out) {
  if (a > std::numeric_limits<uint64_t>::max() - b) return false;
  *out = a + b;
  return true;
}

}  // namespace certkv
