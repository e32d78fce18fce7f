// A tokenizer.model file, run by libsentencepiece. Supported: models whose normaliser is the
// identity (Llama 2, Mistral).
//
// THREADS: const functions may be called from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

class SentencePieceModel {
 public:
  // model: the file's bytes. ERRORS: BadFile.
  SentencePieceModel(const std::string& model, const std::string& name);
  ~SentencePieceModel();

  // Appends the ids of a text. REQUIRES valid UTF-8.
  void encode(std::string_view text, std::vector<int32_t>& ids) const;

  const std::vector<std::string>& names() const { return names_; }      // by id
  const std::vector<int32_t>& control_ids() const { return control_; }  // never made from text
  std::optional<int32_t> bos() const;
  std::optional<int32_t> eos() const;
  // A space is put before each text, and belongs to the first word's token.
  bool adds_space() const { return adds_space_; }

 private:
  struct Processor;
  std::unique_ptr<Processor> processor_;
  std::vector<std::string> names_;
  std::vector<int32_t> control_;
  bool adds_space_ = false;
};

}  // namespace certkv
