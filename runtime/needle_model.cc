#include "runtime/needle_model.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/needle/weights.h"
#include "runtime/safetensors.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr const char* kBosName = "<|begin_of_text|>";
constexpr const char* kEosName = "<|end_of_text|>";

void check_options(const NeedleOptions& o) {
  // Written so that NaN fails. The upper ends lie where 16-bit weights still carry the design.
  CERTKV_EXPECT(o.beta > 0 && o.beta <= 1000, InvalidArgument,
                "beta is {}: nats above 0, at most 1000, are needed", o.beta);
  CERTKV_EXPECT(o.sink > 0 && o.sink < 1, InvalidArgument,
                "sink is {}: a fraction of beta between 0 and 1, exclusive, is needed", o.sink);
  CERTKV_EXPECT(o.k_outlier >= 0 && o.k_outlier <= 1e5, InvalidArgument,
                "k-outlier is {}: between 0 and 1e5 is needed", o.k_outlier);
  CERTKV_EXPECT(o.v_nuisance >= 0 && o.v_nuisance <= 1e5, InvalidArgument,
                "v-nuisance is {}: between 0 and 1e5 is needed", o.v_nuisance);
  CERTKV_EXPECT(o.dtype == DType::F16 || o.dtype == DType::BF16, InvalidArgument,
                "dtype is {}: F16 or BF16 is needed", dtype_name(o.dtype));
}

// The character that stands for a byte in a byte-level BPE vocabulary: itself where it is printable
// in Latin-1, else the next free code point from 256 on. UTF-8.
std::vector<std::string> byte_characters() {
  std::vector<std::string> names;
  int next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xff && b != 0xad);
    const int point = printable ? b : next++;
    names.push_back(point < 0x80
                        ? std::string(1, char(point))
                        : std::string{char(0xc0 | point >> 6), char(0x80 | (point & 0x3f))});
  }
  return names;
}

// Byte-level BPE without merges: every byte is a token, its id the byte's value.
ordered_json tokenizer_json() {
  ordered_json added = ordered_json::array(), vocab = ordered_json::object();
  for (const auto& [id, name] : {std::pair{needle::kBos, kBosName}, {needle::kEos, kEosName}}) {
    added.push_back({{"id", id},
                     {"content", name},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const std::vector<std::string> names = byte_characters();
  for (size_t b = 0; b < names.size(); ++b) vocab[names[b]] = b;
  const ordered_json byte_level = {{"type", "ByteLevel"},
                                   {"add_prefix_space", false},
                                   {"trim_offsets", true},
                                   {"use_regex", false}};
  const auto special = [](int type) {
    return ordered_json{{"SpecialToken", {{"id", kBosName}, {"type_id", type}}}};
  };
  const auto sequence = [](const char* id, int type) {
    return ordered_json{{"Sequence", {{"id", id}, {"type_id", type}}}};
  };
  ordered_json begin;
  begin[kBosName] = {{"id", kBosName},
                     {"ids", ordered_json::array({needle::kBos})},
                     {"tokens", ordered_json::array({kBosName})}};
  const ordered_json model = {{"type", "BPE"},
                              {"dropout", nullptr},
                              {"unk_token", nullptr},
                              {"continuing_subword_prefix", nullptr},
                              {"end_of_word_suffix", nullptr},
                              {"fuse_unk", false},
                              {"byte_fallback", false},
                              {"ignore_merges", false},
                              {"vocab", vocab},
                              {"merges", ordered_json::array()}};
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single", ordered_json::array({special(0), sequence("A", 0)})},
        {"pair", ordered_json::array({special(0), sequence("A", 0), special(1), sequence("B", 1)})},
        {"special_tokens", begin}}},
      {"decoder", byte_level},
      {"model", model}};
}

