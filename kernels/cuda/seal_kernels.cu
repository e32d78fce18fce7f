#include "kernels/cuda/seal_body.h"
#include "kernels/cuda/seal_kernels.h"

namespace certkv::cuda {
namespace {

__global__ void __launch_bounds__(kSealThreads) seal_kernel(const SealArgs args) {
  __shared__ SealShared shared;
  if (args.halted != nullptr && *args.halted != 0) return;
  const SealPage page{args, int(blockIdx.x), &shared};
  const int thread = int(threadIdx.x);
  page.fit_keys(thread);
  __syncthreads();
  page.encode(thread);
  __syncthreads();
  page.serve(thread);
  __syncthreads();
  page.finish(thread);
}

}  // namespace

cudaError_t launch_seal(const SealArgs& args, cudaStream_t stream) {
  if (args.heads * args.pages == 0) return cudaSuccess;
  seal_kernel<<<unsigned(args.heads * args.pages), kSealThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
