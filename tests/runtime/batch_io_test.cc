#include "runtime/batch_io.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

BatchDefaults defaults() {
  BatchDefaults d;
  d.sampling.max_tokens = 17;
  d.sampling.stop = {"END"};
  d.sampling.seed = 5;
  d.tolerance = {true, 0.03};
  return d;
}

BatchLine parse_text(const std::string& text) {
  return parse_batch_line(text, 7, defaults());
}
BatchLine parse(const json& value) {
  return parse_text(value.dump());
}

json completion(const json& extra = json::object()) {
  json body = {{"model", "m"}, {"prompt", "Once"}};
  body.update(extra);
  return {{"custom_id", "a"}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", body}};
}
json chat(const json& extra = json::object()) {
  json body = {{"model", "m"}, {"messages", {{{"role", "user"}, {"content", "Hello"}}}}};
  body.update(extra);
  return {{"custom_id", "c"}, {"method", "POST"}, {"url", "/v1/chat/completions"}, {"body", body}};
}

TEST(BatchLines, ACompletionTakesItsFieldsAndTheJobsDefaults) {
  const BatchLine line = parse(completion(
      {{"max_tokens", 4}, {"temperature", 0.5}, {"top_p", 0.9}, {"top_k", -1}, {"seed", 11}}));
  ASSERT_FALSE(line.bad) << line.error;
  EXPECT_EQ(line.kind, BatchKind::Completion);
  EXPECT_EQ(line.custom_id, "a");
  EXPECT_EQ(line.prompt, "Once");
  EXPECT_EQ(line.sampling.max_tokens, 4);
  EXPECT_EQ(line.sampling.temperature, 0.5);
  EXPECT_EQ(line.sampling.top_p, 0.9);
  EXPECT_EQ(line.sampling.top_k, 0);
  EXPECT_EQ(line.sampling.seed, 11u);
  EXPECT_EQ(line.sampling.stop, std::vector<std::string>{"END"});
  EXPECT_EQ(line.tolerance.value, 0.03);
  EXPECT_FALSE(line.policy_asked);
}

TEST(BatchLines, APlainLineWithoutCustomIdIsCalledByItsNumber) {
  const BatchLine line = parse_text(R"({"prompt": "Once", "max_tokens": 3, "stop": ["\n", "."]})");
  ASSERT_FALSE(line.bad) << line.error;
  EXPECT_EQ(line.custom_id, "7");
  EXPECT_EQ(line.sampling.max_tokens, 3);
  EXPECT_EQ(line.sampling.stop, (std::vector<std::string>{"\n", "."}));
}

TEST(BatchLines, AChatKeepsItsMessagesInOrderAndJoinsTextParts) {
  json line_json = chat({{"max_completion_tokens", 9}});
  line_json["body"]["messages"] = {
      {{"role", "system"}, {"content", "Be brief."}},
      {{"role", "user"},
       {"content", {{{"type", "text"}, {"text", "One"}}, {{"type", "text"}, {"text", " two"}}}}}};
  const BatchLine line = parse(line_json);
  ASSERT_FALSE(line.bad) << line.error;
  ASSERT_EQ(line.messages.size(), 2u);
  EXPECT_EQ(line.messages[0].role, "system");
  EXPECT_EQ(line.messages[1].content, "One two");
  EXPECT_EQ(line.sampling.max_tokens, 9);
}

TEST(BatchLines, APromptMayBeTokenIdsOrAListOfOneText) {
  EXPECT_EQ(parse(completion({{"prompt", {256, 72, 105}}})).prompt_ids,
            (std::vector<int32_t>{256, 72, 105}));
  EXPECT_EQ(parse(completion({{"prompt", {"Hi"}}})).prompt, "Hi");
}

TEST(BatchLines, ToleranceAndPolicyMayStandBesideTheBodyOrInIt) {
  for (const json& tolerance : {json(0.02), json{{"relative", 0.02}}, json{{"absolute", 0.02}}}) {
    const json extra = {{"tolerance", tolerance}, {"policy", "dense"}};
    json beside = completion();
    beside["certkv"] = extra;
    for (const BatchLine& line : {parse(beside), parse(completion({{"certkv", extra}}))}) {
      ASSERT_FALSE(line.bad) << line.error;
      EXPECT_EQ(line.tolerance.value, 0.02);
      EXPECT_EQ(line.tolerance.is_relative,
                !tolerance.is_object() || tolerance.contains("relative"));
      EXPECT_EQ(line.policy, Policy::Dense);
      EXPECT_TRUE(line.policy_asked);
    }
  }
}

TEST(BatchLines, AFieldThatWouldChangeTheAnswerFailsItsLineByName) {
  const std::vector<std::pair<const char*, json>> fields = {
      {"n", 2},
      {"best_of", 3},
      {"echo", true},
      {"suffix", "end"},
      {"stream", true},
      {"logprobs", 0},
      {"logprobs", true},
      {"top_logprobs", 2},
      {"logit_bias", {{"50256", -100}}},
      {"presence_penalty", 0.5},
      {"frequency_penalty", -0.5},
      {"repetition_penalty", 1.1},
      {"tools", json::array({{{"type", "function"}}})},
      {"tool_choice", "required"},
      {"functions", json::array({{{"name", "f"}}})},
      {"response_format", {{"type", "json_object"}}},
      {"response_format", {{"type", "text"}, {"schema", 1}}},
      {"min_p", 0.1},
      {"ignore_eos", true},
      {"modalities", {"text", "audio"}},
      {"reasoning_effort", "high"},
      {"some_new_field", 1},
  };
  for (const auto& [name, value] : fields) {
    for (const json& line_json : {completion({{name, value}}), chat({{name, value}})}) {
      const BatchLine line = parse(line_json);
      EXPECT_TRUE(line.bad) << name << " " << value;
      EXPECT_THAT(line.error, HasSubstr(name));
      EXPECT_THAT(line.error, HasSubstr("line 7"));
      EXPECT_EQ(line.error_kind, ErrorKind::InvalidArgument);
      EXPECT_EQ(line.custom_id, line_json["custom_id"]);
    }
  }
}

TEST(BatchLines, AFieldWithTheValueThatChangesNothingIsAccepted) {
  const json neutral = {{"n", 1},
                        {"best_of", nullptr},
                        {"echo", false},
                        {"suffix", nullptr},
                        {"stream", false},
                        {"stream_options", nullptr},
                        {"logprobs", false},
                        {"top_logprobs", nullptr},
                        {"logit_bias", json::object()},
                        {"presence_penalty", 0},
                        {"frequency_penalty", 0.0},
                        {"tools", json::array()},
                        {"tool_choice", "none"},
                        {"response_format", {{"type", "text"}}},
                        {"user", "someone"},
                        {"metadata", {{"k", "v"}}},
                        {"service_tier", "auto"},
                        {"temperature", nullptr},
                        {"max_tokens", nullptr},
                        {"stop", nullptr}};
  for (const json& line_json : {completion(neutral), chat(neutral)}) {
    const BatchLine line = parse(line_json);
    EXPECT_FALSE(line.bad) << line.error;
    EXPECT_EQ(line.sampling.max_tokens, 17);
    EXPECT_EQ(line.sampling.stop, std::vector<std::string>{"END"});
  }
}

TEST(BatchLines, EveryBadValueIsNamedInItsLinesError) {
  const auto with = [](const char* key, const json& value) {
    json line = completion();
    line[key] = value;
    return line;
  };
  json no_url = completion(), no_body = completion(),
       twice = completion({{"certkv", json::object()}});
  no_url.erase("url");
  no_body.erase("body");
  twice["certkv"] = json::object();
  json no_prompt = completion();
  no_prompt["body"].erase("prompt");
  json no_messages = chat();
  no_messages["body"].erase("messages");
  json tool_message = chat(), bad_part = chat();
  tool_message["body"]["messages"][0]["role"] = "tool";
  bad_part["body"]["messages"][0]["content"] = {{{"type", "image_url"}, {"image_url", "x"}}};
  const std::vector<std::pair<json, const char*>> cases = {
      {completion({{"max_tokens", 0}}), "max_tokens is 0"},
      {completion({{"max_tokens", -1}}), "max_tokens is -1"},
      {completion({{"max_tokens", 1.5}}), "max_tokens is 1.5"},
      {completion({{"max_tokens", uint64_t(1) << 63}}), "max_tokens is 9223372036854775808"},
      {completion({{"max_tokens", "9"}}), "max_tokens is \"9\""},
      {completion({{"temperature", -0.1}}), "temperature is -0.1"},
      {completion({{"temperature", "hot"}}), "temperature is \"hot\""},
      {completion({{"top_p", 0}}), "top_p is 0"},
      {completion({{"top_p", 1.01}}), "top_p is 1.01"},
      {completion({{"top_k", -2}}), "top_k is -2"},
      {completion({{"seed", 1.5}}), "seed is 1.5"},
      {completion({{"stop", 1}}), "stop has 1"},
      {completion({{"stop", ""}}), "stop has \"\""},
      {completion({{"stop", json::array({"a", 2})}}), "stop has 2"},
      {completion({{"stop", std::vector<std::string>(17, "a")}}), "stop has 17 strings"},
      {completion({{"model", 3}}), "model is 3"},
      {completion({{"prompt", ""}}), "prompt is empty"},
      {completion({{"prompt", json::array()}}), "prompt is []"},
      {completion({{"prompt", 5}}), "prompt is 5"},
      {completion({{"prompt", {"a", "b"}}}), "prompt holds 2 prompts"},
      {completion({{"prompt", {1, -2}}}), "token id is -2"},
      {completion({{"prompt", {1, "x"}}}), "token id is \"x\""},
      {completion({{"certkv", {{"tolerance", -1}}}}), "certkv.tolerance is -1"},
      {completion({{"certkv", {{"tolerance", {{"relative", 1}, {"absolute", 1}}}}}}),
       "certkv.tolerance is"},
      {completion({{"certkv", {{"tolerance", {{"rel", 1}}}}}}), "certkv.tolerance is"},
      {completion({{"certkv", {{"policy", "fast"}}}}), "certkv.policy is \"fast\""},
      {completion({{"certkv", {{"speed", 1}}}}), "certkv.speed is not known"},
      {completion({{"certkv", 1}}), "certkv is 1"},
      {twice, "certkv is given twice"},
      {with("method", "GET"), "method is \"GET\""},
      {with("url", "/v1/embeddings"), "url is \"/v1/embeddings\""},
      {with("extra", 1), "extra is not a field of a batch line"},
      {with("custom_id", 5), "custom_id is 5"},
      {with("custom_id", ""), "custom_id is \"\""},
      {with("custom_id", std::string(513, 'x')), "custom_id is a text of 513 bytes"},
      {with("body", "x"), "body is \"x\""},
      {no_url, "url is missing"},
      {no_body, "body is missing"},
      {no_prompt, "prompt is missing"},
      {no_messages, "messages is missing"},
      {tool_message, "messages[0].role is \"tool\""},
      {bad_part, "only text is supported"},
      {chat({{"messages", json::array()}}), "messages is []"},
      {chat({{"messages", {{{"role", "user"}}}}}), "messages[0].content is missing"},
      {chat({{"messages", {{{"content", "x"}}}}}), "messages[0].role is missing"},
      {chat({{"messages", {{{"role", "user"}, {"content", "x"}, {"tool_calls", {1}}}}}}),
       "messages[0].tool_calls"},
      {chat({{"max_tokens", 1}, {"max_completion_tokens", 2}}), "give one of them"},
      {chat({{"prompt", "x"}}), "prompt is not a field of this kind"},
      {json{{"messages", json::array()}}, "messages needs the batch form"},
      {json{{"max_tokens", 5}}, "prompt is missing"},
      {json::array({1}), "is no request"},
  };
  for (const auto& [value, says] : cases) {
    const BatchLine line = parse(value);
    EXPECT_TRUE(line.bad) << value;
    EXPECT_THAT(line.error, HasSubstr(says));
    EXPECT_THAT(line.error, HasSubstr("line 7: "));
  }
}

TEST(BatchLines, TextThatIsNoJsonFailsAloneWithItsPlace) {
  for (const char* text : {"{", "{\"prompt\": \"a\"} x", "{\"prompt\": \"\xff\"}",
                           "{\"prompt\": \"a\", \"prompt\": \"b\"}", "{\"prompt\": 1e999}"}) {
    const BatchLine line = parse_text(text);
    EXPECT_TRUE(line.bad) << text;
    EXPECT_EQ(line.error_kind, ErrorKind::BadFile) << text;
    EXPECT_THAT(line.error, HasSubstr("line 7: "));
  }
  const std::string deep = R"({"prompt": )" + std::string(100, '[') + std::string(100, ']') + "}";
  EXPECT_THAT(parse_text(deep).error, HasSubstr("nested deeper"));
}

TEST(BatchLines, AJobThatComparesPoliciesRefusesALinesOwnPolicy) {
  BatchDefaults d = defaults();
  d.compare = true;
  const BatchLine line =
      parse_batch_line(completion({{"certkv", {{"policy", "dense"}}}}).dump(), 1, d);
  EXPECT_TRUE(line.bad);
  EXPECT_THAT(line.error, HasSubstr("compares policies"));
}

class BatchFile : public ::testing::Test {
 protected:
  std::string write(const std::string& text) {
    const std::string path = (folder_ / "in.jsonl").string();
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  std::vector<BatchLine> read(const std::string& path, BatchLimits limits = {}) {
    BatchReader reader(path, defaults(), limits);
    survey_ = reader.survey();
    std::vector<BatchLine> lines;
    while (auto line = reader.next()) lines.push_back(*line);
    return lines;
  }
  test::TempFolder folder_;
  BatchSurvey survey_;
};

TEST_F(BatchFile, BlankLinesAreSkippedButCountForTheNumbers) {
  const auto lines = read(write("\n{\"prompt\":\"a\"}\r\n  \n{\"prompt\":\"b\"}"));
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0].number, 2u);
  EXPECT_EQ(lines[0].index, 0u);
  EXPECT_EQ(lines[1].custom_id, "4");
  EXPECT_EQ(lines[1].index, 1u);
  EXPECT_EQ(survey_.lines, 2u);
}

