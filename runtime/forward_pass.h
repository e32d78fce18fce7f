// The model's forward pass as the engine sees it, wherever it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/sample.h"
#include "runtime/layers.h"

namespace certkv {

// How a row's next token is chosen; see sample_token.
struct TokenChoice {
  SampleOptions options;
  double uniform = 0;
};

struct DecodeInput {
  int64_t sequence = 0;  // handle of the cache
  int32_t token = 0;     // the newest token
  int64_t position = 0;  // its position: tokens the sequence had before it
  // The token so chosen will do; none: the logits are wanted.
  std::optional<TokenChoice> choice = std::nullopt;
};

// What of a layer was the first not to be finite.
enum class LayerPart : uint8_t { KeyValue, Attention, Mlp };
const char* layer_part_text(LayerPart part);  // "the attention output"

struct DecodeOutput {
  // [rows, vocab]; not set for rows whose token is chosen, and empty where all are.
  std::vector<float> logits;
  // Of a row with a choice the token that sample_token() would give, and the row's largest logit, a
  // NaN counting as largest: where that is not finite, the token is its place (sampled_elsewhere).
  // Token -1 where the row has its logits: a forward pass may always give them.
  struct Chosen {
    int32_t token = -1;
    float largest = 0;
  };
  std::vector<Chosen> chosen;  // [rows]
  // Per row: the first layer with a NaN or an infinity, -1 if none. Such a row's logits are not to
  // be used: its request fails with NonFinite, the others go on.
  std::vector<int> nonfinite_layer;       // [rows]
  std::vector<LayerPart> nonfinite_part;  // [rows], of that layer
  std::vector<int> fallback_layers;       // [rows]: layers that took rung 4
};

// Originals of a prompt's beginning, which the store had, are damaged or gone: thrown by all ranks
// at the same point. Nothing of the prompt was used; it can be prefilled from its first token.
struct SharedPrefixLost : Error {
  using Error::Error;
};

struct ModelConfig;

// Throws InvalidArgument naming the first token of a prompt or step that the vocabulary lacks.
void check_tokens(const ModelConfig& config, std::span<const int32_t> tokens);

class ForwardPass {
 public:
  virtual ~ForwardPass() = default;

  // Called after every chunk of a layer with the tokens of that layer done so far. It may throw:
  // prefill then ends with that exception (the other ranks are not told).
  using Progress = std::function<void(int layer, size_t tokens)>;

  // Runs the whole prompt of a sequence that the cache knows and that is empty. Returns the last
  // token's logits [vocab].
  virtual std::vector<float> prefill(int64_t sequence, std::span<const int32_t> tokens,
                                     const Progress& progress) = 0;

  // Runs one token of each row. Rows of different sequences; the cache appends their originals.
  virtual DecodeOutput decode(std::span<const DecodeInput> rows) = 0;

  virtual ForwardPhases phases() const = 0;  // since they were last cleared
  virtual void clear_phases() = 0;
};

}  // namespace certkv
