#include <cstring>
#include <memory>

#include "kernels/base/error.h"
#include "kernels/cuda/int8_body.h"
#include "kernels/cuda/linear_ops.h"

namespace certkv::cuda {
namespace {

double element(DType dtype, const void* at, size_t i) {
  if (dtype == DType::F32) return static_cast<const float*>(at)[i];
  return float_from_16(dtype, static_cast<const uint16_t*>(at)[i]);
}

struct EmulateInt8 {
  const Int8Product& product;

  template <DType X, int R>
  void operator()(size_t first_row) const {
    using Block = Int8Block<X, R>;
    const auto shared = std::make_unique<typename Block::Shared>();
    for (size_t o = 0; o < product.out; o += kInt8Outputs) {
      std::memset(shared.get(), 0xff, sizeof(typename Block::Shared));  // all NaN
      Block{product, o, first_row, *shared}.run(BlockThreads{});
    }
  }
};

class EmulatedLinear final : public LinearOps {
 public:
  using LinearOps::linear;
  std::string name() const override { return "emulated products"; }

  void prepare(const LinearProduct& p) override { check_linear(p); }

  void linear(const LinearProduct& p) override {
    check_linear(p);
    for (size_t r = 0; r < p.rows; ++r)
      for (size_t o = 0; o < p.out; ++o) {
        float& y = p.y[r * p.y_stride + o];
        double sum = p.accumulate ? double(y) : 0.0;
        for (size_t i = 0; i < p.in; ++i)
          sum +=
              element(p.dtype, p.x, r * p.x_stride + i) * element(p.dtype, p.weight, o * p.in + i);
        y = float(sum);
      }
  }

  void narrow(DType dtype, const float* from, uint16_t* to, size_t count) override {
    check_narrow(dtype, from, to, count);
    for (size_t i = 0; i < count; ++i) to[i] = float_to_16(dtype, from[i]);
  }

 private:
  void int8_rows(const Int8Product& p) override { int8_readings(p, EmulateInt8{p}); }
  void int8_unpack(const Int8Unpack& a) override {
    for (uint64_t i = 0; i < a.count; ++i) unpack_element(a, i);
  }
  void int8_scale(const Int8Scale& a) override {
    for (size_t r = 0; r < a.rows; ++r)
      for (size_t i = 0; i < a.out; ++i) scale_element(a, r, i);
  }
};

}  // namespace

std::unique_ptr<LinearOps> make_emulated_linear_ops(Device& device) {
  CERTKV_EXPECT(device.emulated(), InvalidArgument,
                "emulated products were asked for on {}: they read host memory", device.name());
  return std::make_unique<EmulatedLinear>();
}

}  // namespace certkv::cuda
