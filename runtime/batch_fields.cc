#include "runtime/batch_fields.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr double kMaxTemperature = 100;
constexpr int64_t kMaxCount = int64_t(1) << 30;  // of tokens, and of anything counted in tokens

// Values that change nothing, one predicate per kind of field.
bool is_null(const json& v) {
  return v.is_null();
}
bool is_false(const json& v) {
  return v.is_null() || v == false;
}
bool is_true(const json& v) {
  return v.is_null() || v == true;
}
bool is_zero(const json& v) {
  return v.is_null() || (v.is_number() && v == 0);
}
bool is_one(const json& v) {
  return v.is_null() || (v.is_number() && v == 1);
}
bool is_empty(const json& v) {
  return v.is_null() || ((v.is_array() || v.is_object() || v.is_string()) && v.empty());
}
bool is_empty_or_none(const json& v) {
  return is_empty(v) || v == "none" || v == "auto";
}
bool is_text_format(const json& v) {
  return v.is_null() || (v.is_object() && v.size() == 1 && v.value("type", json()) == "text");
}
bool is_text_modality(const json& v) {
  return v.is_null() || v == json::array({"text"});
}

struct Unsupported {
  const char* name;
  bool (*changes_nothing)(const json&);
  const char* reason;
};

constexpr std::array kUnsupported = {
    Unsupported{"n", is_one, "one answer per request is produced"},
    Unsupported{"best_of", is_one, "one answer per request is produced"},
    Unsupported{"use_beam_search", is_false, "there is no beam search"},
    Unsupported{"echo", is_false, "the prompt is not repeated in the answer"},
    Unsupported{"suffix", is_empty, "insertion is not supported"},
    Unsupported{"stream", is_false, "a batch does not stream"},
    Unsupported{"stream_options", is_empty, "a batch does not stream"},
    Unsupported{"logprobs", is_false, "probabilities are not returned"},
    Unsupported{"top_logprobs", is_zero, "probabilities are not returned"},
    Unsupported{"prompt_logprobs", is_null, "probabilities are not returned"},
    Unsupported{"logit_bias", is_empty, "logits are not changed"},
    Unsupported{"presence_penalty", is_zero, "penalties are not supported"},
    Unsupported{"frequency_penalty", is_zero, "penalties are not supported"},
    Unsupported{"repetition_penalty", is_one, "penalties are not supported"},
    Unsupported{"length_penalty", is_one, "penalties are not supported"},
    Unsupported{"min_p", is_zero, "only temperature, top_p and top_k are supported"},
    Unsupported{"min_tokens", is_zero, "an answer ends where the model ends it"},
    Unsupported{"ignore_eos", is_false, "an answer ends where the model ends it"},
    Unsupported{"stop_token_ids", is_empty, "stop takes strings"},
    Unsupported{"include_stop_str_in_output", is_false, "the stop string is left out"},
    Unsupported{"skip_special_tokens", is_true, "special tokens are left out"},
    Unsupported{"add_special_tokens", is_true, "the tokenizer's own special tokens are added"},
    Unsupported{"truncate_prompt_tokens", is_null, "a prompt is never cut"},
    Unsupported{"tools", is_empty, "tools are not supported"},
    Unsupported{"tool_choice", is_empty_or_none, "tools are not supported"},
    Unsupported{"functions", is_empty, "tools are not supported"},
    Unsupported{"function_call", is_empty_or_none, "tools are not supported"},
    Unsupported{"response_format", is_text_format, "only plain text is produced"},
    Unsupported{"modalities", is_text_modality, "only plain text is produced"},
    Unsupported{"audio", is_null, "only plain text is produced"},
    Unsupported{"prediction", is_null, "predicted outputs are not supported"},
    Unsupported{"reasoning_effort", is_null, "reasoning effort is not supported"},
    Unsupported{"web_search_options", is_null, "there is no web search"},
};

// Cannot change an answer.
constexpr std::array kIgnored = {"user",
                                 "metadata",
                                 "store",
                                 "service_tier",
                                 "safety_identifier",
                                 "prompt_cache_key",
                                 "parallel_tool_calls"};

double number_in(const json& v, const char* name, double least, double most) {
  CERTKV_EXPECT(v.is_number(), InvalidArgument, "{} is {}: a number is needed", name, shown(v));
  const double x = v.get<double>();
  CERTKV_EXPECT(x >= least && x <= most, InvalidArgument, "{} is {}: it must lie in [{}, {}]", name,
                shown(v), least, most);
  return x;
}

