#include <type_traits>

#include "kernels/cuda/attend_kernels.h"
#include "kernels/cuda/pass_body.h"

namespace certkv::cuda {

// ---- kernels ------------------------------------------------------------------------------------

namespace {

template <int kDim, int kGroups, bool kCertificate>
__global__ void __launch_bounds__(32 * kWarps, 1) attend_kernel(const PassArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  const int split = int(blockIdx.x);
  const PassItem item = args.items[blockIdx.y];
  if (split * pages_per_split(args, item) >= item.page_count) return;
  if (args.repeated && *item.again == 0) return;
  const Pass<kDim, kGroups, kCertificate> block{args, item, shared, split, int(threadIdx.y)};
  block.begin();
  __syncthreads();
  block.walk();
  __syncthreads();
  block.combine();
  if (!kCertificate || item.judged == nullptr) return;
  block.tally();
  __syncthreads();
  block.finish_tally();
}

// A warp for 32 elements, and with kJudge one for the tallies.
template <bool kJudge>
__global__ void merge_kernel(const PassArgs args, int head_dim) {
  const PassItem& item = args.items[blockIdx.y];
  const int head = int(blockIdx.x);
  if (head >= item.heads || (args.repeated && *item.again == 0)) return;
  __shared__ MergeShared shared;
  const int each = pages_per_split(args, item), element = int(threadIdx.y) * 32;
  const MergeSplits merge{item, head_dim, (item.page_count + each - 1) / each, head};
  const bool judged = kJudge && item.judged != nullptr;
  if (element < head_dim)
    merge.elements(element, judged, &shared);
  else if (judged)
    merge.tally(&shared);
  if (!judged) return;
  __syncthreads();
  if (threadIdx.y == 0) judge_head(item, head_dim, head, shared);
}

// ---- launchers ----------------------------------------------------------------------------------

// Calls body with the kernel of a shape.
template <typename Body>
cudaError_t with_kernel(const KernelShape& s, Body body) {
  const auto pick = [&](auto d, auto groups) {
    return s.certificate ? body(attend_kernel<decltype(d)::value, decltype(groups)::value, true>)
                         : body(attend_kernel<decltype(d)::value, decltype(groups)::value, false>);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if (s.head_dim == 64) {
    const std::integral_constant<int, 64> d;
    return s.groups == 1 ? pick(d, one) : pick(d, two);
  }
  const std::integral_constant<int, 128> d;
  return s.groups == 1 ? pick(d, one) : pick(d, two);
}

}  // namespace

cudaError_t allow_shared_memory(const KernelShape& shape, uint32_t bytes) {
  return with_kernel(shape, [&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  });
}

cudaError_t launch_attend(const PassArgs& args, const KernelShape& shape, uint32_t shared_bytes,
                          cudaStream_t stream) {
  return with_kernel(shape, [&](auto kernel) {
    kernel<<<dim3(unsigned(shape.splits), unsigned(shape.items)), dim3(32, kWarps), shared_bytes,
             stream>>>(args);
    return cudaGetLastError();
  });
}

cudaError_t launch_merge(const PassArgs& args, const KernelShape& shape, cudaStream_t stream) {
  const dim3 grid(unsigned(shape.heads), unsigned(shape.items));
  const unsigned warps = unsigned(shape.head_dim / 32);
  if (shape.certificate)
    merge_kernel<true><<<grid, dim3(32, warps + 1), 0, stream>>>(args, shape.head_dim);
  else
    merge_kernel<false><<<grid, dim3(32, warps), 0, stream>>>(args, shape.head_dim);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
