#include "runtime/needle_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/model_config.h"
#include "runtime/needle/weights.h"
#include "runtime/safetensors.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using namespace needle;
using test::TempFolder;
using testing::HasSubstr;
using Rows = std::vector<std::vector<double>>;

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return std::string(error_kind_name(e.kind())) + ": " + e.what();
  }
  return "no error";
}

double dot(const Grid& g, int a, int b) {
  double sum = 0;
  for (int c = 0; c < g.cols; ++c) sum += g.at(a, c) * g.at(b, c);
  return sum;
}

TEST(NeedleCodes, WordsOfBytesAreAtMostEightAlike) {
  for (const uint64_t seed : {1, 2, 3}) {
    Random random(seed, 0);
    const Grid words = kerdock_words(random);
    ASSERT_EQ(words.rows, 320);
    for (int a = 0; a < words.rows; ++a) {
      for (int c = 0; c < 64; ++c) ASSERT_EQ(std::abs(words.at(a, c)), 1.0);
      for (int b = 0; b < a; ++b) {
        const double alike = std::abs(dot(words, a, b));
        ASSERT_TRUE(alike == 0 || alike == 8) << a << " " << b << " " << alike;
      }
    }
  }
}

TEST(NeedleCodes, SlotsOfBytesAreTheRootsOfE8) {
  Random random(5, 0);
  const Grid roots = e8_roots(random);
  ASSERT_EQ(roots.rows, 240);
  constexpr double kRounding = 1e-14;  // 8 products of a rotation orthonormal to a few 2^-53
  for (int a = 0; a < 240; ++a) {
    // The root system's own counts: every root has 1 opposite, 56 at -1/2, 126 at 0, 56 at 1/2.
    std::map<int, int> count;
    for (int b = 0; b < 240; ++b) {
      const double twice = 2 * dot(roots, a, b);
      ASSERT_NEAR(twice, std::round(twice), kRounding);
      ++count[int(std::round(twice))];
    }
    EXPECT_EQ(count, (std::map<int, int>{{-2, 1}, {-1, 56}, {0, 126}, {1, 56}, {2, 1}}));
  }
  const Codes codes = make_codes(1);
  for (int a = 0; a <= kBos; ++a) {
    for (int b = 0; b < a; ++b) {
      if (b < 0x80 || b == 0xc3 || b == 0xe2) {  // ASCII and common leading bytes
        if (a == 0xc0 || a == 0xc1 || (a > 0xf0 && a < 0x100)) continue;
        EXPECT_LE(dot(codes.slot, a, b), 0.5 + kRounding) << a << " " << b;
      }
    }
  }
}

TEST(NeedleCodes, FramesAreOrthonormal) {
  Random random(9, 0);
  for (const auto& [n, k] : {std::pair{8, 8}, {128, 64}, {128, 128}}) {
    const Grid g = orthonormal(random, n, k);
    for (int a = 0; a < k; ++a) {
      for (int b = 0; b <= a; ++b) {
        double sum = 0;
        for (int r = 0; r < n; ++r) sum += g.at(r, a) * g.at(r, b);
        ASSERT_NEAR(sum, a == b ? 1.0 : 0.0, 1e-13);
      }
    }
  }
}

TEST(NeedleCodes, RandomNumbersAreTheSameEverywhereAndNormal) {
  Random a(1, 2), b(1, 2), c(1, 3);
  // Written out from the definition: mix(mix(seed) + stream * step), stepped once and mixed.
  const auto mix = [](uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  };
  const uint64_t step = 0x9e3779b97f4a7c15u;
  EXPECT_EQ(mix(1234567 + step), 6457827717110365317u);  // the published sequence of seed 1234567
  EXPECT_EQ(a.bits(), mix(mix(mix(1) + 2 * step) + step));
  b.bits();
  EXPECT_NE(a.bits(), c.bits());
  constexpr int kDraws = 200000;
  double sum = 0, squares = 0, fourth = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = a.normal();
    sum += x, squares += x * x, fourth += x * x * x * x;
  }
  // Five standard deviations of the estimates: 1, sqrt(2) and sqrt(96) over sqrt(kDraws).
  EXPECT_NEAR(sum / kDraws, 0, 5 / std::sqrt(kDraws));
  EXPECT_NEAR(squares / kDraws, 1, 5 * std::sqrt(2.0 / kDraws));
  EXPECT_NEAR(fourth / kDraws, 3, 5 * std::sqrt(96.0 / kDraws));
  std::map<uint64_t, int> seen;
  for (int i = 0; i < 7000; ++i) ++seen[a.below(7)];
  ASSERT_EQ(seen.size(), 7u);
  for (const auto& [value, count] : seen)
    EXPECT_NEAR(count, 1000, 5 * std::sqrt(1000 * 6 / 7.0)) << value;
}

