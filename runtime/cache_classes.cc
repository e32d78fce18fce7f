// Precision classes of the certified cache's KV heads. SOURCE: method section 5b.
#include <limits>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "runtime/cache_sequence.h"
#include "runtime/certified_cache.h"

namespace certkv {

void CertifiedCache::count_reencoding(Sequence& s, size_t cell, ReencodeResult result, int before,
                                      const std::string& error) {
  const size_t heads = size_t(heads_.count());
  const size_t layer = cell / heads, head = cell % heads;
  if (result == ReencodeResult::Lost) {
    ++s.lost_reads;
    log_warning("sequence {} layer {} KV head {} stays in class {}: {}", s.id, layer,
                heads_.begin + int64_t(head), class_label(before), error);
  } else if (result == ReencodeResult::Adopted) {
    log_debug("sequence {} layer {} KV head {} at {} tokens: class {}, was {}", s.id, layer,
              heads_.begin + int64_t(head), s.heads[cell].tier.tokens(),
              class_label(s.heads[cell].precision.now), class_label(before));
  }
}

void CertifiedCache::choose_classes(std::span<const std::vector<float>> last_q, Sequence* s) {
  const size_t heads = size_t(heads_.count()), d = size_t(format_->head_dim);
  const size_t width = size_t(config_.heads_per_group()) * d;  // of one group's queries
  if (last_q.empty()) return;
  pool_.parallel_for(s->heads.size(), [&](size_t cell) {
    const size_t layer = cell / heads, head = cell % heads;
    HeadState& state = s->heads[cell];
    if (state.tier.pages() == 0) return;
    const std::vector<float>& all = last_q[layer];
    std::vector<float> q;  // [queries, heads_per_group, head_dim] of this KV head
    for (size_t row = 0; row * heads * width < all.size(); ++row) {
      const auto first = all.begin() + ptrdiff_t((row * heads + head) * width);
      q.insert(q.end(), first, first + ptrdiff_t(width));
    }
    Originals originals(*this, *s, int(layer), int(head));
    const ClassChoice choice =
        choose_class(s->rules, int(config_.heads_per_group()), q, &state, originals);
    group_.alive();
    if (!choice.measured) {
      count_reencoding(*s, cell, ReencodeResult::Lost, state.precision.now, choice.error);
      return;
    }
    if (choice.number == state.precision.now) return;
    const int before = state.precision.now;
    state.precision.next = choice.number;
    std::string error;
    ReencodeResult result = ReencodeResult::Going;
    while (result == ReencodeResult::Going) {
      result = reencode(kPagesPerStep, &state, originals, &error);
      group_.alive();
    }
    count_reencoding(*s, cell, result, before, error);
  });
}

// Between steps. What is decided and when depends on the head's own steps alone: not on time, on
// neighbours in the batch or on the number of ranks and threads.
void CertifiedCache::revise_classes(std::span<const int64_t> sequences) {
  const size_t heads = size_t(heads_.count()), cells = size_t(config_.layers) * heads;
  pool_.parallel_for(sequences.size() * cells, [&](size_t task) {
    Sequence& s = at(sequences[task / cells]);
    const size_t cell = task % cells;
    HeadState& state = s.heads[cell];
    HeadClass& precision = state.precision;
    if (s.failed() || s.rules.policy != Policy::Budget || state.tier.pages() == 0) return;
    const int before = precision.now;
    Originals originals(*this, s, int(cell / heads), int(cell % heads));
    std::string error;
    if (precision.next == precision.now) {
      if (precision.steps < kRevisionSteps) return;
      if (!precision.measured && !measure_classes({}, &state, originals, &error))
        count_reencoding(s, cell, ReencodeResult::Lost, before, error);
      precision.next = precision.decide();
      if (precision.next == precision.now) return;
    }
    const ReencodeResult result = reencode(kPagesPerStep, &state, originals, &error);
    count_reencoding(s, cell, result, before, error);
    group_.alive();
  });
}

}  // namespace certkv
