// Drawing tokens on a device: of every row the token that the host's sampler takes from the same
// logits and the same number. In emulation here, on a GPU in tests/gpu.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <set>

#include "kernels/sample.h"
#include "tests/support/device_ops.h"

namespace certkv {
namespace {

using cuda::DeviceArray;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Row {
  std::vector<float> logits;
  SampleOptions options;
  double uniform = 0;
};

class SamplingOnDevice : public OnTestDevice {
 protected:
  // The device's tokens, for a vocabulary that lies in so many pieces.
  std::vector<int32_t> draw(const std::vector<Row>& rows, size_t pieces) {
    const size_t n = rows[0].logits.size(), count = rows.size();
    const auto ops = make_test_model_ops(*device_);
    std::vector<uint32_t> begins(pieces + 1);
    size_t stride = 3;  // what is beyond a piece's tokens must not matter
    for (size_t p = 0; p <= pieces; ++p) begins[p] = uint32_t(n * p / pieces);
    for (size_t p = 0; p < pieces; ++p)
      stride = std::max<size_t>(stride, begins[p + 1] - begins[p]);
    std::vector<float> x(pieces * count * stride, kNan);
    std::vector<SampleDraw> draws;
    for (size_t r = 0; r < count; ++r) {
      draws.push_back(draw_of(rows[r].options, rows[r].uniform));
      for (size_t p = 0; p < pieces; ++p)
        std::copy(rows[r].logits.begin() + begins[p], rows[r].logits.begin() + begins[p + 1],
                  x.begin() + ptrdiff_t((p * count + r) * stride));
    }
    const auto logits = put(x);
    const auto all_draws = put(draws);
    const auto all_begins = put(begins);
    const DeviceArray<uint64_t> best(*device_, pieces * count, "a test's array");
    for (size_t p = 0; p < pieces; ++p)
      ops->argmax({.x = logits.data() + p * count * stride,
                   .stride = stride,
                   .best = best.data() + p * count,
                   .rows = count,
                   .n = begins[p + 1] - begins[p]});
    const DeviceArray<cuda::SampleScratch> scratch(*device_, count, "a test's array");
    device_->fill(scratch.data(), 0xee, scratch.bytes());
    const DeviceArray<int32_t> tokens(*device_, count, "a test's array");
    ops->sample({.x = logits.data(),
                 .stride = stride,
                 .begins = all_begins.data(),
                 .best = best.data(),
                 .draws = all_draws.data(),
                 .scratch = scratch.data(),
                 .tokens = tokens.data(),
                 .pieces = pieces,
                 .rows = count,
                 .n = n});
    return get(tokens);
  }
};

// Logits of one of several kinds, among them such that many are equal or have no mass.
std::vector<float> some_logits(size_t n, int kind, std::mt19937_64& engine) {
  std::normal_distribution<float> normal(0, 3);
  std::uniform_real_distribution<float> uniform(0, 1);
  std::vector<float> x(n);
  for (float& v : x) switch (kind) {
      case 0:
        v = normal(engine);
        break;
      case 1:
        v = std::round(normal(engine));
        break;  // few values
      case 2:
        v = -3 * std::log(uniform(engine) + 1e-30f);
        break;  // a few dominate
      case 3:
        v = uniform(engine) < 0.9f ? -kInf : normal(engine);
        break;
      case 4:
        v = 7.25f;
        break;
      case 5:
        v = uniform(engine) < 0.5f ? 0.0f : -0.0f;
        break;
      case 6:
        v = (2 * uniform(engine) - 1) * 3.3e38f;
        break;
      default:
        v = std::nextafter(1.0f, uniform(engine) < 0.5f ? 0.0f : 2.0f);  // last bits differ
    }
  if (kind == 3) x[engine() % n] = 1.0f;  // one at least
  return x;
}
constexpr int kKinds = 8;

std::vector<Row> some_rows(size_t n, size_t count, std::mt19937_64& engine) {
  const double temperatures[] = {1, 5e-324, 0.01, 0.3, 1, 2.5, 1e4, 1e300};
  const double shares[] = {1, 0.9, 0.5, 0.999999, 1e-9, 1e-300, 0.95, std::nextafter(1.0, 0.0)};
  const int64_t most[] = {0, 2, 50, int64_t(n) - 1, int64_t(n), int64_t(n) + 5, 0, 1000};
  const double numbers[] = {0, std::nextafter(1.0, 0.0)};
  std::vector<Row> rows;
  for (size_t r = 0; r < count; ++r) {
    Row row{some_logits(n, int(engine() % kKinds), engine),
            {temperatures[engine() % 8], std::max<int64_t>(most[engine() % 8], 0),
             shares[engine() % 8]},
            uniform_at(1, engine(), r)};
    if (engine() % 8 == 0) row.uniform = numbers[engine() % 2];
    rows.push_back(std::move(row));
  }
  return rows;
}

TEST_F(SamplingOnDevice, IsTheHostsForEveryKindOfRowAndNumberOfPieces) {
  std::mt19937_64 engine(7);
  std::set<int32_t> different;
  size_t drawn = 0;
  for (const auto& [n, count, repeats] :
       {std::tuple{1, 4, 1}, std::tuple{5, 40, 4}, std::tuple{300, 40, 4}, std::tuple{4096, 20, 2},
        std::tuple{4097, 20, 2}, std::tuple{20000, 20, 3}})
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const std::vector<Row> rows = some_rows(size_t(n), size_t(count), engine);
      for (size_t pieces : {1u, 2u, 3u, 5u}) {
        if (pieces > size_t(n)) continue;
        const std::vector<int32_t> tokens = draw(rows, pieces);
        for (size_t r = 0; r < rows.size(); ++r) {
          const Row& row = rows[r];
          const SampleOptions& o = row.options;
          // Where the likeliest token is taken anyway, nothing is drawn.
          const bool greedy = draw_of(o, 0).temperature == 0;
          const int32_t want = greedy ? -1 : sample_token(row.logits, o, row.uniform);
          ASSERT_EQ(tokens[r], want)
              << "row " << r << " of " << n << " tokens in " << pieces << " pieces: temperature "
              << o.temperature << ", top_k " << o.top_k << ", top_p " << o.top_p << ", uniform "
              << row.uniform;
          drawn += greedy ? 0 : 1;
          different.insert(want);
        }
      }
    }
  EXPECT_GT(drawn, 1500u);
  EXPECT_GT(different.size(), 150u) << "no choice to speak of";
}

TEST_F(SamplingOnDevice, IsTheHostsForAWholeVocabulary) {
  std::mt19937_64 engine(8);
  std::vector<Row> rows = some_rows(128256, 2, engine);
  rows[0] = {some_logits(128256, 0, engine), {0.8, 0, 0.95}, 0.3};
  rows[1] = {some_logits(128256, 1, engine), {1.3, 4000, 0.9}, 0.8};
  for (size_t pieces : {1u, 8u}) {
    const std::vector<int32_t> tokens = draw(rows, pieces);
    for (size_t r = 0; r < rows.size(); ++r)
      EXPECT_EQ(tokens[r], sample_token(rows[r].logits, rows[r].options, rows[r].uniform))
          << "row " << r << " in " << pieces << " pieces";
  }
}

TEST_F(SamplingOnDevice, EveryTokenThatIsKeptIsDrawnInItsTurn) {
  std::vector<Row> rows;
  const std::vector<float> logits{1, 2, 0, 2, 2, -kInf, 1};  // of the 2s, top_k 2 keeps the first
  for (int i = 0; i < 200; ++i) rows.push_back({logits, {1, 2, 1}, (i + 0.5) / 200});
  const std::vector<int32_t> tokens = draw(rows, 2);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(tokens[size_t(i)], i < 100 ? 1 : 3) << i;
}

// The argmax says what is wrong with such a row.
TEST_F(SamplingOnDevice, OfARowThatIsNotOfNumbersNothingIsDrawnAndTheOthersAre) {
  std::mt19937_64 engine(9);
  std::vector<Row> rows;
  for (int r = 0; r < 6; ++r) rows.push_back({some_logits(5000, 0, engine), {1, 50, 0.9}, 0.5});
  rows[0].logits[4999] = kNan;
  rows[2].logits[0] = kInf;
  rows[3].logits.assign(5000, -kInf);
  rows[4].options.temperature = 0;
  rows[5].options = {1, 0, 1};
  rows[5].logits[17] = -kNan;
  for (size_t pieces : {1u, 3u}) {
    const std::vector<int32_t> tokens = draw(rows, pieces);
    EXPECT_EQ(tokens, (std::vector<int32_t>{-1, sample_token(rows[1].logits, {1, 50, 0.9}, 0.5), -1,
                                            -1, -1, -1}));
  }
}

TEST_F(SamplingOnDevice, MoreTokensThanItCanTakeAreRefused) {
  const auto ops = make_test_model_ops(*device_);
  const std::string why =
      thrown_by([&] { ops->sample({.stride = 5000000, .pieces = 1, .rows = 1, .n = 5000000}); });
  EXPECT_NE(why.find("4194304 tokens are possible"), std::string::npos) << why;
}

}  // namespace
}  // namespace certkv
