#include "runtime/chat_template.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <span>

#include "kernels/base/error.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;
using Style = ChatTemplate::Style;

constexpr std::array<const char*, 4> kLlama3Tokens{"<|begin_of_text|>", "<|start_header_id|>",
                                                   "<|end_header_id|>", "<|eot_id|>"};
constexpr std::array<const char*, 2> kChatMlTokens{"<|im_start|>", "<|im_end|>"};
constexpr const char* kQwen2System = "You are a helpful assistant.";
constexpr const char* kQwen25System =
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
constexpr const char* kLlama31Dates =
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n";

bool has_all(const Tokenizer& tokenizer, std::span<const char* const> tokens) {
  for (const char* t : tokens)
    if (!tokenizer.token_id(t)) return false;
  return true;
}

void require(const Tokenizer& tokenizer, std::span<const char* const> tokens, const char* name) {
  for (const char* t : tokens) {
    const auto id = tokenizer.token_id(t);
    CERTKV_EXPECT(id.has_value(), BadFile,
                  "chat template {} needs the token {}, which this tokenizer lacks; choose another "
                  "chat_template (auto, llama3, qwen, plain)",
                  name, t);
    // Otherwise a message that contains its text could speak for another role.
    CERTKV_EXPECT(
        tokenizer.is_special(*id), BadFile,
        "chat template {} needs {} as a special token, but the tokenizer does not mark it "
        "special",
        name, t);
  }
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

std::string_view without_leading_newlines(std::string_view s) {
  return s.substr(std::min(s.find_first_not_of('\n'), s.size()));
}
std::string_view without_trailing_newlines(std::string_view s) {
  return s.substr(0, s.find_last_not_of('\n') + 1);
}

// An assistant's turn as Qwen3 writes it: thoughts stay only in turns after the last question.
std::string qwen3_answer(std::string_view content, bool after_question, bool last) {
  std::string_view thoughts, answer = content;
  constexpr std::string_view kOpen = "<think>", kClose = "</think>";
  if (const size_t close = content.find(kClose); close != content.npos) {
    thoughts = without_trailing_newlines(content.substr(0, close));
    if (const size_t open = thoughts.rfind(kOpen); open != thoughts.npos)
      thoughts.remove_prefix(open + kOpen.size());
    thoughts = without_leading_newlines(thoughts);
    answer = without_leading_newlines(content.substr(content.rfind(kClose) + kClose.size()));
  }
  if (!after_question || (!last && thoughts.empty())) return std::string(answer);
  thoughts = without_leading_newlines(without_trailing_newlines(thoughts));
  return fmt::format("<think>\n{}\n</think>\n\n{}", thoughts, without_leading_newlines(answer));
}

// The last message of a user that is no tool's answer wrapped as one.
size_t last_question(const std::vector<ChatMessage>& messages) {
  for (size_t i = messages.size(); i-- > 0;) {
    const ChatMessage& m = messages[i];
    const bool wrapped =
        m.content.starts_with("<tool_response>") && m.content.ends_with("</tool_response>");
    if (m.role == "user" && !wrapped) return i;
  }
  return messages.size() - 1;
}

}  // namespace

