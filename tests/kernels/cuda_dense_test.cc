// Dense attention on a device against softmax(q k^T / sqrt(d)) v in float64, written from the
// formula (kernels/cuda/dense_ops.h).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/support/device_ops.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

using cuda::DenseDecode;
using cuda::DenseOps;
using cuda::DensePrefill;
using testing::AllOf;
using testing::HasSubstr;

constexpr double kUnit = 0x1p-24;  // u of FP32
// What one matrix instruction of 16 products may add to the error, in u of the sum of magnitudes
// (as in cuda_linear_test.cc).
constexpr double kInstructionUnits = 24, kInstructionTerms = 16;
// A score meets the scale, log2 e and the reference: 3 roundings and a difference of two scores.
constexpr double kScoreRoundings = 8;
constexpr double kExpError = 0x1p-21;  // the hardware's 2^t (2^-22) and a corrected argument
constexpr double kJoins = 64;          // rescales and merges of partial sums, one rounding each
constexpr uint16_t kPoison = 0x7fff;   // NaN in both 16-bit types
constexpr uint16_t kLargest[] = {0x7f7f, 0x7bff};  // the largest finite BF16 and F16

double unit_of(DType dtype) {  // what rounding to nearest may change, relative
  return dtype == DType::BF16 ? 0x1p-8 : 0x1p-11;
}
double smallest_of(DType dtype) {  // half the distance of its smallest numbers
  return dtype == DType::BF16 ? 0x1p-134 : 0x1p-25;
}

// One query over keys and values.
struct Want {
  std::vector<double> out, tolerance;
};
template <typename Element>
Want attention(DType dtype, size_t dim, size_t tokens, const std::vector<double>& q, Element key,
               Element value) {
  std::vector<double> score(tokens);
  double most = 0;  // of the sums of magnitudes behind a score
  for (size_t t = 0; t < tokens; ++t) {
    double sum = 0, magnitude = 0;
    for (size_t e = 0; e < dim; ++e) {
      sum += q[e] * key(t, e);
      magnitude += std::fabs(q[e] * key(t, e));
    }
    score[t] = sum / std::sqrt(double(dim));
    most = std::max(most, magnitude / std::sqrt(double(dim)));
  }
  const double largest = *std::max_element(score.begin(), score.end());
  double sum = 0;
  for (double& s : score) sum += s = std::exp(s - largest);
  // A score is off by `off`, and so is the reference; a weight by the difference, by its
  // exponential and by its rounding to 16 bits; the sum of weights by the former and by additions.
  const double off =
      most * kUnit * (kInstructionUnits * double(dim) / kInstructionTerms + kScoreRoundings);
  const double weight = std::expm1(2 * off) + kExpError;
  const double additions =
      kUnit *
      (kInstructionUnits * std::ceil(double(tokens) / kInstructionTerms) + double(tokens) + kJoins);
  const double relative = 2 * weight + unit_of(dtype) + additions;
  Want want;
  for (size_t e = 0; e < dim; ++e) {
    double o = 0, magnitude = 0, widest = 0;
    for (size_t t = 0; t < tokens; ++t) {
      o += score[t] * value(t, e);
      magnitude += score[t] * std::fabs(value(t, e));
      widest = std::max(widest, std::fabs(value(t, e)));
    }
    // A weight below the smallest normal 16-bit number rounds by a fixed amount; the sum of
    // weights is at least 1.
    const double flushed = double(tokens) * smallest_of(dtype) * widest;
    const double sums = relative * magnitude / sum + flushed;
    want.out.push_back(o / sum);
    want.tolerance.push_back(sums + unit_of(dtype) * (std::fabs(o / sum) + sums) +
                             smallest_of(dtype));
  }
  return want;
}

struct PrefillShape {
  size_t rows, tokens, heads, kv_heads, dim;
  size_t row_capacity = 0, token_capacity = 0;
};