TEST_F(BatchFile, ALineThatIsTooLongFailsAloneAndTheNextOnesAreRead) {
  BatchLimits limits;
  limits.line_bytes = 40;
  const auto lines = read(write("{\"prompt\":\"" + std::string(200000, 'x') + "\"}\n" +
                                "{\"prompt\":\"b\"}\n" + std::string(41, ' ') + "\n"),
                          limits);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_TRUE(lines[0].bad);
  EXPECT_THAT(lines[0].error, HasSubstr("200013 bytes: a line may have at most 40"));
  EXPECT_FALSE(lines[1].bad);
  EXPECT_TRUE(lines[2].bad);
}

TEST_F(BatchFile, ACustomIdUsedBeforeFailsTheLaterLine) {
  const auto lines =
      read(write("{\"prompt\":\"a\",\"custom_id\":\"x\"}\n"
                 "{\"prompt\":\"b\",\"custom_id\":\"x\"}\n"
                 "{\"prompt\":\"c\",\"custom_id\":\"4\"}\n"
                 "{\"prompt\":\"d\"}\n"));
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_FALSE(lines[0].bad);
  EXPECT_THAT(lines[1].error, HasSubstr("custom_id 'x' was used before, on line 1"));
  EXPECT_FALSE(lines[2].bad);
  EXPECT_THAT(lines[3].error, HasSubstr("custom_id '4' was used before, on line 3"));
}

