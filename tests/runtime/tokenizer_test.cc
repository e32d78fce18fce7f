// The tokenizer on files and texts that mean harm, and what it promises besides the goldens.
#include "runtime/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <time.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/normalizer.h"
#include "runtime/tokenizer/parts.h"
#include "runtime/tokenizer/split_pattern.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;
using Ids = std::vector<int32_t>;

const std::string kFolder = std::string(CERTKV_GOLDEN_DIR) + "/tokenizer/";

json spec_of(const std::string& name) {
  return load_json_file(kFolder + name + ".json");
}

std::shared_ptr<const Tokenizer> load(const json& spec, const json& config = json::object()) {
  return load_tokenizer_from_json_text(spec.dump(), config.dump());
}

std::string refusal(const std::function<void()>& call, ErrorKind kind = ErrorKind::BadFile) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "was accepted";
  return "";
}

// Loads a tokenizer after one change of its file.
std::string refusal_of(const std::string& name, const std::function<void(json&)>& change) {
  json spec = spec_of(name);
  change(spec);
  return refusal([&] { load(spec); });
}

const json kReaderConfig = {{"bos_token", "<|begin_of_text|>"}, {"eos_token", "<|end_of_text|>"}};

TEST(Tokenizer, AVocabularyOfBytesGivesEveryByteItsOwnId) {
  const auto t = load(spec_of("reader"), kReaderConfig);
  EXPECT_EQ(t->vocab_size(), 258u);
  EXPECT_EQ(t->bos_id(), 256);
  EXPECT_EQ(t->eos_id(), 257);
  EXPECT_TRUE(t->is_special(256));
  EXPECT_FALSE(t->is_special(255));
  EXPECT_FALSE(t->is_special(-1));
  const std::string text = "a \xc3\xa9\n\xf0\x9f\x98\x80";
  Ids expected{256};
  for (const char c : text) expected.push_back(static_cast<uint8_t>(c));
  EXPECT_EQ(t->encode(text, true), expected);
  EXPECT_EQ(t->decode(expected, true), text);
  EXPECT_EQ(t->decode(expected, false), "<|begin_of_text|>" + text);
}

TEST(Tokenizer, UserTextCannotNameSpecialTokens) {
  const auto t = load(spec_of("llama3"));
  const int32_t end = t->token_id("<|eot_id|>").value();
  EXPECT_THAT(t->encode("a<|eot_id|>b", false), ::testing::Contains(end));
  const Ids ids = t->encode("a<|eot_id|>b<|begin_of_text|>", false, SpecialInText::AsText);
  for (const int32_t id : ids) EXPECT_FALSE(t->is_special(id));
  EXPECT_EQ(t->decode(ids, true), "a<|eot_id|>b<|begin_of_text|>");
}

TEST(Tokenizer, IdsWithoutATokenDecodeToNothing) {
  const auto t = load(spec_of("reader"));
  EXPECT_EQ(t->decode(Ids{'a', -1, 258, INT32_MAX, INT32_MIN, 'b'}, false), "ab");
  EXPECT_EQ(t->token_name(-1), "");
  EXPECT_EQ(t->token_name(300), "");
}

TEST(Tokenizer, StreamingNeverEmitsHalfACharacter) {
  StreamingDecoder d(load(spec_of("reader")), true);
  EXPECT_EQ(d.push(0xf0), "");
  EXPECT_EQ(d.push(0x9f), "");
  EXPECT_EQ(d.push(0x98), "");
  EXPECT_EQ(d.push(0x80), "\xf0\x9f\x98\x80");
  EXPECT_EQ(d.push(0xe2), "");
  EXPECT_EQ(d.push('x'), "\xef\xbf\xbdx");
  EXPECT_EQ(d.push(0xc3), "");
  EXPECT_EQ(d.finish(), "\xef\xbf\xbd");
  EXPECT_EQ(d.push('y'), "y");
}

