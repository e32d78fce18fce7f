// The calls of NCCL that the communicator makes, as a table: the library fills it at run time
// (nccl_binding.h), tests fill it with what goes wrong. Nothing here needs nccl.h; nccl_binding.cc
// checks that the numbers are NCCL's.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <string>

#include "kernels/base/tensor_view.h"
#include "kernels/cuda/shared_library.h"

namespace certkv {

enum class NcclResult : int {
  Success = 0,
  UnhandledCudaError = 1,
  SystemError = 2,
  InternalError = 3,
  InvalidArgument = 4,
  InvalidUsage = 5,
  RemoteError = 6,
  InProgress = 7,
};
const char* nccl_result_name(NcclResult result);  // "ncclSystemError"

enum class NcclType : int { Uint8 = 1, Uint64 = 5, Float32 = 7 };
enum class NcclOp : int { Sum = 0, Max = 2 };

using NcclUniqueId = std::array<char, 128>;

// An opaque communicator of NCCL, and a CUDA stream.
using NcclComm = void*;
using NcclStream = void*;

struct NcclApi {
  std::string name;  // for errors: "libnccl.so.2 (2.28.9)"
  int version = 0;   // 22809 is 2.28.9

  std::function<NcclResult(NcclUniqueId*)> get_unique_id;
  // Non-blocking (ncclConfig_t::blocking = 0), on the current device.
  std::function<NcclResult(NcclComm*, int ranks, const NcclUniqueId&, int rank)> init_rank;
  std::function<NcclResult(NcclComm, NcclResult*)> get_async_error;
  std::function<NcclResult(const void* send, void* receive, size_t count, NcclType, NcclOp,
                           NcclComm, NcclStream)>
      all_reduce;
  std::function<NcclResult(const void* send, void* receive, size_t send_count, NcclType, NcclComm,
                           NcclStream)>
      all_gather;
  std::function<NcclResult(const void* send, void* receive, size_t count, NcclType, int root,
                           NcclComm, NcclStream)>
      broadcast;
  std::function<NcclResult(NcclComm)> finalize, destroy, abort;
  std::function<std::string(NcclComm)> last_error;  // "" if NCCL has nothing to say
};

// How a sum over the ranks is made of NCCL's operations.
enum class NcclSum {
  Float32,      // ncclSum; NCCL promises the same bits on every rank
  Uint64,       // ncclSum, modulo 2^64
  InRankOrder,  // 16-bit floats: gathered, then added in FP32 by rank order and rounded once, where
                // NCCL would round after every addition, in an order of its own
  None,
};
NcclSum nccl_sum(DType dtype);

// What a failed call says: what, on which rank, NCCL's words, and what to do about it.
std::string describe_nccl_failure(NcclResult result, const char* what, const std::string& who,
                                  const std::string& last_error, const std::string& library);

// libnccl.so.2. Throws DeviceError: it cannot be loaded.
cuda::SharedLibrary open_nccl(const std::string& soname = "libnccl.so.2");
// "2.28.9"
std::string nccl_version_text(int version);
// Throws DeviceError unless a library of this version can be used: 2.18 or newer (non-blocking
// communicators that can be aborted and finalized at any time), of the major version 2.
void check_nccl_version(int version, const std::string& library);

}  // namespace certkv
