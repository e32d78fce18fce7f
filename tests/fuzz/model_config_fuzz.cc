// config.json and generation_config.json of a model folder. Whatever they are, they are refused
// with a named error, or every size is as bounded as model_config.h promises.
//   input: config.json, a zero byte, generation_config.json
#include <cmath>
#include <string_view>

#include "kernels/base/error.h"
#include "runtime/model_config.h"
#include "runtime/weights.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

void check(const ModelConfig& c) {
  const int64_t sizes[] = {c.hidden,    c.intermediate, c.layers, c.heads,
                           c.kv_heads,  c.head_dim,     c.vocab,  c.max_position_embeddings,
                           c.max_tokens};
  for (const int64_t a : sizes) {
    require(a > 0, "a size that is not positive");
    for (const int64_t b : sizes) require(a <= INT64_MAX / b, "a product that overflows");
  }
  require(c.heads % c.kv_heads == 0, "heads that do not divide");
  require(c.head_dim == 64 || c.head_dim == 96 || c.head_dim == 128 || c.head_dim == 256,
          "a head_dim that is not supported");
  __int128 per_layer = __int128(c.hidden) * c.head_dim * (2 * c.heads + 2 * c.kv_heads);
  per_layer += __int128(3) * c.hidden * c.intermediate;
  const __int128 weights = per_layer * c.layers + __int128(2) * c.vocab * c.hidden;
  require(weights <= INT64_MAX, "a count of weights that overflows");
  require(c.bos_id >= -1 && c.bos_id < c.vocab, "a bos id outside the vocabulary");
  for (const int32_t id : c.eos_ids)
    require(id >= 0 && id < c.vocab, "an eos id outside the vocabulary");
  const RopeConfig& r = c.rope;
  require(r.theta > 1 && std::isfinite(r.theta), "a theta that rotates nothing");
  require(r.factor >= 1 && std::isfinite(r.factor), "a factor below 1");
  require(std::isfinite(r.attention_factor) && r.attention_factor > 0, "an attention factor");
  require(r.kind != RopeKind::Llama3 || r.high_freq_factor > r.low_freq_factor, "llama3's band");
  require(r.kind != RopeKind::Yarn || (r.beta_fast > r.beta_slow && r.beta_slow > 0),
          "yarn's ramp");
  require(c.rms_norm_eps >= 0 && std::isfinite(c.rms_norm_eps), "an epsilon");
  require(weights_bytes(c, 1) > 0, "a model of no bytes");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(all.find('\0'), size);
  const std::string_view generation = cut < size ? all.substr(cut + 1) : std::string_view();
  try {
    check(parse_model_config(all.substr(0, cut), generation, "fuzz.json"));
    ++fuzz::accepted;
  } catch (const Error& e) {
    require(e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile,
            "refused with an unexpected kind of error");
    require(!std::string_view(e.what()).empty(), "an error without a text");
  }
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const std::string llama =
      R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4096,)"
      R"("intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,)"
      R"("num_key_value_heads":8,"vocab_size":128256,"rope_theta":500000.0,"rms_norm_eps":1e-05,)"
      R"("max_position_embeddings":131072,"torch_dtype":"bfloat16","bos_token_id":128000,)"
      R"("eos_token_id":[128001,128009],"rope_scaling":{"factor":8.0,"low_freq_factor":1.0,)"
      R"("high_freq_factor":4.0,"original_max_position_embeddings":8192,"rope_type":"llama3"}})";
  const std::string qwen =
      R"({"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":1024,)"
      R"("intermediate_size":3072,"num_hidden_layers":28,"num_attention_heads":16,)"
      R"("num_key_value_heads":8,"head_dim":128,"vocab_size":151936,"max_position_embeddings":40960,)"
      R"("tie_word_embeddings":true,"rope_scaling":{"rope_type":"yarn","factor":4.0,)"
      R"("original_max_position_embeddings":32768,"beta_fast":32,"beta_slow":1}})";
  const std::string generation = R"({"eos_token_id":[128001,128008],"bos_token_id":128000})";
  return {
      "ModelConfigFuzz",
      {llama, qwen, llama + std::string(1, '\0') + generation,
       R"({"architectures":["MistralForCausalLM"],"hidden_size":4096,"intermediate_size":14336,)"
       R"("num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,)"
       R"("vocab_size":32000,"sliding_window":null,"max_position_embeddings":32768})"},
      {"0",
       "1",
       "-1",
       "2147483648",
       "4294967296",
       "9223372036854775807",
       "1e308",
       "1e999",
       "0.5",
       "null",
       "true",
       "[]",
       "{}",
       "\"linear\"",
       "\"yarn\"",
       "\"dynamic\"",
       "\"silu\"",
       "\"sliding_window\":4096,",
       "\"num_experts\":8,",
       "\"head_dim\":96,",
       "\"head_dim\":0,",
       "\"rope_theta\":1,",
       "\"mscale\":0.7,",
       "\"attention_factor\":-1,",
       "\"quantization_config\":{},",
       "[",
       "]",
       "{",
       "}",
       ",",
       ":",
       "\"",
       std::string(1, '\0')},
      50000};
}