// Processor time of this thread, so that a busy machine does not count.
double processor_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Time must not grow with the square of a word: all of these are single words or single matches.
// A quadratic method takes 2.5 * 10^11 steps, at least 50 s; ours takes well under one.
TEST(Tokenizer, HalfAMegabyteOfOneWordIsNotQuadratic) {
  constexpr size_t n = kDeadlineFactor == 1 ? 500'000 : 100'000;  // sanitizers: a shorter word
  constexpr double kMostSeconds = 5.0 * kDeadlineFactor;
  std::string marks = "a";
  while (marks.size() < n) marks += "\xcc\x81\xcc\x96";
  const std::vector<std::string> texts{std::string(n, 'a'),    std::string(n, ' '),
                                       std::string(n, '\n'),   std::string(n, '!'),
                                       std::string(n, '\xff'), marks};
  for (const char* name : {"llama3", "qwen", "llama2"}) {
    const auto t = load(spec_of(name));
    for (const std::string& text : texts) {
      const double start = processor_seconds();
      EXPECT_FALSE(t->encode(text, false).empty());
      EXPECT_LT(processor_seconds() - start, kMostSeconds) << name << " " << int(text[0]);
    }
  }
}

TEST(Tokenizer, ManyThreadsMayEncodeAtOnce) {
  const auto t = load(spec_of("qwen"));
  const std::string text = "The quick brown fox, e\xcc\x81 12345 don't\n\n <|im_end|>";
  const Ids expected = t->encode(text, true);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 200; ++k) wrong += t->encode(text, true) != expected;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(TokenizerFolder, JsonIsPreferredAndNothingOutsideTheFolderIsRead) {
  std::string path = (fs::temp_directory_path() / "certkv_tok_XXXXXX").string();
  ASSERT_NE(::mkdtemp(path.data()), nullptr);
  const fs::path root = path, model = root / "model";
  fs::create_directory(model);
  EXPECT_THAT(refusal([&] { load_tokenizer(model.string()); }),
              HasSubstr("neither tokenizer.json"));
  fs::copy_file(kFolder + "pieces.model", model / "tokenizer.model");
  EXPECT_EQ(load_tokenizer(model.string())->vocab_size(), 700u);
  std::ofstream(model / "tokenizer_config.json")
      << R"({"add_bos_token": false, "add_eos_token": true,
    "added_tokens_decoder": {"700": {"content": "<|extra|>", "special": true}}})";
  const auto pieces = load_tokenizer(model.string());
  EXPECT_EQ(pieces->encode("x <|extra|>", true).back(), 2);
  EXPECT_NE(pieces->encode("x", true).front(), 1);
  EXPECT_THAT(pieces->encode("x <|extra|>", false), ::testing::Contains(700));

  fs::create_symlink(kFolder + "reader.json", model / "tokenizer.json");
  EXPECT_THAT(refusal([&] { load_tokenizer(model.string()); }),
              HasSubstr("outside the model folder"));
  fs::remove(model / "tokenizer.json");
  fs::copy_file(kFolder + "reader.json", model / "tokenizer.json");
  std::ofstream(model / "tokenizer_config.json") << kReaderConfig.dump();
  std::ofstream(model / "chat_template.jinja") << "{{ messages }}";
  EXPECT_EQ(load_tokenizer(model.string())->bos_id(), 256);
  EXPECT_EQ(load_tokenizer(model.string())->chat_template_text(), "{{ messages }}");
  std::ofstream(model / "tokenizer_config.json") << R"({"eos_token": "<nowhere>"})";
  EXPECT_THAT(refusal([&] { load_tokenizer(model.string()); }), HasSubstr("'<nowhere>' is not in"));
  std::ofstream(model / "tokenizer_config.json") << "[]";
  EXPECT_THAT(refusal([&] { load_tokenizer(model.string()); }), HasSubstr("must be an object"));
  fs::remove_all(root);
}

