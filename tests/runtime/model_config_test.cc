#include "runtime/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "kernels/base/error.h"

namespace certkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// A config.json from members written as JSON; tests replace, add or (with "") remove some.
using Members = std::map<std::string, std::string>;

Members llama_members() {
  return {{"architectures", R"(["LlamaForCausalLM"])"},
          {"model_type", R"("llama")"},
          {"hidden_size", "4096"},
          {"intermediate_size", "14336"},
          {"num_hidden_layers", "32"},
          {"num_attention_heads", "32"},
          {"num_key_value_heads", "8"},
          {"vocab_size", "128256"},
          {"rope_theta", "500000.0"},
          {"rms_norm_eps", "1e-05"},
          {"max_position_embeddings", "131072"},
          {"hidden_act", R"("silu")"},
          {"torch_dtype", R"("bfloat16")"},
          {"bos_token_id", "128000"},
          {"eos_token_id", "[128001, 128008, 128009]"},
          {"rope_scaling", R"({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192, "rope_type": "llama3"})"}};
}

std::string text_of(Members members, const Members& changes = {}) {
  for (const auto& [key, value] : changes) members[key] = value;
  std::string text = "{";
  for (const auto& [key, value] : members) {
    if (value.empty()) continue;
    text += (text.size() > 1 ? ", \"" : "\"") + key + "\": " + value;
  }
  return text + "}";
}

ModelConfig parse(const Members& changes = {}, std::string_view generation = "") {
  return parse_model_config(text_of(llama_members(), changes), generation, "config.json");
}

// The error of a configuration, "kind: message", or "accepted".
std::string error_of(const Members& changes, std::string_view generation = "") {
  try {
    parse(changes, generation);
  } catch (const Error& e) {
    return std::string(error_kind_name(e.kind())) + ": " + e.what();
  }
  return "accepted";
}

TEST(ModelConfig, Llama31IsReadWithAllItsParameters) {
  const ModelConfig c = parse();
  EXPECT_EQ(c.architecture, Architecture::Llama);
  EXPECT_EQ(c.hidden, 4096);
  EXPECT_EQ(c.intermediate, 14336);
  EXPECT_EQ(c.layers, 32);
  EXPECT_EQ(c.heads, 32);
  EXPECT_EQ(c.kv_heads, 8);
  EXPECT_EQ(c.heads_per_group(), 4);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.vocab, 128256);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.max_tokens, 131072);
  EXPECT_EQ(c.rope.kind, RopeKind::Llama3);
  EXPECT_EQ(c.rope.theta, 500000.0);
  EXPECT_EQ(c.rope.factor, 8.0);
  EXPECT_EQ(c.rope.low_freq_factor, 1.0);
  EXPECT_EQ(c.rope.high_freq_factor, 4.0);
  EXPECT_EQ(c.rope.original_max_position_embeddings, 8192);
  EXPECT_EQ(c.dtype, DType::BF16);
  EXPECT_EQ(c.bos_id, 128000);
  EXPECT_THAT(c.eos_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_FALSE(c.tie_word_embeddings || c.qkv_bias || c.o_bias || c.mlp_bias || c.qk_norm);
}

TEST(ModelConfig, GenerationConfigDecidesWhereAnswersEnd) {
  EXPECT_THAT(parse({}, R"({"eos_token_id": [7, 9]})").eos_ids, ElementsAre(7, 9));
  EXPECT_THAT(parse({}, R"({"eos_token_id": 7})").eos_ids, ElementsAre(7));
  EXPECT_THAT(parse({}, R"({"do_sample": true})").eos_ids, ElementsAre(128001, 128008, 128009));
  EXPECT_THAT(parse({{"eos_token_id", "null"}, {"bos_token_id", "null"}}).eos_ids, ElementsAre());
  EXPECT_EQ(parse({{"bos_token_id", "null"}}).bos_id, -1);
  EXPECT_THAT(error_of({}, R"({"eos_token_id": 128256})"), HasSubstr("eos_token_id is 128256"));
  EXPECT_THAT(error_of({{"eos_token_id", "[-1]"}}), HasSubstr("eos_token_id is -1"));
}

