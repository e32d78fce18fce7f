// The operations of a forward pass on a device, each against a float64 computation written from its
// definition. In emulation here, on a GPU in tests/gpu.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "tests/support/device_ops.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

using cuda::DeviceArray;
using cuda::kNoFault;

constexpr double kUnit = 0x1p-24;  // half a unit in the last place of float, relative
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
const DType kTypes[] = {DType::F32, DType::F16, DType::BF16};

std::vector<float> normal(size_t n, uint64_t seed, float scale = 1, float mean = 0) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> draw(mean, scale);
  std::vector<float> x(n);
  for (float& v : x) v = draw(engine);
  return x;
}

// What rounding an element of this size to a type may cost: half a unit in the last place, and for
// halves half of the smallest subnormal.
double rounding(DType t, double size) {
  if (t == DType::F32) return kUnit * size;
  return t == DType::BF16 ? 0x1p-8 * size : 0x1p-11 * size + 0x1p-25;
}

class ModelOpsOnDevice : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ != nullptr) ops_ = make_test_model_ops(*device_);
  }
  // An array of a type, every element rounded to it by the oracle.
  DeviceArray<std::byte> put_as(DType t, const std::vector<float>& x) {
    std::vector<std::byte> bytes(x.size() * dtype_bytes(t));
    for (size_t i = 0; i < x.size(); ++i) {
      const uint16_t bits = t == DType::F32 ? uint16_t(0) : oracle::encode(t, double(x[i]));
      std::memcpy(bytes.data() + i * dtype_bytes(t),
                  t == DType::F32 ? static_cast<const void*>(&x[i]) : &bits, dtype_bytes(t));
    }
    return put(bytes);
  }
  std::vector<double> get_as(DType t, const DeviceArray<std::byte>& from) {
    const std::vector<std::byte> bytes = get(from);
    std::vector<double> x(bytes.size() / dtype_bytes(t));
    for (size_t i = 0; i < x.size(); ++i) {
      float value;
      uint16_t bits;
      if (t == DType::F32)
        std::memcpy(&value, bytes.data() + 4 * i, 4);
      else
        std::memcpy(&bits, bytes.data() + 2 * i, 2);
      x[i] = t == DType::F32 ? double(value) : oracle::decode(t, bits);
    }
    return x;
  }
  template <typename T>
  DeviceArray<T> room(size_t count) {
    return {*device_, count, "a test's array"};
  }

  std::unique_ptr<cuda::ModelOps> ops_;
};

TEST_F(ModelOpsOnDevice, AnEmbeddingRowIsTheTablesRowInEveryType) {
  const size_t n = 300, vocab = 7;
  const auto table = normal(vocab * n, 1);
  const std::vector<int32_t> ids{6, 0, 3, 3};
  for (DType t : kTypes) {
    const auto on_device = put_as(t, table);
    const auto row_ids = put(ids);
    const auto x = room<float>(ids.size() * n);
    ops_->embed({on_device.data(), t, row_ids.data(), x.data(), ids.size(), n});
    const auto got = get(x);
    const auto served = get_as(t, on_device);
    for (size_t r = 0; r < ids.size(); ++r)
      for (size_t i = 0; i < n; ++i)
        EXPECT_EQ(double(got[r * n + i]), served[size_t(ids[r]) * n + i]) << dtype_name(t);
  }
}

