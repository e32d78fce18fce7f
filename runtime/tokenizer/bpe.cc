#include "runtime/tokenizer/bpe.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <queue>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/byte_alphabet.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr uint32_t kNone = UINT32_MAX;
constexpr size_t kMaxWordBytes = size_t(256) << 20;

bool upper_hex(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'F');
}

void refuse_affix(const json& spec, const char* key, const std::string& name) {
  const auto at = spec.find(key);
  if (at == spec.end() || at->is_null()) return;
  CERTKV_EXPECT(at->is_string() && at->get_ref<const std::string&>().empty(), BadFile,
                "{}: model has {}, which is not supported", name, key);
}

}  // namespace

BpeModel::BpeModel(const json& spec, bool byte_level, const std::string& name)
    : name_(name), byte_level_(byte_level) {
  const std::string where = name + ": model";
  CERTKV_EXPECT(spec.is_object(), BadFile, "{}: must be an object", where);
  // Files older than the field "type" hold a BPE where there are merges.
  const auto type = spec.find("type");
  const std::string kind =
      type == spec.end() && spec.contains("merges") ? "BPE" : json_string(spec, "type", where);
  CERTKV_EXPECT(kind == "BPE", BadFile, "{}: type '{:.40}' is not supported; supported: BPE", where,
                kind);
  refuse_affix(spec, "continuing_subword_prefix", name);
  refuse_affix(spec, "end_of_word_suffix", name);
  const auto dropout = spec.find("dropout");
  CERTKV_EXPECT(dropout == spec.end() || dropout->is_null() ||
                    (dropout->is_number() && dropout->get<double>() == 0),
                BadFile, "{}: dropout is not supported", where);
  byte_fallback_ = json_bool_or(spec, "byte_fallback", false, where);
  fuse_unknown_ = json_bool_or(spec, "fuse_unk", false, where);
  ignore_merges_ = json_bool_or(spec, "ignore_merges", false, where);
  read_vocabulary(spec);
  read_byte_tokens();
  read_merges(spec);
  const auto unknown = spec.find("unk_token");
  if (unknown != spec.end() && !unknown->is_null()) {
    unknown_ = id_of(json_string(spec, "unk_token", where));
    CERTKV_EXPECT(unknown_.has_value(), BadFile, "{}: unk_token is not in the vocabulary", where);
  }
}

std::optional<int32_t> BpeModel::id_of(std::string_view name) const {
  const auto at = names_.find(name);
  return at == names_.end() ? std::nullopt : std::optional<int32_t>(at->second);
}

void BpeModel::read_vocabulary(const json& spec) {
  const json& vocab = json_member(spec, "vocab", name_ + ": model");
  CERTKV_EXPECT(vocab.is_object() && !vocab.empty(), BadFile,
                "{}: model.vocab must be an object of token: id, not empty", name_);
  names_.reserve(vocab.size());
  std::vector<bool> seen;
  for (const auto& [key, value] : vocab.items()) {
    CERTKV_EXPECT(value.is_number_integer(), BadFile,
                  "{}: the id of token '{:.80}' must be an integer", name_, key);
    const bool fits = value.is_number_unsigned() && value.get<uint64_t>() <= uint64_t(kMaxTokenId);
    CERTKV_EXPECT(fits, BadFile, "{}: token '{:.80}' has id {}; ids must lie in [0, {}]", name_,
                  key, value.dump(), kMaxTokenId);
    CERTKV_EXPECT(key.size() <= kMaxTokenBytes, BadFile,
                  "{}: a token of {} bytes; at most {} are allowed", name_, key.size(),
                  kMaxTokenBytes);
    const auto id = value.get<int32_t>();
    if (size_t(id) >= seen.size()) seen.resize(size_t(id) + 1);
    CERTKV_EXPECT(!seen[size_t(id)], BadFile, "{}: id {} belongs to two tokens, one is '{:.80}'",
                  name_, id, key);
    seen[size_t(id)] = true;
    names_.emplace(key, id);
    if (!byte_level_) {
      longest_ = std::max(longest_, key.size());
    } else if (auto bytes = alphabet_to_bytes(key)) {
      longest_ = std::max(longest_, bytes->size());
      by_bytes_.emplace(std::move(*bytes), id);
    }
  }
}

void BpeModel::read_byte_tokens() {
  if (byte_level_) {
    for (unsigned b = 0; b < 256; ++b) {
      const auto at = by_bytes_.find(std::string_view(std::string(1, char(b))));
      CERTKV_EXPECT(at != by_bytes_.end(), BadFile,
                    "{}: a byte-level vocabulary needs all 256 bytes; 0x{:02X} is missing", name_,
                    b);
      byte_tokens_.push_back(at->second);
    }
    return;
  }
  if (!byte_fallback_) return;
  for (const auto& [key, id] : names_) {
    if (!key.starts_with("<0x") || !key.ends_with(">") || key.size() > 12) continue;
    CERTKV_EXPECT(key.size() == 6 && upper_hex(key[3]) && upper_hex(key[4]), BadFile,
                  "{}: '{:.80}' is no byte token; they are <0x00> to <0xFF>", name_, key);
  }
  for (unsigned b = 0; b < 256; ++b) {
    const auto id = id_of(fmt::format("<0x{:02X}>", b));
    CERTKV_EXPECT(id.has_value(), BadFile, "{}: byte_fallback is true, but <0x{:02X}> is missing",
                  name_, b);
    byte_tokens_.push_back(*id);
  }
}

