#include "runtime/model_config.h"

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"

namespace certkv {
namespace {

using nlohmann::json;

// Ranges of the sizes: far above any published model, and so low that the product of any two, and
// layers * hidden * (all widths of a layer), stay below 2^52.
constexpr int64_t kMaxHidden = 1 << 17;
constexpr int64_t kMaxIntermediate = 1 << 20;
constexpr int64_t kMaxLayers = 1 << 10;
constexpr int64_t kMaxHeads = 1 << 12;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxPositions = 1 << 27;
constexpr std::array<int64_t, 4> kHeadDims = {64, 96, 128, 256};
constexpr size_t kMaxEosIds = 64;

constexpr const char* kSupported =
    "supported are LlamaForCausalLM (Llama 2 and 3.x), MistralForCausalLM without a sliding "
    "window, "
    "Qwen2ForCausalLM and Qwen3ForCausalLM without a sliding window; all dense, with hidden_act "
    "silu, "
    "head_dim 64, 96, 128 or 256, and RoPE of the kinds default, linear, llama3 and yarn";

// What the reader of one JSON object needs to name a field in an error.
struct Fields {
  const json& object;
  std::string where;  // file, and the path to the object inside it

  // Absent and null mean the same in these files.
  const json* find(const char* key) const {
    const auto it = object.find(key);
    return it == object.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t integer_of(const json& value, const char* key, int64_t low, int64_t high) const {
    // Some tools write 8192.0 where 8192 is meant.
    double d = 0;
    if (value.is_number()) d = value.get<double>();
    CERTKV_EXPECT(value.is_number() && d == std::floor(d) && d >= double(low) && d <= double(high),
                  BadFile, "{}: {} is {}: an integer between {} and {} is needed", where, key,
                  shown(value), low, high);
    return int64_t(d);
  }
  int64_t integer(const char* key, int64_t low, int64_t high) const {
    const json* value = find(key);
    CERTKV_EXPECT(value != nullptr, BadFile, "{}: {} is missing", where, key);
    return integer_of(*value, key, low, high);
  }
  int64_t integer(const char* key, int64_t low, int64_t high, int64_t absent) const {
    return find(key) == nullptr ? absent : integer(key, low, high);
  }

  double number(const char* key, double low, double high) const {
    const json* value = find(key);
    CERTKV_EXPECT(value != nullptr, BadFile, "{}: {} is missing", where, key);
    double d = 0;
    if (value->is_number()) d = value->get<double>();
    CERTKV_EXPECT(value->is_number() && d >= low && d <= high, BadFile,
                  "{}: {} is {}: a number between {} and {} is needed", where, key, shown(*value),
                  low, high);
    return d;
  }
  double number(const char* key, double low, double high, double absent) const {
    return find(key) == nullptr ? absent : number(key, low, high);
  }

  bool flag(const char* key, bool absent) const {
    const json* value = find(key);
    if (value == nullptr) return absent;
    CERTKV_EXPECT(value->is_boolean(), BadFile, "{}: {} is {}: true or false is needed", where, key,
                  shown(*value));
    return value->get<bool>();
  }

  std::string text(const char* key, const std::string& absent) const {
    const json* value = find(key);
    if (value == nullptr) return absent;
    CERTKV_EXPECT(value->is_string(), BadFile, "{}: {} is {}: a text is needed", where, key,
                  shown(*value));
    return value->get<std::string>();
  }

  static std::string shown(const json& value) {
    if (value.is_structured()) return value.is_array() ? "a list" : "an object";
    std::string s = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (s.size() > 60) s = s.substr(0, 57) + "...";
    return s;
  }
};

const json& object_of(const json& value, const std::string& where) {
  CERTKV_EXPECT(value.is_object(), BadFile, "{}: a JSON object is needed", where);
  return value;
}

struct Family {
  Architecture architecture;
  const char* name;
  const char* model_type;
};
constexpr std::array<Family, 4> kFamilies = {{
    {Architecture::Llama, "LlamaForCausalLM", "llama"},
    {Architecture::Mistral, "MistralForCausalLM", "mistral"},
    {Architecture::Qwen2, "Qwen2ForCausalLM", "qwen2"},
    {Architecture::Qwen3, "Qwen3ForCausalLM", "qwen3"},
}};

const Family& family_of(const Fields& f) {
  const std::string type = f.text("model_type", "");
  std::string name;
  if (const json* list = f.find("architectures")) {
    CERTKV_EXPECT(list->is_array() && list->size() == 1 && list->front().is_string(), BadFile,
                  "{}: architectures must be a list of one name; {}", f.where, kSupported);
    name = list->front().get<std::string>();
  }
  for (const Family& family : kFamilies) {
    if (name.empty() ? type != family.model_type : name != family.name) continue;
    CERTKV_EXPECT(type.empty() || type == family.model_type, BadFile,
                  "{}: architectures says {}, but model_type says {}", f.where, family.name,
                  Fields::shown(type));
    return family;
  }
  CERTKV_THROW(InvalidArgument, "{}: a model of kind {} is not supported; {}", f.where,
               Fields::shown(name.empty() ? type : name), kSupported);
}

// Everything that would change the mathematics in a way the transformer does not know.
void refuse_unsupported(const Fields& f, Architecture architecture) {
  const std::string act = f.text("hidden_act", "silu");
  CERTKV_EXPECT(act == "silu", InvalidArgument, "{}: hidden_act {} is not supported; {}", f.where,
                Fields::shown(act), kSupported);
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    CERTKV_EXPECT(f.find(key) == nullptr, InvalidArgument,
                  "{}: {} says that this is a mixture of experts, which is not supported; {}",
                  f.where, key, kSupported);
  }
  for (const char* key : {"quantization_config", "compression_config"}) {
    CERTKV_EXPECT(f.find(key) == nullptr, InvalidArgument,
                  "{}: {}: quantised weights are not supported; use the model's BF16, F16 or F32 "
                  "folder",
                  f.where, key);
  }
  CERTKV_EXPECT(f.number("partial_rotary_factor", 0, 1, 1) == 1, InvalidArgument,
                "{}: partial_rotary_factor below 1 is not supported; {}", f.where, kSupported);
  if (const json* kinds = f.find("layer_types")) {
    CERTKV_EXPECT(kinds->is_array(), BadFile, "{}: layer_types must be a list", f.where);
    for (const json& kind : *kinds) {
      CERTKV_EXPECT(kind.is_string() && kind.get_ref<const std::string&>() == "full_attention",
                    InvalidArgument,
                    "{}: layer_types holds {}: only full_attention is supported; {}", f.where,
                    Fields::shown(kind), kSupported);
    }
  }
  const int64_t positions = f.integer("max_position_embeddings", 1, kMaxPositions);
  if (architecture == Architecture::Mistral) {
    // Absent is not null here: transformers then takes a window of 4096.
    CERTKV_EXPECT(
        f.object.contains("sliding_window"), InvalidArgument,
        "{}: sliding_window is missing, which means a window of 4096 tokens: sliding windows "
        "are not supported (null is needed); {}",
        f.where, kSupported);
    const int64_t window = f.integer("sliding_window", 0, int64_t(1) << 40, positions);
    CERTKV_EXPECT(window >= positions, InvalidArgument,
                  "{}: sliding_window {} is not supported (null is needed); {}", f.where, window,
                  kSupported);
  } else {
    CERTKV_EXPECT(!f.flag("use_sliding_window", false), InvalidArgument,
                  "{}: use_sliding_window is not supported (false is needed); {}", f.where,
                  kSupported);
  }
}

// SOURCE: YaRN (arXiv 2309.00071) section 3.4, with the mscale forms of transformers.
double yarn_attention_factor(const Fields& r, double factor) {
  if (r.find("attention_factor") != nullptr) return r.number("attention_factor", 1e-3, 1e3);
  const auto magnitude = [factor](double mscale) {
    return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
  };
  const double one = r.number("mscale", 0, 1e3, 0), all = r.number("mscale_all_dim", 0, 1e3, 0);
  return one > 0 && all > 0 ? magnitude(one) / magnitude(all) : magnitude(1.0);
}

constexpr double kMaxTheta = 1e30, kMaxFactor = 1e4;

RopeConfig rope_of(const Fields& f, int64_t positions) {
  RopeConfig rope;
  rope.theta = f.number("rope_theta", 1 + 1e-6, kMaxTheta, rope.theta);
  const json* scaling = f.find("rope_parameters");
  const char* key = "rope_parameters";
  if (scaling == nullptr) {
    scaling = f.find("rope_scaling");
    key = "rope_scaling";
  }
  if (scaling == nullptr) return rope;

  const std::string where = f.where + ": " + key;
  const Fields r{object_of(*scaling, where), where};
  if (r.find("rope_theta") != nullptr) {
    const double theta = r.number("rope_theta", 1 + 1e-6, kMaxTheta);
    CERTKV_EXPECT(f.find("rope_theta") == nullptr || theta == rope.theta, BadFile,
                  "{}: rope_theta is {} here and {} outside", where, theta, rope.theta);
    rope.theta = theta;
  }
  CERTKV_EXPECT(r.number("partial_rotary_factor", 0, 1, 1) == 1, InvalidArgument,
                "{}: partial_rotary_factor below 1 is not supported; {}", where, kSupported);
  const std::string old_kind = r.text("type", "");
  const std::string kind = r.text("rope_type", old_kind.empty() ? "default" : old_kind);
  CERTKV_EXPECT(old_kind.empty() || old_kind == kind, BadFile,
                "{}: rope_type and type disagree ({} and {})", where, Fields::shown(kind),
                Fields::shown(old_kind));
  for (const auto& [name, value] : r.object.items()) {
    CERTKV_EXPECT(!value.is_object(), InvalidArgument,
                  "{}: {}: RoPE that differs between layers is not supported; {}", where,
                  Fields::shown(name), kSupported);
  }

  if (kind == "default") return rope;
  if (kind == "linear") {
    rope.kind = RopeKind::Linear;
    rope.factor = r.number("factor", 1, kMaxFactor);
    return rope;
  }
  if (kind == "llama3") {
    rope.kind = RopeKind::Llama3;
    rope.factor = r.number("factor", 1, kMaxFactor);
    rope.low_freq_factor = r.number("low_freq_factor", 1e-3, 1e3);
    rope.high_freq_factor = r.number("high_freq_factor", 1e-3, 1e3);
    CERTKV_EXPECT(rope.high_freq_factor > rope.low_freq_factor, BadFile,
                  "{}: high_freq_factor {} must be above low_freq_factor {}", where,
                  rope.high_freq_factor, rope.low_freq_factor);
    rope.original_max_position_embeddings =
        r.integer("original_max_position_embeddings", 1, kMaxPositions);
    return rope;
  }
  if (kind == "yarn") {
    rope.kind = RopeKind::Yarn;
    rope.original_max_position_embeddings =
        r.integer("original_max_position_embeddings", 1, kMaxPositions, positions);
    rope.factor = r.number("factor", 1, kMaxFactor,
                           double(positions) / double(rope.original_max_position_embeddings));
    CERTKV_EXPECT(rope.factor >= 1 && rope.factor <= kMaxFactor, BadFile,
                  "{}: factor is missing, and max_position_embeddings over "
                  "original_max_position_embeddings gives {}: between 1 and {} is needed",
                  where, rope.factor, kMaxFactor);
    rope.beta_fast = r.number("beta_fast", 1e-3, 1e4, rope.beta_fast);
    rope.beta_slow = r.number("beta_slow", 1e-3, 1e4, rope.beta_slow);
    CERTKV_EXPECT(rope.beta_fast > rope.beta_slow, BadFile,
                  "{}: beta_fast {} must be above beta_slow {}", where, rope.beta_fast,
                  rope.beta_slow);
    rope.yarn_truncate = r.flag("truncate", true);
    rope.attention_factor = yarn_attention_factor(r, rope.factor);
    return rope;
  }
  CERTKV_THROW(InvalidArgument, "{}: kind {} is not supported; {}", where, Fields::shown(kind),
               kSupported);
}

DType dtype_of(const Fields& f) {
  std::string name = f.text("dtype", f.text("torch_dtype", "float32"));
  if (name.starts_with("torch.")) name = name.substr(6);
  if (name == "float32") return DType::F32;
  if (name == "float16") return DType::F16;
  if (name == "bfloat16") return DType::BF16;
  CERTKV_THROW(InvalidArgument,
               "{}: weights of type {} are not supported; supported are float32, float16, bfloat16",
               f.where, Fields::shown(name));
}

// A number, a list of numbers, or nothing.
std::vector<int32_t> ids_of(const Fields& f, const char* key, int64_t vocab) {
  std::vector<int32_t> ids;
  const json* value = f.find(key);
  if (value == nullptr) return ids;
  if (!value->is_array()) return {int32_t(f.integer_of(*value, key, 0, vocab - 1))};
  CERTKV_EXPECT(value->size() <= kMaxEosIds, BadFile, "{}: {} lists {} ids: at most {} are allowed",
                f.where, key, value->size(), kMaxEosIds);
  for (const json& id : *value) ids.push_back(int32_t(f.integer_of(id, key, 0, vocab - 1)));
  return ids;
}

int64_t head_dim_of(const Fields& f, const ModelConfig& c) {
  int64_t head_dim = 0;
  if (f.find("head_dim") != nullptr) {
    head_dim = f.integer("head_dim", 1, 1 << 16);
  } else if (c.architecture == Architecture::Qwen3) {
    head_dim = 128;
  } else {
    CERTKV_EXPECT(c.hidden % c.heads == 0, BadFile,
                  "{}: head_dim is missing, and hidden_size {} is no multiple of "
                  "num_attention_heads {}",
                  f.where, c.hidden, c.heads);
    head_dim = c.hidden / c.heads;
  }
  for (const int64_t allowed : kHeadDims) {
    if (head_dim == allowed) return head_dim;
  }
  CERTKV_THROW(InvalidArgument, "{}: head_dim {} is not supported; {}", f.where, head_dim,
               kSupported);
}

ModelConfig config_of(const json& config, const json* generation, const std::string& name,
                      const std::string& generation_name) {
  const Fields f{object_of(config, name), name};
  const Family& family = family_of(f);
  refuse_unsupported(f, family.architecture);

  ModelConfig c;
  c.architecture = family.architecture;
  c.model_type = family.model_type;
  c.hidden = f.integer("hidden_size", 1, kMaxHidden);
  c.intermediate = f.integer("intermediate_size", 1, kMaxIntermediate);
  c.layers = f.integer("num_hidden_layers", 1, kMaxLayers);
  c.heads = f.integer("num_attention_heads", 1, kMaxHeads);
  // Only Llama's absent value is what every file of that age means; the others' are arbitrary.
  c.kv_heads = family.architecture == Architecture::Llama
                   ? f.integer("num_key_value_heads", 1, kMaxHeads, c.heads)
                   : f.integer("num_key_value_heads", 1, kMaxHeads);
  CERTKV_EXPECT(c.heads % c.kv_heads == 0, BadFile,
                "{}: num_attention_heads {} is no multiple of num_key_value_heads {}", name,
                c.heads, c.kv_heads);
  c.vocab = f.integer("vocab_size", 1, kMaxVocab);
  // Both are cut into one tile per KV head, and no tile may be empty.
  CERTKV_EXPECT(
      c.intermediate >= c.kv_heads && c.vocab >= c.kv_heads, BadFile,
      "{}: intermediate_size {} and vocab_size {} must not be below num_key_value_heads {}", name,
      c.intermediate, c.vocab, c.kv_heads);
  c.head_dim = head_dim_of(f, c);
  c.max_position_embeddings = f.integer("max_position_embeddings", 1, kMaxPositions);
  c.rope = rope_of(f, c.max_position_embeddings);
  c.max_tokens = c.max_position_embeddings;
  if (c.rope.kind == RopeKind::Yarn) {
    const double reach = c.rope.factor * double(c.rope.original_max_position_embeddings);
    c.max_tokens = std::max(c.max_tokens, int64_t(std::min(reach, double(kMaxPositions))));
  }
  c.rms_norm_eps = f.number("rms_norm_eps", 1e-12, 1e-1, c.rms_norm_eps);
  c.tie_word_embeddings = f.flag("tie_word_embeddings", false);
  const bool attention_bias = f.flag("attention_bias", false);
  switch (c.architecture) {
    case Architecture::Llama:
      c.qkv_bias = c.o_bias = attention_bias;
      c.mlp_bias = f.flag("mlp_bias", false);
      break;
    case Architecture::Mistral:
      break;
    case Architecture::Qwen2:
      c.qkv_bias = true;
      break;
    case Architecture::Qwen3:
      c.qkv_bias = c.o_bias = attention_bias;
      c.qk_norm = true;
      break;
  }
  c.dtype = dtype_of(f);

  const std::vector<int32_t> bos = ids_of(f, "bos_token_id", c.vocab);
  CERTKV_EXPECT(bos.size() <= 1, BadFile, "{}: bos_token_id lists {} ids: one is needed", name,
                bos.size());
  if (!bos.empty()) c.bos_id = bos.front();
  c.eos_ids = ids_of(f, "eos_token_id", c.vocab);
  if (generation != nullptr) {
    const Fields g{object_of(*generation, generation_name), generation_name};
    if (std::vector<int32_t> eos = ids_of(g, "eos_token_id", c.vocab); !eos.empty()) {
      c.eos_ids = std::move(eos);
    }
  }
  return c;
}

}  // namespace

const char* architecture_name(Architecture architecture) {
  for (const Family& family : kFamilies) {
    if (family.architecture == architecture) return family.name;
  }
  return "unknown";
}

const char* rope_kind_name(RopeKind kind) {
  switch (kind) {
    case RopeKind::Plain:
      return "default";
    case RopeKind::Linear:
      return "linear";
    case RopeKind::Llama3:
      return "llama3";
    case RopeKind::Yarn:
      return "yarn";
  }
  return "unknown";
}

ModelConfig load_model_config(const std::filesystem::path& folder) {
  const std::string path = path_in_folder(folder.string(), "config.json");
  const json config = load_json_file(path);
  if (!folder_has(folder.string(), "generation_config.json")) {
    return config_of(config, nullptr, path, "");
  }
  const std::string generation_path = path_in_folder(folder.string(), "generation_config.json");
  const json generation = load_json_file(generation_path);
  return config_of(config, &generation, path, generation_path);
}

ModelConfig parse_model_config(std::string_view config, std::string_view generation,
                               const std::string& name) {
  const json parsed = parse_json(config, name);
  if (generation.empty()) return config_of(parsed, nullptr, name, "");
  const json parsed_generation = parse_json(generation, name + " (generation)");
  return config_of(parsed, &parsed_generation, name, name + " (generation)");
}

}  // namespace certkv
