#include "kernels/cuda/cache_kernels.h"
#include "kernels/cuda/prefetch_body.h"

namespace certkv::cuda {
namespace {

__global__ void __launch_bounds__(32 * kClimbWarps)
    prefetch_kernel(const LadderArgs args, const double share) {
  // Plain memory, for its parts have initial values.
  __shared__ alignas(16) unsigned char memory[sizeof(PrefetchShared)];
  const Prefetch prefetch{args, share, int(blockIdx.x), int(threadIdx.y),
                          reinterpret_cast<PrefetchShared*>(memory)};
  prefetch.prepare();
  __syncthreads();
  if (!prefetch.due()) return;
  const Climb climb = prefetch.climb();
  climb.clear();
  __syncthreads();
  climb.rate();
  __syncthreads();
  climb.choose();
  __syncthreads();
  climb.count();
  __syncthreads();
  climb.place();
  __syncthreads();
  climb.close();
  __syncthreads();
  prefetch.take();
  prefetch.page();
}

}  // namespace

cudaError_t launch_prefetch(const LadderArgs& args, double share, cudaStream_t stream) {
  prefetch_kernel<<<unsigned(args.count), dim3(32, kClimbWarps), 0, stream>>>(args, share);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