ordered_json config_json(const NeedleOptions& o) {
  return {{"architectures", ordered_json::array({"LlamaForCausalLM"})},
          {"model_type", "llama"},
          {"hidden_size", needle::kHidden},
          {"intermediate_size", needle::kIntermediate},
          {"num_hidden_layers", needle::kLayers},
          {"num_attention_heads", needle::kHeads},
          {"num_key_value_heads", needle::kKvHeads},
          {"head_dim", needle::kHeadDim},
          {"vocab_size", needle::kVocab},
          {"max_position_embeddings", needle::kMaxPositions},
          {"rope_theta", needle::kTheta},
          {"rope_scaling", nullptr},
          {"rms_norm_eps", needle::kEps},
          {"hidden_act", "silu"},
          {"attention_bias", false},
          {"attention_dropout", 0.0},
          {"mlp_bias", false},
          {"tie_word_embeddings", false},
          {"bos_token_id", needle::kBos},
          {"eos_token_id", needle::kEos},
          {"initializer_range", 0.02},
          {"torch_dtype", o.dtype == DType::F16 ? "float16" : "bfloat16"},
          {"use_cache", true},
          {"needle",
           {{"preset", o.preset},
            {"seed", o.seed},
            {"beta", o.beta},
            {"sink", o.sink},
            {"k_outlier", o.k_outlier},
            {"v_nuisance", o.v_nuisance}}}};
}

void write_json(const fs::path& path, const ordered_json& document) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << document.dump(1) << '\n';
  out.close();
  CERTKV_EXPECT(out.good(), IoError, "{}: cannot be written", path.string());
}

void write_weights(const NeedleOptions& o, const fs::path& path) {
  const std::vector<needle::NamedTensor> weights = needle::make_weights(o);
  std::vector<std::vector<uint16_t>> bits(weights.size());
  std::vector<TensorToWrite> list;
  for (size_t i = 0; i < weights.size(); ++i) {
    const needle::NamedTensor& t = weights[i];
    bits[i].reserve(t.values.size());
    for (const double x : t.values) {
      bits[i].push_back(float_to_16(o.dtype, float(x)));
      CERTKV_EXPECT(
          std::isfinite(float_from_16(o.dtype, bits[i].back())), InvalidArgument,
          "{} holds {}, which is beyond the range of {}: lower beta, k-outlier or v-nuisance",
          t.name, x, dtype_name(o.dtype));
    }
    list.push_back({t.name, o.dtype, t.shape, bits[i].data()});
  }
  write_safetensors(path, list, {{"format", "pt"}});
}

}  // namespace

NeedleOptions needle_preset(const std::string& name) {
  if (name == "default") return {};
  if (name == "fragile") {
    NeedleOptions o;
    o.preset = name;
    o.beta = 60.0;
    o.sink = 0.95;
    o.k_outlier = 500.0;
    o.v_nuisance = 80.0;
    return o;
  }
  CERTKV_THROW(InvalidArgument, "there is no preset '{}': use default or fragile", name);
}

void make_needle_model(const NeedleOptions& options, const fs::path& out) {
  check_options(options);
  std::error_code ec;
  fs::create_directories(out, ec);
  CERTKV_EXPECT(!ec && fs::is_directory(out, ec), IoError, "{}: the folder cannot be made: {}",
                out.string(), ec ? ec.message() : "a file is in the way");
  CERTKV_EXPECT(!fs::exists(out / "model.safetensors.index.json"), InvalidArgument,
                "{}: holds a sharded model already; choose an empty folder", out.string());
  write_weights(options, out / "model.safetensors");
  write_json(out / "config.json", config_json(options));
  write_json(
      out / "generation_config.json",
      {{"bos_token_id", needle::kBos}, {"eos_token_id", needle::kEos}, {"do_sample", false}});
  write_json(out / "tokenizer_config.json", {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                             {"bos_token", kBosName},
                                             {"eos_token", kEosName},
                                             {"model_max_length", needle::kMaxPositions},
                                             {"clean_up_tokenization_spaces", false}});
  write_json(out / "tokenizer.json", tokenizer_json());
}

}  // namespace certkv
