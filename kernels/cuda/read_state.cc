#include <algorithm>
#include <limits>

#include "kernels/cuda/pass.h"

namespace certkv::cuda {

static_assert(kUsedOriginalKey == kUsedKey && kUsedOriginalValue == kUsedValue);

namespace {

// The largest annotation; NaN if one is not a number >= 0.
float largest(std::span<const float> notes) {
  float out = 0;
  for (float x : notes) {
    if (!(x >= 0)) return std::numeric_limits<float>::quiet_NaN();
    out = std::max(out, x);
  }
  return out;
}

}  // namespace

void read_state(const PassOutput& from, PassState* state) {
  const size_t heads = size_t(from.heads), d = size_t(from.head_dim), n = from.blocks;
  state->heads = from.heads;
  state->head_dim = from.head_dim;
  state->blocks = n;
  state->tokens = from.tokens;
  state->certificate = from.certificate;
  state->unit = from.unit;
  state->skips = false;
  state->split.clear();
  state->nu.assign(from.nu.begin(), from.nu.end());
  state->eta.assign(from.eta.begin(), from.eta.end());
  state->vbar.assign(from.vbar.begin(), from.vbar.end());
  state->nu_max = largest(from.nu);
  state->eta_max = largest(from.eta);
  state->vbar_max = largest(from.vbar);
  state->notes_sound = state->nu_max >= 0 && state->eta_max >= 0 && state->vbar_max >= 0;
  for (auto* cells : {&state->block_sum, &state->block_ref, &state->delta, &state->c, &state->keep,
                      &state->score_bound})
    cells->assign(heads * n, 0.0f);
  state->used.assign(heads * n, 0);
  state->head.resize(heads);

  for (size_t h = 0; h < heads; ++h) {
    const double* sums = from.merged.data() + h * size_t(sums_floats(from.head_dim));
    HeadSums& head = state->head[h];
    head.m = sums[kSumRef];
    head.l = sums[kSumL];
    head.m2 = sums[kSumM2];
    head.s1 = sums[kSumS1];
    head.c_tokens = sums[kSumCTokens];
    head.score_max = float(sums[kSumScoreMax]);
    head.o.assign(sums + kSumsHeader, sums + kSumsHeader + d);
    head.a.assign(sums + kSumsHeader + d, sums + kSumsHeader + 2 * d);
    if (!from.certificate) continue;
    for (size_t b = 0; b < n; ++b) {
      const size_t page = from.place[b] / kPageTiles, tile = from.place[b] % kPageTiles;
      const size_t at = state->at(int(h), b);
      const float* record =
          from.records.data() + (page * size_t(from.groups) + h / 4) * kRecordFloats;
      const size_t head_of_four = h % 4;
      const bool key = (from.used[from.place[b]] & kUsedOriginalKey) != 0;
      state->block_sum[at] = record[tile * 4 + head_of_four];
      state->block_ref[at] = record[kRecordRef + tile * 4 + head_of_four];
      state->score_bound[at] = record[kRecordBound + head_of_four];
      state->delta[at] = record[kRecordDelta + tile * 4 + head_of_four];
      // The factor that went into a and m2; with original keys there is none.
      state->c[at] = key ? c_of_delta(state->delta[at]) : record[kRecordC + head_of_four];
      state->keep[at] = keep_of(state->c[at]);
      state->used[at] = from.used[from.place[b]];
    }
  }
}

}  // namespace certkv::cuda