TEST_F(BatchFile, TheDigestTellsInputsApartAndAChangeDuringTheJobIsNoticed) {
  const std::string path = write("{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n");
  BatchReader reader(path, defaults());
  const std::string digest = reader.survey().digest;
  ASSERT_TRUE(reader.next());
  read(write("{\"prompt\":\"a\"}\n{\"prompt\":\"c\"}\n"));
  EXPECT_NE(survey_.digest, digest);
  read(write("{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n"));
  EXPECT_EQ(survey_.digest, digest);

  BatchReader changed(path, defaults());
  changed.survey();
  write("{\"prompt\":\"a\"}\n{\"prompt\":\"c\"}\n");
  EXPECT_THROW(
      {
        while (changed.next()) {
        }
      },
      Error);
}

TEST_F(BatchFile, AMissingFileAndAFolderAreRefusedByName) {
  EXPECT_THROW(BatchReader((folder_ / "none").string(), defaults()), Error);
  EXPECT_THROW(BatchReader((folder_ / "").string(), defaults()), Error);
}

Completion answered() {
  Completion c;
  c.id = 3;
  c.tokens = {1, 2, 3};
  c.text = "caf\xc3 \xff!";
  c.finish_reason = "stop";
  c.outcome = Outcome::Exact;
  c.counts.head_steps = 10;
  c.counts.certified = 9;
  c.counts.exact = 1;
  c.counts.rungs = {7, 2, 0, 1, 0};
  c.bound_max = 0.1;
  c.relative_max = std::nextafter(0.01, 1);
  c.bound_mean = 0.05;
  c.relative_mean = 0.004;
  c.prompt_tokens = 100;
  return c;
}

