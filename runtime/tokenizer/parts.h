// What a loaded tokenizer consists of.
#pragma once

#include <array>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "runtime/tokenizer.h"
#include "runtime/tokenizer/added_tokens.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/decoder.h"
#include "runtime/tokenizer/normalizer.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/sentencepiece_model.h"

namespace certkv {

struct Tokenizer::Parts {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  AddedTokens added;
  std::unique_ptr<const BpeModel> bpe;  // exactly one of these two
  std::unique_ptr<const SentencePieceModel> pieces;
  std::unique_ptr<const Decoder> decoder;
  std::vector<int32_t> prefix, suffix;  // around a text, where add_special
  TokenIds ids;                         // by name: vocabulary and added tokens
  std::vector<std::string> names;       // by id
  std::optional<int32_t> bos, eos;
  std::optional<std::string> chat_template;
};

// tokenizer.json and tokenizer_config.json. ERRORS: BadFile.
std::unique_ptr<const Tokenizer::Parts> read_tokenizer_json(const nlohmann::json& tokenizer,
                                                            const nlohmann::json& config,
                                                            const std::string& name);
// tokenizer.model (its bytes) and tokenizer_config.json. ERRORS: BadFile.
std::unique_ptr<const Tokenizer::Parts> read_tokenizer_model(const std::string& model,
                                                             const nlohmann::json& config,
                                                             const std::string& name);

}  // namespace certkv
