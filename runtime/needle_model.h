// Writes the model "needle": a Llama whose weights are computed, not trained, so that it copies what
// followed the last 16 bytes when they stood in the context before. Its answers are known, over
// contexts up to 131,072 tokens, which makes it a test instrument; launcher/demo/NEEDLE.md tells how
// it works.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "kernels/base/dtype.h"

namespace certkv {

struct NeedleOptions {
  std::string preset = "default";  // noted in config.json
  double beta = 96.0;      // nats of score of a full match; larger: sharper attention
  double sink = 0.70;      // score of the sink over beta, in (0, 1); larger: smaller margin
  double k_outlier = 0.0;  // standard deviation of the outlier key channels over that of the content
  double v_nuisance = 0.0; // standard deviation of the unread value directions over the code's
  uint64_t seed = 1;
  DType dtype = DType::F16;  // F16 or BF16
};

// "default": sharp, survives quantisation. "fragile": a margin of 3 nats, outlier channels in keys
// and large unread values, which naive quantisation does not survive.
// ERRORS: InvalidArgument for another name.
NeedleOptions needle_preset(const std::string& name);

// Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
// model.safetensors (about 8 MB) into the folder, which is made where it does not exist. The same
// options give the same bytes.
// ERRORS: InvalidArgument (options out of range; weights beyond the range of dtype; the folder holds
// a sharded model), IoError.
void make_needle_model(const NeedleOptions& options, const std::filesystem::path& out);

}  // namespace certkv
