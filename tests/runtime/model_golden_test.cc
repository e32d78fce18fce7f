// Tiny random models of every architecture against Hugging Face transformers
// (tests/golden/make_model_goldens.py).
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/model_runner.h"

namespace certkv::test {
namespace {

namespace fs = std::filesystem;

// `spread` of a golden is how far float32 rounding moved its logits in four trials. Our pass is one
// more trial against the same float32 reference; twice the largest of four leaves a false alarm to
// errors that no rounding explains.
constexpr double kSpreads = 2;

class ModelGolden : public testing::TestWithParam<const char*> {};

TEST_P(ModelGolden, LogitsAndGreedyIdsAreThoseOfTransformers) {
  const fs::path folder = fs::path(CERTKV_GOLDEN_DIR) / "models" / GetParam();
  std::ifstream file(folder / "golden.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  const auto prompt = golden.at("prompt_ids").get<std::vector<int32_t>>();
  const auto ids = golden.at("greedy_ids").get<std::vector<int32_t>>();
  const auto margins = golden.at("margins").get<std::vector<double>>();
  const auto logits = golden.at("logits").get<std::vector<double>>();
  const auto final_logits = golden.at("final_logits").get<std::vector<double>>();
  const double tolerance = kSpreads * golden.at("spread").get<double>();

  const int64_t kv_heads = load_model_config(folder).kv_heads;
  for (int tensor : {1, 2}) {
    if (kv_heads % tensor != 0) continue;
    const GreedyRun run = run_model(folder, tensor, 1, tensor == 2, prompt, ids);
    ASSERT_EQ(run.first_logits.size(), logits.size());
    double worst = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
      worst = std::max(worst, std::abs(double(run.first_logits[i]) - logits[i]));
      worst = std::max(worst, std::abs(double(run.final_logits[i]) - final_logits[i]));
    }
    EXPECT_LE(worst, tolerance) << tensor << " ranks";
    RecordProperty("worst_over_tolerance", std::to_string(worst / tolerance));
    int compared = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!(margins[i] > 2 * tolerance)) continue;  // each of the two logits may move
      EXPECT_EQ(run.ids[i], ids[i]) << "step " << i << ", " << tensor << " ranks";
      ++compared;
    }
    EXPECT_GE(compared, int(ids.size()) * 3 / 4) << "the goldens' margins are too small to compare";
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, ModelGolden,
                         testing::Values("llama2", "llama3", "llama-linear", "llama-yarn",
                                         "mistral", "qwen2", "qwen2-yarn", "qwen3"),
                         [](const auto& golden) {
                           std::string name = golden.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace certkv::test