TEST(ResultLines, AnAnswerHasTheBatchSchemaWithTheCertificateInTheBody) {
  const BatchLine line = parse(completion());
  const json v = json::parse(result_line(identity_of(line), answered(), "run", 1234));
  EXPECT_EQ(v["custom_id"], "a");
  EXPECT_TRUE(v["error"].is_null());
  EXPECT_EQ(v["response"]["status_code"], 200);
  const json& body = v["response"]["body"];
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["created"], 1234);
  EXPECT_EQ(body["model"], "m");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_EQ(body["usage"]["total_tokens"], 103);
  const json& certkv = body["certkv"];
  EXPECT_EQ(certkv["outcome"], "exact");
  EXPECT_EQ(certkv["certified"], 9);
  EXPECT_EQ(certkv["exact"], 1);
  EXPECT_EQ(certkv["rungs"]["0"], 7);
  EXPECT_EQ(certkv["rungs"]["3"], 1);
  EXPECT_EQ(certkv["policy"], "budget");
  EXPECT_EQ(certkv["tolerance"]["relative"], 0.03);
  // Every digit: a bound that comes back is not below the one that went in.
  EXPECT_EQ(certkv["returned"]["relative_max"].get<double>(), std::nextafter(0.01, 1));
  EXPECT_EQ(certkv["returned"]["bound_mean"].get<double>(), 0.05);
}

