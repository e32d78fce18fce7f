// What only a GPU can show of the operations that libraries do: launches in a graph, memory that
// stays as it is, a library that is not there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "kernels/cuda/cuda_device.h"
#include "tests/support/device_ops.h"

namespace certkv {
namespace {

using cuda::check_cuda;
using testing::AllOf;
using testing::HasSubstr;

constexpr size_t kBatch = 2, kTokens = 512, kHeads = 8, kKvHeads = 2, kDim = 128;
constexpr size_t kIn = kHeads * kDim, kOut = 192;

// A decode step in small: attention over the cache, and a product with what comes of it.
class OpsOnGpu : public OnTestDevice {
 protected:
  void SetUp() override {
    OnTestDevice::SetUp();
    if (device_ == nullptr) return;
    dense_ = make_test_dense_ops(*device_);
    linear_ = make_test_linear_ops(*device_);
    q_ = random(kBatch * kIn);
    k_ = random(kBatch * kKvHeads * kTokens * kDim);
    v_ = random(kBatch * kKvHeads * kTokens * kDim);
    weight_ = random(kOut * kIn);
    out_ = put(std::vector<uint16_t>(kBatch * kIn));
    y_ = put(std::vector<float>(kBatch * kOut));
    lengths_ = put(std::vector<int32_t>(kBatch, 1));
  }
  cuda::DeviceArray<uint16_t> random(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> v(count);
    for (uint16_t& x : v) x = float_to_bf16(normal(bits_));
    return put(v);
  }
  void lengths(const std::vector<int32_t>& n) {
    device_->copy(lengths_.data(), n.data(), lengths_.bytes());
    wait();
  }
  void step() {
    cuda::DenseDecode a{.dtype = DType::BF16, .batch = kBatch, .tokens = kTokens};
    a.heads = kHeads;
    a.kv_heads = kKvHeads;
    a.head_dim = kDim;
    a.q = q_.data();
    a.k = k_.data();
    a.v = v_.data();
    a.kv_head_stride = kTokens * kDim;
    a.kv_batch_stride = kKvHeads * kTokens * kDim;
    a.lengths = lengths_.data();
    a.out = out_.data();
    dense_->decode(a);
    linear_->linear({.weight = weight_.data(),
                     .dtype = DType::BF16,
                     .out = kOut,
                     .in = kIn,
                     .x = out_.data(),
                     .x_stride = kIn,
                     .y = y_.data(),
                     .y_stride = kOut,
                     .rows = kBatch});
  }

  std::mt19937 bits_{5};
  std::unique_ptr<cuda::DenseOps> dense_;
  std::unique_ptr<cuda::LinearOps> linear_;
  cuda::DeviceArray<uint16_t> q_, k_, v_, weight_, out_;
  cuda::DeviceArray<float> y_;
  cuda::DeviceArray<int32_t> lengths_;
};

TEST_F(OpsOnGpu, RunInAGraphAsOutsideOfOne) {
  const std::vector<std::vector<int32_t>> cases = {{1, 2}, {500, 77}, {512, 512}};
  std::vector<std::vector<float>> want;
  for (const auto& n : cases) {
    lengths(n);
    step();
    want.push_back(get(y_));
  }
  EXPECT_NE(want[0], want[1]);
  const cudaStream_t stream = cuda::CudaDevice::of(*device_).stream();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "a capture");
  step();
  check_cuda(cudaStreamEndCapture(stream, &graph), "a capture");
  check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
  for (size_t c = 0; c < cases.size(); ++c) {
    lengths(cases[c]);
    device_->fill(y_.data(), 0xff, y_.bytes());
    check_cuda(cudaGraphLaunch(exec, stream), "a graph");
    EXPECT_EQ(get(y_), want[c]) << "case " << c;
  }
  check_cuda(cudaGraphExecDestroy(exec), "a graph");
  check_cuda(cudaGraphDestroy(graph), "a graph");
}

TEST_F(OpsOnGpu, AllocateNothingOnceAShapeIsKnown) {
  step();
  wait();
  const uint64_t before = device_->free_bytes();
  for (int i = 0; i < 20; ++i) step();
  wait();
  EXPECT_EQ(device_->free_bytes(), before);
}

TEST_F(OpsOnGpu, NameTheLibraryThatIsMissing) {
  EXPECT_THAT(
      thrown_by([&] { cuda::make_cuda_dense_ops(*device_, {.library = "libcertkv_none.so.9"}); }),
      AllOf(HasSubstr("DeviceError"), HasSubstr("cuDNN is needed for dense attention"),
            HasSubstr("libcertkv_none.so.9"), HasSubstr("LD_LIBRARY_PATH")));
  cuda::LinearOptions options;
  options.library = "libcertkv_none.so.13";
  EXPECT_THAT(thrown_by([&] { cuda::make_cuda_linear_ops(*device_, options); }),
              AllOf(HasSubstr("DeviceError"), HasSubstr("cuBLASLt is needed for products"),
                    HasSubstr("libcertkv_none.so.13")));
}

TEST_F(OpsOnGpu, RefuseTheEmulatedDevice) {
  const auto emulated = cuda::make_emulated_device();
  EXPECT_THAT(thrown_by([&] { cuda::make_cuda_dense_ops(*emulated); }),
              AllOf(HasSubstr("InvalidArgument"), HasSubstr("emulated device")));
  EXPECT_THAT(thrown_by([&] { cuda::make_cuda_linear_ops(*emulated); }),
              HasSubstr("InvalidArgument"));
  EXPECT_THAT(thrown_by([&] { cuda::make_emulated_dense_ops(*device_); }),
              HasSubstr("InvalidArgument"));
  EXPECT_THAT(thrown_by([&] { cuda::make_emulated_linear_ops(*device_); }),
              HasSubstr("InvalidArgument"));
}

}  // namespace
}  // namespace certkv
