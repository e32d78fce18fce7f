#include "runtime/device/device_backend.h"

#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#ifdef CERTKV_WITH_CUDA
#include "kernels/cuda/cuda_device.h"
#endif

namespace certkv {

DeviceBackend make_emulated_backend(std::unique_ptr<cuda::Device> device) {
  DeviceBackend b;
  b.device = std::move(device);
  b.cache = cuda::make_emulated_cache_ops(*b.device);
  b.model = cuda::make_emulated_model_ops(*b.device);
  b.linear = cuda::make_emulated_linear_ops(*b.device);
  b.dense = cuda::make_emulated_dense_ops(*b.device);
  return b;
}

DeviceBackend make_device_backend(const std::string& backend, int ordinal) {
  if (backend == "emulated") return make_emulated_backend(cuda::make_emulated_device());
  CERTKV_EXPECT(backend == "cuda", InvalidArgument,
                "run.backend is '{}': cpu, cuda and emulated are known", backend);
#ifdef CERTKV_WITH_CUDA
  const int count = cuda::cuda_device_count();
  if (count > 0 && ordinal >= count) {
    log_warning("local rank {} of this node shares GPU {}: {} are visible (CUDA_VISIBLE_DEVICES)",
                ordinal, ordinal % count, count);
    ordinal %= count;
  }
  DeviceBackend b;
  b.device = cuda::make_cuda_device(ordinal);
  b.cache = cuda::make_cuda_cache_ops(*b.device);
  b.model = cuda::make_cuda_model_ops(*b.device);
  b.linear = cuda::make_cuda_linear_ops(*b.device);
  b.dense = cuda::make_cuda_dense_ops(*b.device);
  return b;
#else
  (void)ordinal;
  CERTKV_THROW(InvalidArgument,
               "this build has no CUDA backend: configure with -DCERTKV_CUDA=ON where the CUDA "
               "toolkit is installed, or use run.backend cpu");
#endif
}

}  // namespace certkv