TEST_F(ModelOpsOnDevice, ARowIsAddedAndNormedWithinRounding) {
  const size_t rows = 3;
  const float eps = 1e-5f;
  for (size_t n : {1u, 8u, 75u, 300u, 4096u})
    for (DType t : kTypes)
      for (bool with_bias : {false, true}) {
        const auto x0 = normal(rows * n, 2, 3), y0 = normal(rows * n, 3, 2), b0 = normal(n, 4),
                   w0 = normal(n, 5, 0.3f, 1);
        const auto x = put(x0), y = put(y0), bias = put(b0), weight = put(w0);
        const auto fault = put(std::vector<uint32_t>(rows, kNoFault));
        const auto normed = room<std::byte>(rows * n * dtype_bytes(t));
        ops_->residual_norm({.x = x.data(),
                             .y = y.data(),
                             .bias = with_bias ? bias.data() : nullptr,
                             .fault = fault.data(),
                             .code = 9,
                             .weight = weight.data(),
                             .eps = eps,
                             .dtype = t,
                             .normed = normed.data(),
                             .rows = rows,
                             .n = n});
        const auto sum = get(x);
        const auto got = get_as(t, normed);
        EXPECT_EQ(get(fault), std::vector<uint32_t>(rows, kNoFault));
        for (size_t r = 0; r < rows; ++r) {
          double square = 0;
          for (size_t i = 0; i < n; ++i) {
            const size_t at = r * n + i;
            const double added = double(y0[at]) + (with_bias ? double(b0[i]) : 0.0);
            const double exact = double(x0[at]) + added;
            // Two additions.
            EXPECT_NEAR(sum[at], exact, 1.01 * kUnit * (std::abs(added) + std::abs(exact)));
            square += std::pow(double(sum[at]), 2);
          }
          const double factor = 1 / std::sqrt(square / double(n) + double(eps));
          // A sum of n squares costs gamma_n, halved by the root; five more roundings.
          const double relative = kUnit * (double(n) / 2 + 6);
          for (size_t i = 0; i < n; ++i) {
            const double exact = double(sum[r * n + i]) * factor * double(w0[i]);
            EXPECT_NEAR(got[r * n + i], exact,
                        relative * std::abs(exact) + rounding(t, (1 + relative) * std::abs(exact)))
                << n << " " << dtype_name(t);
          }
        }
      }
}

TEST_F(ModelOpsOnDevice, ANormWithNothingToAddLeavesTheRowAndNeedsNoFaultWord) {
  const size_t n = 70;
  const auto x0 = normal(2 * n, 6);
  const auto x = put(x0), weight = put(std::vector<float>(n, 2.0f));
  const auto normed = room<float>(2 * n);
  ops_->residual_norm({.x = x.data(),
                       .weight = weight.data(),
                       .eps = 1e-6f,
                       .normed = normed.data(),
                       .rows = 2,
                       .n = n});
  EXPECT_EQ(get(x), x0);
  double square = 0;
  for (float v : get(normed)) square += double(v) * double(v);
  // Each row's mean square is 4, but for eps and the norm's rounding (above).
  EXPECT_NEAR(square / double(2 * n), 4, 4 * (1e-6 / 0.1 + 2 * kUnit * (double(n) / 2 + 6)));
}

TEST_F(ModelOpsOnDevice, AWordSaysWhichOfTwoSumsIsAdded) {
  const size_t n = 70, rows = 2;
  const auto first = put(std::vector<float>(rows * n, 1.0f));
  const auto again = put(std::vector<float>(rows * n, 2.0f));
  for (uint32_t word : {0u, 1u, 0x01010101u}) {
    const auto x = put(std::vector<float>(rows * n, 10.0f));
    const auto chosen = put(std::vector<uint32_t>{word});
    const auto fault = put(std::vector<uint32_t>(rows, kNoFault));
    ops_->residual_norm({.x = x.data(),
                         .y = first.data(),
                         .y_again = again.data(),
                         .again = chosen.data(),
                         .fault = fault.data(),
                         .rows = rows,
                         .n = n});
    EXPECT_EQ(get(x), std::vector<float>(rows * n, word == 0 ? 11.0f : 12.0f)) << word;
  }
}

