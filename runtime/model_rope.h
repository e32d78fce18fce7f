// The rotary embedding that a model's configuration asks for.
#pragma once

#include <vector>

namespace certkv {

struct ModelConfig;

// [head_dim / 2], scaled as the configuration says. UNITS: radians per position
std::vector<double> model_rope_frequencies(const ModelConfig& config);
// What cosines and sines are multiplied with (YaRN's attention factor, else 1).
double model_rope_magnitude(const ModelConfig& config);

}  // namespace certkv
