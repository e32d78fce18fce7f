// A CUDA runtime in host memory that fails as a test tells it: linked in place of NVIDIA's, so that
// faults go through the backend's own handling. Kernels are not run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace certkv::test {

struct FakeCudart {
  int runtime = CUDART_VERSION, driver = CUDART_VERSION, devices = 1, capability = 90;
  uint64_t total = uint64_t(64) << 30, taken = 0;
  uint64_t lockable = ~uint64_t(0);  // bytes that cudaHostRegister pins
  bool never_done = false;           // work on a stream
  // The next call of a function fails so; one that is sticky stays until cudaGetLastError().
  std::map<std::string, cudaError_t> fail;

  cudaError_t last = cudaSuccess;
  std::map<void*, uint64_t> memory, host_memory, registered;
  std::set<void*> streams, graphs;

  bool nothing_held() const {
    return memory.empty() && host_memory.empty() && registered.empty() && streams.empty() &&
           graphs.empty();
  }
};
extern FakeCudart fake_cudart;

}  // namespace certkv::test
