#include "runtime/step_figures.h"

#include <algorithm>

#include "parallel/communicator.h"

namespace certkv {
namespace {

constexpr size_t kFloats = sizeof(HeadFigures) / sizeof(float);
constexpr size_t kExtras = 3 + kClasses;  // of the rank: F, X and skipped blocks, KV heads by class

// Maximum that keeps NaN.
void raise(double& largest, double x) {
  if (!(x <= largest) && largest == largest) largest = x;
}

}  // namespace

StepFigures::StepFigures(const ModelConfig& config, ShardRange heads, int ranks)
    : per_sequence_(size_t(config.layers * heads.count() * config.heads_per_group()) * kFloats),
      ranks_(size_t(ranks)) {}

size_t StepFigures::stride() const {
  return sequences_ * per_sequence_ + kExtras;
}

const HeadFigures* StepFigures::figures(size_t rank, size_t sequence) const {
  return reinterpret_cast<const HeadFigures*>(all_.data() + rank * stride() +
                                              sequence * per_sequence_);
}

void StepFigures::gather(const SequenceCache& cache, std::span<const int64_t> sequences,
                         Communicator& group) {
  sequences_ = sequences.size();
  std::vector<float> mine;
  mine.reserve(stride());
  uint64_t f = 0, x = 0, skipped = 0;
  std::array<float, kClasses> classes{};
  for (int64_t s : sequences) {
    const SequenceReport& report = cache.report(s);
    const float* p = reinterpret_cast<const float*>(report.figures.data());
    mine.insert(mine.end(), p, p + per_sequence_);
    for (const GroupReport& g : report.layers) {
      f += g.f_blocks;
      x += g.x_blocks;
      skipped += g.skipped_blocks;
      if (g.precision >= 0) ++classes[size_t(g.precision)];
    }
  }
  mine.insert(mine.end(), {float(f), float(x), float(skipped)});
  mine.insert(mine.end(), classes.begin(), classes.end());
  all_.resize(mine.size() * ranks_);
  group.all_gather(view_f32(mine.data(), mine.size()), view_f32(all_.data(), all_.size()), {});
  group.wait();
  for (size_t r = 0; r < ranks_; ++r) {
    const float* extras = all_.data() + (r + 1) * stride() - kExtras;
    f_blocks_ += uint64_t(extras[0]);
    x_blocks_ += uint64_t(extras[1]);
    skipped_blocks_ += uint64_t(extras[2]);
    for (size_t i = 0; i < classes_.size(); ++i) classes_[i] += uint64_t(extras[3 + i]);
  }
}

void StepFigures::add_to(size_t sequence, Completion::Distribution* returned,
                         Completion::Distribution* candidate) const {
  for (size_t r = 0; r < ranks_; ++r) {
    const HeadFigures* f = figures(r, sequence);
    for (size_t i = 0; i < per_sequence_ / kFloats; ++i) {
      returned->bound.add(f[i].returned);
      returned->relative.add(f[i].returned_relative);
      candidate->bound.add(f[i].candidate);
      candidate->relative.add(f[i].candidate_relative);
    }
  }
}

void StepFigures::fill(StepRecord* record) const {
  Completion::Distribution returned, candidate;
  for (size_t s = 0; s < sequences_; ++s) {
    add_to(s, &returned, &candidate);
    for (size_t r = 0; r < ranks_; ++r) {
      const HeadFigures* f = figures(r, s);
      for (size_t i = 0; i < per_sequence_ / kFloats; ++i) {
        raise(record->e_key_max, f[i].e_key);
        raise(record->e_val_max, f[i].e_val);
        raise(record->e_fp_max, f[i].e_fp);
        raise(record->e_key_paper_max, f[i].e_key_paper);
      }
    }
  }
  const auto bounds = [](const Completion::Distribution& d) {
    return StepRecord::Bounds{
        .max = d.bound.max,
        .p50 = d.bound.quantile(0.5),
        .p95 = d.bound.quantile(0.95),
        .p99 = d.bound.quantile(0.99),
        .relative_max = d.relative.max,
        .relative_p50 = d.relative.quantile(0.5),
        .relative_p95 = d.relative.quantile(0.95),
        .relative_p99 = d.relative.quantile(0.99),
    };
  };
  record->candidate = bounds(candidate);
  record->returned = bounds(returned);
  record->f_blocks = f_blocks_;
  record->x_blocks = x_blocks_;
  record->skipped_blocks = skipped_blocks_;
  record->classes = classes_;
}

}  // namespace certkv