class DenseOnDevice : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ != nullptr) ops_ = make_test_dense_ops(*device_);
  }
  std::vector<uint16_t> random(DType dtype, size_t count, double scale = 1) {
    std::normal_distribution<double> normal(0, scale);
    std::vector<uint16_t> v(count);
    for (uint16_t& x : v) x = oracle::encode(dtype, normal(bits_));
    return v;
  }

  // heads_first: keys and values lie [kv_heads, tokens, d], queries and output [heads, rows, d].
  void expect_prefill(DType dtype, const PrefillShape& s, bool heads_first) {
    const size_t rows = std::max(s.rows, s.row_capacity),
                 tokens = std::max(s.tokens, s.token_capacity);
    std::vector<uint16_t> q = random(dtype, rows * s.heads * s.dim, 1.5),
                          k = random(dtype, tokens * s.kv_heads * s.dim),
                          v = random(dtype, tokens * s.kv_heads * s.dim);
    DensePrefill a{.dtype = dtype, .rows = s.rows, .tokens = s.tokens};
    a.row_capacity = s.row_capacity;
    a.token_capacity = s.token_capacity;
    a.heads = s.heads;
    a.kv_heads = s.kv_heads;
    a.head_dim = s.dim;
    a.q_row_stride = a.out_row_stride = heads_first ? s.dim : s.heads * s.dim;
    a.q_head_stride = a.out_head_stride = heads_first ? rows * s.dim : s.dim;
    a.k_token_stride = a.v_token_stride = heads_first ? s.dim : s.kv_heads * s.dim;
    a.k_head_stride = a.v_head_stride = heads_first ? tokens * s.dim : s.dim;
    for (size_t h = 0; h < s.heads; ++h)
      for (size_t r = s.rows; r < rows; ++r)
        std::fill_n(&q[r * a.q_row_stride + h * a.q_head_stride], s.dim, kPoison);
    for (size_t g = 0; g < s.kv_heads; ++g)
      for (size_t t = s.tokens; t < tokens; ++t)
        for (auto* m : {&k, &v})
          std::fill_n(&(*m)[t * a.k_token_stride + g * a.k_head_stride], s.dim,
                      m == &k ? kPoison : kLargest[dtype == DType::F16]);
    const auto q_on = put(q), k_on = put(k), v_on = put(v);
    const auto out_on = put(std::vector<uint16_t>(q.size(), kPoison));
    a.q = q_on.data();
    a.k = k_on.data();
    a.v = v_on.data();
    a.out = out_on.data();
    ops_->prefill(a);
    const std::vector<uint16_t> got = get(out_on);
    const std::vector<double>& numbers = oracle::decoded(dtype);
    for (size_t h = 0; h < s.heads; ++h)
      for (size_t r = 0; r < s.rows; ++r) {
        const size_t at = r * a.q_row_stride + h * a.q_head_stride;
        const size_t kv = h / (s.heads / s.kv_heads) * a.k_head_stride;
        std::vector<double> query(s.dim);
        for (size_t e = 0; e < s.dim; ++e) query[e] = oracle::decode(dtype, q[at + e]);
        const auto element = [&](const std::vector<uint16_t>& m) {
          return [&, kv](size_t t, size_t e) { return numbers[m[kv + t * a.k_token_stride + e]]; };
        };
        const Want want =
            attention(dtype, s.dim, s.tokens - s.rows + r + 1, query, element(k), element(v));
        for (size_t e = 0; e < s.dim; ++e)
          ASSERT_LE(std::fabs(oracle::decode(dtype, got[at + e]) - want.out[e]), want.tolerance[e])
              << dtype_name(dtype) << " head " << h << " row " << r << " of " << s.rows << " over "
              << s.tokens << " element " << e << ", head_dim " << s.dim
              << (heads_first ? ", heads first" : "");
      }
  }

  // lengths empty: all sequences have `tokens`, and the device is told no lengths.
  void expect_decode(DType dtype, size_t batch, size_t tokens, size_t capacity,
                     const std::vector<int32_t>& lengths, size_t heads, size_t kv_heads,
                     size_t dim) {
    std::vector<uint16_t> q = random(dtype, batch * heads * dim, 1.5),
                          k = random(dtype, batch * kv_heads * capacity * dim),
                          v = random(dtype, batch * kv_heads * capacity * dim);
    const auto length = [&](size_t b) { return lengths.empty() ? tokens : size_t(lengths[b]); };
    for (size_t b = 0; b < batch; ++b)
      for (size_t g = 0; g < kv_heads; ++g)
        for (auto* m : {&k, &v})
          std::fill_n(&(*m)[((b * kv_heads + g) * capacity + length(b)) * dim],
                      (capacity - length(b)) * dim, kPoison);
    const auto q_on = put(q), k_on = put(k), v_on = put(v);
    const auto out_on = put(std::vector<uint16_t>(q.size(), kPoison));
    const auto lengths_on = put(lengths);
    DenseDecode a{.dtype = dtype, .batch = batch, .tokens = tokens};
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = dim;
    a.q = q_on.data();
    a.k = k_on.data();
    a.v = v_on.data();
    a.kv_head_stride = capacity * dim;
    a.kv_batch_stride = kv_heads * capacity * dim;
    a.lengths = lengths_on.data();
    a.out = out_on.data();
    ops_->decode(a);
    const std::vector<uint16_t> got = get(out_on);
    const std::vector<double>& numbers = oracle::decoded(dtype);
    for (size_t b = 0; b < batch; ++b)
      for (size_t h = 0; h < heads; ++h) {
        const size_t at = (b * heads + h) * dim;
        const size_t kv = (b * kv_heads + h / (heads / kv_heads)) * capacity * dim;
        std::vector<double> query(dim);
        for (size_t e = 0; e < dim; ++e) query[e] = oracle::decode(dtype, q[at + e]);
        const auto element = [&](const std::vector<uint16_t>& m) {
          return [&, kv](size_t t, size_t e) { return numbers[m[kv + t * dim + e]]; };
        };
        const Want want = attention(dtype, dim, length(b), query, element(k), element(v));
        for (size_t e = 0; e < dim; ++e)
          ASSERT_LE(std::fabs(oracle::decode(dtype, got[at + e]) - want.out[e]), want.tolerance[e])
              << dtype_name(dtype) << " sequence " << b << " of " << length(b) << " head " << h
              << " element " << e << ", head_dim " << dim;
      }
  }

  std::mt19937_64 bits_{11};
  std::unique_ptr<DenseOps> ops_;
};

