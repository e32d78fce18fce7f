// Products with weights on a device against sums in float64 (kernels/cuda/linear_ops.h).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cuda/shared_library.h"
#include "tests/support/device_ops.h"
#include "tests/support/oracle.h"

namespace certkv {
namespace {

using cuda::LinearOps;
using cuda::LinearProduct;
using testing::AllOf;
using testing::HasSubstr;

constexpr double kUnit = 0x1p-24;  // u of FP32
// What one matrix instruction of 16 products may add to the error, in u of the sum of magnitudes:
// aligned to the largest exponent and cut there, at least 23 bits kept of each of 17 terms, and
// once more for the result. tests/gpu/lanes_gpu_test.cc measures less.
constexpr double kInstructionUnits = 24, kInstructionTerms = 16;
// Partial sums of a split over `in` are joined in FP32, at most this many.
constexpr double kJoins = 64;

// UNITS: of sum_i |x_i w_i|, which bounds every partial sum. 16-bit products are exact in FP32; an
// FP32 product rounds once, and each of in - 1 additions rounds a partial sum.
double relative_tolerance(DType dtype, size_t in) {
  const double additions =
      dtype == DType::F32 ? double(in) + kJoins + 1
                          : kInstructionUnits * std::ceil(double(in) / kInstructionTerms) + kJoins;
  return additions * kUnit / (1 - additions * kUnit);
}

struct Shape {
  size_t rows, out, in, x_gap, y_gap;
};

// A matrix with gaps between its rows, as bytes of its type.
struct Matrix {
  Matrix(DType type, size_t row_count, size_t width, size_t row_stride)
      : dtype(type),
        rows(row_count),
        stride(row_stride),
        bytes(row_count * row_stride * dtype_bytes(type), std::byte(0xff)) {
    CERTKV_EXPECT(width <= stride, InvalidArgument, "rows overlap");
  }
  double at(size_t r, size_t i) const {
    if (dtype == DType::F32) {
      float f = 0;
      std::memcpy(&f, &bytes[(r * stride + i) * 4], 4);
      return f;
    }
    uint16_t h = 0;
    std::memcpy(&h, &bytes[(r * stride + i) * 2], 2);
    return oracle::decode(dtype, h);
  }
  void set(size_t r, size_t i, double value) {
    if (dtype == DType::F32) {
      const float f = float(value);
      std::memcpy(&bytes[(r * stride + i) * 4], &f, 4);
      return;
    }
    const uint16_t h = oracle::encode(dtype, value);
    std::memcpy(&bytes[(r * stride + i) * 2], &h, 2);
  }
  DType dtype;
  size_t rows, stride;
  std::vector<std::byte> bytes;
};

class LinearOnDevice : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ != nullptr) ops_ = make_test_linear_ops(*device_);
  }
  Matrix random(DType dtype, size_t rows, size_t width, size_t stride) {
    Matrix m(dtype, rows, width, stride);
    std::normal_distribution<double> normal;
    for (size_t r = 0; r < rows; ++r)
      for (size_t i = 0; i < width; ++i) m.set(r, i, normal(bits_));
    return m;
  }
  // What the device makes of it. y: its contents before.
  Matrix run(const Matrix& w, const Matrix& x, const Matrix& y, size_t out, size_t in,
             bool accumulate) {
    const auto weight = put(w.bytes), input = put(x.bytes), output = put(y.bytes);
    ops_->linear({.weight = weight.data(),
                  .dtype = w.dtype,
                  .out = out,
                  .in = in,
                  .x = input.data(),
                  .x_stride = x.stride,
                  .y = reinterpret_cast<float*>(output.data()),
                  .y_stride = y.stride,
                  .rows = x.rows,
                  .accumulate = accumulate});
    Matrix result = y;
    result.bytes = get(output);
    return result;
  }
  // The same product in float64, element by element.
  void expect_product(DType dtype, const Shape& s, bool accumulate) {
    const Matrix w = random(dtype, s.out, s.in, s.in);
    const Matrix x = random(dtype, s.rows, s.in, s.in + s.x_gap);
    Matrix y(DType::F32, s.rows, s.out, s.out + s.y_gap);
    if (accumulate) y = random(DType::F32, s.rows, s.out, s.out + s.y_gap);
    const Matrix got = run(w, x, y, s.out, s.in, accumulate);
    for (size_t r = 0; r < s.rows; ++r) {
      for (size_t o = 0; o < s.out; ++o) {
        double sum = 0, magnitude = 0;
        for (size_t i = 0; i < s.in; ++i) {
          sum += x.at(r, i) * w.at(o, i);
          magnitude += std::fabs(x.at(r, i) * w.at(o, i));
        }
        const double before = accumulate ? y.at(r, o) : 0;
        const double want = before + sum;
        const double tolerance = relative_tolerance(dtype, s.in) * magnitude +
                                 4 * kUnit * (std::fabs(before) + std::fabs(sum));
        ASSERT_LE(std::fabs(got.at(r, o) - want), tolerance)
            << dtype_name(dtype) << " row " << r << " output " << o << " of [" << s.rows << ", "
            << s.out << "] from " << s.in;
      }
      const size_t gap = (r * y.stride + s.out) * 4;
      ASSERT_EQ(std::memcmp(&got.bytes[gap], &y.bytes[gap], s.y_gap * 4), 0)
          << "written beyond row " << r;
    }
  }

  std::mt19937_64 bits_{7};
  std::unique_ptr<LinearOps> ops_;
};