int64_t integer_in(const json& v, const char* name, int64_t least, int64_t most) {
  CERTKV_EXPECT(v.is_number_integer(), InvalidArgument, "{} is {}: an integer is needed", name,
                shown(v));
  const bool huge =
      v.is_number_unsigned() && v.get<uint64_t>() > uint64_t(std::numeric_limits<int64_t>::max());
  CERTKV_EXPECT(!huge && v.get<int64_t>() >= least && v.get<int64_t>() <= most, InvalidArgument,
                "{} is {}: it must lie in [{}, {}]", name, shown(v), least, most);
  return v.get<int64_t>();
}

void read_prompt(const json& v, BatchLine& line) {
  if (v.is_string()) {
    line.prompt = v.get<std::string>();
    CERTKV_EXPECT(!line.prompt.empty(), InvalidArgument, "prompt is empty");
    return;
  }
  CERTKV_EXPECT(v.is_array() && !v.empty(), InvalidArgument,
                "prompt is {}: a text, or a list of token ids, is needed", shown(v));
  if (v.front().is_string() || v.front().is_array()) {
    CERTKV_EXPECT(v.size() == 1, InvalidArgument,
                  "prompt holds {} prompts: write one line for each", v.size());
    return read_prompt(v.front(), line);
  }
  line.prompt_ids.reserve(v.size());
  for (const json& id : v) {
    line.prompt_ids.push_back(
        int32_t(integer_in(id, "prompt: a token id", 0, std::numeric_limits<int32_t>::max())));
  }
}

std::string message_content(const json& v, size_t at) {
  if (v.is_string()) return v.get<std::string>();
  CERTKV_EXPECT(v.is_array() && !v.empty(), InvalidArgument,
                "messages[{}].content is {}: a text is needed", at, shown(v));
  std::string text;
  for (const json& part : v) {
    CERTKV_EXPECT(part.is_object() && part.size() == 2 && part.value("type", json()) == "text" &&
                      part.contains("text") && part["text"].is_string(),
                  InvalidArgument, "messages[{}].content has a part {}: only text is supported", at,
                  shown(part));
    text += part["text"].get<std::string>();
  }
  return text;
}

void read_messages(const json& v, BatchLine& line) {
  CERTKV_EXPECT(v.is_array() && !v.empty(), InvalidArgument,
                "messages is {}: a list of messages is needed", shown(v));
  for (size_t i = 0; i < v.size(); ++i) {
    const json& m = v[i];
    CERTKV_EXPECT(m.is_object(), InvalidArgument, "messages[{}] is {}: an object is needed", i,
                  shown(m));
    BatchMessage message;
    for (const auto& [name, value] : m.items()) {
      if (name == "role") {
        CERTKV_EXPECT(value == "system" || value == "user" || value == "assistant", InvalidArgument,
                      "messages[{}].role is {}: system, user and assistant are supported", i,
                      shown(value));
        message.role = value.get<std::string>();
      } else if (name == "content") {
        message.content = message_content(value, i);
      } else {
        CERTKV_EXPECT(is_empty(value), InvalidArgument, "messages[{}].{} is not supported", i,
                      name.substr(0, 64));
      }
    }
    CERTKV_EXPECT(!message.role.empty(), InvalidArgument, "messages[{}].role is missing", i);
    CERTKV_EXPECT(m.contains("content"), InvalidArgument, "messages[{}].content is missing", i);
    line.messages.push_back(std::move(message));
  }
}

void read_stop(const json& v, BatchLine& line, const BatchLimits& limits) {
  if (v.is_null()) return;
  line.sampling.stop.clear();
  const json list = v.is_array() ? v : json::array({v});
  CERTKV_EXPECT(list.size() <= limits.stop_strings, InvalidArgument,
                "stop has {} strings: at most {} are allowed", list.size(), limits.stop_strings);
  for (const json& s : list) {
    CERTKV_EXPECT(s.is_string() && !s.get_ref<const std::string&>().empty() &&
                      s.get_ref<const std::string&>().size() <= limits.stop_bytes,
                  InvalidArgument, "stop has {}: strings of 1 to {} bytes are needed", shown(s),
                  limits.stop_bytes);
    line.sampling.stop.push_back(s.get<std::string>());
  }
}

