// Text to token ids and back, as the model folder's tokenizer.json or tokenizer.model says.
//
// Supported: tokenizer.json with a BPE model, byte-level (Llama 3, Qwen2, Qwen3, GPT-2 splitting)
// or of SentencePiece's kind (byte fallback; Llama 2, Mistral); where there is no tokenizer.json,
// tokenizer.model through libsentencepiece. Anything else is refused by name when loading. Ids and
// text are those of Hugging Face's `tokenizers`.
//
// Text that is not valid UTF-8 is repaired first: every maximal invalid part becomes one U+FFFD.
//
// THREADS: a loaded Tokenizer is immutable; any number of threads may use it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

enum class SpecialInText : uint8_t {
  Parse,   // "<|eot_id|>" in the text becomes that token: for templates and trusted prompts
  AsText,  // it stays ordinary text: for what users wrote inside a chat message
};

class Tokenizer {
 public:
  struct Parts;
  explicit Tokenizer(std::unique_ptr<const Parts> parts);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // add_special: also what the model's template puts around a text (usually BOS).
  // Time n log n in the bytes of the text, whatever the text.
  std::vector<int32_t> encode(std::string_view text, bool add_special,
                              SpecialInText special = SpecialInText::Parse) const;

  // Puts around ids what the model's template puts around a text.
  std::vector<int32_t> with_special(std::vector<int32_t> ids) const;

  // ENSURES valid UTF-8: invalid parts become U+FFFD. An id without a token (a padding row of the
  // vocabulary) becomes nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  size_t vocab_size() const;  // 1 + the largest id
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  bool is_special(int32_t id) const;                              // added and marked special
  std::optional<int32_t> token_id(std::string_view token) const;  // by its name in the vocabulary
  std::string token_name(int32_t id) const;                       // empty where the id has no token
  // The folder's own Jinja template, if it has one.
  const std::optional<std::string>& chat_template_text() const;

  const Parts& parts() const { return *parts_; }

 private:
  std::unique_ptr<const Parts> parts_;
};

// ERRORS: BadFile naming file, place and what is supported.
std::shared_ptr<const Tokenizer> load_tokenizer(const std::string& folder);

// The same from memory; `config` is the text of tokenizer_config.json. `name` is for errors.
std::shared_ptr<const Tokenizer> load_tokenizer_from_json_text(
    std::string_view tokenizer_json, std::string_view config = "{}",
    const std::string& name = "tokenizer.json");

// Decodes ids one by one. ENSURES what push() and finish() return, put together, is decode() of all
// ids; nothing returned ever ends inside a character. Text is held back while it could still
// change.
class StreamingDecoder {
 public:
  StreamingDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special);
  ~StreamingDecoder();
  StreamingDecoder(StreamingDecoder&&) noexcept;
  StreamingDecoder& operator=(StreamingDecoder&&) noexcept;

  std::string push(int32_t id);
  std::string finish();  // what was held back; afterwards the decoder is as new

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace certkv