TEST(ResultLines, BytesThatAreNoTextBecomeReplacementCharactersAndNothingBreaksTheLine) {
  Completion c = answered();
  c.text = "a\nb\xff\t\x01";
  const std::string text = result_line(identity_of(parse(completion())), c, "run", 0);
  EXPECT_EQ(text.find('\n'), std::string::npos);
  EXPECT_EQ(text.find('\t'), std::string::npos);
  EXPECT_EQ(json::parse(text)["response"]["body"]["choices"][0]["text"], "a\nb\xef\xbf\xbd\t\x01");
}

TEST(ResultLines, AChatAnswerIsAMessage) {
  const json v = json::parse(result_line(identity_of(parse(chat())), answered(), "run", 0));
  EXPECT_EQ(v["response"]["body"]["object"], "chat.completion");
  EXPECT_EQ(v["response"]["body"]["choices"][0]["message"]["role"], "assistant");
}

TEST(ResultLines, AFigureThatIsNotFiniteIsNullWithANote) {
  Completion c = answered();
  c.bound_max = std::numeric_limits<double>::quiet_NaN();
  c.relative_max = std::numeric_limits<double>::infinity();
  const json v = json::parse(result_line(identity_of(parse(completion())), c, "run", 0));
  const json& returned = v["response"]["body"]["certkv"]["returned"];
  EXPECT_TRUE(returned["bound_max"].is_null());
  EXPECT_TRUE(returned["relative_max"].is_null());
  EXPECT_EQ(returned["notes"]["bound_max"], "nan");
  EXPECT_EQ(returned["notes"]["relative_max"], "inf");
}

TEST(ResultLines, AFailedLineHasAnErrorAndNoResponse) {
  const BatchLine bad = parse(completion({{"n", 2}}));
  const Completion c = failed_completion(0, Policy::Budget, bad.error_kind, bad.error);
  const json v = json::parse(result_line(identity_of(bad), c, "run", 0));
  EXPECT_TRUE(v["response"].is_null());
  EXPECT_EQ(v["error"]["code"], "InvalidArgument");
  EXPECT_EQ(v["error"]["line"], 7);
  EXPECT_THAT(v["error"]["message"].get<std::string>(), HasSubstr("n is 2"));
}

}  // namespace
}  // namespace certkv
