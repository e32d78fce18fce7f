// What a Hugging Face model folder says about its model: config.json and generation_config.json.
//
// Supported: LlamaForCausalLM (Llama 2 and 3.x), MistralForCausalLM without a sliding window,
// Qwen2ForCausalLM (bias on q, k, v), Qwen3ForCausalLM (RMSNorm on the heads of q and k), all dense
// (no mixture of experts), with silu, and with RoPE (rotate_half) plain or scaled as `linear`,
// `llama3` or `yarn`. Anything else is an error that lists this.
//
// SOURCE: the configuration classes and modeling_rope_utils of Hugging Face transformers; a field
// that is absent takes the default of its architecture there.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"

namespace certkv {

enum class Architecture : uint8_t { Llama, Mistral, Qwen2, Qwen3 };
const char* architecture_name(Architecture architecture);  // "LlamaForCausalLM", ...

enum class RopeKind : uint8_t { Plain, Linear, Llama3, Yarn };
const char* rope_kind_name(RopeKind kind);  // "default", "linear", "llama3", "yarn"

// With inv_freq[m] = theta^(-2m/head_dim), m in [0, head_dim/2), pair m = dimensions m, m + d/2:
//  Linear  every frequency divided by factor.
//  Llama3  wavelength 2 pi / inv_freq above original/low_freq_factor: divided by factor; below
//          original/high_freq_factor: kept; between them interpolated linearly in
//          original/wavelength.
//  Yarn    pairs that turn more than beta_fast times over `original` positions are kept, fewer than
//          beta_slow times are divided by factor, a linear ramp over the pair index between them
//          (its ends rounded outward to whole pairs iff yarn_truncate); cos and sin both multiplied
//          by attention_factor.
struct RopeConfig {
  RopeKind kind = RopeKind::Plain;
  double theta = 10000.0;       // > 1
  double factor = 1.0;          // Linear, Llama3, Yarn; >= 1
  double low_freq_factor = 1.0;   // Llama3
  double high_freq_factor = 4.0;  // Llama3, > low_freq_factor
  double beta_fast = 32.0;      // Yarn, > beta_slow
  double beta_slow = 1.0;       // Yarn, > 0
  bool yarn_truncate = true;    // Yarn
  double attention_factor = 1.0;  // Yarn, resolved: given, or from mscale, mscale_all_dim and factor
  int64_t original_max_position_embeddings = 0;  // Llama3, Yarn; 0 otherwise
};

struct ModelConfig {
  Architecture architecture = Architecture::Llama;
  std::string model_type;         // "llama", "mistral", "qwen2", "qwen3"
  int64_t hidden = 0;             // hidden_size
  int64_t intermediate = 0;       // intermediate_size
  int64_t layers = 0;             // num_hidden_layers
  int64_t heads = 0;              // num_attention_heads
  int64_t kv_heads = 0;           // num_key_value_heads; divides heads
  int64_t head_dim = 0;           // 64, 96, 128 or 256; heads * head_dim need not equal hidden
  int64_t vocab = 0;              // vocab_size
  RopeConfig rope;
  double rms_norm_eps = 1e-6;
  int64_t max_position_embeddings = 0;  // as in the file
  int64_t max_tokens = 0;         // limit of prompt + answer: max_position_embeddings, and under
                                  // yarn at least factor * original_max_position_embeddings
  bool tie_word_embeddings = false;  // lm_head is embed_tokens
  bool qkv_bias = false;          // q_proj, k_proj, v_proj
  bool o_bias = false;            // o_proj
  bool mlp_bias = false;          // gate_proj, up_proj, down_proj
  bool qk_norm = false;           // RMSNorm [head_dim] on every head of q and k, before RoPE
  DType dtype = DType::F32;       // dtype or torch_dtype: F32 (also where absent), F16 or BF16
  int32_t bos_id = -1;            // -1: none
  std::vector<int32_t> eos_ids;   // generation_config.json's where it has some, else config.json's

  int64_t heads_per_group() const { return heads / kv_heads; }
};

// Reads folder/config.json and, where it exists, folder/generation_config.json.
// ENSURES every size is positive and so bounded that products of any two sizes and the total count
// of weights fit int64_t; ids lie in [0, vocab).
// Throws BadFile (missing, not JSON, values out of range), InvalidArgument (a model of a kind that
// is not supported; the message lists what is).
ModelConfig load_model_config(const std::filesystem::path& folder);

// The same from the texts themselves (for tests and fuzzing); `name` stands for the file in errors.
// An empty generation text means that there is no such file.
ModelConfig parse_model_config(std::string_view config, std::string_view generation,
                               const std::string& name);

}  // namespace certkv
