#include "runtime/tokenizer/decoder.h"

#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/byte_alphabet.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr const char* kSupported =
    "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse, Strip in a Sequence in that order";
constexpr std::string_view kLowerOneEighthBlock = "\xe2\x96\x81";  // U+2581
constexpr size_t kMaxContentBytes = 256;

int hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

int16_t byte_of(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || !piece.ends_with('>')) return -1;
  const int high = hex(piece[3]), low = hex(piece[4]);
  return high < 0 || low < 0 ? int16_t(-1) : int16_t(high * 16 + low);
}

std::string replaced(std::string_view in, std::string_view from, std::string_view to) {
  std::string out;
  size_t at = 0;
  for (size_t f = in.find(from); f != in.npos; f = in.find(from, at)) {
    out.append(in, at, f - at).append(to);
    at = f + from.size();
  }
  return out.append(in, at);
}

}  // namespace

Decoder::Decoder(const json& spec, const std::vector<std::string>& names, const std::string& name)
    : pieces_(names) {
  for (const std::string& n : names) known_.push_back(!n.empty());
  CERTKV_EXPECT(!spec.is_null(), BadFile, "{}: decoder is missing; supported: {}", name,
                kSupported);
  add(spec, name);
  CERTKV_EXPECT(strip_count_ == 0 || fused_, BadFile,
                "{}: decoder Strip without Fuse before it is not supported; supported: {}", name,
                kSupported);
}

Decoder Decoder::for_sentencepiece(const std::vector<std::string>& names, bool strip_first) {
  Decoder d;
  for (const std::string& n : names) {
    d.known_.push_back(!n.empty());
    d.byte_.push_back(byte_of(n));
    d.pieces_.push_back(replaced(n, kLowerOneEighthBlock, " "));
  }
  d.byte_fallback_ = d.fused_ = true;
  d.strip_.assign(1, ' ');  // gcc 12 misreads the assignment of a literal
  d.strip_count_ = strip_first ? 1 : 0;
  return d;
}

void Decoder::add(const json& spec, const std::string& name) {
  const std::string where = name + ": decoder";
  const std::string& type = json_string(spec, "type", where);
  const auto before = [&](bool later_step_seen) {
    CERTKV_EXPECT(!later_step_seen, BadFile, "{}: {:.40} stands too late; supported: {}", where,
                  type, kSupported);
  };
  if (type == "Sequence") {
    const json& list = json_member(spec, "decoders", where);
    CERTKV_EXPECT(list.is_array() && list.size() <= 32, BadFile,
                  "{}: decoders must be a list of at most 32", where);
    for (const json& one : list) add(one, name);
  } else if (type == "ByteLevel") {
    before(byte_level_ || byte_fallback_ || fused_ || strip_count_ > 0 || metaspace_first_);
    byte_level_ = true;
    for (std::string& piece : pieces_)
      if (auto bytes = alphabet_to_bytes(piece)) piece = std::move(*bytes);
  } else if (type == "Replace") {
    before(byte_level_ || byte_fallback_ || fused_ || strip_count_ > 0 || metaspace_first_);
    const std::string& from =
        json_string(json_member(spec, "pattern", where), "String", where + ": Replace");
    const std::string& to = json_string(spec, "content", where);
    CERTKV_EXPECT(!from.empty() && to.size() <= kMaxContentBytes, BadFile,
                  "{}: Replace needs a pattern, and content of at most {} bytes", where,
                  kMaxContentBytes);
    for (std::string& piece : pieces_) piece = replaced(piece, from, to);
  } else if (type == "Metaspace") {
    before(byte_level_ || byte_fallback_ || fused_ || strip_count_ > 0 || metaspace_first_);
    const std::string& replacement = json_string(spec, "replacement", where);
    CERTKV_EXPECT(!replacement.empty(), BadFile, "{}: Metaspace without replacement", where);
    const auto scheme = spec.find("prepend_scheme");
    const bool never = scheme != spec.end() && !scheme->is_null()
                           ? json_string(spec, "prepend_scheme", where) == "never"
                           : !json_bool_or(spec, "add_prefix_space", true, where);
    metaspace_first_ = !never;
    for (std::string& piece : pieces_) {
      first_pieces_.push_back(replaced(piece, replacement, ""));
      piece = replaced(piece, replacement, " ");
    }
  } else if (type == "ByteFallback") {
    before(byte_level_ || byte_fallback_ || fused_ || strip_count_ > 0 || metaspace_first_);
    byte_fallback_ = true;
    for (const std::string& piece : pieces_) byte_.push_back(byte_of(piece));
  } else if (type == "Fuse") {
    before(byte_level_ || strip_count_ > 0);
    fused_ = true;
  } else if (type == "Strip") {
    before(byte_level_ || strip_count_ > 0);
    strip_ = json_string(spec, "content", where);
    CERTKV_EXPECT(!strip_.empty() && utf8::scan(strip_, 0).bytes == strip_.size(), BadFile,
                  "{}: Strip takes one character", where);
    strip_count_ = size_t(json_integer(spec, "start", 0, 1024, where));
    CERTKV_EXPECT(json_integer(spec, "stop", 0, 1024, where) == 0, BadFile,
                  "{}: Strip at the end (stop > 0) is not supported", where);
  } else {
    CERTKV_THROW(BadFile, "{}: '{:.60}' is not supported; supported: {}", where, type, kSupported);
  }
}

void Decoder::emit(std::string_view text, Progress& p, std::string& out) const {
  while (p.stripping && !text.empty()) {
    if (p.stripped < strip_count_ && text.starts_with(strip_)) {
      text.remove_prefix(strip_.size());
      ++p.stripped;
    } else {
      p.stripping = false;
    }
  }
  out += text;
}

// A run of byte tokens is text only as a whole: one wrong byte spoils all of it.
void Decoder::flush_bytes(Progress& p, std::string& out) const {
  if (p.held.empty()) return;
  std::string text;
  if (utf8::valid(p.held)) {
    text = std::move(p.held);
  } else {
    for (size_t i = 0; i < p.held.size(); ++i) text += utf8::kReplacement;
  }
  p.held.clear();
  emit(text, p, out);
}

void Decoder::push(int32_t id, Progress& p, std::string& out) const {
  if (id < 0 || size_t(id) >= known_.size() || !known_[size_t(id)]) return;
  const auto i = size_t(id);
  if (byte_level_) {
    p.held += pieces_[i];
    size_t at = 0;
    while (at < p.held.size()) {
      const utf8::Scan s = utf8::scan(p.held, at);
      if (s.kind == utf8::Scan::Kind::Incomplete) break;
      out += s.kind == utf8::Scan::Kind::Character ? std::string_view(p.held).substr(at, s.bytes)
                                                   : utf8::kReplacement;
      at += s.bytes;
    }
    p.held.erase(0, at);
    return;
  }
  if (byte_fallback_ && byte_[i] >= 0) {
    p.held += char(byte_[i]);
  } else {
    flush_bytes(p, out);
    emit(metaspace_first_ && !p.any_token ? first_pieces_[i] : pieces_[i], p, out);
  }
  p.any_token = true;
}

void Decoder::finish(Progress& p, std::string& out) const {
  if (byte_level_) {
    if (!p.held.empty()) out += utf8::kReplacement;
  } else {
    flush_bytes(p, out);
  }
  p = Progress();
}

}  // namespace certkv
