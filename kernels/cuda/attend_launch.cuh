// The kernel of the certified pass for one kind of page; each kind is compiled by a file of its
// own, attend_k8v4.cu and so on.
#pragma once

#include <type_traits>

#include "kernels/cuda/attend_kernels.h"
#include "kernels/cuda/pass_body.h"

namespace certkv::cuda {

// early: the kernel begins before its predecessor in the stream has ended, and waits for it itself.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(dim3 grid, dim3 block, uint32_t shared_bytes, cudaStream_t stream, bool early) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

namespace {

// Few warps of a small head leave shared memory for a second block, so it gets registers too; see
// plan_splits().
template <int kDim, int kGroups, int kWarps>
inline constexpr int kResident = kWarps <= kFewWarps&& kDim* kGroups < 256 ? kMostResident : 1;

template <int kDim, int kGroups, bool kCertificate, int kWarps, PageKind kKind>
__global__ void __launch_bounds__(32 * kWarps, kResident<kDim, kGroups, kWarps>)
    attend_kernel(const PassArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  const int split = int(blockIdx.x) + args.first_split;
  PassItem item = args.items[blockIdx.y];
  if (split * pages_per_split(args, item) >= item.page_count) return;
  if (args.repeated && *item.again == 0) return;
  if (args.of_kind && item.kind != kKind) return;
  const Pass<kDim, kGroups, kCertificate, kWarps, kKind> block{args, item, shared, split,
                                                               int(threadIdx.y)};
  block.begin_copies();
  wait_for_previous();
  item.unit = load_fresh(&args.items[blockIdx.y].unit);  // by append
  block.begin();
  __syncthreads();
  block.walk();
  __syncthreads();
  let_next_begin();
  block.combine();
}

// Calls body with the kernel of a shape.
template <PageKind kKind, typename Body>
cudaError_t with_kernel(const KernelShape& s, Body body) {
  const auto pick_warps = [&](auto d, auto groups, auto warps) {
    constexpr int kDim = decltype(d)::value, kGroups = decltype(groups)::value;
    constexpr int kWarps = decltype(warps)::value;
    return s.certificate ? body(attend_kernel<kDim, kGroups, true, kWarps, kKind>)
                         : body(attend_kernel<kDim, kGroups, false, kWarps, kKind>);
  };
  constexpr WarpCounts kCounts = warp_counts(kKind);
  const std::integral_constant<int, kCounts.most> most;
  const std::integral_constant<int, kCounts.fewest> fewest;
  const auto pick = [&](auto d, auto groups) {
    return s.warps == most.value ? pick_warps(d, groups, most) : pick_warps(d, groups, fewest);
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

template <PageKind kKind>
cudaError_t allow_shared_memory_of(const KernelShape& shape, uint32_t bytes) {
  return with_kernel<kKind>(shape, [&](auto kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  });
}

template <PageKind kKind>
cudaError_t launch_attend_of(const PassArgs& args, const KernelShape& shape, uint32_t shared_bytes,
                             cudaStream_t stream) {
  return with_kernel<kKind>(shape, [&](auto kernel) {
    const Launch launch(dim3(unsigned(shape.splits), unsigned(shape.items)),
                        dim3(32, unsigned(shape.warps)), shared_bytes, stream,
                        shape.early && args.after_append);
    return cudaLaunchKernelEx(&launch.config, kernel, args);
  });
}

}  // namespace certkv::cuda
