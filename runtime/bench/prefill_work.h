// Floating-point operations that a prefill has to do, whatever way it is computed.
#pragma once

#include <cstdint>

namespace certkv {

struct ModelConfig;

struct PrefillWork {
  double products = 0;   // of weights: 2 for each weight and token
  double attention = 0;  // scores and values of causal pairs: 4 head_dim for each pair and head
};
// Of the whole model. The last layer's attention, output and MLP are needed for the last tile of
// queries alone (runtime/transformer.cc). UNITS: floating-point operations
PrefillWork prefill_work(const ModelConfig& config, int64_t tokens);

}  // namespace certkv
