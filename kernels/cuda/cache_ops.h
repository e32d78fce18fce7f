// The operations of a certified cache on a device: append, attend and judge, climb, learn; seal.
//
// Everything is enqueued on the device's stream; nothing is allocated or waited for. A step of one
// layer, for all its items (cache_args.h), with parts under Device::when():
//   append; attend; beside what follows: learn of the items within their tolerance;
//   while any head fails and rounds are left: climb, page_in, attend again; where heads still fail:
//   list_dense, then for each item of the list stage_dense, attend to the staged item, take_dense;
//   learn of the items that climbed; beside what follows: prefetch.
// SOURCE: method section 5.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels/cuda/cache_args.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/library_args.h"
#include "kernels/cuda/pass.h"
#include "kernels/cuda/seal_args.h"

namespace certkv::cuda {

class CacheOps {
 public:
  virtual ~CacheOps() = default;

  virtual void append(const AppendArgs& args) = 0;
  virtual void attend(const PassArgs& args, const PassShape& shape) = 0;
  // Chooses what the items with failing heads promote: their `again`, and lists for page_in().
  virtual void climb(const LadderArgs& args) = 0;
  virtual void page_in(const LadderArgs& args) = 0;
  virtual void list_dense(const LadderArgs& args) = 0;
  virtual void stage_dense(const LadderArgs& args, const DenseArgs& dense, int n) = 0;
  virtual void take_dense(const LadderArgs& args, const DenseArgs& dense, int n) = 0;
  virtual void learn(const LadderArgs& args) = 0;
  // Policy `paper`, whose first pass has read codes alone: chooses what all items promote, as
  // climb() does for some; their `again`, `wants`, and lists for page_in(). What the scratch cannot
  // hold leaves all heads of the item failing.
  virtual void select_paper(const LadderArgs& args, const PaperArgs& paper) = 0;
  // After a pass: marks heads whose ranking is unresolved as failing. Under policy `budget`, before
  // climb(), with the blocks that leave it so.
  virtual void rank(const LadderArgs& args, const PaperArgs& paper) = 0;
  // Behind the first pass: chooses blocks at random, as climb(): `again`, lists for page_in().
  // Heads of these items are not failing until the pass that follows says so.
  virtual void explore(const LadderArgs& args) = 0;
  // The next step's first pass reads codes alone; the scratch keeps what it holds.
  virtual void forget(const LadderArgs& args) = 0;
  // Behind learn() of all items: where a head's returned bound is beyond `share` of its tolerance,
  // reads what the ladder would promote if that were the tolerance, into at most half of the slots
  // that are free. Needs a list of its own; the records, sources and sums of the last pass; (0, 1).
  virtual void prefetch(const LadderArgs& args, double share) = 0;
  // Policy `dense` by a library: largest_notes() once a step for items of all layers; append, the
  // library and judge_library() for each layer.
  virtual void largest_notes(const LibraryArgs& args) = 0;
  virtual void judge_library(const LibraryArgs& args) = 0;
  // Throws InvalidArgument for a shape that is not served, and for rows or pages out of alignment.
  virtual void seal(const SealArgs& args) = 0;
  // Of pages, for the scrub of tier 1. Throws InvalidArgument for bytes that are no multiple of 16.
  virtual void digest_pages(const DigestArgs& args) = 0;
  // Restores entries, and drops originals that are not what the arena's slot of their block says,
  // or that the tables do not agree about: the codes stand in. Between passes.
  virtual void check_tables(const TableArgs& args) = 0;
};

std::unique_ptr<CacheOps> make_emulated_cache_ops(Device& device);
// Of a device that is no emulation; in certkv::kernels_cuda.
std::unique_ptr<CacheOps> make_cuda_cache_ops(Device& device);

}  // namespace certkv::cuda
