// One line of a job's input. Whatever it is, parsing throws nothing: the line is bad with a reason
// and a name, or what it asks for is allowed; and the line of results.jsonl that answers it is
// JSON.
#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "runtime/batch_io.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

void check(const BatchLine& line, const BatchLimits& limits) {
  const SamplingOptions& s = line.sampling;
  require(s.max_tokens >= 1, "max_tokens below 1");
  require(s.temperature >= 0 && std::isfinite(s.temperature), "a temperature");
  require(s.top_p > 0 && s.top_p <= 1, "top_p");
  require(s.top_k >= 0, "top_k");
  require(s.stop.size() <= limits.stop_strings, "too many stop strings");
  for (const std::string& stop : s.stop)
    require(!stop.empty() && stop.size() <= limits.stop_bytes, "a stop string's length");
  require(tolerance_allowed(line.tolerance), "a tolerance that is not allowed");
  require(line.error.empty(), "a good line with an error");
  const bool chat = line.kind == BatchKind::Chat;
  require(chat == !line.messages.empty(), "messages");
  require(!chat || (line.prompt.empty() && line.prompt_ids.empty()), "a chat with a prompt");
  for (const int32_t id : line.prompt_ids) require(id >= 0, "a negative token id");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const BatchLimits limits{.line_bytes = 1 << 16, .json_values = 4096};
  for (const bool compare : {false, true}) {
    BatchDefaults defaults;
    defaults.compare = compare;
    const BatchLine line = parse_batch_line(text, 7, defaults, limits);
    require(!line.custom_id.empty() && line.custom_id.size() <= limits.custom_id_bytes,
            "a custom_id's length");
    require(line.number == 7, "another line's number");
    if (line.bad) {
      require(!line.error.empty(), "a bad line without a reason");
    } else {
      check(line, limits);
      if (!compare) ++fuzz::accepted;
      require(!compare || !line.policy_asked, "a line's own policy beside compare");
    }
    const std::string result = result_line(
        identity_of(line), failed_completion(line.index, line.policy, line.error_kind, line.error),
        "run", 0);
    require(result.find('\n') == std::string::npos, "a result of two lines");
    const auto value = nlohmann::json::parse(result, nullptr, false);
    require(value.is_object() && value["custom_id"].is_string(), "a result that is no JSON");
  }
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  return {
      "BatchLineFuzz",
      {R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m",)"
       R"("prompt":"Once","max_tokens":5,"temperature":0.7,"top_p":0.9,"stop":["x","\n"],"seed":3}})",
       R"({"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{"model":"m",)"
       R"("messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text",)"
       R"("text":"hi"}]}],"max_completion_tokens":9,"n":1,"stream":false}})",
       R"({"prompt":"p","max_tokens":4,"certkv":{"tolerance":{"absolute":1e-3},"policy":"dense"}})",
       R"({"prompt":[1,2,3],"certkv":{"tolerance":0.05}})"},
      {"0",
       "-1",
       "1e999",
       "-0.0",
       "NaN",
       "1e308",
       "4294967296",
       "18446744073709551616",
       "null",
       "true",
       "\"\"",
       "\"policy\":\"naive\",",
       "\"policy\":\"none\",",
       "\"n\":2,",
       "\"logprobs\":1,",
       "\"tools\":[],",
       "\"top_k\":-5,",
       "\"stop\":[],",
       "\"custom_id\":\"\",",
       "\"prompt\":[-1],",
       "\"relative\":",
       "\"absolute\":",
       "[[[[[[",
       "{",
       "}",
       "[",
       "]",
       ",",
       ":",
       "\"",
       "\\ud800",
       "\\u0000",
       "\xff",
       "\xc0\x80",
       "\xf0\x9f\x98\x80",
       std::string(600, 'x')},
      15000};
}