// What ranks sum beside a layer's outputs: a row whose flag is not 0 is not added, the others are,
// nothing is added behind it, and no fault is seen of what does not count.
TEST_F(ModelOpsOnDevice, AFlagHaltsTheStepForAllAndNamesItsRows) {
  const size_t n = 700, rows = 4;
  const uint32_t layer = 6;
  const auto y = put(std::vector<float>(rows * n, 1.0f)), wrong = put(normal(rows * n, 3, kInf));
  const auto by_row = [&](std::vector<float> value) {
    std::vector<float> all;
    for (const float v : value) all.insert(all.end(), n, v);
    return all;
  };
  struct Case {
    std::vector<float> flags;
    std::vector<uint32_t> halted;  // before
    std::vector<uint32_t> after;
    std::vector<float> sums;
  };
  const std::vector<float> none(rows, 0.0f), one = {0, 2, kNan, 0};
  const Case cases[] = {
      {none, {0, 9, 9, 9, 9}, {0, 9, 9, 9, 9}, {11, 11, 11, 11}},
      {one, {0, 9, 9, 9, 9}, {layer + 1, 0, 1, 1, 0}, {11, 10, 10, 11}},
      {{0x1p-149f, 0, 0, 0}, {0, 9, 9, 9, 9}, {layer + 1, 1, 0, 0, 0}, {10, 11, 11, 11}},
      {one, {layer, 1, 0, 0, 0}, {layer, 1, 0, 0, 0}, {10, 10, 10, 10}}};  // since the layer before
  for (const Case& c : cases) {
    const auto x = put(std::vector<float>(rows * n, 10.0f)), flags = put(c.flags);
    const auto halted = put(c.halted), fault = put(std::vector<uint32_t>(rows, kNoFault));
    cuda::ResidualNorm add{
        .x = x.data(), .y = y.data(), .fault = fault.data(), .rows = rows, .n = n};
    add.halted = halted.data();
    add.fallback = flags.data();
    add.layer = layer;
    ops_->residual_norm(add);
    EXPECT_EQ(get(x), by_row(c.sums));
    EXPECT_EQ(get(halted), c.after);
    // The layer's other sum, and the next step's flags.
    add.fallback = nullptr;
    add.clear = flags.data();
    if (c.after[0] != 0) add.y = wrong.data();
    ops_->residual_norm(add);
    std::vector<float> then = c.sums;
    for (float& v : then) v += c.after[0] == 0 ? 1 : 0;
    EXPECT_EQ(get(x), by_row(then));
    EXPECT_EQ(get(flags), none);
    EXPECT_EQ(get(fault), std::vector<uint32_t>(rows, kNoFault));
  }
  // The layer once more, for the rows that are named.
  const auto x = put(std::vector<float>(rows * n, 10.0f));
  const auto only = put(std::vector<uint32_t>{0, 1, 0x100u, 0});
  const auto fault = put(std::vector<uint32_t>(rows, kNoFault));
  cuda::ResidualNorm again{
      .x = x.data(), .y = y.data(), .fault = fault.data(), .rows = rows, .n = n};
  again.only = only.data();
  ops_->residual_norm(again);
  EXPECT_EQ(get(x), by_row({10, 11, 11, 10}));
}

TEST_F(ModelOpsOnDevice, ASumThatIsNotFiniteMarksItsRowAndTheFirstFaultStays) {
  const size_t n = 700, rows = 5;
  auto x0 = normal(rows * n, 7), y0 = normal(rows * n, 8);
  y0[1 * n + 699] = kNan;
  y0[2 * n + 0] = -kInf;
  y0[3 * n + 300] = kInf;
  x0[4 * n + 5] = kNan;  // came earlier: no fault of this sum
  const auto x = put(x0), y = put(y0), weight = put(std::vector<float>(n, 1.0f));
  const auto fault = put(std::vector<uint32_t>{kNoFault, kNoFault, 3, 12, kNoFault});
  const auto normed = room<float>(rows * n);
  ops_->residual_norm({.x = x.data(),
                       .y = y.data(),
                       .fault = fault.data(),
                       .code = 8,
                       .weight = weight.data(),
                       .eps = 1e-6f,
                       .normed = normed.data(),
                       .rows = rows,
                       .n = n});
  EXPECT_EQ(get(fault), (std::vector<uint32_t>{kNoFault, 8, 3, 8, kNoFault}));
  const auto got = get(normed);
  for (size_t i = 0; i < n; ++i) {
    EXPECT_TRUE(std::isfinite(got[i]));
    for (size_t r = 1; r < rows; ++r) EXPECT_TRUE(std::isnan(got[r * n + i])) << r;
  }
}

struct RotationCase {
  size_t head_dim;
  DType originals;
  bool bias, norms, positions, copies;
};

class Rotation : public ModelOpsOnDevice, public testing::WithParamInterface<RotationCase> {};