TEST(NeedleWeights, NoOtherOffsetComesCloserThanEighteenNatsOverTheWholeContext) {
  double least = 1e9, leak = 0;
  for (int distance = 1; distance < kMaxPositions; ++distance) {
    least = std::min(least, offset_gap(distance));
    leak += 2 * std::exp(-offset_gap(distance));
  }
  EXPECT_NEAR(least, 18.7, 0.05);
  EXPECT_EQ(least, offset_gap(1));
  EXPECT_LT(leak, 1.6e-8);
  EXPECT_EQ(offset_gap(0), 0.0);
}

// ---- a float64 forward pass over the written file -----------------------------------------------

// A plain reading of the Llama definition, of short texts; shares nothing with the engine.
struct Reference {
  explicit Reference(const std::filesystem::path& folder) : file(folder / "model.safetensors") {}

  Rows matrix(const std::string& name) const {
    const TensorEntry& t = file.tensor(name);
    std::vector<float> values(t.elements);
    file.read_float(t, 0, t.elements, values.data());
    const size_t cols = size_t(t.shape.back());
    Rows rows;
    for (size_t at = 0; at < values.size(); at += cols) {
      rows.emplace_back(values.begin() + ptrdiff_t(at), values.begin() + ptrdiff_t(at + cols));
    }
    return rows;
  }
  static Rows times(const Rows& x, const Rows& w) {
    Rows y;
    for (const auto& row : x) {
      auto& out = y.emplace_back();
      for (const auto& weight : w) {
        double sum = 0;
        for (size_t i = 0; i < row.size(); ++i) sum += row[i] * weight[i];
        out.push_back(sum);
      }
    }
    return y;
  }
  static Rows normed(Rows x) {  // the norm's weights are ones
    for (auto& row : x) {
      double sum = 0;
      for (const double v : row) sum += v * v;
      for (double& v : row) v /= std::sqrt(sum / double(row.size()) + kEps);
    }
    return x;
  }
  static void rotate(std::vector<double>& heads, double position) {
    for (size_t h = 0; h < heads.size(); h += 128) {
      for (size_t m = 0; m < 64; ++m) {
        const double angle = position * std::pow(1e16, -double(m) / 64);
        const double a = heads[h + m], b = heads[h + m + 64];
        heads[h + m] = a * std::cos(angle) - b * std::sin(angle);
        heads[h + m + 64] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
  }

  // Logits of every position. `seen` gets the residual stream at each layer's input, and
  // probabilities[layer][head][i][j].
  Rows logits(const std::vector<int>& ids) {
    const Rows table = matrix("model.embed_tokens.weight");
    Rows x;
    for (const int id : ids) x.push_back(table[size_t(id)]);
    for (int l = 0; l < kLayers; ++l) {
      const std::string p = "model.layers." + std::to_string(l) + ".";
      residual.push_back(x);
      const Rows h = normed(x);
      Rows q = times(h, matrix(p + "self_attn.q_proj.weight"));
      Rows k = times(h, matrix(p + "self_attn.k_proj.weight"));
      const Rows v = times(h, matrix(p + "self_attn.v_proj.weight"));
      for (size_t i = 0; i < x.size(); ++i) rotate(q[i], double(i)), rotate(k[i], double(i));
      Rows mixed(x.size(), std::vector<double>(1024));
      auto& layer = probability.emplace_back(8, Rows(x.size()));
      for (size_t head = 0; head < 8; ++head) {
        for (size_t i = 0; i < x.size(); ++i) {
          std::vector<double>& w = layer[head][i];
          double top = -1e300, sum = 0;
          for (size_t j = 0; j <= i; ++j) {
            double s = 0;
            for (size_t c = 0; c < 128; ++c) s += q[i][head * 128 + c] * k[j][head / 2 * 128 + c];
            w.push_back(s / std::sqrt(128.0));
            top = std::max(top, w.back());
          }
          for (double& s : w) sum += s = std::exp(s - top);
          for (size_t j = 0; j <= i; ++j) {
            w[j] /= sum;
            for (size_t c = 0; c < 128; ++c)
              mixed[i][head * 128 + c] += w[j] * v[j][head / 2 * 128 + c];
          }
        }
      }
      const Rows o = times(mixed, matrix(p + "self_attn.o_proj.weight"));
      for (size_t i = 0; i < x.size(); ++i) {
        for (size_t c = 0; c < x[i].size(); ++c) x[i][c] += o[i][c];
      }
      // The MLP must add nothing: its last product is with zeros.
      for (const auto& row : matrix(p + "mlp.down_proj.weight")) {
        for (const double w : row) EXPECT_EQ(w, 0.0);
      }
    }
    return times(normed(x), matrix("lm_head.weight"));
  }

  SafetensorsFile file;
  std::vector<Rows> residual;
  std::vector<std::vector<Rows>> probability;
};

class NeedlePresets : public testing::TestWithParam<const char*> {};

TEST_P(NeedlePresets, TheReferenceFindsTheGoldenAnswerByTheDesignedRoute) {
  const TempFolder folder;
  const NeedleOptions options = needle_preset(GetParam());
  make_needle_model(options, folder.path());
  const auto golden =
      load_json_file(std::string(CERTKV_GOLDEN_DIR) + "/needle/" + GetParam() + ".json");
  std::vector<int> ids = golden["prompt_ids"];
  const std::vector<int> answer = golden["greedy_ids"];
  const size_t prompt = ids.size();
  ids.insert(ids.end(), answer.begin(), answer.end() - 1);

  Reference model(folder.path());
  const Rows logits = model.logits(ids);
  for (size_t n = 0; n < answer.size(); ++n) {
    const auto& row = logits[prompt - 1 + n];
    EXPECT_EQ(std::max_element(row.begin(), row.end()) - row.begin(), answer[n]) << n;
    double rest = 0;
    for (size_t t = 0; t < row.size(); ++t) {
      if (int(t) != answer[n]) rest += std::exp(row[t] - row[size_t(answer[n])]);
    }
    EXPECT_GT(1 / (1 + rest), 0.99) << n;
  }

  // RMSNorm is a known factor: the norms do not depend on the token (16-bit weights move them a
  // little: the generator's report measured a spread of at most 0.5).
  for (size_t l = 0; l < 3; ++l) {
    EXPECT_EQ(squared_norms()[l], (std::array<double, 3>{4228, 4256, 4352}[l]));
    // Before 16 tokens have passed, slots hold what the heads find at the start instead.
    for (size_t i = 16; i < ids.size(); ++i) {
      double norm = 0;
      for (const double v : model.residual[l][i]) norm += v * v;
      EXPECT_NEAR(norm, squared_norms()[l], 0.5) << l << " " << i;
    }
  }
  // Offset heads look where they should. The scores carry the rounding of 16-bit weights to a few
  // thousandths of their 186 nats.
  const std::array<std::array<size_t, 8>, 2> offsets = {
      {{1, 2, 3, 4, 5, 6, 7, 1}, {8, 1, 9, 8, 1, 9, 8, 1}}};
  for (size_t l = 0; l < 2; ++l) {
    for (size_t h = 0; h < 8; ++h) {
      for (size_t i = 16; i < ids.size(); ++i) {
        EXPECT_GT(model.probability[l][h][i][i - offsets[l][h]], 1 - 1e-6) << l << h << i;
      }
    }
  }
  // Induction: what is compared is the text. Every head's weight goes to positions whose bytes at
  // its 8 places agree with the last 16, or to the sink; where all 16 agree it has most of it.
  const auto matches = [&](size_t i, size_t j) {
    for (size_t s = 0; s < 16; ++s) {
      if (ids[i - s] != ids[j - 1 - s]) return false;
    }
    return true;
  };
  size_t found = 0;
  for (size_t i = prompt - 1; i < ids.size(); ++i) {
    for (size_t j = 17; j < i; ++j) {
      if (!matches(i, j)) continue;
      ++found;
      for (size_t h = 0; h < 8; ++h)
        EXPECT_GT(model.probability[2][h][i][j], 0.45) << h << " " << i;
      break;
    }
  }
  EXPECT_EQ(found, answer.size());
}

INSTANTIATE_TEST_SUITE_P(Presets, NeedlePresets, testing::Values("default", "fragile"),
                         [](const auto& a) { return std::string(a.param); });

TEST(NeedleModel, WithoutAMatchTheSinkSaysNewline) {
  const TempFolder folder;
  make_needle_model(needle_preset("default"), folder.path());
  std::vector<int> ids = {kBos};
  for (const char c : std::string("The quick brown fox jumps over the lazy dog")) ids.push_back(c);
  Reference model(folder.path());
  const Rows logits = model.logits(ids);
  for (size_t i = 17; i < ids.size(); ++i) {
    EXPECT_EQ(std::max_element(logits[i].begin(), logits[i].end()) - logits[i].begin(), '\n') << i;
    for (size_t h = 0; h < 8; ++h) EXPECT_GT(model.probability[2][h][i][0], 0.9) << h << " " << i;
  }
}

// The margin of a full match over the sink, and what a single wrong byte costs, in nats, from the
// weights before rounding.
TEST(NeedleModel, MatchSinkAndMismatchScoreWhatTheOptionsSay) {
  for (const char* preset : {"default", "fragile"}) {
    const NeedleOptions options = needle_preset(preset);
    const Codes codes = make_codes(options.seed);
    const auto weights = make_weights(options);
    const auto find = [&](const std::string& name) -> const std::vector<double>& {
      for (const NamedTensor& t : weights) {
        if (t.name == name) return t.values;
      }
      throw std::runtime_error(name);
    };
    const auto& wq = find("model.layers.2.self_attn.q_proj.weight");
    const auto& wk = find("model.layers.2.self_attn.k_proj.weight");
    const auto project = [](const std::vector<double>& w, int head, const std::vector<double>& x) {
      double squares = 0;
      for (const double v : x) squares += v * v;
      const double norm = std::sqrt(squares / 384 + kEps);
      std::vector<double> y(128);
      for (int c = 0; c < 128; ++c) {
        for (int i = 0; i < 384; ++i)
          y[size_t(c)] += w[size_t((head * 128 + c) * 384 + i)] * x[size_t(i)] / norm;
      }
      return y;
    };
    // The stream of a position whose last bytes are `text` (query side) or were so before it (key).
    const std::string text = "access code of C";
    const auto stream = [&](const std::string& before, int token) {
      std::vector<double> x(384);
      for (int c = 0; c < 64; ++c) x[size_t(c)] = codes.word.at(token, c);
      for (int s = 0; s < 16; ++s) {
        for (int c = 0; c < 8; ++c) {
          const double v = 2 * codes.slot.at(uint8_t(before[size_t(15 - s)]), c);
          x[size_t(64 + 8 * s + c)] = x[size_t(192 + 8 * s + c)] = v;
        }
      }
      x[380] = 64;
      x[381] = 8;
      return x;
    };
    std::vector<double> bos = stream(std::string(16, '\0'), kBos);
    for (int s = 0; s < 16; ++s) {
      for (int c = 0; c < 8; ++c) bos[size_t(192 + 8 * s + c)] = 2 * codes.slot.at(kBos, c);
    }
    bos[381] = 0;
    bos[382] = 8;
    std::string near = text;
    near[7] = 'C';  // distance 8 of 0..15: even, and the next bit even
    for (int h = 0; h < 8; ++h) {
      const auto q = project(wq, h, stream(text, 'x'));
      const auto score = [&](const std::vector<double>& x) {
        const auto k = project(wk, h / 2, x);
        double s = 0;
        for (size_t c = 0; c < 128; ++c) s += q[c] * k[c];
        return s / std::sqrt(128.0);
      };
      // Every token carries noise of deviation 5e-4 * 8 in the sink's channel, which the
      // sink's query of sink * beta / 8 reads: 6 deviations.
      const double noise = 6 * options.sink * options.beta / 8 * 5e-4 * 8;
      const double full = score(stream(text, 'q')), sink = score(bos),
                   one = score(stream(near, 'q'));
      EXPECT_NEAR(full, options.beta, noise + 1e-6) << preset << h;
      EXPECT_NEAR(sink, options.sink * options.beta, noise) << preset << h;
      const bool sees = h / 2 == 0 || h / 2 == 2;
      if (sees) {
        EXPECT_GT(full - one, options.beta / 16 - 1e-6) << preset << h;
      } else {
        EXPECT_NEAR(full, one, 1e-6) << preset << h;
      }
    }
  }
}

TEST(NeedleModel, TheFolderIsACompleteModelOfTheStatedShape) {
  const TempFolder folder, again;
  const NeedleOptions options = needle_preset("fragile");
  make_needle_model(options, folder / "made/here");
  const ModelConfig c = load_model_config(folder / "made/here");
  EXPECT_EQ(c.architecture, Architecture::Llama);
  EXPECT_EQ(c.layers, 3);
  EXPECT_EQ(c.hidden, 384);
  EXPECT_EQ(c.heads, 8);
  EXPECT_EQ(c.kv_heads, 4);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.vocab, 288);
  EXPECT_EQ(c.rope.theta, 1e16);
  EXPECT_EQ(c.max_tokens, 131072);
  EXPECT_EQ(c.bos_id, 256);
  EXPECT_EQ(c.eos_ids, std::vector<int32_t>{257});
  EXPECT_EQ(c.dtype, DType::F16);
  uint64_t parameters = 0;
  const SafetensorsFolder files(folder / "made/here");
  for (const auto& [name, place] : files.tensors()) parameters += place.entry->elements;
  EXPECT_EQ(parameters, 3984000u);
  const auto tokenizer = load_json_file((folder / "made/here/tokenizer.json").string());
  const auto& vocab = tokenizer["model"]["vocab"];
  EXPECT_EQ(vocab.size(), 256u);
  EXPECT_EQ(vocab["a"], 'a');
  EXPECT_EQ(vocab["\u0120"], ' ');   // the usual stand-in for a space
  EXPECT_EQ(vocab["\u010a"], '\n');  // and for a newline
  EXPECT_EQ(vocab["\u00ff"], 255);

  make_needle_model(options, again.path());
  for (const char* name : {"model.safetensors", "config.json", "tokenizer.json"}) {
    EXPECT_EQ(TempFolder::read(folder / "made/here" / name), TempFolder::read(again / name))
        << name;
  }
}

TEST(NeedleModel, OptionsOutOfRangeAreRefused) {
  const TempFolder folder;
  const auto refused = [&](std::function<void(NeedleOptions&)> change, const char* what) {
    NeedleOptions o;
    change(o);
    EXPECT_THAT(error_of([&] { make_needle_model(o, folder.path()); }), HasSubstr(what));
    EXPECT_FALSE(std::filesystem::exists(folder / "model.safetensors"));
  };
  refused([](auto& o) { o.beta = 0; }, "beta is 0");
  refused([](auto& o) { o.beta = std::nan(""); }, "beta is nan");
  refused([](auto& o) { o.sink = 1; }, "sink is 1");
  refused([](auto& o) { o.k_outlier = -1; }, "k-outlier is -1");
  refused([](auto& o) { o.v_nuisance = INFINITY; }, "v-nuisance is inf");
  refused([](auto& o) { o.dtype = DType::F32; }, "dtype is F32");
  refused(
      [](auto& o) {
        o.k_outlier = 1e5;
        o.beta = 1;
      },
      "k_proj.weight holds");
  EXPECT_THAT(error_of([] { needle_preset("strong"); }), HasSubstr("default or fragile"));
  folder.write("taken", "");
  EXPECT_THAT(error_of([&] { make_needle_model({}, folder / "taken"); }), HasSubstr("IoError"));
  folder.write("model.safetensors.index.json", "{}");
  EXPECT_THAT(error_of([&] { make_needle_model({}, folder.path()); }), HasSubstr("sharded model"));
}

}  // namespace
}  // namespace certkv
