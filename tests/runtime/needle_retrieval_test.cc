// Dense retrieval of the constructed model: whatever is asked for comes back byte for byte, from
// either preset, at 2K and at 8K. All questions of a length are about one document, which is
// prefilled once; each question goes on from it alone.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/base/thread_pool.h"
#include "kernels/sample.h"
#include "runtime/demo_batch.h"
#include "runtime/model_config.h"
#include "runtime/needle_model.h"
#include "runtime/transformer.h"
#include "runtime/weights.h"
#include "tests/support/forked_kv_attention.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_ranks.h"

namespace certkv {
namespace {

using test::ForkedKvAttention;
using test::TempFolder;

constexpr int32_t kBeginning = 256;  // the other ids that occur are bytes

struct Fact {
  std::string lead, answer;  // in the text: lead + " " + answer + "."
};

struct Document {
  std::string text;
  std::vector<Fact> facts;
};

// Codenames among others that nobody asks for, as the demo batch plants them, and between their
// lines numbers of random keys and of keys that differ from a neighbour's in one character.
Document make_document(int64_t tokens) {
  std::vector<Fact> planted = {
      {"The value of key 3f9a2c is", "8412077"}, {"The value of key b07d15 is", "2960381"},
      {"The value of key 94ce6a is", "5073918"}, {"The value of key 1d83f2 is", "6648250"},
      {"The value of key e52b79 is", "1397564"}, {"The value of key 706fd4 is", "9025813"},
      {"The value of key c8a31b is", "3781649"}, {"The value of key 2be490 is", "7150426"},
      {"The code of door 41a7 is", "KX-4093"},   {"The code of door 41b7 is", "TW-7718"},
      {"The code of door 9c62 is", "BR-2564"},   {"The code of door 9c52 is", "MD-8301"},
      {"The code of door e380 is", "HS-6947"},   {"The code of door e38f is", "PZ-1125"},
      {"The code of door 7d15 is", "GL-5376"},   {"The code of door 6d15 is", "VN-9482"}};
  int64_t room = tokens;
  for (const Fact& f : planted) room -= int64_t(f.lead.size() + f.answer.size() + 4);
  const auto batch = make_demo_batch(read_demo_text(kDemoTextFolder), {"needle", {room}, 5, 1});
  Document document;
  const std::string& prompt = batch.front().prompt;
  document.text = prompt.substr(0, prompt.rfind("\n\n"));
  const size_t step = document.text.size() / (planted.size() + 1);
  for (size_t i = planted.size(); i > 0; --i) {
    const Fact& f = planted[i - 1];
    // At the end of a line, so that no other fact is cut in two.
    document.text.insert(document.text.find('\n', i * step),
                         "\n" + f.lead + " " + f.answer + ".\n");
  }
  for (const DemoQuestion& q : batch)
    planted.push_back({q.prompt.substr(q.prompt.rfind("\n\n") + 2), q.expected});
  document.facts = std::move(planted);
  return document;
}

// What greedy decoding says after document + "\n\n" + lead, up to the full stop, for all questions
// at once.
std::vector<std::string> answers(const std::filesystem::path& folder, const Document& document) {
  std::vector<std::string> said(document.facts.size());
  const ModelConfig config = load_model_config(folder);
  run_thread_ranks(1, [&](Communicator& group) {
    const Weights weights = load_weights(folder, config, 1, 0);
    ThreadPool pool(2);
    ForkedKvAttention cache(size_t(config.kv_heads), size_t(config.heads_per_group()),
                            size_t(config.head_dim), config.dtype);
    Transformer model(config, weights, group, cache, pool, {false, config.dtype});
    std::vector<int32_t> prompt = {kBeginning};
    for (const char c : document.text + "\n\n") prompt.push_back(uint8_t(c));
    model.prefill(0, prompt);

    std::vector<std::string> heard;  // of the question and the answer, what the model has been told
    for (const Fact& f : document.facts) heard.push_back(f.lead);
    constexpr size_t kMost = 100;  // the longest lead and answer have 70 bytes
    for (size_t at = 0; at < kMost; ++at) {
      std::vector<DecodeInput> rows;
      for (size_t i = 0; i < heard.size(); ++i) {
        if (at < heard[i].size())
          rows.push_back({int64_t(i), uint8_t(heard[i][at]), int64_t(prompt.size() + at)});
      }
      const DecodeOutput out = model.decode(rows);
      for (size_t r = 0; r < rows.size(); ++r) {
        const size_t i = size_t(rows[r].sequence);
        const bool asking = at + 1 < document.facts[i].lead.size();
        if (asking || said[i].ends_with('.')) continue;
        const std::span logits(out.logits);
        const int32_t next =
            sample_greedy(logits.subspan(r * size_t(config.vocab), size_t(config.vocab)));
        said[i] += char(next);
        if (next != '.') heard[i] += char(next);
      }
    }
  });
  return said;
}

class NeedleRetrieval : public testing::TestWithParam<std::tuple<std::string, int64_t>> {};

TEST_P(NeedleRetrieval, EveryFactComesBackByteForByte) {
  const auto [preset, tokens] = GetParam();
  const TempFolder folder;
  make_needle_model(needle_preset(preset), folder.path());
  const Document document = make_document(tokens);
  ASSERT_GE(document.facts.size(), 20u);
  EXPECT_NEAR(double(document.text.size()), double(tokens), 0.05 * double(tokens));
  const std::vector<std::string> said = answers(folder.path(), document);
  for (size_t i = 0; i < said.size(); ++i) {
    const Fact& f = document.facts[i];
    // Once in the text, or the question would have two answers.
    ASSERT_EQ(document.text.find(f.lead), document.text.rfind(f.lead)) << f.lead;
    EXPECT_EQ(said[i], " " + f.answer + ".") << f.lead;
  }
}

INSTANTIATE_TEST_SUITE_P(Presets, NeedleRetrieval,
                         testing::Combine(testing::Values<std::string>("default", "fragile"),
                                          testing::Values(2048, 8192)),
                         [](const auto& a) {
                           return std::get<0>(a.param) + "At" +
                                  std::to_string(std::get<1>(a.param) / 1024) + "K";
                         });

}  // namespace
}  // namespace certkv
