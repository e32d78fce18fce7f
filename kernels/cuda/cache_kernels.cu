#include "kernels/cuda/cache_body.h"
#include "kernels/cuda/cache_kernels.h"
#include "kernels/cuda/explore_body.h"
#include "kernels/cuda/library_body.h"
#include "kernels/cuda/paper_body.h"
#include "kernels/cuda/rank_body.h"

namespace certkv::cuda {

// ---- kernels ------------------------------------------------------------------------------------

namespace {

constexpr int kBlockWarps = 4;     // of blocks that read the arena, or pages for their digests
constexpr int kPageInBlocks = 32;  // for each item: enough to keep PCIe busy
constexpr int kStageBlocks = 256;

__global__ void condition_kernel(cudaGraphConditionalHandle handle, const uint32_t* word) {
  cudaGraphSetConditional(handle, *word != 0 ? 1 : 0);
}

__global__ void append_kernel(const AppendArgs args) {
  let_next_begin();
  append_part(args, int(blockIdx.x), int(threadIdx.y));
}

__global__ void __launch_bounds__(32 * kClimbWarps) climb_kernel(const LadderArgs args) {
  __shared__ ClimbShared shared;
  const int index = int(blockIdx.x);
  const Climb climb{args, index, int(threadIdx.y), &shared};
  const bool failing = args.passes[index].failing[0] != 0 && !args.halt.passed();
  __syncthreads();  // all have seen it before anyone changes it
  if (!failing) {
    if (threadIdx.y == 0) {
      *args.items[index].again = 0;
      args.listed[index] = 0;
    }
    return;
  }
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
}

__global__ void __launch_bounds__(32 * kClimbWarps)
    select_paper_kernel(const LadderArgs args, const PaperArgs paper) {
  __shared__ PaperShared shared;
  if (args.halt.passed()) return;
  const SelectPaper select{args, paper, int(blockIdx.x), int(threadIdx.y), &shared};
  select_phases(
      [&](auto phase) {
        phase(select);
        __syncthreads();
      },
      [&] {
        const bool searches = select.searches();
        __syncthreads();  // all have read it before anyone changes it
        return searches;
      });
}

__global__ void __launch_bounds__(32 * kRankWarps)
    rank_kernel(const LadderArgs args, const PaperArgs paper) {
  __shared__ RankShared shared;
  if (args.halt.passed()) return;
  const Rank rank{args, paper, int(blockIdx.x), int(threadIdx.y), &shared};
  rank_phases(rank.due(), rank.places(), [&](auto phase) {
    phase(rank);
    __syncthreads();
  });
}

__global__ void __launch_bounds__(32 * kClimbWarps) explore_kernel(const LadderArgs args) {
  __shared__ ExploreShared shared;
  if (args.halt.passed()) return;
  const Explore explore{args, int(blockIdx.x), int(threadIdx.y), &shared};
  explore.count();
  __syncthreads();
  explore.place();
  __syncthreads();
  explore.close();
}

__global__ void forget_kernel(const LadderArgs args) {
  if (args.halt.passed()) return;
  forget(args, int(blockIdx.x), int(threadIdx.y), kBlockWarps);
}

__global__ void page_in_kernel(const LadderArgs args) {
  page_in(args, int(blockIdx.y), int(blockIdx.x * kBlockWarps + threadIdx.y),
          int(gridDim.x) * kBlockWarps);
}

__global__ void __launch_bounds__(32 * kBlockWarps) digest_pages_kernel(const DigestArgs args) {
  const int n = int(blockIdx.x * kBlockWarps + threadIdx.y);
  if (n < args.count) digest_stretch(args, n);
}

__global__ void __launch_bounds__(32 * kBlockWarps) check_tables_kernel(const TableArgs args) {
  const int n = int(blockIdx.x * kBlockWarps + threadIdx.y);
  if (n < args.count) check_table(args, n);
}

__global__ void list_dense_kernel(const LadderArgs args) {
  list_dense(args);
}

__global__ void stage_dense_kernel(const LadderArgs args, const DenseArgs dense, int n) {
  if (n >= int(*args.dense_count)) return;
  stage_dense(args, dense, n, int(blockIdx.x * kBlockWarps + threadIdx.y),
              int(gridDim.x) * kBlockWarps);
}

__global__ void take_dense_kernel(const LadderArgs args, const DenseArgs dense, int n) {
  if (n < int(*args.dense_count)) take_dense(args, dense, n);
}

__global__ void __launch_bounds__(32 * kLearnWarps) learn_kernel(const LadderArgs args) {
  __shared__ LearnShared shared;
  const Learn learn{args, int(blockIdx.x), int(threadIdx.y), &shared};
  if (!learn.due()) return;
  learn.prepare();
  __syncthreads();
  learn.score();
  __syncthreads();
  learn.list_free();
}

__global__ void largest_notes_kernel(const LibraryArgs args) {
  largest_notes(args, int(blockIdx.x));
}

__global__ void judge_library_kernel(const LibraryArgs args) {
  judge_library(args, int(blockIdx.x), int(threadIdx.y));
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------

cudaError_t launch_condition(cudaGraphConditionalHandle handle, const uint32_t* word,
                             cudaStream_t stream) {
  condition_kernel<<<1, 1, 0, stream>>>(handle, word);
  return cudaGetLastError();
}

cudaError_t launch_append(const AppendArgs& args, cudaStream_t stream) {
  append_kernel<<<unsigned(args.rows * args.kv_heads), dim3(32, unsigned(args.heads + 2)), 0,
                  stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_climb(const LadderArgs& args, cudaStream_t stream) {
  climb_kernel<<<unsigned(args.count), dim3(32, kClimbWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_select_paper(const LadderArgs& args, const PaperArgs& paper,
                                cudaStream_t stream) {
  select_paper_kernel<<<unsigned(args.count), dim3(32, kClimbWarps), 0, stream>>>(args, paper);
  return cudaGetLastError();
}

cudaError_t launch_rank(const LadderArgs& args, const PaperArgs& paper, cudaStream_t stream) {
  rank_kernel<<<unsigned(args.count), dim3(32, kRankWarps), 0, stream>>>(args, paper);
  return cudaGetLastError();
}

cudaError_t launch_explore(const LadderArgs& args, cudaStream_t stream) {
  explore_kernel<<<unsigned(args.count), dim3(32, kClimbWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_forget(const LadderArgs& args, cudaStream_t stream) {
  forget_kernel<<<unsigned(args.count), dim3(32, kBlockWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_page_in(const LadderArgs& args, cudaStream_t stream) {
  page_in_kernel<<<dim3(kPageInBlocks, unsigned(args.count)), dim3(32, kBlockWarps), 0, stream>>>(
      args);
  return cudaGetLastError();
}

cudaError_t launch_digest_pages(const DigestArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  digest_pages_kernel<<<unsigned((args.count + kBlockWarps - 1) / kBlockWarps),
                        dim3(32, kBlockWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_check_tables(const TableArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  check_tables_kernel<<<unsigned((args.count + kBlockWarps - 1) / kBlockWarps),
                        dim3(32, kBlockWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_list_dense(const LadderArgs& args, cudaStream_t stream) {
  list_dense_kernel<<<1, 32, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_stage_dense(const LadderArgs& args, const DenseArgs& dense, int n,
                               cudaStream_t stream) {
  stage_dense_kernel<<<kStageBlocks, dim3(32, kBlockWarps), 0, stream>>>(args, dense, n);
  return cudaGetLastError();
}

cudaError_t launch_take_dense(const LadderArgs& args, const DenseArgs& dense, int n,
                              cudaStream_t stream) {
  take_dense_kernel<<<1, 32, 0, stream>>>(args, dense, n);
  return cudaGetLastError();
}

cudaError_t launch_learn(const LadderArgs& args, cudaStream_t stream) {
  learn_kernel<<<unsigned(args.count), dim3(32, kLearnWarps), 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_largest_notes(const LibraryArgs& args, cudaStream_t stream) {
  largest_notes_kernel<<<unsigned(args.count), 32, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_judge_library(const LibraryArgs& args, cudaStream_t stream) {
  judge_library_kernel<<<unsigned(args.count), dim3(32, unsigned(args.heads)), 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace certkv::cuda
