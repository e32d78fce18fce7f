#include "runtime/bench/synthetic_heads.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr int kSinks = 4, kLocal = 256, kTopics = 4, kPlaces = 3, kPlaceTokens = 4;
constexpr double kSinkKey = 18, kLocalKey = 10, kTopicKey = 18;  // norms of what marks such a key
constexpr double kMainTopic = 0.7, kSinkValue = 0.1, kValueMean = 0.3;
constexpr double kKept = 0.9;  // of a query's direction among the rest, from step to step
constexpr double kStrengthNoise = 0.02;

struct Shares {
  double sinks, local, far, rest;
};
Shares shares_of(HeadKind kind) {
  switch (kind) {
    case HeadKind::Sharp:
      return {0.30, 0.30, 0.36, 0.04};
    case HeadKind::Diffuse:
      return {0.20, 0.10, 0.0, 0.70};
    case HeadKind::Mixed:
      break;
  }
  return {0.30, 0.29, 0.33, 0.08};
}

// Counter-based, so that the data do not depend on the standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double uniform() { return (double(next() >> 11) + 0.5) * 0x1p-53; }
  double normal() {  // Box-Muller
    if (spare_ready_) {
      spare_ready_ = false;
      return spare_;
    }
    const double r = std::sqrt(-2 * std::log(uniform())), a = 2 * std::numbers::pi * uniform();
    spare_ = r * std::sin(a);
    spare_ready_ = true;
    return r * std::cos(a);
  }

 private:
  uint64_t state_;
  double spare_ = 0;
  bool spare_ready_ = false;
};

using Vector = std::vector<double>;

// Takes from x what points along the given directions. REQUIRES them orthonormal.
void remove(const std::vector<Vector>& directions, Vector* x) {
  for (const Vector& y : directions) {
    double dot = 0;
    for (size_t c = 0; c < y.size(); ++c) dot += (*x)[c] * y[c];
    for (size_t c = 0; c < y.size(); ++c) (*x)[c] -= dot * y[c];
  }
}

std::vector<Vector> orthonormal(Random& random, size_t count, size_t d) {
  std::vector<Vector> out;
  while (out.size() < count) {
    Vector x(d);
    for (double& v : x) v = random.normal();
    remove(out, &x);
    double norm = 0;
    for (double v : x) norm += v * v;
    for (double& v : x) v /= std::sqrt(norm);
    out.push_back(std::move(x));
  }
  return out;
}

Vector channel_scales(Random& random, size_t d) {
  Vector scale(d);
  for (size_t c = 0; c < d; ++c)
    scale[c] = std::exp(0.3 * random.normal()) * (c % 32 == 7 ? 4.0 : 1.0);
  return scale;
}

// The a with sum_i exp(a keys_i) = mass: the sum grows with a, keys are positive.
double strength_for(const Vector& keys, double mass) {
  double lo = 0, hi = 1;
  const auto sum = [&](double a) {
    double s = 0;
    for (double x : keys) s += std::exp(a * x);
    return s;
  };
  while (sum(hi) < mass) hi *= 2;
  for (int i = 0; i < 60; ++i) (sum((lo + hi) / 2) < mass ? lo : hi) = (lo + hi) / 2;
  return (lo + hi) / 2;
}

// Directions that mark kinds of tokens: in a query their strength, in a key how strongly it is one.
enum Direction : size_t { kSink = 0, kRecent = 1, kTopic = 2, kDirections = kTopic + kTopics };

}  // namespace

const char* head_kind_name(HeadKind kind) {
  return kind == HeadKind::Sharp ? "sharp" : kind == HeadKind::Mixed ? "mixed" : "diffuse";
}

HeadKind head_kind_from_name(std::string_view name) {
  for (HeadKind kind : {HeadKind::Diffuse, HeadKind::Mixed, HeadKind::Sharp})
    if (name == head_kind_name(kind)) return kind;
  CERTKV_THROW(InvalidArgument, "heads '{}' are not known; allowed: diffuse, mixed, sharp", name);
}

