#include <cstring>

#include "kernels/cuda/cache_body.h"
#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/explore_body.h"
#include "kernels/cuda/library_body.h"
#include "kernels/cuda/paper_body.h"
#include "kernels/cuda/prefetch_body.h"
#include "kernels/cuda/rank_body.h"
#include "kernels/cuda/seal_ops.h"

namespace certkv::cuda {
namespace {

class EmulatedCacheOps final : public CacheOps {
 public:
  explicit EmulatedCacheOps(const Device& device) : shared_(device.shape().shared_per_block) {}

  void append(const AppendArgs& args) override {
    for (int i = 0; i < args.rows * args.kv_heads; ++i)
      for (int part = 0; part < args.heads + 2; ++part) emulated::append_part(args, i, part);
  }
  void attend(const PassArgs& args, const PassShape& shape) override {
    const uint32_t bytes =
        shared_layout(shape.head_dim, shape.groups(), shape.warps, shape.kind).bytes;
    CERTKV_EXPECT(bytes <= shared_, DeviceError,
                  "the device refuses the shared memory that the certified pass needs: {} bytes of "
                  "{}",
                  bytes, shared_);
    attend_emulated(args, shape);
  }
  void climb(const LadderArgs& args) override {
    for (int i = 0; i < args.count; ++i) {
      *args.items[i].again = 0;
      args.listed[i] = 0;
      if (args.passes[i].failing[0] == 0 || args.halt.passed()) continue;
      emulated::ClimbShared shared;
      std::memset(&shared, 0xff, sizeof shared);
      const auto all = [&](void (emulated::Climb::*part)() const) {
        for (int warp = 0; warp < emulated::kClimbWarps; ++warp)
          (emulated::Climb{args, i, warp, &shared}.*part)();
      };
      all(&emulated::Climb::clear);
      all(&emulated::Climb::rate);
      all(&emulated::Climb::choose);
      all(&emulated::Climb::count);
      all(&emulated::Climb::place);
      all(&emulated::Climb::close);
    }
  }
  void select_paper(const LadderArgs& args, const PaperArgs& paper) override {
    if (args.halt.passed()) return;
    emulated::PaperShared shared;
    for (int i = 0; i < args.count; ++i) {
      std::memset(&shared, 0xff, sizeof shared);
      emulated::select_phases(
          [&](auto phase) {
            for (int warp = 0; warp < emulated::kClimbWarps; ++warp)
              phase(emulated::SelectPaper{args, paper, i, warp, &shared});
          },
          [&] {
            return emulated::SelectPaper{args, paper, i, 0, &shared}.searches();
          });
    }
  }
  void rank(const LadderArgs& args, const PaperArgs& paper) override {
    if (args.halt.passed()) return;
    emulated::RankShared shared;
    for (int i = 0; i < args.count; ++i) {
      std::memset(&shared, 0xff, sizeof shared);
      const emulated::Rank one{args, paper, i, 0, &shared};
      emulated::rank_phases(one.due(), one.places(), [&](auto phase) {
        for (int warp = 0; warp < emulated::kRankWarps; ++warp)
          phase(emulated::Rank{args, paper, i, warp, &shared});
      });
    }
  }
  void explore(const LadderArgs& args) override {
    if (args.halt.passed()) return;
    for (int i = 0; i < args.count; ++i) {
      emulated::ExploreShared shared;
      std::memset(&shared, 0xff, sizeof shared);
      for (const auto part :
           {&emulated::Explore::count, &emulated::Explore::place, &emulated::Explore::close})
        for (int warp = 0; warp < emulated::kClimbWarps; ++warp)
          (emulated::Explore{args, i, warp, &shared}.*part)();
    }
  }
  void forget(const LadderArgs& args) override {
    if (args.halt.passed()) return;
    for (int i = 0; i < args.count; ++i)
      for (int warp = 0; warp < kWarpsEach; ++warp) emulated::forget(args, i, warp, kWarpsEach);
  }
  void page_in(const LadderArgs& args) override {
    for (int i = 0; i < args.count; ++i)
      for (int warp = 0; warp < kWarpsEach; ++warp) emulated::page_in(args, i, warp, kWarpsEach);
  }
  void list_dense(const LadderArgs& args) override { emulated::list_dense(args); }
  void stage_dense(const LadderArgs& args, const DenseArgs& dense, int n) override {
    if (n >= int(*args.dense_count)) return;
    for (int warp = 0; warp < kWarpsEach; ++warp)
      emulated::stage_dense(args, dense, n, warp, kWarpsEach);
  }
  void take_dense(const LadderArgs& args, const DenseArgs& dense, int n) override {
    if (n < int(*args.dense_count)) emulated::take_dense(args, dense, n);
  }
  void learn(const LadderArgs& args) override {
    for (int i = 0; i < args.count; ++i) {
      emulated::LearnShared shared;
      std::memset(&shared, 0xff, sizeof shared);
      if (!emulated::Learn{args, i, 0, &shared}.due()) continue;
      const auto all = [&](void (emulated::Learn::*part)() const) {
        for (int warp = 0; warp < emulated::kLearnWarps; ++warp)
          (emulated::Learn{args, i, warp, &shared}.*part)();
      };
      all(&emulated::Learn::prepare);
      all(&emulated::Learn::score);
      all(&emulated::Learn::list_free);
    }
  }
  void prefetch(const LadderArgs& args, double share) override {
    for (int i = 0; i < args.count; ++i) {
      emulated::PrefetchShared shared;
      std::memset(static_cast<void*>(&shared), 0xff, sizeof shared);
      const auto all = [&](auto body) {
        for (int warp = 0; warp < emulated::kClimbWarps; ++warp)
          body(emulated::Prefetch{args, share, i, warp, &shared});
      };
      all([](const emulated::Prefetch& p) { p.prepare(); });
      if (shared.near == 0) continue;
      for (const auto part :
           {&emulated::Climb::clear, &emulated::Climb::rate, &emulated::Climb::choose,
            &emulated::Climb::count, &emulated::Climb::place, &emulated::Climb::close})
        all([&](const emulated::Prefetch& p) { (p.climb().*part)(); });
      all([](const emulated::Prefetch& p) { p.take(); });
      all([](const emulated::Prefetch& p) { p.page(); });
    }
  }
  void largest_notes(const LibraryArgs& args) override {
    for (int i = 0; i < args.count; ++i) emulated::largest_notes(args, i);
  }
  void judge_library(const LibraryArgs& args) override {
    for (int i = 0; i < args.count; ++i)
      for (int h = 0; h < args.heads; ++h) emulated::judge_library(args, i, h);
  }
  void seal(const SealArgs& args) override { seal_emulated(args); }
  void digest_pages(const DigestArgs& args) override {
    check_digest(args);
    for (int n = 0; n < args.count; ++n) emulated::digest_stretch(args, n);
  }
  void check_tables(const TableArgs& args) override {
    for (int n = 0; n < args.count; ++n) emulated::check_table(args, n);
  }

 private:
  static constexpr int kWarpsEach = 3;  // any number does
  size_t shared_;
};

}  // namespace

std::unique_ptr<CacheOps> make_emulated_cache_ops(Device& device) {
  return std::make_unique<EmulatedCacheOps>(device);
}

}  // namespace certkv::cuda
