#include "kernels/cuda/cuda_build.h"

namespace certkv::cuda {

// nvcc's own list, 900 for sm_90: what `native` became is known to nobody else.
std::vector<int> compiled_architectures() {
  std::vector<int> list{__CUDA_ARCH_LIST__};
  for (int& architecture : list) architecture /= 10;
  return list;
}

}  // namespace certkv::cuda
