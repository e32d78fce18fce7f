#include "kernels/base/error.h"
#include "kernels/cuda/linear_ops.h"

namespace certkv::cuda {
namespace {

double element(DType dtype, const void* at, size_t i) {
  if (dtype == DType::F32) return static_cast<const float*>(at)[i];
  return float_from_16(dtype, static_cast<const uint16_t*>(at)[i]);
}

class EmulatedLinear final : public LinearOps {
 public:
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
};

}  // namespace

std::unique_ptr<LinearOps> make_emulated_linear_ops(Device& device) {
  CERTKV_EXPECT(device.emulated(), InvalidArgument,
                "emulated products were asked for on {}: they read host memory", device.name());
  return std::make_unique<EmulatedLinear>();
}

}  // namespace certkv::cuda
