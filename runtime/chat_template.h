// A chat as one prompt: what each family of models was trained to see around the messages.
//
// Roles are system, user, assistant; contents are text. What users wrote is never parsed for
// special tokens, so a message cannot end its own turn or speak for another role.
//
// | name   | families                                    | differences taken from the folder |
// |--------|---------------------------------------------|----------------------------------------------|
// | llama3 | Llama 3, 3.1, 3.2, 3.3                      | 3.1 on: a system turn with dates, always
// | | qwen   | Qwen2, Qwen2.5, Qwen3 (ChatML)              | default system prompt; Qwen3: <think>
// | | plain  | any: contents one per line, BOS by template | none |
//
// The date that Llama 3.1 templates print is fixed at their default, 26 Jul 2024, so that the same
// input makes the same prompt on every day.
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "runtime/tokenizer.h"

namespace certkv {

struct ChatMessage {
  std::string role;     // system, user, assistant
  std::string content;  // UTF-8
};

// A list of {"role", "content"}, contents being strings or lists of {"type": "text", "text"}, which
// are put together without anything between. Other roles, other kinds of content and other members
// (tool_calls, ...) are refused. ERRORS: InvalidArgument naming the message.
std::vector<ChatMessage> parse_chat_messages(const nlohmann::json& messages);

class ChatTemplate {
 public:
  enum class Style : uint8_t { Unknown, Plain, Llama3, Llama31, Qwen2, Qwen25, ChatMl, Qwen3 };

  explicit ChatTemplate(Style style) : style_(style) {}
  Style style() const { return style_; }
  const char* name() const;  // llama3, qwen, plain, unknown

  // The prompt that asks for the assistant's next turn, for people and for tests.
  // ERRORS: InvalidArgument where the messages cannot be put so, or the style is Unknown.
  std::string render(const std::vector<ChatMessage>& messages) const;

  // The same as token ids. ENSURES no control token comes from a message's text.
  // ERRORS: also BadFile where the tokenizer would make one of it.
  std::vector<int32_t> encode(const std::vector<ChatMessage>& messages,
                              const Tokenizer& tokenizer) const;

  // Tokens that end the assistant's turn, besides the model's own EOS.
  std::vector<int32_t> stop_ids(const Tokenizer& tokenizer) const;

 private:
  struct Part;
  std::vector<Part> lay_out(const std::vector<ChatMessage>& messages) const;
  Style style_;
};

// name: auto, llama3, qwen, plain. model_type: of config.json, "" where unknown. `auto` goes by the
// special tokens, the folder's own template and the model type; a folder whose template is of none
// of these families gets the style Unknown, which refuses chats (and only them) by name.
// ERRORS: InvalidArgument for another name; BadFile where the named template's tokens are missing
// or not special in this tokenizer.
ChatTemplate choose_chat_template(const std::string& name, const std::string& model_type,
                                  const Tokenizer& tokenizer);

}  // namespace certkv
