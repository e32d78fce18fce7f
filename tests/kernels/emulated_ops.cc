#include "tests/support/device_ops.h"

namespace certkv {

std::unique_ptr<cuda::Device> make_test_device(std::string*) {
  return cuda::make_emulated_device();
}
std::unique_ptr<cuda::CacheOps> make_test_cache_ops(cuda::Device& device) {
  return cuda::make_emulated_cache_ops(device);
}
std::unique_ptr<cuda::LinearOps> make_test_linear_ops(cuda::Device& device) {
  return cuda::make_emulated_linear_ops(device);
}
std::unique_ptr<cuda::DenseOps> make_test_dense_ops(cuda::Device& device) {
  return cuda::make_emulated_dense_ops(device);
}
std::unique_ptr<cuda::ModelOps> make_test_model_ops(cuda::Device& device) {
  return cuda::make_emulated_model_ops(device);
}

}  // namespace certkv