void BpeModel::read_merges(const json& spec) {
  const json& merges = json_member(spec, "merges", name_ + ": model");
  CERTKV_EXPECT(merges.is_array(), BadFile, "{}: model.merges must be a list", name_);
  merges_.reserve(merges.size());
  std::string whole;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const json& m = merges[rank];
    std::string_view left, right;
    if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string()) {
      left = m[0].get_ref<const std::string&>();
      right = m[1].get_ref<const std::string&>();
    } else {
      CERTKV_EXPECT(m.is_string(), BadFile,
                    "{}: merge {} must be a pair of strings or 'left right'", name_, rank);
      const std::string_view line = m.get_ref<const std::string&>();
      const size_t space = line.find(' ');
      CERTKV_EXPECT(space != line.npos && line.find(' ', space + 1) == line.npos, BadFile,
                    "{}: merge {} '{:.80}' must be two tokens and one space", name_, rank, line);
      left = line.substr(0, space);
      right = line.substr(space + 1);
    }
    const auto a = id_of(left), b = id_of(right);
    CERTKV_EXPECT(a && b, BadFile, "{}: merge {}: '{:.80}' is not in the vocabulary", name_, rank,
                  a ? right : left);
    whole.assign(left).append(right);
    const auto id = id_of(whole);
    CERTKV_EXPECT(id.has_value(), BadFile,
                  "{}: merge {} makes '{:.80}' ({} bytes), which is not in the vocabulary", name_,
                  rank, whole, whole.size());
    const bool fresh = merges_.try_emplace(pair_of(*a, *b), Merge{uint32_t(rank), *id}).second;
    CERTKV_EXPECT(fresh, BadFile, "{}: merge {} '{:.40}' '{:.40}' occurs twice", name_, rank, left,
                  right);
  }
}

void BpeModel::start(std::string_view word, std::vector<Symbol>& symbols) const {
  symbols.reserve(word.size());
  const auto add = [&](int32_t id) { symbols.push_back({id, kNone, kNone, true}); };
  if (byte_level_) {
    for (const char c : word) add(byte_tokens_[static_cast<uint8_t>(c)]);
    return;
  }
  bool after_unknown = false;
  for (size_t at = 0; at < word.size();) {
    const size_t bytes = utf8::scan(word, at).bytes;
    const std::string_view character = word.substr(at, bytes);
    at += bytes;
    if (const auto id = id_of(character)) {
      add(*id);
      after_unknown = false;
    } else if (byte_fallback_) {
      for (const char c : character) add(byte_tokens_[static_cast<uint8_t>(c)]);
    } else {
      CERTKV_EXPECT(unknown_.has_value(), InvalidArgument,
                    "{}: the vocabulary has no token for '{}', no unk_token and no byte fallback",
                    name_, character);
      if (!(fuse_unknown_ && after_unknown)) add(*unknown_);
      after_unknown = true;
    }
  }
}

void BpeModel::merge(std::vector<Symbol>& symbols) const {
  struct Candidate {
    uint32_t rank, at;
    int32_t id;
    bool operator>(const Candidate& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  const auto count = uint32_t(symbols.size());
  std::vector<Candidate> heap;
  const auto consider = [&](uint32_t at) -> std::optional<Candidate> {
    const uint32_t next = symbols[at].next;
    if (next == kNone) return std::nullopt;
    const auto m = merges_.find(pair_of(symbols[at].id, symbols[next].id));
    if (m == merges_.end()) return std::nullopt;
    return Candidate{m->second.rank, at, m->second.id};
  };
  for (uint32_t i = 0; i < count; ++i) {
    symbols[i].previous = i == 0 ? kNone : i - 1;
    symbols[i].next = i + 1 == count ? kNone : i + 1;
  }
  for (uint32_t i = 0; i < count; ++i)
    if (const auto c = consider(i)) heap.push_back(*c);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{},
                                                                               std::move(heap));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.at];
    if (!left.alive) continue;
    // The pair may have changed since it was queued.
    const auto now = consider(best.at);
    if (!now || now->id != best.id) continue;
    Symbol& right = symbols[left.next];
    right.alive = false;
    left.id = best.id;
    left.next = right.next;
    if (left.next != kNone) symbols[left.next].previous = best.at;
    if (left.previous != kNone)
      if (const auto c = consider(left.previous)) queue.push(*c);
    if (const auto c = consider(best.at)) queue.push(*c);
  }
}

void BpeModel::encode(std::string_view word, std::vector<int32_t>& ids) const {
  if (word.empty()) return;
  CERTKV_EXPECT(word.size() <= kMaxWordBytes, InvalidArgument,
                "a word of {} bytes; at most {} can be encoded", word.size(), kMaxWordBytes);
  if (ignore_merges_ && word.size() <= longest_) {
    const TokenIds& keys = byte_level_ ? by_bytes_ : names_;
    if (const auto at = keys.find(word); at != keys.end()) {
      ids.push_back(at->second);
      return;
    }
  }
  std::vector<Symbol> symbols;
  start(word, symbols);
  if (symbols.size() > 1) merge(symbols);
  for (const Symbol& s : symbols)
    if (s.alive) ids.push_back(s.id);
}

}  // namespace certkv
