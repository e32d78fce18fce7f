#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cuda/dense_ops.h"

namespace certkv::cuda {
namespace {

// One query over `tokens` keys and values of one KV head, stride elements apart.
class Attention {
 public:
  Attention(DType dtype, size_t head_dim) : dtype_(dtype), dim_(head_dim) {}

  void operator()(const uint16_t* q, const uint16_t* k, size_t k_stride, const uint16_t* v,
                  size_t v_stride, size_t tokens, uint16_t* out) {
    weight_.resize(tokens);
    double largest = -std::numeric_limits<double>::infinity();
    for (size_t t = 0; t < tokens; ++t) {
      double score = 0;
      for (size_t e = 0; e < dim_; ++e) score += value(q[e]) * value(k[t * k_stride + e]);
      weight_[t] = score / std::sqrt(double(dim_));
      largest = std::max(largest, weight_[t]);
    }
    double sum = 0;
    for (double& w : weight_) sum += w = std::exp(w - largest);
    for (size_t e = 0; e < dim_; ++e) {
      double o = 0;
      for (size_t t = 0; t < tokens; ++t) o += weight_[t] * value(v[t * v_stride + e]);
      out[e] = float_to_16(dtype_, float(o / sum));
    }
  }

 private:
  double value(uint16_t bits) const { return float_from_16(dtype_, bits); }

  DType dtype_;
  size_t dim_;
  std::vector<double> weight_;
};

class EmulatedDense final : public DenseOps {
 public:
  std::string name() const override { return "emulated dense attention"; }
  void prepare(const DensePrefill& a) override { check_dense(a); }
  void prepare(const DenseDecode& a) override { check_dense(a); }

  void prefill(const DensePrefill& a) override {
    check_dense(a);
    Attention attention(a.dtype, a.head_dim);
    for (size_t r = 0; r < a.rows; ++r)
      for (size_t h = 0; h < a.heads; ++h) {
        const size_t g = h / (a.heads / a.kv_heads);
        attention(a.q + r * a.q_row_stride + h * a.q_head_stride, a.k + g * a.k_head_stride,
                  a.k_token_stride, a.v + g * a.v_head_stride, a.v_token_stride,
                  a.tokens - a.rows + r + 1, a.out + r * a.out_row_stride + h * a.out_head_stride);
      }
  }

  void decode(const DenseDecode& a) override {
    check_dense(a);
    Attention attention(a.dtype, a.head_dim);
    for (size_t b = 0; b < a.batch; ++b) {
      const int32_t length = a.lengths == nullptr ? int32_t(a.tokens) : a.lengths[b];
      CERTKV_EXPECT(length >= 1 && size_t(length) <= a.tokens, InvalidArgument,
                    "dense decode: lengths[{}] is {}: 1 to {} is needed", b, length, a.tokens);
      for (size_t h = 0; h < a.heads; ++h) {
        const size_t g = h / (a.heads / a.kv_heads);
        const size_t kv = b * a.kv_batch_stride + g * a.kv_head_stride;
        const size_t row = (b * a.heads + h) * a.head_dim;
        attention(a.q + row, a.k + kv, a.head_dim, a.v + kv, a.head_dim, size_t(length),
                  a.out + row);
      }
    }
  }
};

}  // namespace

std::unique_ptr<DenseOps> make_emulated_dense_ops(Device& device) {
  CERTKV_EXPECT(device.emulated(), InvalidArgument,
                "emulated dense attention was asked for on {}: it reads host memory",
                device.name());
  return std::make_unique<EmulatedDense>();
}

}  // namespace certkv::cuda
