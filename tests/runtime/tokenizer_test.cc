#include "runtime/tokenizer.h"

#include <gtest/gtest.h>

#include "runtime/json_file.h"

namespace certkv {
namespace {

const std::string kGolden = CERTKV_GOLDEN_DIR;

std::shared_ptr<const Tokenizer> reader() {
  static const auto tokenizer = load_tokenizer_from_json_text(
      read_file_bounded(kGolden + "/tokenizer/reader.json", 1 << 20),
      R"({"bos_token":"<|begin_of_text|>","eos_token":"<|end_of_text|>"})");
  return tokenizer;
}

TEST(Tokenizer, AVocabularyOfBytesGivesEveryByteItsOwnId) {
  const auto t = reader();
  EXPECT_EQ(t->vocab_size(), 258u);
  EXPECT_EQ(t->bos_id(), 256);
  EXPECT_EQ(t->eos_id(), 257);
  const std::string text = "a \xc3\xa9\n\xf0\x9f\x98\x80";
  std::vector<int32_t> expected{256};
  for (const char c : text) expected.push_back(static_cast<uint8_t>(c));
  EXPECT_EQ(t->encode(text, true), expected);
  EXPECT_EQ(t->decode(expected, true), text);
  EXPECT_EQ(t->decode(expected, false), "<|begin_of_text|>" + text);
}

}  // namespace
}  // namespace certkv
