#include <cuda_runtime_api.h>

#include <vector>

#include "kernels/base/error.h"
#include "kernels/cuda/attend_device.h"
#include "tests/support/device_pass.h"

namespace certkv {
namespace {

void check(cudaError_t error) {
  CERTKV_EXPECT(error == cudaSuccess, DeviceError, "{}", cudaGetErrorString(error));
}

class GpuBackend : public PassBackend {
 public:
  ~GpuBackend() override {
    for (void* p : held_) cudaFree(p);
  }
  std::byte* put(const void* from, size_t bytes) override {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes));
    held_.push_back(p);
    check(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return static_cast<std::byte*>(p);
  }
  void get(const std::byte* at, void* to, size_t bytes) override {
    check(cudaMemcpy(to, at, bytes, cudaMemcpyDeviceToHost));
  }
  void run(const cuda::PassArgs& args, const cuda::PassShape& shape) override {
    cuda::prepare_attend(shape);
    cuda::attend(args, shape, nullptr, cuda::begins_early());
    check(cudaDeviceSynchronize());
  }

 private:
  std::vector<void*> held_;
};

}  // namespace

std::unique_ptr<PassBackend> make_pass_backend() {
  return std::make_unique<GpuBackend>();
}
bool pass_backend_answers() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

}  // namespace certkv
