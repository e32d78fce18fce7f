// tokenizer.json and a text. Whatever the file is, it is refused by name, or encoding and decoding
// with it keep their promises: ids inside the vocabulary, valid UTF-8, and streaming that gives
// what decoding at once gives.
//   input: tokenizer.json, a zero byte, the text
#include <nlohmann/json.hpp>
#include <string_view>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

bool is_utf8(const std::string& text) {
  // nlohmann refuses to write a text that is not.
  try {
    nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

void check(const std::shared_ptr<const Tokenizer>& t, std::string_view text) {
  for (const SpecialInText special : {SpecialInText::Parse, SpecialInText::AsText}) {
    const std::vector<int32_t> ids = t->encode(text, true, special);
    for (const int32_t id : ids)
      require(id >= 0 && size_t(id) < t->vocab_size(), "an id outside the vocabulary");
    for (const bool skip : {false, true}) {
      const std::string whole = t->decode(ids, skip);
      require(is_utf8(whole), "a decoded text that is not UTF-8");
      StreamingDecoder stream(t, skip);
      std::string parts;
      for (const int32_t id : ids) {
        const std::string part = stream.push(id);
        require(is_utf8(part), "a piece that is not UTF-8");
        parts += part;
      }
      require(parts + stream.finish() == whole, "streaming differs from decoding at once");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(all.find('\0'), size);
  const std::string_view text = cut < size ? all.substr(cut + 1) : std::string_view("the end");
  try {
    check(load_tokenizer_from_json_text(all.substr(0, cut), "{}", "fuzz.json"), text);
    ++fuzz::accepted;
  } catch (const Error& e) {
    require(e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile,
            "refused with an unexpected kind of error");
    require(!std::string_view(e.what()).empty(), "an error without a text");
  }
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const std::string text =
      std::string(1, '\0') + "The 12345 q\xc3\xa9 \xe2\x96\x81  \xf0\x9f\x98\x80 <|eot|>\n\xff end";
  std::vector<std::string> seeds;
  for (const char* name : {"added", "metaspace", "llama2", "llama3", "gpt2", "qwen", "reader"})
    seeds.push_back(read_file_bounded(
                        std::string(CERTKV_GOLDEN_DIR) + "/tokenizer/" + name + ".json", 1 << 20) +
                    text);
  return {"TokenizerFuzz",
          std::move(seeds),
          {"0",
           "-1",
           "1e9",
           "4294967296",
           "null",
           "true",
           "[]",
           "{}",
           "\"\"",
           "[",
           "]",
           "{",
           "}",
           ",",
           ":",
           "\"",
           "\"<0x41>\"",
           "\"<0x-1>\"",
           "\"<0x100>\"",
           "\"merges\"",
           "\"vocab\"",
           "\"type\":\"Sequence\",",
           "\"pattern\":{\"Regex\":\"(a+)+$\"},",
           "\\\\p{L}",
           "(?i:",
           "{2,}",
           "\"special\":true,",
           "\"lstrip\":true,",
           "\"ignore_merges\":true,",
           "\"byte_fallback\":true,",
           "\\ud800",
           "\xe2\x96\x81",
           "\xc4\xa0",
           "\xff",
           std::string(300, 'a'),
           std::string(1, '\0')},
          6000};
}
