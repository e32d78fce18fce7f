// The floor under a pass: a kernel that reads the same bytes and does nothing with them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace certkv {

// Reads `bytes` (a multiple of 64 KiB) once and writes one word a thread if they sum to a number
// that they do not.
cudaError_t launch_read_only(const std::byte* from, size_t bytes, unsigned* out, int blocks,
                             cudaStream_t stream);

}  // namespace certkv
