// How text is cut into words before the model sees it: "pre_tokenizer" of tokenizer.json.
//
// Supported: null, Sequence, Split, ByteLevel (last), Metaspace, Digits.
// THREADS: const functions may be called from any thread.
#pragma once

#include <deque>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

struct Word {
  std::string_view text;
  bool at_start = false;  // begins where the whole input begins
};

// Words, and the text of those that are not parts of the input.
struct Words {
  std::vector<Word> list;
  std::deque<std::string> owned;
};

class PreTokenizer {
 public:
  PreTokenizer();
  // ERRORS: BadFile naming what is not supported, with `name` of the file.
  PreTokenizer(const nlohmann::json& spec, const std::string& name);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;
  PreTokenizer& operator=(PreTokenizer&&) noexcept;

  // True where the words' bytes are to be looked up in the byte alphabet.
  bool byte_level() const { return byte_level_; }

  // REQUIRES valid UTF-8 and words.list the pieces to cut. ENSURES no word is empty.
  void apply(Words& words) const;

 private:
  struct Step;
  void add(const nlohmann::json& spec, const std::string& name);
  std::vector<std::unique_ptr<Step>> steps_;
  bool byte_level_ = false;
};

}  // namespace certkv