TEST(ModelConfig, EachArchitectureBringsItsOwnBiasesNormsAndDefaults) {
  const Members qwen2 = {{"architectures", R"(["Qwen2ForCausalLM"])"},
                         {"model_type", R"("qwen2")"},
                         {"use_sliding_window", "false"},
                         {"sliding_window", "32768"},
                         {"tie_word_embeddings", "true"},
                         {"rope_scaling", "null"}};
  EXPECT_TRUE(parse(qwen2).qkv_bias);
  EXPECT_FALSE(parse(qwen2).o_bias);
  EXPECT_TRUE(parse(qwen2).tie_word_embeddings);
  EXPECT_EQ(parse(qwen2).rope.kind, RopeKind::Plain);

  Members qwen3 = {{"architectures", R"(["Qwen3ForCausalLM"])"},
                   {"model_type", R"("qwen3")"},
                   {"hidden_size", "1024"},
                   {"head_dim", ""},
                   {"rope_scaling", "null"}};
  EXPECT_TRUE(parse(qwen3).qk_norm);
  EXPECT_FALSE(parse(qwen3).qkv_bias);
  EXPECT_EQ(parse(qwen3).head_dim, 128);
  qwen3["head_dim"] = "64";
  EXPECT_EQ(parse(qwen3).head_dim, 64);
  qwen3["layer_types"] = R"(["full_attention", "full_attention"])";
  EXPECT_EQ(parse(qwen3).architecture, Architecture::Qwen3);

  const Members mistral = {{"architectures", R"(["MistralForCausalLM"])"},
                           {"model_type", R"("mistral")"},
                           {"sliding_window", "null"},
                           {"rope_scaling", ""}};
  EXPECT_EQ(parse(mistral).architecture, Architecture::Mistral);
  EXPECT_FALSE(parse(mistral).qkv_bias);

  const ModelConfig llama = parse({{"attention_bias", "true"},
                                   {"mlp_bias", "true"},
                                   {"num_key_value_heads", ""},
                                   {"rms_norm_eps", ""},
                                   {"rope_theta", ""},
                                   {"torch_dtype", ""},
                                   {"rope_scaling", ""}});
  EXPECT_TRUE(llama.qkv_bias && llama.o_bias && llama.mlp_bias);
  EXPECT_EQ(llama.kv_heads, 32);
  EXPECT_EQ(llama.rms_norm_eps, 1e-6);
  EXPECT_EQ(llama.rope.theta, 10000.0);
  EXPECT_EQ(llama.dtype, DType::F32);
}

TEST(ModelConfig, EverySpellingOfRopeScalingMeansTheSame) {
  const std::string body = R"("factor": 2.0})";
  for (const auto& [key, value] : Members{{"rope_scaling", R"({"type": "linear", )" + body},
                                          {"rope_scaling ", R"({"rope_type": "linear", )" + body},
                                          {"rope_parameters", R"({"rope_type": "linear",
                                             "rope_theta": 500000.0, )" +
                                                                  body}}) {
    Members changes = {{"rope_scaling", ""}};
    changes[key == "rope_scaling " ? "rope_scaling" : key] = value;
    const ModelConfig c = parse(changes);
    EXPECT_EQ(c.rope.kind, RopeKind::Linear) << key;
    EXPECT_EQ(c.rope.factor, 2.0) << key;
    EXPECT_EQ(c.rope.theta, 500000.0) << key;
  }
  const ModelConfig newer =
      parse({{"rope_scaling", ""},
             {"rope_theta", ""},
             {"rope_parameters", R"({"rope_type": "default", "rope_theta": 1e16})"}});
  EXPECT_EQ(newer.rope.kind, RopeKind::Plain);
  EXPECT_EQ(newer.rope.theta, 1e16);
  EXPECT_THAT(
      error_of({{"rope_scaling", R"({"type": "linear", "rope_type": "yarn", "factor": 2})"}}),
      HasSubstr("disagree"));
  EXPECT_THAT(error_of({{"rope_scaling", ""}, {"rope_parameters", R"({"rope_theta": 1e4})"}}),
              HasSubstr("rope_theta is 10000 here and 500000 outside"));
}

