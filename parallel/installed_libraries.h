// Which communication libraries this process runs with, and what they offer on this machine.
//
// Nothing here initialises MPI or opens a network connection. The CUDA driver and NCCL are looked
// for at run time (dlopen), so that a build without CUDA can tell what the machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace certkv {

std::string mpi_library_version();  // "Open MPI v4.1.4"
std::string ucx_library_version();  // "1.13.1"

// A way UCX can move bytes here: transport "tcp" on device "eth0".
struct UcxTransport {
  std::string transport;
  std::string device;
};
// Every transport that UCX's components report on this machine, whatever UCX_TLS says. A component
// that fails to open is left out.
std::vector<UcxTransport> ucx_transports();

struct Gpu {
  std::string name;
  uint64_t memory_bytes = 0;
};
struct CudaDriver {
  bool loaded = false;  // libcuda.so.1 was found
  std::string error;    // why it cannot be used, empty if it can
  int version = 0;      // 12040 for 12.4, 0 if unknown
  std::vector<Gpu> gpus;
};
CudaDriver cuda_driver();

std::string nccl_library_version();  // "2.21.5", empty if libnccl.so.2 was not found

}  // namespace certkv