constexpr DType kTypes[] = {DType::BF16, DType::F16};

TEST_F(DenseOnDevice, PrefillIsCausalAttention) {
  for (DType dtype : kTypes)
    for (const PrefillShape& s : {PrefillShape{64, 64, 4, 4, 64}, PrefillShape{130, 130, 8, 2, 128},
                                  PrefillShape{1, 1, 2, 1, 128}, PrefillShape{77, 77, 6, 2, 64}})
      for (bool heads_first : {false, true}) expect_prefill(dtype, s, heads_first);
}

TEST_F(DenseOnDevice, PrefillOfAChunkSeesWhatCameBefore) {
  for (DType dtype : kTypes)
    for (const PrefillShape& s : {PrefillShape{32, 200, 4, 1, 128}, PrefillShape{1, 97, 8, 2, 128},
                                  PrefillShape{129, 131, 4, 2, 64}})
      expect_prefill(dtype, s, s.rows % 2 == 0);
}

TEST_F(DenseOnDevice, PrefillUsesNothingBeyondItsRowsAndTokens) {
  for (DType dtype : kTypes)
    for (const PrefillShape& s :
         {PrefillShape{50, 140, 4, 2, 128, 64, 256}, PrefillShape{64, 64, 4, 1, 64, 64, 300},
          PrefillShape{1, 1, 4, 2, 128, 64, 256}, PrefillShape{60, 250, 4, 2, 128, 64, 256}})
      expect_prefill(dtype, s, s.rows % 4 == 0);
}

