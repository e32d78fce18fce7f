#include "kernels/cuda/attend_device.h"
#include "kernels/cuda/cache_kernels.h"
#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/seal_kernels.h"
#include "kernels/cuda/seal_ops.h"

namespace certkv::cuda {
namespace {

class CudaCacheOps final : public CacheOps {
 public:
  explicit CudaCacheOps(Device& device) : device_(CudaDevice::of(device)), early_(begins_early()) {}

  void append(const AppendArgs& args) override {
    check_cuda(launch_append(args, stream()), "appending a token cannot be launched");
  }
  void attend(const PassArgs& args, const PassShape& shape) override {
    const int kernel = int(shape.kind) * 16 + (shape.warps == warp_counts(shape.kind).most) * 8 +
                       (shape.head_dim == 128) * 4 + (shape.groups() - 1) * 2 + shape.certificate;
    if ((prepared_ >> kernel & 1) == 0) prepare_attend(shape);
    prepared_ |= uint64_t(1) << kernel;
    cuda::attend(args, shape, stream(), early_);
  }
  void climb(const LadderArgs& args) override {
    check_cuda(launch_climb(args, stream()), "the ladder cannot be launched");
  }
  void page_in(const LadderArgs& args) override {
    check_cuda(launch_page_in(args, stream()), "paging in cannot be launched");
  }
  void select_paper(const LadderArgs& args, const PaperArgs& paper) override {
    check_cuda(launch_select_paper(args, paper, stream()), "policy paper cannot be launched");
  }
  void rank(const LadderArgs& args, const PaperArgs& paper) override {
    check_cuda(launch_rank(args, paper, stream()), "ranking cannot be launched");
  }
  void explore(const LadderArgs& args) override {
    check_cuda(launch_explore(args, stream()), "exploration cannot be launched");
  }
  void forget(const LadderArgs& args) override {
    check_cuda(launch_forget(args, stream()), "the end of policy paper cannot be launched");
  }
  void list_dense(const LadderArgs& args) override {
    check_cuda(launch_list_dense(args, stream()), "rung 3 cannot be launched");
  }
  void stage_dense(const LadderArgs& args, const DenseArgs& dense, int n) override {
    check_cuda(launch_stage_dense(args, dense, n, stream()), "rung 3's copies cannot be launched");
  }
  void take_dense(const LadderArgs& args, const DenseArgs& dense, int n) override {
    check_cuda(launch_take_dense(args, dense, n, stream()), "rung 3's end cannot be launched");
  }
  void learn(const LadderArgs& args) override {
    check_cuda(launch_learn(args, stream()), "the memory of a step cannot be launched");
  }
  void prefetch(const LadderArgs& args, double share) override {
    check_cuda(launch_prefetch(args, share, stream()), "prefetching cannot be launched");
  }
  void largest_notes(const LibraryArgs& args) override {
    check_cuda(launch_largest_notes(args, stream()), "the notes of originals cannot be looked at");
  }
  void judge_library(const LibraryArgs& args) override {
    check_cuda(launch_judge_library(args, stream()), "judging dense attention cannot be launched");
  }
  void seal(const SealArgs& args) override {
    check_seal(args);
    check_cuda(launch_seal(args, stream()), "sealing cannot be launched");
  }
  void digest_pages(const DigestArgs& args) override {
    check_digest(args);
    check_cuda(launch_digest_pages(args, stream()), "digests of pages cannot be launched");
  }
  void check_tables(const TableArgs& args) override {
    check_cuda(launch_check_tables(args, stream()), "a look at tables cannot be launched");
  }

 private:
  cudaStream_t stream() const { return device_.stream(); }
  CudaDevice& device_;
  bool early_;
  uint64_t prepared_ = 0;  // a bit for each kernel of the pass
};

}  // namespace

std::unique_ptr<CacheOps> make_cuda_cache_ops(Device& device) {
  return std::make_unique<CudaCacheOps>(device);
}

}  // namespace certkv::cuda
