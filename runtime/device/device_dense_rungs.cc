// The device's cache, eighth part: rungs 3 and 4, which attend to originals alone, through a
// staging area.
#include <algorithm>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kPageTiles;

// Rung 3's staging area, for one KV head: the others wait. Reserved when a sequence comes, so that
// no step finds it missing. Where the device has no room for all of a KV head's originals, for as
// many as it has room for: a head then takes several passes.
void DeviceCache::reserve_staging(size_t entries) {
  StepBuffers& b = *step_;
  if (entries <= b.staged_entries) return;
  b.staged_entries = 0;
  const size_t d = size_t(config_.head_dim), n = size_t(config_.heads_per_group());
  const char* what = "staging of rung 3, a KV head's originals (lower sampling.max_tokens)";
  const auto grow = [&](auto* array, size_t count) {
    b.grown += grow_array(array, device_, count, what);
  };
  const size_t each = 2 * kPageTiles * block_bytes_;
  size_t least = 0;
  for (const cuda::PageKind kind : cuda::kPageKinds)
    if (has_classes_ || kind == kind_)
      least =
          std::max(least, size_t(cuda::most_pages_per_split(
                              device_.shape(), int(d), int((n + 3) / 4), kind, int(entries), 1)));
  for (size_t pages = entries; pages > b.staged_pages;) {
    try {
      grow(&b.stage, pages * each);
      b.staged_pages = pages;
    } catch (const Error& e) {
      b.staged_pages = 0;  // what there was is gone
      if (e.kind() != ErrorKind::OutOfMemory || pages <= least) throw;
      log_warning("{}; rung 3 goes through a KV head's originals piece by piece", e.what());
      pages = std::max(least, pages / 2);
    }
  }
  grow(&b.stage_entries, entries);
  for (auto& slot_of : b.stage_slot) {
    grow(&slot_of, entries * kPageTiles);
    device_.fill(slot_of.data(), 0xff, slot_of.bytes());  // no slot, whoever looks ahead
  }
  grow(&b.stage_k_norm, entries * kPageTiles);
  grow(&b.stage_nu, entries * kPageTiles);
  grow(&b.stage_out, n * d);
  grow(&b.stage_judged, n);
  grow(&b.stage_pass, 1);
  b.staged_entries = entries;
}

// Rung 3, and rung 4: originals alone, for the heads that fail still. shape: of a repeated pass.
void DeviceCache::rung3(const cuda::PassArgs& pass, const cuda::PassShape& shape,
                        const cuda::LadderArgs& ladder) {
  StepBuffers& b = *step_;
  cuda::DenseArgs dense;
  dense.pass = b.stage_pass.data();
  dense.slots = b.stage.data();
  dense.entries = b.stage_entries.data();
  for (int part = 0; part < 2; ++part) dense.slot_of[part] = b.stage_slot[part].data();
  dense.k_norm = b.stage_k_norm.data();
  dense.open_nu = b.stage_nu.data();
  dense.out = b.stage_out.data();
  dense.judged = b.stage_judged.data();
  dense.failing = b.words.data() + kStageFailing;
  cuda::PassArgs staged = pass;
  staged.items = b.stage_pass.data();
  cuda::PassShape one = shape;
  one.items = 1;
  if (audit_ != nullptr) read_audit(false);
  // Heads that found nothing to promote, or no room, are failing still, though no pass said so.
  ops_.list_dense(ladder);
  for (int i = 0; i < ladder.count; ++i)
    device_.when(ladder.dense_listed + i, [&] {
      device_.fill(dense.failing, 0, 2 * sizeof(uint32_t));
      for (int first = 0; first < shape.splits; first += b.staged_splits) {
        dense.first_split = staged.first_split = first;
        dense.splits = one.splits = std::min(b.staged_splits, shape.splits - first);
        one.merge = first + one.splits == shape.splits;
        ops_.stage_dense(ladder, dense, i);
        attend(staged, one);
      }
      ops_.take_dense(ladder, dense, i);
    });
}

// On all ranks, after the wait of a step that has halted at this layer.
void DeviceCache::decode_dense(int layer, const uint32_t* rows) {
  StepBuffers& b = *step_;
  const size_t heads = size_t(heads_.count()), behind = (size_t(layer) + 1) * heads;
  b.layer = size_t(layer);
  size_t staged = 0;
  int largest = 1;
  for (const int64_t handle : rows_) {
    Sequence& s = at(handle);
    staged = std::max(staged, s.capacity);
    // What the later layers have said of what they were given.
    device_.fill(s.marks.data() + behind * kMarks, 0, s.marks.bytes() - behind * kMarks * 4);
    device_.fill(s.counts.data() + behind, 0,
                 s.counts.bytes() - behind * sizeof(cuda::LadderCounts));
  }
  for (size_t i = 0; i < rows_.size() * heads; ++i)
    largest =
        std::max(largest, b.pass_host[size_t(layer) * rows_.size() * heads + i].repeated_per_split);
  reserve_staging(staged);  // is there already, but where the policy has no rung 3
  b.staged_splits = std::clamp(int(b.staged_pages) / largest, 1, b.most_splits[1]);
  const cuda::PassShape shape = pass_shape(b.most_splits[1]);
  cuda::LadderArgs ladder = ladder_args(layer, shape);
  ladder.halt = {};
  ladder.repeat = rows;
  if (audit_ != nullptr) repeat_audit(layer, rows);
  rung3(pass_args(layer), shape, ladder);
  if (audit_ != nullptr) read_audit(true);
  group_.alive();
}

}  // namespace certkv
