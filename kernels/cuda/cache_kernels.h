// What nvcc compiles of the cache's operations, for cache_device.cc.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/library_args.h"

namespace certkv::cuda {

// Sets a conditional node's handle by a word of the device's memory.
cudaError_t launch_condition(cudaGraphConditionalHandle handle, const uint32_t* word,
                             cudaStream_t stream);
cudaError_t launch_append(const AppendArgs& args, cudaStream_t stream);
cudaError_t launch_climb(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_select_paper(const LadderArgs& args, const PaperArgs& paper,
                                cudaStream_t stream);
cudaError_t launch_rank(const LadderArgs& args, const PaperArgs& paper, cudaStream_t stream);
cudaError_t launch_explore(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_forget(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_page_in(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_list_dense(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_stage_dense(const LadderArgs& args, const DenseArgs& dense, int n,
                               cudaStream_t stream);
cudaError_t launch_take_dense(const LadderArgs& args, const DenseArgs& dense, int n,
                              cudaStream_t stream);
cudaError_t launch_digest_pages(const DigestArgs& args, cudaStream_t stream);
cudaError_t launch_check_tables(const TableArgs& args, cudaStream_t stream);
cudaError_t launch_learn(const LadderArgs& args, cudaStream_t stream);
cudaError_t launch_prefetch(const LadderArgs& args, double share, cudaStream_t stream);
cudaError_t launch_largest_notes(const LibraryArgs& args, cudaStream_t stream);
cudaError_t launch_judge_library(const LibraryArgs& args, cudaStream_t stream);

}  // namespace certkv::cuda
