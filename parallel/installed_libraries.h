// Which communication libraries this process runs with, and what they offer on this machine.
//
// Nothing here initialises MPI or opens a network connection. The CUDA driver and NVIDIA's
// libraries are looked for at run time (dlopen), so that a build without CUDA can tell what the
// machine has.
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
  int capability = 0;  // 90 for compute capability 9.0, 0 if unknown
};
struct CudaDriver {
  bool loaded = false;  // the library was found
  std::string error;    // why it cannot be used, empty if it can
  int version = 0;      // of CUDA: 12040 for 12.4, 0 if unknown
  std::string kernel;   // of the kernel module: "580.95.05", empty if unknown
  std::vector<Gpu> gpus;
};
CudaDriver cuda_driver(const std::string& soname = "libcuda.so.1");

// A library of NVIDIA's, as the dynamic linker finds it.
enum class VendorLibrary { CublasLt, Cudnn, Nccl };
struct FoundLibrary {
  std::string path;     // empty if it was not found
  std::string version;  // "13.1.0"; "unknown" if it does not say
  std::string error;    // what the linker said, empty if it was found
};
FoundLibrary find_library(VendorLibrary which, const std::string& soname);

}  // namespace certkv
