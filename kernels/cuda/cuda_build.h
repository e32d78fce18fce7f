// What the CUDA backend of this build was compiled for and against.
#pragma once

#include <string>
#include <vector>

namespace certkv::cuda {

// Of the kernels: 90 for sm_90, ascending.
std::vector<int> compiled_architectures();

struct CudaBuild {
  int toolkit = 0;                 // 13000 for 13.0
  std::vector<int> architectures;  // compiled_architectures()
  // Sonames of the libraries that are loaded when a GPU is used; empty where their headers were not
  // there when it was configured.
  std::string cublaslt, cudnn;
};
CudaBuild cuda_build();

}  // namespace certkv::cuda