TEST(HostileTokenizer, IdsMustBeSmallDistinctIntegers) {
  const auto with_id = [](const json& id) {
    return refusal_of("llama2", [&](json& s) { s["model"]["vocab"]["zzz"] = id; });
  };
  EXPECT_THAT(with_id(-1), HasSubstr("'zzz' has id -1"));
  EXPECT_THAT(with_id(1 << 20), HasSubstr("ids must lie in"));
  EXPECT_THAT(with_id(int64_t(1) << 40), HasSubstr("ids must lie in"));
  EXPECT_THAT(with_id(UINT64_MAX), HasSubstr("ids must lie in"));
  EXPECT_THAT(with_id(1.0), HasSubstr("must be an integer"));
  EXPECT_THAT(with_id("7"), HasSubstr("must be an integer"));
  EXPECT_THAT(with_id(nullptr), HasSubstr("must be an integer"));
  EXPECT_THAT(with_id(5), HasSubstr("two tokens"));
  EXPECT_THAT(refusal_of("llama2", [](json& s) { s["model"]["vocab"] = json::object(); }),
              HasSubstr("not empty"));
  EXPECT_THAT(refusal_of("llama2", [](json& s) { s["model"]["vocab"] = json::array(); }),
              HasSubstr("must be an object"));
  EXPECT_THAT(
      refusal_of("llama2", [](json& s) { s["model"]["vocab"][std::string(9000, 'q')] = 90000; }),
      HasSubstr("9000 bytes"));
}

TEST(HostileTokenizer, MergesMustJoinKnownTokensToAKnownToken) {
  const auto with_merge = [](const json& merge) {
    return refusal_of("llama3", [&](json& s) { s["model"]["merges"].push_back(merge); });
  };
  EXPECT_THAT(with_merge(json::array({"the", std::string(5000, 'x')})),
              HasSubstr("not in the voc"));
  EXPECT_THAT(with_merge(json::array({"zz", "q"})), HasSubstr("not in the vocabulary"));
  EXPECT_THAT(with_merge("z q"), HasSubstr("makes 'zq' (2 bytes), which is not in the vocabulary"));
  EXPECT_THAT(with_merge("a b c"), HasSubstr("one space"));
  EXPECT_THAT(with_merge("ab"), HasSubstr("one space"));
  EXPECT_THAT(with_merge(""), HasSubstr("one space"));
  EXPECT_THAT(with_merge(3), HasSubstr("pair of strings"));
  EXPECT_THAT(with_merge(json::array({"a"})), HasSubstr("pair of strings"));
  EXPECT_THAT(refusal_of("llama3",
                         [](json& s) { s["model"]["merges"].push_back(s["model"]["merges"][0]); }),
              HasSubstr("twice"));
  EXPECT_THAT(refusal_of("llama3", [](json& s) { s["model"]["merges"] = 1; }), HasSubstr("a list"));
}

TEST(HostileTokenizer, ByteTokensMustBeExactlyThe256) {
  for (const char* token :
       {"<0x-1>", "<0x+1>", "<0x>", "<0x1>", "<0x100>", "<0xab>", "<0xGG>", "<0x 1>"}) {
    EXPECT_THAT(refusal_of("llama2", [&](json& s) { s["model"]["vocab"][token] = 90000; }),
                HasSubstr("no byte token"))
        << token;
  }
  EXPECT_THAT(refusal_of("llama2",
                         [](json& s) {
                           json& vocab = s["model"]["vocab"];
                           vocab["other"] = vocab["<0x7F>"];
                           vocab.erase("<0x7F>");
                         }),
              HasSubstr("<0x7F> is missing"));
  EXPECT_THAT(refusal_of("reader", [](json& s) { s["model"]["vocab"].erase("A"); }),
              HasSubstr("0x41 is missing"));
}

