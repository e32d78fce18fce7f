#include "runtime/tokenizer/added_tokens.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr size_t kMaxTokens = 65'536;
constexpr size_t kMaxContentBytes = 512;  // bounds the work at each place of the text

AddedToken read_token(const json& spec, int64_t id, const std::string& where) {
  AddedToken t;
  t.id = int32_t(id);
  t.content = json_string(spec, "content", where);
  CERTKV_EXPECT(!t.content.empty() && t.content.size() <= kMaxContentBytes, BadFile,
                "{}: id {} has {} bytes; 1 to {} are allowed", where, id, t.content.size(),
                kMaxContentBytes);
  t.single_word = json_bool_or(spec, "single_word", false, where);
  t.lstrip = json_bool_or(spec, "lstrip", false, where);
  t.rstrip = json_bool_or(spec, "rstrip", false, where);
  t.special = json_bool_or(spec, "special", false, where);
  t.normalized = json_bool_or(spec, "normalized", !t.special, where);
  return t;
}

}  // namespace

std::vector<AddedToken> read_added_tokens(const json& list, const std::string& name) {
  const std::string where = name + ": added_tokens";
  std::vector<AddedToken> tokens;
  if (list.is_null()) return tokens;
  CERTKV_EXPECT(list.is_array() && list.size() <= kMaxTokens, BadFile,
                "{}: must be a list of at most {} tokens", where, kMaxTokens);
  for (const json& spec : list)
    tokens.push_back(read_token(spec, json_integer(spec, "id", 0, kMaxTokenId, where), where));
  return tokens;
}

std::vector<AddedToken> read_added_tokens_decoder(const json& object, const std::string& name) {
  const std::string where = name + ": added_tokens_decoder";
  std::vector<AddedToken> tokens;
  if (object.is_null()) return tokens;
  CERTKV_EXPECT(object.is_object() && object.size() <= kMaxTokens, BadFile,
                "{}: must be an object of at most {} tokens", where, kMaxTokens);
  for (const auto& [key, spec] : object.items()) {
    int64_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    CERTKV_EXPECT(
        error == std::errc() && end == key.data() + key.size() && id >= 0 && id <= kMaxTokenId,
        BadFile, "{}: '{:.40}' is no id in [0, {}]", where, key, kMaxTokenId);
    tokens.push_back(read_token(spec, id, where));
  }
  return tokens;
}

void AddedTokens::Trie::insert(std::string_view key, int32_t index) {
  uint32_t node = 0;
  first_bytes[static_cast<uint8_t>(key[0])] = true;
  for (const char c : key) {
    const auto [edge, fresh] =
        edges.try_emplace(uint64_t(node) << 8 | static_cast<uint8_t>(c), uint32_t(token.size()));
    if (fresh) token.push_back(-1);
    node = edge->second;
  }
  token[node] = index;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer)
    : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& t = tokens_[i];
    if (t.special) special_.insert(t.id);
    const std::string key = t.normalized ? normalizer.apply(t.content) : t.content;
    if (!key.empty()) (t.normalized ? normalized_ : raw_).insert(key, int32_t(i));
  }
}

void AddedTokens::split(std::string_view text, bool normalized, bool with_special,
                        std::vector<Piece>& out) const {
  const Trie& trie = normalized ? normalized_ : raw_;
  size_t done = 0;  // everything before is in `out`
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    int32_t index = -1;
    if (trie.first_bytes[static_cast<uint8_t>(text[at])]) {
      uint32_t node = 0;
      for (size_t i = at; i < text.size(); ++i) {
        const auto edge = trie.edges.find(uint64_t(node) << 8 | static_cast<uint8_t>(text[i]));
        if (edge == trie.edges.end()) break;
        node = edge->second;
        if (trie.token[node] >= 0) {
          index = trie.token[node];
          length = i + 1 - at;
        }
      }
    }
    if (index < 0) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + length;
    at = end;
    const AddedToken& t = tokens_[size_t(index)];
    if (t.special && !with_special) continue;
    if (t.single_word) {
      const bool free_left = begin == 0 || !utf8::is_word(utf8::last(text.substr(0, begin)));
      const bool free_right = end == text.size() || !utf8::is_word(utf8::first(text.substr(end)));
      if (!free_left || !free_right) continue;
    }
    if (t.lstrip) {
      // Never beyond what the previous token took.
      std::string_view before = text.substr(0, begin);
      while (before.size() > done && utf8::is_space(utf8::last(before))) {
        do before.remove_suffix(1);
        while (!before.empty() && (static_cast<uint8_t>(text[before.size()]) & 0xc0) == 0x80);
      }
      begin = std::max(before.size(), done);
    }
    if (t.rstrip) {
      while (end < text.size()) {
        const utf8::Scan s = utf8::scan(text, end);
        if (!utf8::is_space(s.code)) break;
        end += s.bytes;
      }
    }
    if (done < begin) out.push_back({{done, begin}, -1});
    out.push_back({{begin, end}, t.id});
    done = end;
  }
  if (done < text.size()) out.push_back({{done, text.size()}, -1});
}

}  // namespace certkv