std::vector<ChatMessage> parse_chat_messages(const json& messages) {
  CERTKV_EXPECT(messages.is_array() && !messages.empty(), InvalidArgument,
                "messages must be a list of at least one message");
  std::vector<ChatMessage> out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const json& m = messages[i];
    CERTKV_EXPECT(m.is_object(), InvalidArgument, "messages[{}] must be an object", i);
    for (const auto& [key, value] : m.items()) {
      CERTKV_EXPECT(key == "role" || key == "content" || key == "name" || value.is_null(),
                    InvalidArgument, "messages[{}]: '{:.60}' is not supported", i, key);
    }
    const auto role = m.find("role"), content = m.find("content");
    CERTKV_EXPECT(role != m.end() && role->is_string(), InvalidArgument,
                  "messages[{}]: role is missing", i);
    ChatMessage message{role->get<std::string>(), ""};
    CERTKV_EXPECT(
        message.role == "system" || message.role == "user" || message.role == "assistant",
        InvalidArgument,
        "messages[{}]: role '{:.60}' is not supported; supported: system, user, assistant", i,
        message.role);
    CERTKV_EXPECT(content != m.end() && (content->is_string() || content->is_array()),
                  InvalidArgument, "messages[{}]: content must be a string or a list of text parts",
                  i);
    if (content->is_string()) message.content = content->get<std::string>();
    if (content->is_array()) {
      for (const json& part : *content) {
        const bool text = part.is_object() && part.value("type", json()) == "text" &&
                          part.contains("text") && part["text"].is_string();
        CERTKV_EXPECT(text, InvalidArgument,
                      "messages[{}]: a part of content is not {{\"type\": \"text\", \"text\": "
                      "...}}; only text is supported",
                      i);
        message.content += part["text"].get_ref<const std::string&>();
      }
    }
    out.push_back(std::move(message));
  }
  return out;
}

// A special token by name, or text in which none is parsed.
struct ChatTemplate::Part {
  bool token = false;
  std::string text;
};

const char* ChatTemplate::name() const {
  switch (style_) {
    case Style::Unknown:
      return "unknown";
    case Style::Plain:
      return "plain";
    case Style::Llama3:
    case Style::Llama31:
      return "llama3";
    case Style::Qwen2:
    case Style::Qwen25:
    case Style::ChatMl:
    case Style::Qwen3:
      return "qwen";
  }
  return "unknown";
}

std::vector<ChatTemplate::Part> ChatTemplate::lay_out(
    const std::vector<ChatMessage>& messages) const {
  CERTKV_EXPECT(style_ != Style::Unknown, InvalidArgument,
                "this model's chat template is not one of the supported ones; set chat_template to "
                "llama3, qwen or plain, or send prompts instead of messages");
  CERTKV_EXPECT(!messages.empty(), InvalidArgument, "messages must not be empty");
  std::vector<Part> parts;
  const auto token = [&](std::string_view t) { parts.push_back({true, std::string(t)}); };
  // Neighbouring texts are one text: words may reach across their border.
  const auto text = [&](std::string_view t) {
    if (parts.empty() || parts.back().token) parts.push_back({false, {}});
    parts.back().text += t;
  };

  if (style_ == Style::Plain) {
    for (size_t i = 0; i < messages.size(); ++i) {
      if (i > 0) text("\n");
      text(messages[i].content);
    }
    return parts;
  }

  if (style_ == Style::Llama3 || style_ == Style::Llama31) {
    const auto turn = [&](const std::string& role) {
      token("<|start_header_id|>");
      text(role);
      token("<|end_header_id|>");
      text("\n\n");
    };
    token("<|begin_of_text|>");
    size_t next = 0;
    if (style_ == Style::Llama31) {
      turn("system");
      text(kLlama31Dates);
      if (messages[0].role == "system") {
        text(utf8::stripped(messages[0].content));
        next = 1;
      }
      token("<|eot_id|>");
    }
    for (; next < messages.size(); ++next) {
      turn(messages[next].role);
      text(utf8::stripped(messages[next].content));
      token("<|eot_id|>");
    }
    turn("assistant");
    return parts;
  }

  const auto turn = [&](const std::string& role, std::string_view content) {
    token("<|im_start|>");
    text(role + "\n");
    text(content);
    token("<|im_end|>");
    text("\n");
  };
  if (messages[0].role != "system") {
    if (style_ == Style::Qwen2) turn("system", kQwen2System);
    if (style_ == Style::Qwen25) turn("system", kQwen25System);
  }
  const size_t question = last_question(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (style_ == Style::Qwen3 && m.role == "assistant")
      turn(m.role, qwen3_answer(m.content, i > question, i + 1 == messages.size()));
    else
      turn(m.role, m.content);
  }
  token("<|im_start|>");
  text("assistant\n");
  return parts;
}

