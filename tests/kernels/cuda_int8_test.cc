// Products with 8-bit weights on a device against sums in float64 over code times scale
// (kernels/cuda/int8_args.h). In emulation here, on a GPU in tests/gpu.
#include <gmock/gmock.h>
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
using cuda::Int8Product;
using testing::HasSubstr;

constexpr double kUnit = 0x1p-24;  // u of FP32

// UNITS: of sum_i |x_i code_i scale|, which bounds every partial sum times the scale.
// Few rows: a thread adds 16 products in turn for every 4096 columns, each fused; then at most 32
// and 64 sums are joined, and the scale multiplies: one rounding each.
// Many rows: as LinearProduct's (tests/kernels/cuda_linear_test.cc): products of 16-bit numbers are
// exact, and every 16 may add 24 u; FP32 products round. Then the scale.
double relative_tolerance(DType dtype, size_t rows, size_t in) {
  const double few = 16 * std::ceil(double(in) / 4096) + 32 + 64 + 1;
  const double many = (dtype == DType::F32 ? double(in) + 1 : 24 * std::ceil(double(in) / 16)) + 65;
  const double roundings = rows <= cuda::kInt8MostRows ? few : many;
  return roundings * kUnit / (1 - roundings * kUnit);
}

struct Shape {
  size_t rows, out, in, x_gap, y_gap, workspace_outputs;
};

class Int8OnDevice : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ != nullptr) ops_ = make_test_linear_ops(*device_);
  }

  struct Case {
    DType dtype;
    Shape shape;
    std::vector<int8_t> codes;
    std::vector<float> scales;
    std::vector<double> x;  // [rows, in], as rounded to dtype
  };
  Case random_case(DType dtype, const Shape& s) {
    Case c{dtype, s, {}, {}, {}};
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < s.out * s.in; ++i) c.codes.push_back(int8_t(int(bits_() % 255) - 127));
    for (size_t o = 0; o < s.out; ++o) c.scales.push_back(float(std::exp(normal(bits_) - 4)));
    for (size_t i = 0; i < s.rows * s.in; ++i) c.x.push_back(rounded(dtype, normal(bits_)));
    return c;
  }
  static double rounded(DType dtype, double x) {
    return dtype == DType::F32 ? double(float(x)) : oracle::decode(dtype, oracle::encode(dtype, x));
  }
  // y with gaps of 7s.
  std::vector<float> run(const Case& c) {
    const Shape& s = c.shape;
    const size_t x_stride = s.in + s.x_gap, y_stride = s.out + s.y_gap,
                 width = dtype_bytes(c.dtype);
    std::vector<std::byte> input(s.rows * x_stride * width, std::byte(0xff));  // NaN in the gaps
    for (size_t r = 0; r < s.rows; ++r)
      for (size_t i = 0; i < s.in; ++i) {
        const float f = float(c.x[r * s.in + i]);
        const uint16_t h = c.dtype == DType::F32 ? uint16_t(0) : oracle::encode(c.dtype, double(f));
        const void* from = c.dtype == DType::F32 ? static_cast<const void*>(&f) : &h;
        std::memcpy(&input[(r * x_stride + i) * width], from, width);
      }
    const auto codes = put(c.codes);
    const auto scales = put(c.scales);
    const auto x = put(input);
    const auto y = put(std::vector<float>(s.rows * y_stride, 7.0f));
    const DeviceArray<std::byte> workspace(*device_, s.workspace_outputs * s.in * width + 16,
                                           "a test's array");
    ops_->linear(Int8Product{.codes = codes.data(),
                             .scales = scales.data(),
                             .dtype = c.dtype,
                             .out = s.out,
                             .in = s.in,
                             .x = x.data(),
                             .x_stride = x_stride,
                             .y = y.data(),
                             .y_stride = y_stride,
                             .rows = s.rows,
                             .workspace = workspace.data(),
                             .workspace_bytes = s.workspace_outputs * s.in * width});
    return get(y);
  }

  std::mt19937_64 bits_{11};
  std::unique_ptr<cuda::LinearOps> ops_;
};

// Rows of every template and reading, columns beyond whole loads and beyond one load a thread,
// outputs beyond whole blocks; workspaces of all outputs and of some.
const Shape kShapes[] = {{1, 1, 1, 0, 0, 1},     {1, 96, 64, 0, 0, 1},     {2, 37, 29, 0, 0, 1},
                         {3, 130, 257, 3, 5, 1}, {4, 18, 4096, 0, 0, 1},   {5, 33, 4112, 16, 1, 1},
                         {8, 64, 1000, 8, 8, 1}, {9, 21, 768, 0, 0, 1},    {16, 70, 8208, 0, 3, 1},
                         {17, 64, 96, 8, 0, 64}, {40, 300, 80, 0, 4, 129}, {130, 72, 128, 0, 0, 5},
                         {1, 6, 14336, 0, 0, 1}, {8, 4, 160, 1, 0, 1}};

