#include "kernels/cuda/attend_launch.cuh"

namespace certkv::cuda {

extern template cudaError_t allow_shared_memory_of<PageKind::K8V4>(const KernelShape&, uint32_t);
extern template cudaError_t launch_attend_of<PageKind::K8V4>(const PassArgs&, const KernelShape&,
                                                             uint32_t, cudaStream_t);
extern template cudaError_t allow_shared_memory_of<PageKind::K8V8>(const KernelShape&, uint32_t);
extern template cudaError_t launch_attend_of<PageKind::K8V8>(const PassArgs&, const KernelShape&,
                                                             uint32_t, cudaStream_t);
extern template cudaError_t allow_shared_memory_of<PageKind::K12V8>(const KernelShape&, uint32_t);
extern template cudaError_t launch_attend_of<PageKind::K12V8>(const PassArgs&, const KernelShape&,
                                                              uint32_t, cudaStream_t);

namespace {

// A warp for 32 elements, and one for the header.
__global__ void merge_kernel(const PassArgs args, int head_dim, bool judges) {
  // Read before the pass has ended; append alone has changed anything of it.
  PassItem item = args.items[blockIdx.y];
  const int head = int(blockIdx.x);
  if (head >= item.heads || (args.repeated && *item.again == 0)) return;
  wait_for_previous();
  item.unit = load_fresh(&args.items[blockIdx.y].unit);
  __shared__ MergeShared shared;
  const int each = pages_per_split(args, item), element = int(threadIdx.y) * 32;
  const MergeSplits merge{item, head_dim, (item.page_count + each - 1) / each, head};
  const bool judged = judges && item.judged != nullptr;
  if (element < head_dim)
    merge.elements(element, judged, &shared);
  else
    merge.header(&shared);
  if (!judged) return;
  __syncthreads();
  Certificate c;
  if (threadIdx.y == 0)
    c = judge_head(item, head_dim, shared);
  else if (threadIdx.y == 1)
    shared.published = published_bound(shared);
  __syncthreads();
  if (threadIdx.y > 0) return;
  c.e_key_paper = shared.published;
  state_verdict(args, item, head, c);
}

}  // namespace

cudaError_t allow_shared_memory(const KernelShape& shape, uint32_t bytes) {
  switch (shape.kind) {
    case PageKind::K8V4:
      return allow_shared_memory_of<PageKind::K8V4>(shape, bytes);
    case PageKind::K8V8:
      return allow_shared_memory_of<PageKind::K8V8>(shape, bytes);
    case PageKind::K12V8:
      return allow_shared_memory_of<PageKind::K12V8>(shape, bytes);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_attend(const PassArgs& args, const KernelShape& shape, uint32_t shared_bytes,
                          cudaStream_t stream) {
  switch (shape.kind) {
    case PageKind::K8V4:
      return launch_attend_of<PageKind::K8V4>(args, shape, shared_bytes, stream);
    case PageKind::K8V8:
      return launch_attend_of<PageKind::K8V8>(args, shape, shared_bytes, stream);
    case PageKind::K12V8:
      return launch_attend_of<PageKind::K12V8>(args, shape, shared_bytes, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_merge(const PassArgs& args, const KernelShape& shape, cudaStream_t stream) {
  const dim3 grid(unsigned(shape.heads), unsigned(shape.items));
  const unsigned warps = unsigned(shape.head_dim / 32);
  const Launch launch(grid, dim3(32, warps + 1), 0, stream, shape.early);
  return cudaLaunchKernelEx(&launch.config, merge_kernel, args, shape.head_dim, shape.certificate);
}

}  // namespace certkv::cuda