SyntheticHead make_synthetic_head(const SyntheticShape& shape, uint64_t seed) {
  CERTKV_EXPECT(shape.tokens >= 1024, InvalidArgument,
                "synthetic heads of {} tokens: at least 1024 are needed", shape.tokens);
  CERTKV_EXPECT(shape.query_heads >= 1 && shape.query_steps >= 1 && shape.head_dim >= 16,
                InvalidArgument, "synthetic heads: {} query heads, {} steps of head_dim {}",
                shape.query_heads, shape.query_steps, shape.head_dim);
  const size_t d = size_t(shape.head_dim), n = shape.tokens;
  Random random(seed);
  const Shares shares = shares_of(shape.kind);
  const std::vector<Vector> direction = orthonormal(random, kDirections, d);
  const Vector key_scale = channel_scales(random, d), value_scale = channel_scales(random, d);

  // Where the topics are: whole places, apart from sinks and the local window.
  std::vector<int> topic_of(n, -1);
  for (int topic = 0; topic < kTopics; ++topic)
    for (int place = 0; place < kPlaces; ++place) {
      const size_t span = n - kLocal - 64;
      const size_t at = 32 + size_t(random.uniform() * double(span)) / 16 * 16;
      for (int t = 0; t < kPlaceTokens; ++t) topic_of[at + size_t(t)] = topic;
    }

  SyntheticHead head;
  head.k.resize(n * d);
  head.v.resize(n * d);
  Vector key(d);
  std::array<Vector, kDirections> marked;  // how strongly the tokens of each kind are marked
  for (size_t t = 0; t < n; ++t) {
    size_t kind = kDirections;
    double mark = 0;
    if (t < kSinks) {
      kind = kSink;
      mark = kSinkKey;
    } else if (n - t <= kLocal) {
      kind = kRecent;
      mark = kLocalKey * (1 - 0.5 * double(n - 1 - t) / kLocal);
    } else if (topic_of[t] >= 0) {
      kind = kTopic + size_t(topic_of[t]);
      mark = kTopicKey;
    }
    if (kind < kDirections) marked[kind].push_back(mark);
    for (double& x : key) x = random.normal();
    for (size_t c = 0; c < d; ++c) key[c] *= key_scale[c];
    remove(direction, &key);
    for (size_t c = 0; c < d; ++c) {
      const double v = value_scale[c] * random.normal() + kValueMean;
      const double k = key[c] + (kind < kDirections ? mark * direction[kind][c] : 0);
      head.k[t * d + c] = float_to_16(shape.dtype, float(k));
      head.v[t * d + c] = float_to_16(shape.dtype, float(kind == kSink ? kSinkValue * v : v));
    }
  }

  // A query is noise in the keys' units, which gives the scores of the rest their variance of 1
  // (and every token's mass a factor of e^1/2 on average), plus strengths.
  const double root = std::sqrt(double(d)), rest = double(n) / shares.rest;
  const auto noise = [&] {
    Vector x(d);
    for (size_t c = 0; c < d; ++c) x[c] = random.normal() / key_scale[c];
    remove(direction, &x);  // what the strengths add is theirs alone
    return x;
  };
  const auto to_unit_variance = [&](Vector* x) {
    double sum = 0;
    for (size_t c = 0; c < d; ++c) sum += std::pow((*x)[c] * key_scale[c], 2);
    for (double& v : *x) v *= root / std::sqrt(sum);
  };
  const double sink = strength_for(marked[kSink], shares.sinks * rest);
  const double local = strength_for(marked[kRecent], shares.local * rest);
  std::vector<Vector> base;
  for (int h = 0; h < shape.query_heads; ++h) base.push_back(noise());
  head.q.reserve(size_t(shape.query_steps * shape.query_heads) * d);
  for (int step = 0; step < shape.query_steps; ++step)
    for (int h = 0; h < shape.query_heads; ++h) {
      Vector query = noise();
      for (size_t c = 0; c < d; ++c)
        query[c] = kKept * base[size_t(h)][c] + std::sqrt(1 - kKept * kKept) * query[c];
      to_unit_variance(&query);
      const auto varied = [&](double x) { return x * (1 + kStrengthNoise * random.normal()); };
      std::array<double, kDirections> strength{};
      strength[kSink] = varied(sink);
      strength[kRecent] = varied(local);
      if (shares.far > 0)
        for (int i = 0; i < 2; ++i) {
          const size_t topic = kTopic + size_t((h + i) % kTopics);
          const double share = shares.far * (i == 0 ? kMainTopic : 1 - kMainTopic);
          strength[topic] = varied(strength_for(marked[topic], share * rest));
        }
      for (size_t c = 0; c < d; ++c) {
        double x = query[c];
        for (size_t i = 0; i < kDirections; ++i) x += strength[i] * root * direction[i][c];
        head.q.push_back(float(x));
      }
    }
  return head;
}

}  // namespace certkv
