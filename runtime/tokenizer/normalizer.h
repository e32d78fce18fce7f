// What happens to text before it is split: "normalizer" of tokenizer.json.
//
// Supported: null, Sequence, NFC, NFD, NFKC, NFKD, Prepend, Replace (String or Regex).
// THREADS: const functions may be called from any thread.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

class Normalizer {
 public:
  Normalizer();
  // ERRORS: BadFile naming what is not supported, with `name` of the file.
  Normalizer(const nlohmann::json& spec, const std::string& name);
  ~Normalizer();
  Normalizer(Normalizer&&) noexcept;
  Normalizer& operator=(Normalizer&&) noexcept;

  bool empty() const { return steps_.empty(); }
  // REQUIRES valid UTF-8; ENSURES valid UTF-8. ERRORS: InvalidArgument where a
  // replacement would make more than 64 MiB.
  std::string apply(std::string_view text) const;

 private:
  struct Step;
  void add(const nlohmann::json& spec, const std::string& name);
  std::vector<std::unique_ptr<Step>> steps_;
};

enum class UnicodeForm { Nfc, Nfd, Nfkc, Nfkd };
// REQUIRES valid UTF-8. Time n log n whatever the text (utf8proc's own ordering is quadratic).
std::string unicode_normalized(std::string_view text, UnicodeForm form);

}  // namespace certkv
