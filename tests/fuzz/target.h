// A fuzz target: one entry that takes bytes from an attacker and aborts where a promise is broken,
// and what to begin with. One program per target: with gcc tests/fuzz/replay.cc runs a seeded
// number of mutations of the seeds, with clang and CERTKV_FUZZERS libFuzzer does it for as long as
// one likes (tests/README.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace certkv::fuzz {

struct Plan {
  const char* name;                 // of the test suite
  std::vector<std::string> seeds;   // inputs that are accepted
  std::vector<std::string> pieces;  // what mutations put in
  int runs = 0;
};
Plan plan();

// Inputs that were read well: a target that refuses everything tests little.
inline uint64_t accepted = 0;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s\n", plan().name, what);
  std::abort();
}

}  // namespace certkv::fuzz