TEST_P(Rotation, BiasNormAndTurnAreTheirDefinitionsWithinRounding) {
  const RotationCase c = GetParam();
  const size_t rows = 3, heads = 4, kv_heads = 2, d = c.head_dim, pairs = d / 2;
  const size_t all = heads + 2 * kv_heads, width = all * d, limit = 40, first = 17;
  const size_t tokens = 30;
  const double theta = 1e4;
  const float eps = 1e-5f;
  const auto qkv0 = normal(rows * width, 9), bias0 = normal(width, 10),
             q_norm0 = normal(d, 11, 0.2f, 1), k_norm0 = normal(d, 12, 0.2f, 1);
  std::vector<float> cos0, sin0;
  for (size_t p = 0; p < limit; ++p)
    for (size_t m = 0; m < pairs; ++m) {
      const double angle = double(p) * std::pow(theta, -2.0 * double(m) / double(d));
      cos0.push_back(float(std::cos(angle)));
      sin0.push_back(float(std::sin(angle)));
    }
  const std::vector<int32_t> positions0{39, 0, 11};
  const auto qkv = put(qkv0), bias = put(bias0), q_norm = put(q_norm0), k_norm = put(k_norm0),
             cos = put(cos0), sin = put(sin0);
  const auto positions = put(positions0);
  const auto fault = put(std::vector<uint32_t>(rows, kNoFault));
  const auto q16 = put(std::vector<uint16_t>(rows * heads * d, 7)),
             k16 = put(std::vector<uint16_t>(kv_heads * tokens * d, 7)),
             v16 = put(std::vector<uint16_t>(kv_heads * tokens * d, 7));
  ops_->rotate_qkv({.qkv = qkv.data(),
                    .bias = c.bias ? bias.data() : nullptr,
                    .q_norm = c.norms ? q_norm.data() : nullptr,
                    .k_norm = c.norms ? k_norm.data() : nullptr,
                    .eps = eps,
                    .cos = cos.data(),
                    .sin = sin.data(),
                    .positions = c.positions ? positions.data() : nullptr,
                    .first_position = first,
                    .originals = c.originals,
                    .fault = fault.data(),
                    .code = 4,
                    .q16 = c.copies ? q16.data() : nullptr,
                    .k16 = c.copies ? k16.data() : nullptr,
                    .v16 = c.copies ? v16.data() : nullptr,
                    .kv_head_stride = tokens * d,
                    .kv_first = first,
                    .rows = rows,
                    .heads = heads,
                    .kv_heads = kv_heads,
                    .head_dim = d});
  const auto got = get(qkv);
  EXPECT_EQ(get(fault), std::vector<uint32_t>(rows, kNoFault));
  for (size_t r = 0; r < rows; ++r)
    for (size_t h = 0; h < all; ++h) {
      const size_t at = r * width + h * d;
      std::vector<double> x(d);
      double square = 0;
      for (size_t i = 0; i < d; ++i) {
        x[i] = double(qkv0[at + i]) + (c.bias ? double(bias0[h * d + i]) : 0.0);
        square += x[i] * x[i];
      }
      const bool value = h >= heads + kv_heads;
      const auto& weight = h < heads ? q_norm0 : k_norm0;
      if (c.norms && !value)
        for (size_t i = 0; i < d; ++i)
          x[i] *= double(weight[i]) / std::sqrt(square / double(d) + double(eps));
      // Bias, and under a norm the sum of squares (halved by the root, and each square has the
      // bias's rounding) and six more; then a product and a sum with a rounded cosine.
      const double relative = kUnit * ((c.norms ? double(d) / 2 + 8 : 1) + (value ? 0 : 4));
      const size_t position = c.positions ? size_t(positions0[r]) : first + r;
      for (size_t m = 0; m < pairs; ++m) {
        const double angle = double(position) * std::pow(theta, -2.0 * double(m) / double(d));
        const double co = value ? 1 : std::cos(angle), si = value ? 0 : std::sin(angle);
        const double a = x[m] * co - x[m + pairs] * si, b = x[m + pairs] * co + x[m] * si;
        // Where an addition of the bias cancels, its rounding is of the operands' size.
        const double size = std::abs(x[m]) + std::abs(x[m + pairs]) +
                            (c.bias ? std::abs(double(bias0[h * d + m])) +
                                          std::abs(double(bias0[h * d + m + pairs]))
                                    : 0.0);
        EXPECT_NEAR(got[at + m], a, 1.01 * relative * size);
        EXPECT_NEAR(got[at + m + pairs], b, 1.01 * relative * size);
      }
    }
  if (!c.copies) return;
  const auto q = get(q16), k = get(k16), v = get(v16);
  std::vector<uint16_t> want_k(k.size(), 7), want_v(v.size(), 7);  // what is not written stays
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < d; ++i) {
      const auto rounded = [&](size_t h) {
        return oracle::encode(c.originals, double(got[r * width + h * d + i]));
      };
      for (size_t h = 0; h < heads; ++h) EXPECT_EQ(q[(r * heads + h) * d + i], rounded(h));
      for (size_t h = 0; h < kv_heads; ++h) {
        want_k[(h * tokens + first + r) * d + i] = rounded(heads + h);
        want_v[(h * tokens + first + r) * d + i] = rounded(heads + kv_heads + h);
      }
    }
  EXPECT_EQ(k, want_k);
  EXPECT_EQ(v, want_v);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Rotation,
                         testing::Values(RotationCase{64, DType::BF16, false, false, true, false},
                                         RotationCase{128, DType::F16, true, false, false, true},
                                         RotationCase{96, DType::BF16, false, true, false, true},
                                         RotationCase{256, DType::F16, true, true, true, true}));