TEST(HostileTokenizer, AddedTokensMustAgreeWithTheVocabulary) {
  const auto with_token = [](const json& token) {
    return refusal_of("reader", [&](json& s) { s["added_tokens"].push_back(token); });
  };
  EXPECT_THAT(with_token({{"id", 65}, {"content", "x<"}}), HasSubstr("two tokens"));
  EXPECT_THAT(with_token({{"id", 400}, {"content", "A"}}), HasSubstr("two ids"));
  EXPECT_THAT(with_token({{"id", 300}, {"content", ""}}), HasSubstr("0 bytes"));
  EXPECT_THAT(with_token({{"id", 300}, {"content", std::string(600, 'x')}}),
              HasSubstr("600 bytes"));
  EXPECT_THAT(with_token({{"id", -3}, {"content", "xy"}}), HasSubstr("'id' is -3"));
  EXPECT_THAT(with_token({{"id", 1e300}, {"content", "xy"}}), HasSubstr("integer"));
  EXPECT_THAT(with_token({{"id", 2000000000}, {"content", "xy"}}), HasSubstr("must lie in"));
  EXPECT_THAT(with_token({{"id", 300}, {"content", "xy"}, {"special", 1}}),
              HasSubstr("true or false"));
  EXPECT_THAT(with_token(5), HasSubstr("object"));
  refusal([] {
    load(spec_of("reader"), {{"added_tokens_decoder", {{"-1", {{"content", "xy"}}}}}});
  });
  refusal([] {
    load(spec_of("reader"), {{"added_tokens_decoder", {{"1x", {{"content", "xy"}}}}}});
  });
  refusal([] {
    load(spec_of("reader"), {{"added_tokens_decoder", {{"65", {{"content", "xy"}}}}}});
  });
}

TEST(HostileTokenizer, WhatIsNotSupportedIsNamedWithWhatIs) {
  const auto with = [](const char* key, const json& value) {
    return refusal_of("llama3", [&](json& s) { s[key] = value; });
  };
  EXPECT_THAT(with("normalizer", {{"type", "Precompiled"}}),
              ::testing::AllOf(HasSubstr("'Precompiled'"), HasSubstr("supported: Sequence, NFC")));
  EXPECT_THAT(with("pre_tokenizer", {{"type", "Whitespace"}}),
              ::testing::AllOf(HasSubstr("'Whitespace'"), HasSubstr("supported: Sequence, Split")));
  EXPECT_THAT(with("post_processor", {{"type", "BertProcessing"}}),
              ::testing::AllOf(HasSubstr("'BertProcessing'"), HasSubstr("TemplateProcessing")));
  EXPECT_THAT(with("decoder", {{"type", "WordPiece"}}),
              ::testing::AllOf(HasSubstr("'WordPiece'"), HasSubstr("ByteLevel")));
  EXPECT_THAT(with("decoder", nullptr), HasSubstr("decoder is missing"));
  EXPECT_THAT(with("model", {{"type", "Unigram"}}),
              ::testing::AllOf(HasSubstr("'Unigram'"), HasSubstr("supported: BPE")));
  EXPECT_THAT(with("model", {{"vocab", json::object()}}), HasSubstr("'type' is missing"));
  EXPECT_THAT(refusal_of("llama3", [](json& s) { s["model"]["end_of_word_suffix"] = "</w>"; }),
              HasSubstr("end_of_word_suffix"));
  EXPECT_THAT(refusal_of("llama3", [](json& s) { s["model"]["dropout"] = 0.5; }),
              HasSubstr("dropout"));
  EXPECT_THAT(refusal_of("llama3", [](json& s) { s["model"]["unk_token"] = "<none>"; }),
              HasSubstr("unk_token"));
  EXPECT_THAT(refusal_of("llama2", [](json& s) { s["decoder"]["decoders"][3]["stop"] = 1; }),
              HasSubstr("stop"));
  EXPECT_THAT(refusal_of("llama2",
                         [](json& s) {
                           std::swap(s["decoder"]["decoders"][0], s["decoder"]["decoders"][1]);
                         }),
              HasSubstr("too late"));
  refusal([] { load_tokenizer_from_json_text("[]"); });
  refusal([] { load_tokenizer_from_json_text("{}"); });
}

TEST(HostileTokenizer, ATemplateMayOnlyUseTokensThatExist) {
  const auto with_ids = [](const json& ids) {
    return refusal_of("reader", [&](json& s) {
      s["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"] = ids;
    });
  };
  EXPECT_THAT(with_ids(json::array({258})), HasSubstr("no token"));
  EXPECT_THAT(with_ids(json::array({-1})), HasSubstr("no token"));
  EXPECT_THAT(with_ids(json::array({1e9})), HasSubstr("no token"));
  EXPECT_THAT(with_ids(5), HasSubstr("must be a list"));
  EXPECT_THAT(refusal_of("reader", [](json& s) { s["post_processor"]["single"].erase(1); }),
              HasSubstr("does not hold sequence A"));
  EXPECT_THAT(
      refusal_of("reader", [](json& s) { s["post_processor"]["special_tokens"] = json::object(); }),
      HasSubstr("is missing"));
}

