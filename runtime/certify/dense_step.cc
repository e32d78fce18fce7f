#include <algorithm>
#include <cmath>

#include "kernels/base/log.h"
#include "runtime/audit/capture.h"
#include "runtime/certify/head_step.h"
#include "runtime/certify/selector.h"

namespace certkv {

void DenseStep::begin(const StepWhere& where, int heads, uint32_t mask, const float* q,
                      HeadState* state, HeadOriginals& originals) {
  const int d = state->tier.format().head_dim;
  where_ = where;
  context_ = {&state->tier.format(), state->tier.dtype()};
  originals_ = &originals;
  lost_ = 0;
  refs_.assign(state->tier.blocks().begin(), state->tier.blocks().end());
  chosen_.clear();
  chosen_q_.clear();
  for (int h = 0; h < heads; ++h) {
    if ((mask >> h & 1) == 0) continue;
    chosen_.push_back(h);
    chosen_q_.insert(chosen_q_.end(), q + h * d, q + (h + 1) * d);
  }
  make_query_group(int(chosen_.size()), d, chosen_q_.data(), &group_);
  attend_begin(context_, group_, refs_, {}, &pass_);
}

size_t DenseStep::splits() const {
  return attend_splits(context_, refs_.size());
}

void DenseStep::attend(size_t first_split, size_t last_split) {
  const size_t per_split = size_t(kSplitTokens / context_.format->block_tokens);
  const size_t first = first_split * per_split,
               last = std::min(refs_.size(), last_split * per_split);
  // Verified views of every quantised block; the others are served from originals anyway.
  thread_local std::vector<uint32_t> wanted;
  thread_local std::vector<Destination> destinations;
  thread_local std::vector<BlockResult> results;
  wanted.clear();
  for (size_t b = first; b < last; ++b)
    if (refs_[b].page != nullptr) wanted.push_back(uint32_t(b));
  destinations.assign(wanted.size(), {.part = BlockPart::Both, .view = true});
  originals_->read(wanted, destinations, &results);
  if (results.size() != wanted.size()) {
    ++lost_;
    return;
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (results[i].status != BlockStatus::Ok) {
      ++lost_;
      log_error("sequence {} layer {} KV head {} block {}: originals are {} and no copy is left",
                where_.sequence, where_.layer, where_.kv_head, wanted[i],
                block_status_name(results[i].status));
      return;
    }
    BlockRef& ref = refs_[wanted[i]];
    ref.page = nullptr;
    ref.k = results[i].k;
    ref.v = results[i].v;
  }
  attend_some(context_, group_, refs_, first_split, last_split, &pass_);
}

void DenseStep::finish(int rung, float* out, float* block_log_mass_out, GroupReport* report) {
  const int d = context_.format->head_dim;
  const bool have_all = lost_ == 0;
  if (have_all) attend_merge(&pass_);
  report->digest += lost_;
  for (const BlockRef& b : refs_) report->read_bytes += uint64_t(b.tokens) * size_t(d) * 4;
  for (size_t i = 0; i < chosen_.size(); ++i) {
    HeadReport& r = report->heads[size_t(chosen_[i])];
    float* o = out + chosen_[i] * d;
    r.rung = std::max(r.rung, rung);
    r.outcome = Outcome::Failed;
    if (have_all) {
      finish_output(pass_, int(i), o);
      if (block_log_mass_out != nullptr)
        for (size_t b = 0; b < pass_.blocks; ++b)
          block_log_mass_out[size_t(chosen_[i]) * pass_.blocks + b] =
              float(block_log_mass(pass_, int(i), b));
      r.returned = certify(pass_, int(i), {}, o);
      if (where_.audit != nullptr) capture_head(pass_, int(i), {}, chosen_[i], where_.audit);
      // `exact` needs verified originals, a finite output and a stated rounding bound.
      if (std::isfinite(r.returned.bound)) r.outcome = Outcome::Exact;
    }
    if (r.outcome == Outcome::Failed) {
      r.returned = {};
      r.returned.bound = r.returned.relative = std::nan("");
      std::fill_n(o, d, 0.0f);
    }
  }
}

void dense_step(const StepWhere& where, int heads, uint32_t mask, int rung, const float* q,
                HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass_out,
                GroupReport* report) {
  thread_local DenseStep step;
  report->heads.resize(size_t(heads));
  step.begin(where, heads, mask, q, state, originals);
  step.attend(0, step.splits());
  step.finish(rung, out, block_log_mass_out, report);
}

}  // namespace certkv
