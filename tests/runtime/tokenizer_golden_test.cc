// What Hugging Face's tokenizers say of awkward text, for a tiny tokenizer of every supported form
// (tests/golden/make_tokenizer_goldens.py).
#include <fmt/core.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "runtime/json_file.h"
#include "runtime/tokenizer.h"
#include "runtime/tokenizer/parts.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;

const std::string kFolder = std::string(CERTKV_GOLDEN_DIR) + "/tokenizer/";

std::shared_ptr<const Tokenizer> load(const std::string& name) {
  return load_tokenizer_from_json_text(read_file_bounded(kFolder + name + ".json", 1 << 20), "{}",
                                       name);
}

std::string hash_of(const Ids& ids) {  // FNV-1a over little-endian words
  uint64_t h = 0xcbf29ce484222325u;
  for (const int32_t id : ids)
    for (int b = 0; b < 4; ++b) h = (h ^ (uint32_t(id) >> (8 * b) & 0xff)) * 0x100000001b3u;
  return fmt::format("{:016x}", h);
}

std::string from_hex(const std::string& hex) {
  std::string out;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    out += char(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

std::string streamed(const std::shared_ptr<const Tokenizer>& tokenizer, const Ids& ids, bool skip) {
  StreamingDecoder decoder(tokenizer, skip);
  std::string out;
  for (const int32_t id : ids) {
    const std::string part = decoder.push(id);
    EXPECT_TRUE(utf8::valid(part));
    out += part;
  }
  return out + decoder.finish();
}

class TokenizerGolden : public ::testing::TestWithParam<const char*> {
 protected:
  const std::shared_ptr<const Tokenizer> tokenizer = load(GetParam());
  const json golden = load_json_file(kFolder + GetParam() + ".golden.json");
};

TEST_P(TokenizerGolden, AwkwardTextHasTheSameIds) {
  EXPECT_EQ(tokenizer->vocab_size(), golden["vocab_size"]);
  for (const json& c : golden["cases"]) {
    const auto text = c["text"].get<std::string>();
    const auto ids = c["ids"].get<Ids>();
    EXPECT_EQ(tokenizer->encode(text, false), ids) << text;
    EXPECT_EQ(tokenizer->encode(text, false, SpecialInText::AsText), c.value("as_text", ids))
        << text;
    if (c.contains("around")) {
      EXPECT_EQ(tokenizer->encode(text, true), c["around"].get<Ids>());
    }
  }
}

TEST_P(TokenizerGolden, IdsDecodeToTheSameTextAtOnceAndOneByOne) {
  for (const json& c : golden["cases"]) {
    if (c.contains("encode_only")) continue;
    const auto text = c["text"].get<std::string>();
    const Ids ids = tokenizer->encode(text, true);
    const auto kept = c.value("kept", text);
    const auto skipped = c.value("skipped", kept);
    EXPECT_EQ(tokenizer->decode(ids, false), kept);
    EXPECT_EQ(tokenizer->decode(ids, true), skipped);
    EXPECT_EQ(streamed(tokenizer, ids, false), kept);
    EXPECT_EQ(streamed(tokenizer, ids, true), skipped);
  }
  for (const json& d : golden["decoded"]) {
    const auto ids = d[0].get<Ids>();
    EXPECT_EQ(tokenizer->decode(ids, false), d[1].get<std::string>()) << d[0];
    EXPECT_EQ(tokenizer->decode(ids, true), d[2].get<std::string>()) << d[0];
    EXPECT_EQ(streamed(tokenizer, ids, false), d[1].get<std::string>()) << d[0];
  }
}

TEST_P(TokenizerGolden, InvalidUtf8IsRepairedBeforeItIsEncoded) {
  for (const json& b : golden["broken"])
    EXPECT_EQ(tokenizer->encode(from_hex(b[0]), false), b[1].get<Ids>()) << b[0];
}

TEST_P(TokenizerGolden, LongRunsHaveTheSameIds) {
  for (const json& l : golden["long"]) {
    const auto unit = l[0].get<std::string>();
    std::string text;
    for (int i = 0; i < l[1].get<int>(); ++i) text += unit;
    const Ids ids = tokenizer->encode(text, false);
    EXPECT_EQ(ids.size(), l[3].get<size_t>()) << unit;
    EXPECT_EQ(hash_of(ids), l[2].get<std::string>()) << unit;
  }
}

class TokenizerPlanes : public TokenizerGolden {};

TEST_P(TokenizerPlanes, EveryAssignedCharacterHasTheSameIds) {
  const json ranges = load_json_file(kFolder + "ranges.json");
  std::vector<char32_t> points;
  for (const json& r : ranges["ranges"])
    for (char32_t c = r[0].get<uint32_t>(); c <= r[1].get<uint32_t>(); ++c) points.push_back(c);
  const auto chunk = ranges["chunk"].get<size_t>();
  size_t index = 0;
  for (size_t at = 0; at < points.size(); at += chunk, ++index) {
    std::string text;
    for (size_t i = at; i < std::min(at + chunk, points.size()); ++i) {
      std::string c;
      utf8::append(c, points[i]);
      text += "x" + c + c + " " + c + "1" + c + "'s\n";
    }
    EXPECT_EQ(hash_of(tokenizer->encode(text, false)), golden["planes"][index].get<std::string>())
        << fmt::format("code points from U+{:04X}", uint32_t(points[at]));
  }
  EXPECT_EQ(index, golden["planes"].size());
}

std::string family_name(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

INSTANTIATE_TEST_SUITE_P(Families, TokenizerGolden,
                         ::testing::Values("llama3", "qwen", "gpt2", "added", "llama2", "unsplit",
                                           "metaspace", "reader"),
                         family_name);
// The families whose split patterns ask for classes of characters.
INSTANTIATE_TEST_SUITE_P(Families, TokenizerPlanes, ::testing::Values("llama3", "qwen", "gpt2"),
                         family_name);

TEST(PreTokenizerGolden, EveryKindOfSplitCutsTheSameWords) {
  for (const json& split : load_json_file(kFolder + "splits.golden.json")) {
    const PreTokenizer step(split["spec"], "splits");
    for (const json& c : split["words"]) {
      const auto text = c[0].get<std::string>();
      Words words;
      words.list.push_back({text, true});
      step.apply(words);
      std::vector<std::string> got;
      for (const Word& w : words.list) got.emplace_back(w.text);
      auto expected = c[1].get<std::vector<std::string>>();
      std::erase(expected, "");  // Hugging Face reports the empty text as one empty word
      EXPECT_EQ(got, expected) << split["spec"] << " of '" << text << "'";
    }
  }
}

TEST(SentencePieceGolden, ATokenizerModelEncodesAsItsOwnLibraryAndDecodesAsItsConversion) {
  const auto model = std::make_shared<const Tokenizer>(read_tokenizer_model(
      read_file_bounded(kFolder + "pieces.model", 1 << 20), json::object(), "pieces.model"));
  EXPECT_EQ(model->bos_id(), 1);
  EXPECT_EQ(model->eos_id(), 2);
  EXPECT_TRUE(model->is_special(1));
  EXPECT_TRUE(model->is_special(0));
  const json golden = load_json_file(kFolder + "pieces.golden.json");
  for (const json& c : golden["cases"]) {
    const auto text = c[0].get<std::string>();
    Ids expected = c[1].get<Ids>();
    EXPECT_EQ(model->encode(text, false), expected) << text;
    expected.insert(expected.begin(), 1);
    EXPECT_EQ(model->encode(text, true), expected) << text;
    std::string spaced = text;  // SentencePiece cannot tell U+2581 from a space
    for (size_t at; (at = spaced.find("\xe2\x96\x81")) != spaced.npos;) spaced.replace(at, 3, " ");
    EXPECT_EQ(model->decode(expected, true), spaced);
    EXPECT_EQ(streamed(model, expected, true), model->decode(expected, true));
  }
  const json conversion = load_json_file(kFolder + "llama2.golden.json");
  for (const json& d : conversion["decoded"])
    EXPECT_EQ(model->decode(d[0].get<Ids>(), true), d[2].get<std::string>()) << d[0];
  EXPECT_EQ(model->encode("a<s>b", false, SpecialInText::Parse)[1], 1);
  for (const int32_t id : model->encode("a<s>b", false, SpecialInText::AsText)) EXPECT_NE(id, 1);
}

}  // namespace
}  // namespace certkv
