// Ids back to text: "decoder" of tokenizer.json, worked out per token when loading.
//
// Supported: ByteLevel; Metaspace; and Replace, ByteFallback, Fuse, Strip (at the start), alone or
// in a Sequence in that order.
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

class Decoder {
 public:
  // names: by id, empty where an id has no token. ERRORS: BadFile naming what is not supported.
  Decoder(const nlohmann::json& spec, const std::vector<std::string>& names,
          const std::string& name);
  // What tokenizer.model means: byte pieces, U+2581 for a space, one leading space dropped where
  // `strip_first` (the model put it there).
  static Decoder for_sentencepiece(const std::vector<std::string>& names, bool strip_first);

  // State between ids.
  struct Progress {
    std::string held;        // bytes that may still change
    bool any_token = false;  // a token went by
    size_t stripped = 0;     // characters taken from the start
    bool stripping = true;   // no other character has been seen at the start
  };
  // Appends to `out` what is final after this id.
  void push(int32_t id, Progress& p, std::string& out) const;
  void finish(Progress& p, std::string& out) const;

 private:
  Decoder() = default;
  void add(const nlohmann::json& spec, const std::string& name);
  void flush_bytes(Progress& p, std::string& out) const;
  void emit(std::string_view text, Progress& p, std::string& out) const;

  bool byte_level_ = false;     // pieces are bytes
  bool byte_fallback_ = false;  // pieces named <0xNN> are bytes
  bool fused_ = false;
  bool metaspace_first_ = false;  // the first token loses its replacement characters
  std::string strip_;             // the character taken from the start, at most strip_count_ times
  size_t strip_count_ = 0;
  std::vector<std::string> pieces_;        // by id
  std::vector<std::string> first_pieces_;  // by id, where metaspace_first_
  std::vector<bool> known_;                // by id: there is such a token
  std::vector<int16_t> byte_;              // by id: the byte of a byte token, or -1
};

}  // namespace certkv