TEST_F(ModelOpsOnDevice, AKeyOrValueBeyondTheOriginalsMarksItsRowAndAQueryDoesNot) {
  const size_t d = 64, rows = 6;  // one query head, one KV head
  const auto cos = put(std::vector<float>(d / 2, 1.0f)), sin = put(std::vector<float>(d / 2, 0.0f));
  const auto positions = put(std::vector<int32_t>(rows, 0));
  std::vector<float> qkv0(rows * 3 * d, 1.0f);
  const auto element = [&](size_t r, size_t head) -> float& {
    return qkv0[(r * 3 + head) * d + 50];
  };
  element(1, 0) = 1e9f;      // a query: rounded by nobody but the prompt's attention
  element(2, 1) = 65519.0f;  // the largest float that rounds to a finite half
  element(3, 1) = 65520.0f;
  element(4, 2) = -1e9f;
  element(5, 2) = kNan;
  const auto marked = [&](DType originals) {
    const auto qkv = put(qkv0);
    const auto fault = put(std::vector<uint32_t>(rows, kNoFault));
    ops_->rotate_qkv({.qkv = qkv.data(),
                      .cos = cos.data(),
                      .sin = sin.data(),
                      .positions = positions.data(),
                      .originals = originals,
                      .fault = fault.data(),
                      .code = 0,
                      .rows = rows,
                      .heads = 1,
                      .kv_heads = 1,
                      .head_dim = d});
    return get(fault);
  };
  constexpr uint32_t kOk = kNoFault;
  EXPECT_EQ(marked(DType::F16), (std::vector<uint32_t>{kOk, kOk, kOk, 0, 0, 0}));
  EXPECT_EQ(marked(DType::BF16), (std::vector<uint32_t>{kOk, kOk, kOk, kOk, kOk, 0}));
}

TEST_F(ModelOpsOnDevice, TheGateIsItsDefinitionWithinRoundingAndKeepsNan) {
  const size_t rows = 2, n = 777;
  std::vector<float> gate_up0(rows * 2 * n), bias0 = normal(2 * n, 13);
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < n; ++i) {
      gate_up0[r * 2 * n + i] = (float(i) - 388) * (i % 3 == 0 ? 1.0f : 0.037f);
      gate_up0[r * 2 * n + n + i] = (float(i) - 20.5f) / 16;
    }
  for (DType t : kTypes)
    for (bool with_bias : {false, true}) {
      const auto gate_up = put(gate_up0), bias = put(bias0);
      const auto y = room<std::byte>(rows * n * dtype_bytes(t));
      ops_->gate({gate_up.data(), with_bias ? bias.data() : nullptr, t, y.data(), rows, n});
      const auto got = get_as(t, y);
      for (size_t r = 0; r < rows; ++r)
        for (size_t i = 0; i < n; ++i) {
          // The bias as it is added, in float: it moves the argument of an exponential.
          const auto with = [&](size_t at) {
            return double(with_bias ? gate_up0[r * 2 * n + at] + bias0[at]
                                    : gate_up0[r * 2 * n + at]);
          };
          const double x = with(i), exact = x / (1 + std::exp(-x)) * with(n + i);
          // The exponential is right to 2^-21.6 (kernels/arith/exp.h), or flushed to 0 below
          // exp(-87).
          const double error = 0x1p-20 * std::abs(exact) + 400 * 60 * 0x1p-125;
          EXPECT_NEAR(got[r * n + i], exact, error + rounding(t, std::abs(exact) + error));
        }
    }
  gate_up0[5] = kNan;
  gate_up0[n + 6] = kNan;
  const auto gate_up = put(gate_up0);
  const auto y = room<float>(rows * n);
  ops_->gate({gate_up.data(), nullptr, DType::F32, y.data(), rows, n});
  const auto got = get(y);
  for (size_t i = 0; i < rows * n; ++i) EXPECT_EQ(std::isnan(got[i]), i == 5 || i == 6) << i;
}

