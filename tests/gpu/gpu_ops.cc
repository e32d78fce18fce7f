#include "kernels/cuda/cuda_device.h"
#include "tests/support/device_ops.h"

namespace certkv {

std::unique_ptr<cuda::Device> make_test_device(std::string* why) {
  if (cuda::cuda_device_count() == 0) {
    *why = "no device answers";
    return nullptr;
  }
  return cuda::make_cuda_device(0);
}
std::unique_ptr<cuda::CacheOps> make_test_cache_ops(cuda::Device& device) {
  return cuda::make_cuda_cache_ops(device);
}
std::unique_ptr<cuda::LinearOps> make_test_linear_ops(cuda::Device& device) {
  return cuda::make_cuda_linear_ops(device);
}
std::unique_ptr<cuda::DenseOps> make_test_dense_ops(cuda::Device& device) {
  return cuda::make_cuda_dense_ops(device);
}
std::unique_ptr<cuda::ModelOps> make_test_model_ops(cuda::Device& device) {
  return cuda::make_cuda_model_ops(device);
}

}  // namespace certkv
