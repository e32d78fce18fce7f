// The demo model against the greedy continuations of its reference implementation (Hugging Face
// transformers in FP32, keys and values not rounded).
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/model_runner.h"

namespace certkv::test {
namespace {

namespace fs = std::filesystem;

// The reference keeps keys and values in float; ours are bfloat16, each off by up to 2^-9 of
// itself. Scores of this model stay below 32, so that a weight of a head's softmax moves by up to
// expm1(2 * 32 * 2^-9) = 13 % if all errors align and by about 1 % as they do; logits, of the order
// of 10, by the same share.
constexpr double kLogitTolerance = 0.1;

void compare(size_t which) {
  std::ifstream file(fs::path(CERTKV_GOLDEN_DIR) / "reader" / "golden.json");
  const nlohmann::json golden = nlohmann::json::parse(file).at(which);
  const auto prompt = golden.at("prompt_ids").get<std::vector<int32_t>>();
  const auto ids = golden.at("greedy_ids").get<std::vector<int32_t>>();
  const GreedyRun run = run_model(CERTKV_READER_DIR, 1, 1, false, prompt, ids);
  EXPECT_EQ(run.ids, ids);
  for (const auto& [id, value] : golden.at("last_logits_top5").items()) {
    const size_t token = value.is_array() ? value[0].get<size_t>() : std::stoul(id);
    const double logit = value.is_array() ? value[1].get<double>() : value.get<double>();
    EXPECT_NEAR(run.first_logits.at(token), logit, kLogitTolerance) << "token " << token;
  }
}

#if defined(CERTKV_LONG_PROMPTS)
TEST(Reader, ContinuesAPromptOf1808TokensAsTheReferenceDoes) {
  compare(1);
}
TEST(Reader, ContinuesAPromptOf7407TokensAsTheReferenceDoes) {
  compare(2);
}
#else
TEST(Reader, ContinuesAPromptOf961TokensAsTheReferenceDoes) {
  compare(0);
}
#endif

}  // namespace
}  // namespace certkv::test
