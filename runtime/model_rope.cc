#include "runtime/model_rope.h"

#include "kernels/rope.h"
#include "runtime/model_config.h"

namespace certkv {

std::vector<double> model_rope_frequencies(const ModelConfig& config) {
  const RopeConfig& r = config.rope;
  std::vector<double> f = rope_frequencies(r.theta, size_t(config.head_dim));
  const double original = double(r.original_max_position_embeddings);
  switch (r.kind) {
    case RopeKind::Plain:
      break;
    case RopeKind::Linear:
      rope_scale_linear(f, r.factor);
      break;
    case RopeKind::Llama3:
      rope_scale_llama3(f, r.factor, r.low_freq_factor, r.high_freq_factor, original);
      break;
    case RopeKind::Yarn:
      rope_scale_yarn(f, r.theta, r.factor, r.beta_fast, r.beta_slow, r.yarn_truncate, original);
      break;
  }
  return f;
}

double model_rope_magnitude(const ModelConfig& config) {
  return config.rope.kind == RopeKind::Yarn ? config.rope.attention_factor : 1.0;
}

}  // namespace certkv