TEST(HostileTokenizer, EveryTruncationOfAFileIsRefused) {
  const std::string text = spec_of("metaspace").dump();
  for (size_t n = 0; n < text.size(); n += 97)
    refusal([&] { load_tokenizer_from_json_text(std::string_view(text).substr(0, n)); });
}

// Whatever single byte is changed, loading succeeds or throws our error, and then encoding does.
TEST(HostileTokenizer, ChangedBytesNeverDoMoreThanThrow) {
  const std::string good = spec_of("metaspace").dump();
  uint64_t seed = 1;
  int loaded = 0, refused = 0;
  for (int round = 0; round < 400; ++round) {
    std::string text = good;
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    text[(seed >> 33) % text.size()] = "\"{}[],:01-ex\\ \xc3\x7f"[(seed >> 20) % 16];
    try {
      const auto t = load_tokenizer_from_json_text(text);
      t->decode(t->encode("the \xe2\x96\x81 q\xc3\xa9", true), true);
      ++loaded;
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(loaded, 0);
  EXPECT_GT(refused, 10);
}

TEST(HostileTokenizer, ABrokenModelFileIsRefused) {
  const std::string good = read_file_bounded(kFolder + "pieces.model", 1 << 20);
  const auto read = [](const std::string& model) {
    return read_tokenizer_model(model, json::object(), "x.model");
  };
  EXPECT_NO_THROW(read(good));
  // Field 3 (normaliser) holding field 2 (character map) of four bytes.
  EXPECT_THAT(refusal([&] {
                read(good + std::string("\x1a\x06\x12\x04"
                                        "abcd",
                                        8));
              }),
              HasSubstr("compiled character map"));
  refusal([&] { read(""); });
  refusal([&] { read("not a model"); });
  refusal([&] { read(std::string(10, '\xff')); });
  for (size_t n = 1; n < good.size(); n += 211) {
    try {  // a cut between two pieces is a smaller model
      read(good.substr(0, n));
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::BadFile);
    }
  }
}

TEST(SplitPattern, AnExplodingPatternIsStoppedByName) {
  std::vector<TextSpan> out;
  const SplitPattern evil("(a+)+(b+)+(a+)+$x|(x+x+)+y", "evil.json");
  std::string text(3000, 'x');
  EXPECT_THAT(refusal([&] { evil.find_all(text, out); }), HasSubstr("evil.json"));
}

TEST(SplitPattern, SyntaxThatTheTwoEnginesReadDifferentlyIsRefused) {
  for (const char* p : {"\\h", "[a[b]]", "[a&&b]", "(*ACCEPT)", "[\\S]", "a\\", "(",
                        "\\p{Nonsense}", "[]", "a{2}+", "\\K", "(?<=a\\C)"}) {
    EXPECT_THAT(refusal([&] { SplitPattern(p, "p.json"); }), HasSubstr("p.json")) << p;
  }
  refusal([] { SplitPattern(std::string(20000, 'a'), "p.json"); });
  refusal([] { SplitPattern(std::string(1000, '(') + std::string(1000, ')'), "p.json"); });
}

TEST(Normalizer, AReplacementCannotBlowTextUp) {
  const Normalizer n(
      {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", std::string(256, 'b')}},
      "n");
  refusal([&] { n.apply(std::string(1'000'000, 'a')); }, ErrorKind::InvalidArgument);
  refusal([] { Normalizer({{"type", "Prepend"}, {"prepend", std::string(300, 'b')}}, "n"); });
  refusal([] {
    Normalizer({{"type", "Replace"}, {"pattern", {{"String", ""}}}, {"content", ""}}, "n");
  });
}

}  // namespace
}  // namespace certkv