// Equal scores and value t one-hot at element t: what a row does not see is exactly zero.
TEST_F(DenseOnDevice, PrefillHidesExactlyTheTokensToCome) {
  constexpr size_t kRows = 40, kTokens = 100, kDim = 128;
  const std::vector<uint16_t> zeros(kRows * kDim), keys(kTokens * kDim);
  std::vector<uint16_t> values(kTokens * kDim);
  for (size_t t = 0; t < kTokens; ++t) values[t * kDim + t] = oracle::encode(DType::F16, 1);
  const auto q = put(zeros), k = put(keys), v = put(values), out = put(zeros);
  DensePrefill a{.dtype = DType::F16, .rows = kRows, .tokens = kTokens};
  a.heads = a.kv_heads = 1;
  a.head_dim = a.q_row_stride = a.k_token_stride = a.v_token_stride = a.out_row_stride = kDim;
  a.q_head_stride = a.out_head_stride = kRows * kDim;
  a.k_head_stride = a.v_head_stride = kTokens * kDim;
  a.q = q.data();
  a.k = k.data();
  a.v = v.data();
  a.out = out.data();
  ops_->prefill(a);
  const std::vector<uint16_t> got = get(out);
  for (size_t r = 0; r < kRows; ++r)
    for (size_t e = 0; e < kDim; ++e) {
      const double o = oracle::decode(DType::F16, got[r * kDim + e]);
      if (e < kTokens - kRows + r + 1)
        ASSERT_GT(o, 0.5 / double(kTokens)) << r << " " << e;
      else
        ASSERT_EQ(o, 0) << r << " " << e;
    }
}

TEST_F(DenseOnDevice, DecodeIsAttentionOverTheCache) {
  for (DType dtype : kTypes) {
    expect_decode(dtype, 1, 96, 96, {}, 8, 2, 128);
    expect_decode(dtype, 3, 130, 160, {}, 4, 4, 64);
    expect_decode(dtype, 1, 1, 8, {}, 4, 1, 128);
    expect_decode(dtype, 2, 1500, 1536, {}, 4, 1, 128);
  }
}

TEST_F(DenseOnDevice, DecodeStopsAtEachLength) {
  for (DType dtype : kTypes) {
    expect_decode(dtype, 4, 256, 256, {1, 63, 200, 256}, 8, 2, 128);
    expect_decode(dtype, 2, 192, 320, {190, 7}, 6, 2, 64);
    expect_decode(dtype, 2, 2048, 2048, {1030, 5}, 4, 1, 128);
  }
}

TEST_F(DenseOnDevice, DecodeReadsItsLengthsWhenItRuns) {
  constexpr size_t kDim = 128, kTokens = 128;
  const auto q = put(std::vector<uint16_t>(kDim)), k = put(std::vector<uint16_t>(kTokens * kDim));
  std::vector<uint16_t> values(kTokens * kDim);
  for (size_t t = 0; t < kTokens; ++t) values[t * kDim + t] = oracle::encode(DType::BF16, 1);
  const auto v = put(values), out = put(std::vector<uint16_t>(kDim));
  const auto length = put(std::vector<int32_t>{1});
  DenseDecode a{.dtype = DType::BF16,
                .batch = 1,
                .tokens = kTokens,
                .heads = 1,
                .kv_heads = 1,
                .head_dim = kDim,
                .q = q.data(),
                .k = k.data(),
                .v = v.data(),
                .kv_batch_stride = kTokens * kDim,
                .kv_head_stride = kTokens * kDim,
                .lengths = length.data(),
                .out = out.data()};
  for (int32_t n : {1, 2, 65, 128}) {
    device_->copy(length.data(), &n, sizeof n);
    ops_->decode(a);
    const std::vector<uint16_t> got = get(out);
    for (size_t e = 0; e < kDim; ++e)
      ASSERT_EQ(oracle::decode(DType::BF16, got[e]) > 0, e < size_t(n)) << n << " " << e;
  }
}

