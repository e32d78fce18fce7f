#include "kernels/cuda/cuda_build.h"

#include <cuda_runtime_api.h>
#ifdef CERTKV_HAVE_CUBLASLT
#include <cublasLt.h>
#endif
#ifdef CERTKV_HAVE_CUDNN
#include <cudnn_version.h>
#endif

namespace certkv::cuda {

CudaBuild cuda_build() {
  CudaBuild build;
  build.toolkit = CUDART_VERSION;
  build.architectures = compiled_architectures();
#ifdef CERTKV_HAVE_CUBLASLT
  build.cublaslt = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
#endif
#ifdef CERTKV_HAVE_CUDNN
  build.cudnn = "libcudnn.so." + std::to_string(CUDNN_MAJOR);
#endif
  return build;
}

}  // namespace certkv::cuda
