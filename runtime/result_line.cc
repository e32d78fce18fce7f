#include <nlohmann/json.hpp>

#include "runtime/batch_io.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;

// response.body.certkv, and error.certkv of a line that failed after some steps.
json certificate_json(const LineIdentity& line, const Completion& c) {
  json v = {{"policy", policy_name(c.policy)},
            {"tolerance", tolerance_json(line.tolerance)},
            {"outcome", outcome_name(c.outcome)},
            {"tier1_bytes", c.tier1_bytes},
            {"dense_bytes", c.dense_bytes}};
  put_counts(v, c.counts);
  json returned = json::object();
  put_figure(returned, "bound_max", c.bound_max);
  put_figure(returned, "bound_mean", c.bound_mean);
  put_figure(returned, "relative_max", c.relative_max);
  put_figure(returned, "relative_mean", c.relative_mean);
  put_figure(returned, "relative_p99", c.returned.relative.quantile(0.99));
  v["returned"] = returned;
  json candidate = json::object();
  put_figure(candidate, "bound_max", c.candidate.bound.max);
  put_figure(candidate, "relative_max", c.candidate.relative.max);
  put_figure(candidate, "relative_p99", c.candidate.relative.quantile(0.99));
  v["candidate"] = candidate;
  v["reused_prompt_tokens"] = c.reused_tokens;
  put_figure(v, "prefill_seconds", c.prefill_seconds);
  put_figure(v, "decode_seconds", c.decode_seconds);
  return v;
}

json choice_json(const LineIdentity& line, const Completion& c) {
  json choice = {{"index", 0}, {"finish_reason", c.finish_reason}, {"logprobs", nullptr}};
  if (line.kind == BatchKind::Chat) {
    choice["message"] = {{"role", "assistant"}, {"content", c.text}};
  } else {
    choice["text"] = c.text;
  }
  return choice;
}

}  // namespace

std::string result_line(const LineIdentity& line, const Completion& c, const std::string& run_id,
                        int64_t created) {
  const std::string id = fmt::format("{}-{}-{}", run_id, line.index, policy_name(c.policy));
  json v = {{"id", "batch_req_" + id}, {"custom_id", line.custom_id}};
  if (c.failed) {
    v["response"] = nullptr;
    v["error"] = {{"code", c.error_kind}, {"message", c.error}, {"line", line.number}};
    v["error"]["certkv"] = certificate_json(line, c);
    return json_line(v);
  }
  const bool chat = line.kind == BatchKind::Chat;
  json body = {{"id", (chat ? "chatcmpl-" : "cmpl-") + id},
               {"object", chat ? "chat.completion" : "text_completion"},
               {"created", created},
               {"model", line.model},
               {"choices", json::array({choice_json(line, c)})},
               {"usage",
                {{"prompt_tokens", c.prompt_tokens},
                 {"completion_tokens", c.tokens.size()},
                 {"total_tokens", c.prompt_tokens + c.tokens.size()}}},
               {"certkv", certificate_json(line, c)}};
  v["response"] = {{"status_code", 200}, {"request_id", id}, {"body", body}};
  v["error"] = nullptr;
  return json_line(v);
}

}  // namespace certkv