TEST_F(DenseOnDevice, SaysWhichArgumentIsWrong) {
  const auto x = put(std::vector<uint16_t>(4096));
  const uint16_t* at = x.data();
  DensePrefill good{.dtype = DType::F16, .rows = 2, .tokens = 3};
  good.heads = 4;
  good.kv_heads = 2;
  good.head_dim = good.q_head_stride = good.k_head_stride = good.v_head_stride =
      good.out_head_stride = 64;
  good.q_row_stride = good.out_row_stride = 256;
  good.k_token_stride = good.v_token_stride = 128;
  good.q = good.k = good.v = at;
  good.out = x.data() + 2048;
  EXPECT_EQ(thrown_by([&] { ops_->prepare(good); }), "");
  const auto prefill = [&](auto change) {
    DensePrefill a = good;
    change(a);
    const std::string once = thrown_by([&] { ops_->prepare(a); });
    EXPECT_EQ(thrown_by([&] { ops_->prefill(a); }), once);
    return once;
  };
  using P = DensePrefill;
  EXPECT_THAT(prefill([](P& a) { a.dtype = DType::F32; }),
              AllOf(HasSubstr("InvalidArgument"), HasSubstr("prefill: dtype is F32")));
  EXPECT_THAT(prefill([](P& a) { a.rows = 0; }), HasSubstr("rows is 0"));
  EXPECT_THAT(prefill([](P& a) { a.rows = 4; }), HasSubstr("tokens is 3: at least rows, 4"));
  EXPECT_THAT(prefill([](P& a) { a.row_capacity = 1; }), HasSubstr("row_capacity is 1"));
  EXPECT_THAT(prefill([](P& a) { a.token_capacity = 2; }), HasSubstr("token_capacity is 2"));
  EXPECT_THAT(prefill([](P& a) { a.kv_heads = 3; }), HasSubstr("multiple of kv_heads, 3"));
  EXPECT_THAT(prefill([](P& a) { a.head_dim = 96; }), HasSubstr("head_dim is 96"));
  EXPECT_THAT(prefill([](P& a) { a.v = nullptr; }), HasSubstr("v is null"));
  EXPECT_THAT(prefill([&](P& a) { a.k = at + 1; }), HasSubstr("k is not aligned to 16 bytes"));
  EXPECT_THAT(prefill([](P& a) { a.k_token_stride = 32; }), HasSubstr("k_token_stride is 32"));
  EXPECT_THAT(prefill([](P& a) { a.out_row_stride = 257; }),
              HasSubstr("out_row_stride is 257: a multiple of 8"));

  DenseDecode step{.dtype = DType::BF16,
                   .batch = 1,
                   .tokens = 4,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = 64,
                   .q = at,
                   .k = at,
                   .v = at,
                   .kv_batch_stride = 512,
                   .kv_head_stride = 256,
                   .out = x.data() + 2048};
  EXPECT_EQ(thrown_by([&] { ops_->prepare(step); }), "");
  const auto decode = [&](auto change) {
    DenseDecode a = step;
    change(a);
    const std::string once = thrown_by([&] { ops_->prepare(a); });
    EXPECT_EQ(thrown_by([&] { ops_->decode(a); }), once);
    return once;
  };
  using D = DenseDecode;
  EXPECT_THAT(decode([](D& a) { a.batch = 0; }), HasSubstr("decode: batch is 0"));
  EXPECT_THAT(decode([](D& a) { a.tokens = 0; }), HasSubstr("tokens is 0"));
  EXPECT_THAT(decode([](D& a) { a.heads = 5; }), HasSubstr("heads is 5"));
  EXPECT_THAT(decode([](D& a) { a.kv_head_stride = 248; }), HasSubstr("kv_head_stride is 248"));
  EXPECT_THAT(decode([](D& a) { a.kv_batch_stride = 8; }), HasSubstr("kv_batch_stride is 8"));
  EXPECT_THAT(decode([](D& a) { a.q = nullptr; }), HasSubstr("q is null"));
}

}  // namespace
}  // namespace certkv