const Shape kShapes[] = {{1, 1, 1, 0, 0},     {1, 96, 64, 0, 0},    {3, 37, 29, 0, 0},
                         {4, 130, 257, 3, 5}, {17, 64, 1000, 8, 8}, {130, 72, 128, 0, 0},
                         {2, 512, 768, 0, 0}};

TEST_F(LinearOnDevice, IsTheProduct) {
  for (DType dtype : {DType::BF16, DType::F16, DType::F32})
    for (const Shape& s : kShapes) expect_product(dtype, s, false);
}

TEST_F(LinearOnDevice, AddsToWhatIsThere) {
  for (DType dtype : {DType::BF16, DType::F16, DType::F32})
    for (const Shape& s : kShapes) expect_product(dtype, s, true);
}

TEST_F(LinearOnDevice, IsTheSameTwice) {
  const Matrix w = random(DType::BF16, 256, 512, 512), x = random(DType::BF16, 4, 512, 512);
  const Matrix y(DType::F32, 4, 256, 256);
  EXPECT_EQ(run(w, x, y, 256, 512, false).bytes, run(w, x, y, 256, 512, false).bytes);
}

TEST_F(LinearOnDevice, KeepsANanInItsRow) {
  const Matrix w = random(DType::F16, 24, 40, 40);
  Matrix x = random(DType::F16, 3, 40, 40);
  x.set(1, 17, std::numeric_limits<double>::quiet_NaN());
  const Matrix got = run(w, x, Matrix(DType::F32, 3, 24, 24), 24, 40, false);
  for (size_t o = 0; o < 24; ++o) {
    EXPECT_TRUE(std::isfinite(got.at(0, o))) << o;
    EXPECT_TRUE(std::isnan(got.at(1, o))) << o;
    EXPECT_TRUE(std::isfinite(got.at(2, o))) << o;
  }
}

TEST_F(LinearOnDevice, NarrowsToTheNearest) {
  std::vector<float> from = {
      0.0f,  -0.0f,   1.0f,    -1.5f,    65504.0f,       65520.0f,
      1e-8f, 6.1e-5f, 3.4e38f, -3.4e38f, 2.0f + 0x1p-9f, std::numeric_limits<float>::infinity()};
  for (int i = 0; i < 5000; ++i)
    from.push_back(std::ldexp(float(int64_t(bits_()) * 0x1p-63), int(bits_() % 60) - 30));
  for (DType dtype : {DType::BF16, DType::F16}) {
    const auto source = put(from);
    const cuda::DeviceArray<uint16_t> to(*device_, from.size() + 1, "narrowed");
    ops_->narrow(dtype, source.data(), to.data(), from.size());
    const std::vector<uint16_t> got = get(to);
    for (size_t i = 0; i < from.size(); ++i)
      ASSERT_EQ(got[i], oracle::encode(dtype, double(from[i]))) << dtype_name(dtype) << from[i];
  }
  const auto nan = put(std::vector<float>{std::numeric_limits<float>::quiet_NaN()});
  const cuda::DeviceArray<uint16_t> to(*device_, 1, "narrowed");
  ops_->narrow(DType::F16, nan.data(), to.data(), 1);
  EXPECT_TRUE(std::isnan(oracle::decode(DType::F16, get(to)[0])));
}

