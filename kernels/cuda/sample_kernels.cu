#include "kernels/cuda/sample_body.h"
#include "kernels/cuda/sample_kernels.h"

namespace certkv::cuda {

// ---- kernels ------------------------------------------------------------------------------------

namespace {

__global__ void __launch_bounds__(kSampleThreads) search_kernel(const SampleRows a, int stage) {
  __shared__ SampleShared shared;
  const SampleBlock block(a, blockIdx.y, blockIdx.x, shared);
  block.search(BlockThreads{}, stage);
}

__global__ void __launch_bounds__(kSampleThreads) add_kernel(const SampleRows a) {
  __shared__ SampleShared shared;
  const SampleBlock block(a, blockIdx.y, blockIdx.x, shared);
  block.add_part(BlockThreads{});
}

__global__ void __launch_bounds__(kSampleThreads) draw_kernel(const SampleRows a) {
  __shared__ SampleShared shared;
  SampleBlock block(a, blockIdx.x, 0, shared);
  block.draw_token(BlockThreads{});
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

// Each stage reads the 4 n bytes of a row's logits, where the row takes it: 3 stages for top_k or
// top_p, 5 for both, 1 to add up; the draw reads one part (16 KiB). At 128,256 tokens, 4 n is 513
// KB: 2.1 MB a row with top_p, 3.1 MB with both, 0.5 MB with neither, from the L2 cache after the
// first. Beside it go 20 to 24 KiB of bins a block and stage.
cudaError_t launch_sample(const SampleRows& a, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(a.scratch, 0, a.rows * sizeof(SampleScratch), stream);
  if (error != cudaSuccess) return error;
  const dim3 blocks(unsigned(a.parts()), unsigned(a.rows));
  for (int stage = 0; stage < kSampleStages; ++stage)
    search_kernel<<<blocks, kSampleThreads, 0, stream>>>(a, stage);
  add_kernel<<<blocks, kSampleThreads, 0, stream>>>(a);
  draw_kernel<<<unsigned(a.rows), kSampleThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