TEST_F(Int8OnDevice, IsTheProductOfCodesAndScales) {
  for (DType dtype : {DType::BF16, DType::F16, DType::F32})
    for (const Shape& s : kShapes) {
      const Case c = random_case(dtype, s);
      const std::vector<float> y = run(c);
      const size_t y_stride = s.out + s.y_gap;
      for (size_t r = 0; r < s.rows; ++r) {
        for (size_t o = 0; o < s.out; ++o) {
          double sum = 0, magnitude = 0;
          for (size_t i = 0; i < s.in; ++i) {
            const double term =
                c.x[r * s.in + i] * double(c.codes[o * s.in + i]) * double(c.scales[o]);
            sum += term;
            magnitude += std::fabs(term);
          }
          ASSERT_LE(std::fabs(double(y[r * y_stride + o]) - sum),
                    relative_tolerance(dtype, s.rows, s.in) * magnitude)
              << dtype_name(dtype) << " row " << r << " output " << o << " of [" << s.rows << ", "
              << s.out << "] from " << s.in;
        }
        for (size_t g = s.out; g < y_stride; ++g)
          ASSERT_EQ(y[r * y_stride + g], 7.0f) << "written beyond row " << r;
      }
    }
}

TEST_F(Int8OnDevice, EveryCodeIsItself) {
  Case c{DType::BF16, {1, 256, 16, 0, 0, 1}, {}, {}, std::vector<double>(16, 0.0)};
  c.x[5] = 1;
  for (int code = -128; code < 128; ++code) {
    for (int i = 0; i < 16; ++i) c.codes.push_back(int8_t(i == 5 ? code : 99));
    c.scales.push_back(0.5f);
  }
  for (size_t rows : {1u, 17u}) {  // both ways
    c.shape.rows = rows;
    c.shape.workspace_outputs = 256;
    c.x.resize(rows * 16, 0.0);
    const std::vector<float> y = run(c);
    for (int code = -128; code < 128; ++code)
      EXPECT_EQ(y[size_t(code + 128)], 0.5f * float(code)) << rows << " rows";
  }
}

TEST_F(Int8OnDevice, ARowOfAReadingDoesNotDependOnTheOthers) {
  const Case all = random_case(DType::BF16, {8, 50, 4500, 0, 0, 1});
  const std::vector<float> y = run(all);
  Case other = all;  // 5 rows take the same kernel as 8
  other.shape.rows = 5;
  std::fill(other.x.begin() + 4 * 4500, other.x.end(), 1e30);
  const std::vector<float> some = run(other);
  for (size_t r = 0; r < 4; ++r)
    for (size_t o = 0; o < 50; ++o) ASSERT_EQ(some[r * 50 + o], y[r * 50 + o]) << r << " " << o;
}

TEST_F(Int8OnDevice, KeepsANanInItsRow) {
  for (size_t rows : {3u, 20u}) {
    Case c = random_case(DType::BF16, {rows, 24, 48, 0, 0, 24});
    c.x[48 + 17] = std::numeric_limits<double>::quiet_NaN();
    const std::vector<float> y = run(c);
    for (size_t r = 0; r < rows; ++r)
      for (size_t o = 0; o < 24; ++o) EXPECT_EQ(std::isnan(y[r * 24 + o]), r == 1) << r << " " << o;
  }
}

TEST_F(Int8OnDevice, SaysWhichArgumentIsWrong) {
  const auto x = put(std::vector<float>(64));
  const auto codes = put(std::vector<int8_t>(64));
  const Int8Product good{.codes = codes.data(),
                         .scales = x.data(),
                         .dtype = DType::F32,
                         .out = 4,
                         .in = 8,
                         .x = x.data(),
                         .x_stride = 8,
                         .y = x.data(),
                         .y_stride = 4,
                         .rows = 2};
  const auto refused = [&](auto change) {
    Int8Product p = good;
    change(p);
    return thrown_by([&] { ops_->linear(p); });
  };
  using P = Int8Product;
  EXPECT_THAT(refused([](P& p) { p.dtype = DType::I8; }), HasSubstr("dtype is I8"));
  EXPECT_THAT(refused([](P& p) { p.codes = nullptr; }), HasSubstr("codes is null"));
  EXPECT_THAT(refused([](P& p) { p.scales = nullptr; }), HasSubstr("scales is null"));
  EXPECT_THAT(refused([](P& p) { p.x_stride = 7; }), HasSubstr("x_stride is 7"));
  EXPECT_THAT(refused([](P& p) { p.rows = 17; }), HasSubstr("workspace is null"));
  EXPECT_THAT(refused([&](P& p) {
                p.rows = 17;
                p.workspace = const_cast<float*>(x.data());
                p.workspace_bytes = 31;
              }),
              HasSubstr("a workspace of 31 bytes: 32 are needed"));
}

}  // namespace
}  // namespace certkv