TEST_F(ModelOpsOnDevice, AConversionRoundsToNearestEvenBetweenAllTypes) {
  auto x = normal(1000, 14, 100);
  for (float special : {0.0f, -0.0f, 65519.0f, 65520.0f, 1e-7f, 2.98e-8f, kInf, -kInf, 1.0009765f,
                        1.00048828125f, 1.00390625f, 3e38f})
    x.push_back(special);
  for (DType from : kTypes)
    for (DType to : kTypes) {
      const auto input = put_as(from, x);
      const auto output = room<std::byte>(x.size() * dtype_bytes(to));
      ops_->convert({input.data(), from, output.data(), to, x.size()});
      const auto exact = get_as(from, input), got = get_as(to, output);
      for (size_t i = 0; i < x.size(); ++i)
        EXPECT_EQ(got[i],
                  to == DType::F32 ? exact[i] : oracle::decode(to, oracle::encode(to, exact[i])))
            << dtype_name(from) << " to " << dtype_name(to) << ", element " << i;
    }
  const auto nan = put(std::vector<float>{kNan});
  for (DType to : {DType::F16, DType::BF16}) {
    const auto output = room<std::byte>(2);
    ops_->convert({nan.data(), DType::F32, output.data(), to, 1});
    EXPECT_TRUE(std::isnan(get_as(to, output)[0]));
  }
}

// Rows of one part and of several, with a gap behind each that counts for nothing.
TEST_F(ModelOpsOnDevice, TheLargestElementIsFoundTheFirstOfEqualsAndANanAboveAll) {
  for (const size_t n : {size_t(3000), size_t(20000)}) {
    const size_t last = n - 1, stride = n + 5;
    std::vector<float> x0 = normal(7 * stride, 15);
    const auto row = [&](size_t r) { return x0.data() + r * stride; };
    row(0)[last] = 100;
    row(1)[700] = row(1)[last] = row(1)[1700] = 100;
    std::fill_n(row(2), n, -5.0f);
    row(2)[4] = -4.0f;
    std::fill_n(row(3), n, -0.0f);
    row(3)[9] = 0.0f;  // equal to the others
    row(4)[1000] = row(4)[2000] = kNan;
    row(4)[2] = kInf;
    std::fill_n(row(5), n, -kInf);
    row(6)[last - 1] = kInf;
    for (size_t r = 0; r < 7; ++r) std::fill_n(row(r) + n, 5, kNan);
    const auto x = put(x0);
    const auto best = room<uint64_t>(7);
    ops_->argmax({x.data(), stride, best.data(), 7, n});
    const std::vector<uint64_t> words = get(best);
    const size_t places[] = {last, 700, 4, 0, 1000, 0, last - 1};
    const float values[] = {100, 100, -4, 0, kNan, -kInf, kInf};
    for (size_t r = 0; r < 7; ++r) {
      EXPECT_EQ(cuda::argmax_place(words[r]), places[r]) << "row " << r << " of " << n;
      if (r == 4)
        EXPECT_TRUE(std::isnan(cuda::argmax_value(words[r])));
      else
        EXPECT_EQ(cuda::argmax_value(words[r]), values[r]) << "row " << r << " of " << n;
    }
  }
  EXPECT_NE(thrown_by([&] { ops_->argmax({.rows = 1, .n = 0}); }).find("0 elements"),
            std::string::npos);
}

TEST_F(ModelOpsOnDevice, WhatCannotBeDoneIsRefused) {
  float x = 0;
  EXPECT_NE(thrown_by([&] {
              ops_->convert({&x, DType::I8, &x, DType::F32, 1});
            }).find("I8"),
            std::string::npos);
  EXPECT_NE(thrown_by([&] {
              ops_->rotate_qkv(
                  {.originals = DType::F32, .rows = 1, .heads = 1, .kv_heads = 1, .head_dim = 64});
            }).find("originals of type F32"),
            std::string::npos);
  EXPECT_NE(
      thrown_by([&] { ops_->residual_norm({.x = &x, .y = &x, .rows = 1, .n = 1}); }).find("faults"),
      std::string::npos);
}

}  // namespace
}  // namespace certkv