TEST(ModelConfig, YarnResolvesItsAttentionFactorAndItsReach) {
  const ModelConfig c = parse(
      {{"max_position_embeddings", "32768"}, {"rope_scaling", R"({"type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 32768})"}});
  EXPECT_EQ(c.rope.kind, RopeKind::Yarn);
  EXPECT_EQ(c.max_tokens, 131072);
  EXPECT_EQ(c.rope.beta_fast, 32.0);
  EXPECT_EQ(c.rope.beta_slow, 1.0);
  EXPECT_TRUE(c.rope.yarn_truncate);
  EXPECT_DOUBLE_EQ(c.rope.attention_factor, 0.1 * std::log(4.0) + 1);

  const ModelConfig given = parse({{"rope_scaling", R"({"type": "yarn", "factor": 4.0,
      "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2, "truncate": false,
      "original_max_position_embeddings": 8192})"}});
  EXPECT_EQ(given.rope.attention_factor, 1.25);
  EXPECT_EQ(given.rope.beta_fast, 16.0);
  EXPECT_EQ(given.rope.beta_slow, 2.0);
  EXPECT_FALSE(given.rope.yarn_truncate);
  EXPECT_EQ(given.max_tokens, 131072);

  const ModelConfig both = parse({{"rope_scaling", R"({"type": "yarn", "factor": 4.0, "mscale": 2,
      "mscale_all_dim": 1})"}});
  EXPECT_DOUBLE_EQ(both.rope.attention_factor,
                   (0.2 * std::log(4.0) + 1) / (0.1 * std::log(4.0) + 1));
  EXPECT_EQ(both.rope.original_max_position_embeddings, 131072);
}

TEST(ModelConfig, WhatIsNotSupportedIsRefusedWithAListOfWhatIs) {
  const auto refused = [](const Members& changes, const char* what) {
    const std::string e = error_of(changes);
    EXPECT_THAT(e, HasSubstr("InvalidArgument")) << what;
    EXPECT_THAT(e, HasSubstr("config.json")) << what;
    EXPECT_THAT(e, HasSubstr(what));
    EXPECT_THAT(e, HasSubstr("supported are LlamaForCausalLM")) << what;
  };
  refused({{"architectures", R"(["GPT2LMHeadModel"])"}}, "GPT2LMHeadModel");
  refused({{"architectures", ""}, {"model_type", R"("gemma")"}}, "gemma");
  refused({{"hidden_act", R"("gelu")"}}, "hidden_act");
  refused({{"num_local_experts", "8"}}, "mixture of experts");
  refused({{"rope_scaling", R"({"type": "dynamic", "factor": 2.0})"}}, "dynamic");
  refused({{"rope_scaling", R"({"rope_type": "longrope", "factor": 2.0})"}}, "longrope");
  refused({{"rope_scaling", R"({"full_attention": {"rope_type": "default"}})"}}, "between layers");
  refused({{"partial_rotary_factor", "0.5"}}, "partial_rotary_factor");
  refused({{"head_dim", "80"}}, "head_dim 80");
  refused({{"layer_types", R"(["sliding_attention"])"}}, "sliding_attention");
  refused({{"use_sliding_window", "true"}}, "use_sliding_window");
  refused({{"architectures", R"(["MistralForCausalLM"])"},
           {"model_type", R"("mistral")"},
           {"sliding_window", "4096"}},
          "sliding_window 4096");
  refused({{"architectures", R"(["MistralForCausalLM"])"}, {"model_type", R"("mistral")"}},
          "sliding_window is missing");
  EXPECT_THAT(error_of({{"quantization_config", R"({"bits": 4})"}}),
              HasSubstr("quantised weights"));
  EXPECT_THAT(error_of({{"torch_dtype", R"("float8_e4m3fn")"}}), HasSubstr("float8_e4m3fn"));
}

TEST(ModelConfig, HostileNumbersAreRefusedByName) {
  for (const char* key :
       {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "max_position_embeddings"}) {
    for (const char* value : {"-1", "0", "1e300", "9223372036854775807", "18446744073709551615",
                              "1.5", "true", "\"8\"", "[8]", "4611686018427387904"}) {
      const std::string e = error_of({{key, value}});
      EXPECT_THAT(e, HasSubstr("BadFile")) << key << " " << value;
      EXPECT_THAT(e, HasSubstr(key)) << value;
    }
    if (std::string(key) != "num_key_value_heads") {
      EXPECT_THAT(error_of({{key, ""}}), HasSubstr(std::string(key) + " is missing"));
    }
  }
  EXPECT_THAT(error_of({{"num_key_value_heads", "7"}}), HasSubstr("no multiple of"));
  EXPECT_THAT(error_of({{"num_key_value_heads", "64"}}), HasSubstr("no multiple of"));
  EXPECT_THAT(error_of({{"hidden_size", "4097"}}), HasSubstr("no multiple of"));
  EXPECT_THAT(error_of({{"intermediate_size", "7"}}), HasSubstr("must not be below"));
  for (const char* value : {"-1", "0", "1", "1e31", "\"x\""}) {
    EXPECT_THAT(error_of({{"rope_theta", value}}), HasSubstr("rope_theta")) << value;
  }
  for (const char* value : {"-1", "0", "1", "\"x\""}) {
    EXPECT_THAT(error_of({{"rms_norm_eps", value}}), HasSubstr("rms_norm_eps")) << value;
  }
  EXPECT_THAT(error_of({{"rope_scaling", R"({"type": "linear", "factor": 0.5})"}}),
              HasSubstr("factor"));
  EXPECT_THAT(error_of({{"rope_scaling", R"({"type": "linear"})"}}),
              HasSubstr("factor is missing"));
  EXPECT_THAT(error_of({{"rope_scaling", R"({"type": "llama3", "factor": 8, "low_freq_factor": 4,
      "high_freq_factor": 4, "original_max_position_embeddings": 8192})"}}),
              HasSubstr("must be above"));
  EXPECT_THAT(error_of({{"rope_scaling", R"([1])"}}), HasSubstr("a JSON object is needed"));
  EXPECT_THAT(error_of({{"tie_word_embeddings", "1"}}), HasSubstr("tie_word_embeddings"));
  EXPECT_THAT(error_of({{"architectures", R"(["LlamaForCausalLM", "x"])"}}), HasSubstr("one name"));
  EXPECT_THAT(error_of({{"model_type", R"("qwen2")"}}), HasSubstr("model_type says"));
}

TEST(ModelConfig, TextThatIsNoObjectOrNoJsonIsABadFile) {
  for (const char* text :
       {"", "[]", "7", "{", "{\"a\": 1e999}", "null", "{\"hidden_size\": NaN}"}) {
    try {
      parse_model_config(text, "", "config.json");
      ADD_FAILURE() << "accepted: " << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::BadFile) << text;
      EXPECT_THAT(e.what(), HasSubstr("config.json")) << text;
    }
  }
  const std::string whole = text_of(llama_members());
  for (size_t cut = 0; cut < whole.size(); ++cut) {
    EXPECT_THROW(parse_model_config(whole.substr(0, cut), "", "config.json"), Error) << cut;
  }
}

}  // namespace
}  // namespace certkv