TEST_F(LinearOnDevice, SaysWhichArgumentIsWrong) {
  const auto x = put(std::vector<float>(64)), w = put(std::vector<float>(64)),
             y = put(std::vector<float>(64));
  const LinearProduct good{.weight = w.data(),
                           .dtype = DType::F32,
                           .out = 4,
                           .in = 8,
                           .x = x.data(),
                           .x_stride = 8,
                           .y = y.data(),
                           .y_stride = 4,
                           .rows = 2};
  EXPECT_EQ(thrown_by([&] { ops_->prepare(good); }), "");
  const auto refused = [&](auto change) {
    LinearProduct p = good;
    change(p);
    const std::string once = thrown_by([&] { ops_->prepare(p); });
    EXPECT_EQ(thrown_by([&] { ops_->linear(p); }), once);
    return once;
  };
  using P = LinearProduct;
  EXPECT_THAT(refused([](P& p) { p.dtype = DType::I8; }),
              AllOf(HasSubstr("InvalidArgument"), HasSubstr("dtype is I8")));
  EXPECT_THAT(refused([](P& p) { p.rows = 0; }), HasSubstr("rows is 0"));
  EXPECT_THAT(refused([](P& p) { p.out = 0; }), HasSubstr("out is 0"));
  EXPECT_THAT(refused([](P& p) { p.in = 0; }), HasSubstr("in is 0"));
  EXPECT_THAT(refused([](P& p) { p.x_stride = 7; }), HasSubstr("x_stride is 7"));
  EXPECT_THAT(refused([](P& p) { p.y_stride = 3; }), HasSubstr("y_stride is 3"));
  EXPECT_THAT(refused([](P& p) { p.x = nullptr; }), HasSubstr("x is null"));
  EXPECT_THAT(refused([](P& p) { p.weight = nullptr; }), HasSubstr("weight is null"));
  EXPECT_THAT(refused([](P& p) { p.y = nullptr; }), HasSubstr("y is null"));
  EXPECT_THAT(refused([&](P& p) { p.x = reinterpret_cast<const std::byte*>(x.data()) + 2; }),
              HasSubstr("x is not aligned to 4 bytes"));
  EXPECT_THAT(thrown_by([&] { ops_->narrow(DType::F32, x.data(), nullptr, 1); }),
              HasSubstr("dtype is F32"));
  EXPECT_THAT(thrown_by([&] { ops_->narrow(DType::F16, x.data(), nullptr, 1); }),
              HasSubstr("to is null"));
}

TEST(SharedLibrary, NamesWhatIsMissing) {
  const std::vector<std::string> sonames = {"libcertkv_nowhere.so.1", "libcertkv_nowhere.so.2"};
  EXPECT_THAT(
      thrown_by([&] { cuda::SharedLibrary("Nowhere", "products with weights on a GPU", sonames); }),
      AllOf(HasSubstr("DeviceError"), HasSubstr("Nowhere is needed for products"),
            HasSubstr("libcertkv_nowhere.so.1 ("), HasSubstr("libcertkv_nowhere.so.2 (")));
  // The C library answers everywhere; what it lacks is named.
  const std::vector<std::string> libc = {"libc.so.6"};
  const cuda::SharedLibrary found("the C library", "a test", libc);
  size_t (*length)(const char*) = nullptr;
  found.find(&length, "strlen");
  EXPECT_EQ(length("four"), 4u);
  EXPECT_THAT(thrown_by([&] { found.find(&length, "certkv_no_such_function"); }),
              AllOf(HasSubstr("DeviceError"), HasSubstr("libc.so.6"),
                    HasSubstr("no function certkv_no_such_function")));
}

}  // namespace
}  // namespace certkv
