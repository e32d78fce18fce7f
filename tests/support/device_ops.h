// What a test of device operations runs on: the emulation (tests/kernels/emulated_ops.cc), or a GPU
// (tests/gpu/gpu_ops.cc). The tests' sources are the same.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/dense_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/model_ops.h"
#include "tests/support/thrown_by.h"

namespace certkv {

// nullptr where no device answers; *why then says so.
std::unique_ptr<cuda::Device> make_test_device(std::string* why);
std::unique_ptr<cuda::CacheOps> make_test_cache_ops(cuda::Device& device);
std::unique_ptr<cuda::LinearOps> make_test_linear_ops(cuda::Device& device);
std::unique_ptr<cuda::DenseOps> make_test_dense_ops(cuda::Device& device);
std::unique_ptr<cuda::ModelOps> make_test_model_ops(cuda::Device& device);

// A test's device with arrays on it.
class OnTestDevice : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    device_ = make_test_device(&why);
    if (device_ == nullptr) GTEST_SKIP() << why;
  }
  template <typename T>
  cuda::DeviceArray<T> put(const std::vector<T>& values) {
    cuda::DeviceArray<T> array(*device_, values.size(), "a test's array");
    device_->copy(array.data(), values.data(), array.bytes());
    return array;
  }
  template <typename T>
  std::vector<T> get(const cuda::DeviceArray<T>& array) {
    std::vector<T> values(size_t(array.count()));
    device_->copy(values.data(), array.data(), array.bytes());
    wait();
    return values;
  }
  void wait() { device_->synchronize(Deadline::after(std::chrono::seconds(60))); }

  std::unique_ptr<cuda::Device> device_;
};

}  // namespace certkv
