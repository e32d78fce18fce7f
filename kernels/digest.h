// Digest of a payload: a 64-bit multilinear hash over 32-bit words, as fast as memory on a CPU and
// on a GPU, because its terms may be summed in any order and by any number of lanes.
//
//   words   m_0 .. m_{n-1}: the bytes as little-endian 32-bit words, the last padded with zeros
//   keys    k_i = splitmix64(i) | 1, odd, fixed and public (digest_key below)
//   chunks  of 4096 words: S_c = sum_{i < 4096} k_i * m_{4096 c + i}            (mod 2^64)
//   digest  = kStart + bytes * kLength + sum_c kChunk^c * S_c                   (mod 2^64)
//
// kLength and kChunk are odd.
//
// ENSURES, for payloads of equal length:
//  1. Any change that stays inside one 32-bit word is detected, a single flipped bit above all. It
//     changes the digest by kChunk^c k_i d with 0 < |d| < 2^32; kChunk^c k_i is odd, hence
//     invertible mod 2^64, and d is not 0 mod 2^64.
//  2. Any two flipped bits are detected, up to 16 KiB (one chunk). In one word: 1. In two words
//     i != j the change is +-2^a k_i +- 2^b k_j. If a < b it is 2^a times an odd number; likewise
//     b < a. If a = b <= 31 it is 2^a (k_i +- k_j), zero only if k_i = +-k_j mod 2^(64-a), hence
//     mod 2^33; the 8192 residues of +-k_i mod 2^33 are all different (the test checks the table).
//  3. Over keys drawn at random from the odd numbers, two given different payloads of one chunk
//     collide with probability at most 2^-32. Let d_i be the word differences, 2^v the largest
//     power of two that divides all of them (v <= 31), and i a word with d_i / 2^v odd. Given the
//     other keys, a collision fixes k_i d_i mod 2^64, so it fixes k_i mod 2^(64-v): at most 2^v of
//     the 2^63 odd keys, so at most 2^(v-63). This is 2^-63 unless every difference is even, and
//     2^-32 only where nothing but top bits of words differ. Across chunks the same holds: kChunk^c
//     is odd.
//  4. Random garbage passes with probability of about 2^-64.
// It is no defence against somebody who chooses the change: the keys are public.
//
// SOURCE: multilinear hashing, Carter and Wegman 1979; Lemire and Kaser 2014.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/base/dtype.h"

namespace certkv {

inline constexpr size_t kDigestChunkWords = 4096;
inline constexpr uint64_t kDigestStart = 0x243f6a8885a308d3;   // fraction of pi
inline constexpr uint64_t kDigestLength = 0x9e3779b97f4a7c15;  // golden ratio, odd
inline constexpr uint64_t kDigestChunk = 0xd1342543de82ef95;   // multiplier of full period, odd

// Key of word i of a chunk, i < kDigestChunkWords: the generator SplitMix64 with one bit set.
// T is uint64_t or a vector of them of the compiler.
template <typename T>
CERTKV_INLINE constexpr T digest_keys(T i) {
  T z = (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) | 1;
}
CERTKV_INLINE constexpr uint64_t digest_key(uint32_t i) {
  return digest_keys(uint64_t(i));
}

// Digest of `bytes` bytes; any alignment, any length. THREADS: safe.
uint64_t payload_digest(const void* data, size_t bytes);

// Versions for instruction sets, those that this machine runs, the fastest first: payload_digest is
// that one. All give the same digest.
struct DigestVersion {
  const char* isa;
  uint64_t (*digest)(const void* data, size_t bytes);
};
std::span<const DigestVersion> digest_versions();

// memcpy, then the digest of what has arrived in `to`. REQUIRES no overlap.
uint64_t copy_and_digest(void* to, const void* from, size_t bytes);

}  // namespace certkv
