// Byte-pair encoding: the vocabulary, the ranked merges, and their application to one word.
//
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace certkv {

// Ids index tables, so they have to stay small; the largest vocabularies have 262,144 tokens.
inline constexpr int64_t kMaxTokenId = (1 << 20) - 1;
inline constexpr size_t kMaxTokenBytes = 8192;

struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
using TokenIds = std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>>;

class BpeModel {
 public:
  // spec: "model" of tokenizer.json. byte_level: keys are written in the byte alphabet, and words
  // are bytes; otherwise words and keys are text.
  // ERRORS: BadFile naming the key, id or merge that is wrong.
  BpeModel(const nlohmann::json& spec, bool byte_level, const std::string& name);

  // Appends the ids of a word. Time n log n.
  // ERRORS: InvalidArgument where a character has neither token nor fallback.
  void encode(std::string_view word, std::vector<int32_t>& ids) const;

  const TokenIds& vocabulary() const { return names_; }  // as the file writes them
  bool byte_fallback() const { return byte_fallback_; }
  std::optional<int32_t> id_of(std::string_view name) const;

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  struct Symbol {
    int32_t id;
    uint32_t previous, next;  // kNone at the ends
    bool alive;
  };
  struct PairHash {
    size_t operator()(uint64_t k) const {
      k ^= k >> 31;
      k *= 0x9e3779b97f4a7c15u;
      return size_t(k ^ k >> 29);
    }
  };
  static uint64_t pair_of(int32_t a, int32_t b) {
    return uint64_t(uint32_t(a)) << 32 | uint32_t(b);
  }
  void read_vocabulary(const nlohmann::json& spec);
  void read_merges(const nlohmann::json& spec);
  void read_byte_tokens();
  void start(std::string_view word, std::vector<Symbol>& symbols) const;
  void merge(std::vector<Symbol>& symbols) const;

  std::string name_;
  bool byte_level_ = false, byte_fallback_ = false, fuse_unknown_ = false, ignore_merges_ = false;
  TokenIds names_;      // as the file writes them
  TokenIds by_bytes_;   // byte level: the same by the bytes they stand for
  size_t longest_ = 0;  // bytes of the longest key that a word can be
  std::unordered_map<uint64_t, Merge, PairHash> merges_;
  std::optional<int32_t> unknown_;
  std::vector<int32_t> byte_tokens_;  // [256] of byte fallback, or of the byte alphabet
};

}  // namespace certkv
