#include "kernels/cuda/attend_launch.cuh"

namespace certkv::cuda {

template cudaError_t allow_shared_memory_of<PageKind::K12V8>(const KernelShape&, uint32_t);
template cudaError_t launch_attend_of<PageKind::K12V8>(const PassArgs&, const KernelShape&,
                                                       uint32_t, cudaStream_t);

}  // namespace certkv::cuda
