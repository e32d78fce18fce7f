// Tokens beside the model's vocabulary, which are sought in the text itself before it is split:
// "added_tokens" of tokenizer.json and "added_tokens_decoder" of tokenizer_config.json.
//
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "runtime/tokenizer/normalizer.h"
#include "runtime/tokenizer/split_pattern.h"

namespace certkv {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // only where no letter, digit or mark stands beside it
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool normalized = false;   // sought in the normalised text
  bool special = false;
};

// ERRORS: BadFile naming the token and field.
std::vector<AddedToken> read_added_tokens(const nlohmann::json& list, const std::string& name);
// Of tokenizer_config.json: an object of "id": token.
std::vector<AddedToken> read_added_tokens_decoder(const nlohmann::json& object,
                                                  const std::string& name);

class AddedTokens {
 public:
  AddedTokens() = default;
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer);

  struct Piece {
    TextSpan span;
    int32_t id = -1;  // -1: text between tokens
  };
  // Cuts text into tokens and what lies between them; the longest token wins at each place.
  // normalized: seeks the tokens that belong to normalised text, else the others.
  void split(std::string_view text, bool normalized, bool with_special,
             std::vector<Piece>& out) const;

  bool is_special(int32_t id) const { return special_.contains(id); }
  const std::vector<AddedToken>& list() const { return tokens_; }

 private:
  // A trie over bytes.
  struct Trie {
    std::unordered_map<uint64_t, uint32_t> edges;  // node << 8 | byte -> node
    std::vector<int32_t> token{-1};                // index into tokens_, or -1
    bool first_bytes[256] = {};
    void insert(std::string_view key, int32_t index);
  };
  std::vector<AddedToken> tokens_;
  std::unordered_set<int32_t> special_;
  Trie raw_, normalized_;
};

}  // namespace certkv