// True if the field is one that is understood.
bool read_known(const std::string& name, const json& v, BatchLine& line,
                const BatchLimits& limits) {
  SamplingOptions& s = line.sampling;
  if (name == "prompt" && line.kind != BatchKind::Chat) {
    read_prompt(v, line);
  } else if (name == "messages" && line.kind == BatchKind::Chat) {
    read_messages(v, line);
  } else if (name == "max_tokens" ||
             (name == "max_completion_tokens" && line.kind == BatchKind::Chat)) {
    if (!v.is_null()) s.max_tokens = integer_in(v, name.c_str(), 1, kMaxCount);
  } else if (name == "temperature") {
    if (!v.is_null()) s.temperature = number_in(v, "temperature", 0, kMaxTemperature);
  } else if (name == "top_p") {
    if (v.is_null()) return true;
    s.top_p = number_in(v, "top_p", 0, 1);
    CERTKV_EXPECT(s.top_p > 0, InvalidArgument, "top_p is 0: it must lie in (0, 1]");
  } else if (name == "top_k") {  // as vLLM has it: -1 and 0 mean all
    if (!v.is_null()) s.top_k = std::max<int64_t>(0, integer_in(v, "top_k", -1, kMaxCount));
  } else if (name == "seed") {
    if (v.is_null()) return true;
    CERTKV_EXPECT(v.is_number_integer(), InvalidArgument, "seed is {}: an integer is needed",
                  shown(v));
    s.seed = v.is_number_unsigned() ? v.get<uint64_t>() : uint64_t(v.get<int64_t>());
  } else if (name == "stop") {
    read_stop(v, line, limits);
  } else if (name == "model") {
    CERTKV_EXPECT(v.is_string() || v.is_null(), InvalidArgument, "model is {}: a name is needed",
                  shown(v));
    if (v.is_string()) line.model = v.get<std::string>();
  } else {
    return false;
  }
  return true;
}

Tolerance read_tolerance(const json& v) {
  Tolerance t;
  json value = v;
  if (v.is_object()) {
    CERTKV_EXPECT(
        v.size() == 1 && (v.contains("relative") || v.contains("absolute")), InvalidArgument,
        "certkv.tolerance is {}: {{\"relative\": x}} or {{\"absolute\": x}} is needed", shown(v));
    t.is_relative = v.contains("relative");
    value = *v.begin();
  }
  t.value = number_in(value, "certkv.tolerance", 0, kMaxTolerance);
  return t;
}

}  // namespace

std::string shown(const json& value) {
  constexpr size_t kLongest = 60;
  if (value.is_structured() && value.size() > 8) {
    return fmt::format("{} of {}", value.is_array() ? "a list" : "an object", value.size());
  }
  if (value.is_string() && value.get_ref<const std::string&>().size() > kLongest) {
    return fmt::format("a text of {} bytes", value.get_ref<const std::string&>().size());
  }
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
}

void read_request_body(const json& body, BatchLine& line, const BatchLimits& limits) {
  CERTKV_EXPECT(body.is_object(), InvalidArgument, "body is {}: an object is needed", shown(body));
  CERTKV_EXPECT(!(body.contains("max_tokens") && body.contains("max_completion_tokens")),
                InvalidArgument, "max_tokens and max_completion_tokens: give one of them");
  for (const auto& [name, value] : body.items()) {
    if (read_known(name, value, line, limits)) continue;
    if (std::find(kIgnored.begin(), kIgnored.end(), name) != kIgnored.end()) continue;
    const auto* found =
        std::find_if(kUnsupported.begin(), kUnsupported.end(),
                     [&name = name](const Unsupported& u) { return u.name == name; });
    CERTKV_EXPECT(found != kUnsupported.end(), InvalidArgument,
                  "{} is not a field of this kind of request: a field that might change the answer "
                  "is not ignored",
                  name.substr(0, 64));
    CERTKV_EXPECT(found->changes_nothing(value), InvalidArgument, "{} is {}: {}", name,
                  shown(value), found->reason);
  }
  const char* needed = line.kind == BatchKind::Chat ? "messages" : "prompt";
  CERTKV_EXPECT(body.contains(needed), InvalidArgument, "{} is missing", needed);
}

void read_certkv_field(const json& value, BatchLine& line, const BatchDefaults& defaults) {
  CERTKV_EXPECT(value.is_object(), InvalidArgument, "certkv is {}: an object is needed",
                shown(value));
  for (const auto& [name, v] : value.items()) {
    if (name == "tolerance") {
      line.tolerance = read_tolerance(v);
    } else if (name == "policy") {
      const auto policy =
          v.is_string() ? policy_from_name(v.get_ref<const std::string&>()) : std::nullopt;
      CERTKV_EXPECT(policy.has_value(), InvalidArgument,
                    "certkv.policy is {}: budget, paper, naive and dense are known", shown(v));
      CERTKV_EXPECT(!defaults.compare, InvalidArgument,
                    "certkv.policy is {}: this job compares policies, every line is decoded under "
                    "each of them; leave it out",
                    shown(v));
      line.policy = *policy;
      line.policy_asked = true;
    } else {
      CERTKV_THROW(InvalidArgument, "certkv.{} is not known: tolerance and policy are",
                   name.substr(0, 64));
    }
  }
}

}  // namespace certkv
