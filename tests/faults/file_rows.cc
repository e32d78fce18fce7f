// Model files that were cut or altered. What loads in spite of it must be what stood there before.
#include <fmt/format.h>
#include <xxhash.h>

#include <filesystem>
#include <fstream>

#include "kernels/base/error.h"
#include "runtime/tokenizer.h"
#include "tests/faults/worker.h"
#include "tests/support/temp_folder.h"

namespace certkv::faults {
namespace {

namespace fs = std::filesystem;
constexpr const char* kModel = CERTKV_GOLDEN_DIR "/models/qwen3";
constexpr const char* kTokenizer = CERTKV_GOLDEN_DIR "/tokenizer/qwen.json";

uint64_t digest(const Weights& w) {
  uint64_t h = 0;
  const auto add = [&h](const void* p, size_t bytes) { h = XXH3_64bits_withSeed(p, bytes, h); };
  const auto floats = [&](const std::vector<float>& v) { add(v.data(), v.size() * sizeof(float)); };
  add(w.embed.values.get(), size_t(w.embed.rows * w.embed.cols) * dtype_bytes(w.embed.dtype));
  for (const LayerWeights& l : w.layers) {
    for (const auto* v : {&l.input_norm, &l.post_attention_norm, &l.q_norm, &l.k_norm}) floats(*v);
    for (const GroupWeights& g : l.groups)
      for (const Matrix* m : {&g.qkv, &g.o, &g.gate_up, &g.down})
        add(m->values.get(), size_t(m->rows * m->cols) * sizeof(float));
  }
  floats(w.final_norm);
  return h;
}

uint64_t load(const fs::path& folder) {
  const ModelConfig config = load_model_config(folder.string());
  return digest(load_weights(folder, config, 1, 0));
}

std::string altered(std::string text, Draw& draw, size_t within) {
  static const std::vector<std::string> kPieces = {"0",
                                                   "9",
                                                   "-",
                                                   "\"",
                                                   "{",
                                                   "}",
                                                   "[",
                                                   "]",
                                                   ",",
                                                   ":",
                                                   "99999999999999999999",
                                                   "null",
                                                   "1e400",
                                                   std::string(70, '['),
                                                   "\\ud800",
                                                   std::string(1, '\0'),
                                                   "<0x-1>",
                                                   "../../etc/passwd"};
  for (uint64_t edits = draw.between(1, 4); edits > 0; --edits) {
    const size_t end = std::min(within, text.size());
    if (end == 0) break;
    const size_t place = size_t(draw.below(end));
    switch (draw.below(4)) {
      case 0:
        text[place] = char(text[place] ^ char(1u << draw.below(8)));
        break;
      case 1:
        text.erase(place, draw.between(1, 30));
        break;
      case 2:
        text.insert(place, draw.of(kPieces));
        break;
      default:
        text.insert(place, text.substr(size_t(draw.below(end)), draw.between(1, 60)));
    }
  }
  return text;
}

}  // namespace

Outcome model_files(Bench&, Draw& draw) {
  static const uint64_t right = load(kModel);
  const test::TempFolder folder;
  for (const char* name : {"config.json", "model.safetensors"})
    fs::copy_file(fs::path(kModel) / name, folder / name);
  const std::string weights = test::TempFolder::read(folder / "model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), sizeof header);
  const uint64_t what = draw.below(4);
  bool must_fail = false;
  try {
    switch (what) {
      case 0:
        folder.write("model.safetensors", weights.substr(0, size_t(draw.below(weights.size()))));
        must_fail = true;
        break;
      case 1:
        folder.write("model.safetensors", altered(weights, draw, size_t(8 + header)));
        break;
      case 2:
        folder.write("config.json",
                     altered(test::TempFolder::read(folder / "config.json"), draw, SIZE_MAX));
        break;
      default: {
        folder.write("tokenizer.json", altered(test::TempFolder::read(kTokenizer), draw, 200000));
        const auto tokenizer = load_tokenizer(folder.path().string());
        const int64_t vocabulary = tokenizer->vocab_size();
        for (const int32_t id : tokenizer->encode("A text, with 42 numbers & more.", false))
          if (id < 0 || id >= vocabulary)
            return {Outcome::Result::Violation, fmt::format("token {} of {}", id, vocabulary)};
        return {Outcome::Result::Same, "it reads well"};
      }
    }
    const uint64_t got = load(folder.path());
    if (must_fail) return {Outcome::Result::Violation, "weights that were cut were loaded"};
    // Another configuration is another model; other bytes under one header are not.
    if (what == 1 && got != right)
      return {Outcome::Result::Violation, "other weights were loaded by an altered header"};
    return {Outcome::Result::Same, "it reads well"};
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::BadFile && e.kind() != ErrorKind::InvalidArgument &&
        e.kind() != ErrorKind::OutOfMemory)
      return {Outcome::Result::Violation,
              fmt::format("{}: {}", error_kind_name(e.kind()), e.what())};
    return {Outcome::Result::Named,
            std::string(error_kind_name(e.kind())) + ": " + std::string(e.what()).substr(0, 160)};
  }
}

}  // namespace certkv::faults