std::string ChatTemplate::render(const std::vector<ChatMessage>& messages) const {
  std::string out;
  for (const Part& p : lay_out(messages)) out += p.text;
  return out;
}

std::vector<int32_t> ChatTemplate::encode(const std::vector<ChatMessage>& messages,
                                          const Tokenizer& tokenizer) const {
  const std::vector<Part> parts = lay_out(messages);
  std::vector<int32_t> control;
  for (const auto id : {tokenizer.bos_id(), tokenizer.eos_id()})
    if (id) control.push_back(*id);
  for (const Part& p : parts) {
    if (!p.token) continue;
    const auto id = tokenizer.token_id(p.text);
    CERTKV_EXPECT(id.has_value(), BadFile, "chat template {}: this tokenizer has no {}", name(),
                  p.text);
    control.push_back(*id);
  }
  std::vector<int32_t> ids;
  for (const Part& p : parts) {
    if (p.token) {
      ids.push_back(tokenizer.token_id(p.text).value());
      continue;
    }
    // A tokenizer whose vocabulary holds a control token as an ordinary word could still make it.
    for (const int32_t id : tokenizer.encode(p.text, false, SpecialInText::AsText)) {
      CERTKV_EXPECT(std::find(control.begin(), control.end(), id) == control.end(), BadFile,
                    "this tokenizer makes the control token {} of a message's text, so chats would "
                    "not be safe; send prompts instead of messages",
                    tokenizer.token_name(id));
      ids.push_back(id);
    }
  }
  return style_ == Style::Plain ? tokenizer.with_special(std::move(ids)) : ids;
}

std::vector<int32_t> ChatTemplate::stop_ids(const Tokenizer& tokenizer) const {
  std::vector<int32_t> ids;
  const auto add = [&](const char* t) {
    if (const auto id = tokenizer.token_id(t)) ids.push_back(*id);
  };
  const std::string family = name();
  if (family == "llama3") add("<|eot_id|>");
  if (family == "qwen") add("<|im_end|>");
  return ids;
}

ChatTemplate choose_chat_template(const std::string& name, const std::string& model_type,
                                  const Tokenizer& tokenizer) {
  CERTKV_EXPECT(name == "auto" || name == "llama3" || name == "qwen" || name == "plain",
                InvalidArgument,
                "chat_template '{:.60}' is not known; known: auto, llama3, qwen, plain", name);
  if (name == "plain") return ChatTemplate(Style::Plain);
  const std::string own = tokenizer.chat_template_text().value_or("");
  const bool qwen_model = model_type.starts_with("qwen");
  const bool llama_template = own.empty() || contains(own, "<|start_header_id|>");
  const bool qwen_template =
      own.empty() ? qwen_model
                  : contains(own, "<|im_start|>") && (qwen_model || contains(own, "Qwen"));

  if (name == "llama3" || (name == "auto" && has_all(tokenizer, kLlama3Tokens) && llama_template)) {
    require(tokenizer, kLlama3Tokens, "llama3");
    return ChatTemplate(contains(own, "Cutting Knowledge Date") ? Style::Llama31 : Style::Llama3);
  }
  if (name == "qwen" || (name == "auto" && has_all(tokenizer, kChatMlTokens) && qwen_template)) {
    require(tokenizer, kChatMlTokens, "qwen");
    if (contains(own, kQwen25System)) return ChatTemplate(Style::Qwen25);
    if (contains(own, kQwen2System)) return ChatTemplate(Style::Qwen2);
    if (model_type.starts_with("qwen3"))
      return ChatTemplate(own.empty() || contains(own, "</think>") ? Style::Qwen3 : Style::ChatMl);
    return ChatTemplate(own.empty() && model_type == "qwen2" ? Style::Qwen25 : Style::ChatMl);
  }
  const bool bare = !has_all(tokenizer, kLlama3Tokens) && !has_all(tokenizer, kChatMlTokens);
  return ChatTemplate(own.empty() && bare ? Style::Plain : Style::Unknown);
}

}  // namespace certkv
