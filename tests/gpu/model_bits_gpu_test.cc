// The operations on rows give the same bits on a GPU as in emulation.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/support/device_ops.h"

namespace certkv {
namespace {

class ModelBits : public OnTestDevice {};

// Runs everything on one device with the same inputs; returns all bytes it made.
std::vector<std::byte> run(cuda::Device& device, cuda::ModelOps& ops, DType t) {
  const size_t rows = 5, n = 1111, heads = 4, kv_heads = 2, d = 128, width = (heads + 4) * d;
  std::mt19937 engine(11);
  std::normal_distribution<float> draw(0, 3);
  const auto filled = [&](size_t count) {
    std::vector<float> x(count);
    for (float& v : x) v = draw(engine);
    cuda::DeviceArray<float> array(device, count, "a test's array");
    device.copy(array.data(), x.data(), array.bytes());
    return array;
  };
  const auto room = [&](size_t bytes) {
    cuda::DeviceArray<std::byte> array(device, bytes, "a test's array");
    device.fill(array.data(), 0, bytes);
    return array;
  };
  const auto x = filled(rows * n), y = filled(rows * n), weight = filled(n), bias = filled(2 * n),
             gate_up = filled(rows * 2 * n), qkv = filled(rows * width), norm = filled(d),
             cos = filled(rows * d / 2), sin = filled(rows * d / 2);
  const auto normed = room(rows * n * 4), gated = room(rows * n * 4),
             q = room(rows * heads * d * 2), k = room(rows * kv_heads * d * 2),
             v = room(rows * kv_heads * d * 2), converted = room(rows * n * 4);
  const cuda::DeviceArray<uint32_t> fault(device, rows, "a test's array");
  device.fill(fault.data(), 0xff, fault.bytes());
  ops.residual_norm({.x = x.data(),
                     .y = y.data(),
                     .bias = bias.data(),
                     .fault = fault.data(),
                     .weight = weight.data(),
                     .eps = 1e-5f,
                     .dtype = t,
                     .normed = normed.data(),
                     .rows = rows,
                     .n = n});
  ops.gate({gate_up.data(), bias.data(), t, gated.data(), rows, n});
  ops.convert({x.data(), DType::F32, converted.data(), t, rows * n});
  const auto words = [](const auto& a) { return reinterpret_cast<uint16_t*>(a.data()); };
  ops.rotate_qkv({.qkv = qkv.data(),
                  .q_norm = norm.data(),
                  .k_norm = norm.data(),
                  .eps = 1e-6f,
                  .cos = cos.data(),
                  .sin = sin.data(),
                  .originals = t == DType::F16 ? DType::F16 : DType::BF16,
                  .fault = fault.data(),
                  .q16 = words(q),
                  .k16 = words(k),
                  .v16 = words(v),
                  .kv_head_stride = rows * d,
                  .rows = rows,
                  .heads = heads,
                  .kv_heads = kv_heads,
                  .head_dim = d});
  std::vector<std::byte> all;
  const auto take = [&](const auto& a) {
    all.resize(all.size() + a.bytes());
    device.copy(all.data() + all.size() - a.bytes(), a.data(), a.bytes());
    device.synchronize(Deadline::after(std::chrono::seconds(60)));
  };
  take(x);
  take(normed);
  take(gated);
  take(converted);
  take(qkv);
  take(q);
  take(k);
  take(v);
  take(fault);
  return all;
}

TEST_F(ModelBits, AreTheEmulationsInEveryType) {
  const auto ops = make_test_model_ops(*device_);
  for (DType t : {DType::F32, DType::F16, DType::BF16}) {
    const auto emulated = cuda::make_emulated_device();
    const auto emulated_ops = cuda::make_emulated_model_ops(*emulated);
    const auto want = run(*emulated, *emulated_ops, t), got = run(*device_, *ops, t);
    ASSERT_EQ(got.size(), want.size());
    size_t different = 0, first = got.size();
    for (size_t i = 0; i < got.size(); ++i)
      if (got[i] != want[i]) {
        ++different;
        first = std::min(first, i);
      }
    EXPECT_EQ(different, 0u) << dtype_name(t) << ": the first at byte " << first << " of "
                             << got.size();
  }
}

}  // namespace
}  // namespace certkv
