#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/attend.h"
#include "kernels/base/error.h"
#include "kernels/cpu/attend_tiles.h"
#include "kernels/quantize.h"
#include "kernels/simd.h"

namespace certkv {

namespace cpu {

const TileKernels& tile_kernels() {
  static const TileKernels& chosen = [&]() -> const TileKernels& {
#if defined(CERTKV_BUILD_X86_TILES)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return __builtin_cpu_supports("avx512vnni") ? *tile_kernels_avx512vnni()
                                                  : *tile_kernels_avx512();
    // Every processor with AVX2 converts halves; clang 14 cannot be asked about F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return *tile_kernels_avx2();
#endif
    return tile_kernels_baseline();
  }();
  return chosen;
}

}  // namespace cpu

namespace {

using cpu::kRunTiles;
using cpu::PageQuery;

constexpr cpu::Ahead kNothingAhead[2] = {};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// NaN-propagating maximum.
float max_nan(float a, float b) {
  return a > b ? a : (a <= b ? b : kNaN);
}
// A damaged annotation must not pass for a small one.
float accepted(float annotation) {
  return annotation >= 0 ? annotation : kNaN;
}

// Blocks [first, last) that are served from the same sources: of one page, or one block of
// originals.
struct Run {
  size_t first, last;
  int tokens, column;  // column: of its first token within the split
};

Run run_at(std::span<const BlockRef> blocks, size_t first, size_t end) {
  const BlockRef& b = blocks[first];
  Run r{first, first + 1, b.tokens, 0};
  if (b.page == nullptr) return r;
  while (r.last < end && blocks[r.last].page == b.page && r.tokens < kRunTiles * kTile &&
         blocks[r.last].index == b.index + int(r.last - first) &&
         (blocks[r.last].k == nullptr) == (b.k == nullptr) &&
         (blocks[r.last].v == nullptr) == (b.v == nullptr))
    r.tokens += blocks[r.last++].tokens;
  return r;
}

int first_tile(const PageFormat& f, const BlockRef& b) {
  return int(b.index) * f.block_tokens / kTile;
}

// What a run is charged.
void charge_run(const AttendContext& context, const QueryGroup& q, std::span<const BlockRef> blocks,
                const PageQuery& pq, cpu::Charge* out) {
  const PageFormat& f = *context.format;
  const bool page = blocks[0].page != nullptr;
  float kappa = 0, e = 0, k_norm = -1;
  if (page && int(blocks.size()) == f.blocks()) {
    const PageNotes& notes = page_notes(f, blocks[0].page);
    kappa = accepted(notes.kappa);
    e = accepted(notes.e);
  } else if (page) {
    for (const BlockRef& b : blocks) {
      const BlockAnnotations& note = page_annotations(f, b.page, b.index);
      kappa = max_nan(kappa, accepted(note.kappa));
      e = max_nan(e, accepted(note.e));
    }
  }
  if (blocks[0].k != nullptr) {
    k_norm = 0;
    for (const BlockRef& b : blocks) k_norm = max_nan(k_norm, accepted(b.k_norm));
  }
  cpu::tile_kernels().charge(f.head_dim, page ? &pq : nullptr, q.norm, kappa, e, k_norm, out);
}

// Scores of a run. scores: [heads, stride], the run's first token at column 0.
void score_run(const AttendContext& context, const QueryGroup& q, std::span<const BlockRef> blocks,
               const PageQuery& pq, cpu::Ahead ahead, float* scores, int stride) {
  const PageFormat& f = *context.format;
  const cpu::TileKernels& k = cpu::tile_kernels();
  if (blocks[0].k == nullptr) {
    k.score_codes(f, blocks[0].page, first_tile(f, blocks[0]),
                  int(blocks.size()) * f.block_tokens / kTile, q.heads, pq, ahead, scores, stride);
    return;
  }
  for (const BlockRef& b : blocks)
    for (int t = 0; t < b.tokens; t += kTile, scores += kTile)
      k.score_originals(context.dtype, f.head_dim, b.k + t * f.head_dim,
                        std::min(kTile, b.tokens - t), q.heads, q.scaled.data(), ahead, scores,
                        stride);
}

// Calls body with the value runs of a run: the whole of it where codes are read, else 16 rows each.
template <typename Body>
void for_value_runs(const AttendContext& context, std::span<const BlockRef> blocks, int tokens,
                    float unit, Body body) {
  const PageFormat& f = *context.format;
  cpu::ValueRun run{.format = &f,
                    .dtype = context.dtype,
                    .page = blocks[0].page,
                    .tile = first_tile(f, blocks[0]),
                    .tokens = tokens,
                    .v = nullptr,
                    .unit = unit};
  if (blocks[0].v == nullptr) {
    body(run, 0);
    return;
  }
  int column = 0;
  for (const BlockRef& b : blocks)
    for (int t = 0; t < b.tokens; t += kTile, column += kTile) {
      run.v = b.v + t * f.head_dim;
      run.tokens = std::min(kTile, b.tokens - t);
      body(run, column);
    }
}

// 2^-e with 2^e just above the largest norm in play, within the range of FP32.
float value_unit(std::span<const BlockRef> blocks) {
  float largest = 0;
  for (const BlockRef& b : blocks) largest = std::max(largest, b.nu);
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0f, std::clamp(-(std::ilogb(largest) + 1), -120, 120));
}

// A run has few blocks: a call of std::fill_n costs more than the stores.
inline void fill(float* p, size_t n, float x) {
  if (n == 4) {
    const float four[4] = {x, x, x, x};
    std::memcpy(p, four, sizeof four);
  } else {
    for (size_t i = 0; i < n; ++i) p[i] = x;
  }
}

// The largest of `count` annotations; NaN if one is not a number >= 0.
CERTKV_CPU_VERSIONS float largest_annotation(const float* x, size_t count) {
  Float8 most{};
  Int8x32 bad{};
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const Float8 v = load8(x + i);
    bad |= ~(v >= 0.0f);
    most = v > most ? v : most;
  }
  float out = 0;
  for (int lane = 0; lane < 8; ++lane) out = bad[lane] != 0 ? kNaN : max_nan(out, most[lane]);
  for (; i < count; ++i) out = max_nan(out, accepted(x[i]));
  return out;
}

// out += factor * x. REQUIRES count a multiple of 8.
CERTKV_CPU_VERSIONS void add_scaled(const float* x, double factor, size_t count, double* out) {
  typedef double Lanes __attribute__((vector_size(64)));
  for (size_t i = 0; i < count; i += 8) {
    Lanes sum;
    std::memcpy(&sum, out + i, sizeof sum);
    sum += factor * __builtin_convertvector(load8(x + i), Lanes);
    std::memcpy(out + i, &sum, sizeof sum);
  }
}

// A split under way. Scores become weights.
struct SplitWork {
  size_t index, first, last;  // of the split; its blocks
  int tokens;
  size_t runs;
  Run run[kSplitTokens / kTile];
  float ref[kMaxGroupHeads];
  float skip_below[kMaxGroupHeads];  // mass times nu about ref, where values are skipped
  alignas(64) float scores[kMaxGroupHeads * kSplitTokens];
};

// What one thread needs while it works on splits or a block.
struct Scratch {
  PageQuery pq;
  SplitWork work[2];
};
Scratch& scratch() {
  thread_local const std::unique_ptr<Scratch> mine = std::make_unique<Scratch>();
  mine->pq.page = nullptr;  // pages of another sequence may have come to lie at the same address
  return *mine;
}

}  // namespace

void make_query_group(int heads, int head_dim, const float* q, QueryGroup* group) {
  CERTKV_EXPECT(heads >= 1 && heads <= kMaxGroupHeads, InvalidArgument,
                "{} query heads share a KV head: 1 to {} are supported", heads, kMaxGroupHeads);
  group->heads = heads;
  group->head_dim = head_dim;
  group->scaled.resize(size_t(heads) * size_t(head_dim));
  std::fill_n(group->norm, kMaxGroupHeads, 0.0f);
  const double inv = 1.0 / std::sqrt(double(head_dim));
  for (int h = 0; h < heads; ++h) {
    double norm2 = 0;
    for (int c = 0; c < head_dim; ++c) {
      const size_t i = size_t(h) * size_t(head_dim) + size_t(c);
      group->scaled[i] = float(double(q[i]) * inv);
      norm2 += double(q[i]) * q[i];
    }
    group->norm[h] = float_up(std::sqrt(norm2) * inv * (1 + 4 * kUnit));
  }
}

QueryGroup make_query_group(int heads, int head_dim, const float* q) {
  QueryGroup group;
  make_query_group(heads, head_dim, q, &group);
  return group;
}

void block_terms(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 float unit, bool raise_ref, BlockTerms* out) {
  const cpu::TileKernels& k = cpu::tile_kernels();
  const std::span<const BlockRef> run(&block, 1);
  PageQuery& pq = scratch().pq;
  std::memset(out->score, 0, sizeof out->score);
  if (block.page != nullptr)
    k.prepare_page(*context.format, q.heads, q.scaled.data(), q.norm, block.page, &pq);
  cpu::Charge charge;
  charge_run(context, q, run, pq, &charge);
  score_run(context, q, run, pq, {}, out->score[0], 32);
  for (int h = 0; h < q.heads; ++h) {
    out->score_bound[h] = charge.bound[h];
    out->delta[h] = charge.delta[h];
    if (raise_ref)
      for (int t = 0; t < block.tokens; ++t) out->ref[h] = max_nan(out->ref[h], out->score[h][t]);
  }

  alignas(64) float p[kMaxGroupHeads][32];
  float sums[kMaxGroupHeads * kRunTiles];
  std::memcpy(p, out->score, sizeof p);
  k.weigh(p[0], 32, block.tokens, q.heads, out->ref, sums);
  for (int h = 0; h < q.heads; ++h) {
    out->sum[h] = 0;
    for (int t = 0; t < block.tokens; t += kTile) out->sum[h] += sums[h * kRunTiles + t / kTile];
    out->m2[h] = out->s1[h] = 0;
    std::fill_n(out->o[h], q.head_dim, 0.0f);
  }
  for_value_runs(context, run, block.tokens, unit, [&](const cpu::ValueRun& values, int column) {
    k.values(values, q.heads, p[0] + column, 32, kNothingAhead,
             {out->o[0], nullptr, nullptr, kMaxHeadDim});
    float s1[kMaxGroupHeads], m2[kMaxGroupHeads];
    k.norms(values, q.heads, p[0] + column, 32, s1, m2);
    for (int h = 0; h < q.heads; ++h) {
      out->s1[h] += s1[h];
      out->m2[h] += m2[h];
    }
  });
}

size_t attend_splits(const AttendContext& context, size_t blocks) {
  const size_t per_split = size_t(kSplitTokens / context.format->block_tokens);
  return (blocks + per_split - 1) / per_split;
}

void attend_begin(const AttendContext& context, const QueryGroup& q,
                  std::span<const BlockRef> blocks, const PassOptions& options, PassState* state) {
  const size_t n = blocks.size(), cells = size_t(q.heads) * n;
  state->heads = q.heads;
  state->head_dim = q.head_dim;
  state->blocks = n;
  state->certificate = options.certificate;
  state->skips = options.skip != nullptr && options.certificate;
  if (state->skips) std::copy_n(options.skip, q.heads, state->skip);
  state->unit = value_unit(blocks);
  state->tokens = 0;
  for (const BlockRef& b : blocks) state->tokens += size_t(b.tokens);
  const auto hold = [](auto& v, size_t count) {
    if (v.capacity() < count) v.reserve(count + count / 4);  // a sequence grows by every step
    v.resize(count);
  };
  for (auto* cell : {&state->block_sum, &state->block_ref, &state->delta, &state->c, &state->keep,
                     &state->score_bound})
    hold(*cell, cells);
  hold(state->used, cells);
  for (auto* note : {&state->nu, &state->eta, &state->vbar}) hold(*note, n);
  hold(state->split, attend_splits(context, n) * size_t(q.heads));
  hold(state->head, size_t(q.heads));
}

namespace {

// The pass over some splits of one KV head, by one thread.
struct Worker {
  const AttendContext& context;
  const QueryGroup& q;
  std::span<const BlockRef> blocks;
  PassState& state;
  PageQuery& pq;
  const PageFormat& f = *context.format;
  const cpu::TileKernels& k = cpu::tile_kernels();
  const int heads = q.heads;
  const bool certificate = state.certificate;

  SplitSums* sums(const SplitWork& w) const { return state.split.data() + w.index * size_t(heads); }
  std::span<const BlockRef> members(const Run& r) const {
    return blocks.subspan(r.first, r.last - r.first);
  }

  void begin(size_t split, SplitWork* w) const {
    const size_t per_split = size_t(kSplitTokens / f.block_tokens);
    w->index = split;
    w->first = split * per_split;
    w->last = std::min(blocks.size(), w->first + per_split);
    w->tokens = 0;
    w->runs = 0;
    for (size_t at = w->first; at < w->last; ++w->runs) {
      Run& r = w->run[w->runs] = run_at(blocks, at, w->last);
      r.column = w->tokens;
      w->tokens += r.tokens;
      at = r.last;
    }
    for (int h = 0; h < heads; ++h) {
      SplitSums& s = sums(*w)[h];
      s.l = s.m2 = s.s1 = s.c_tokens = s.score_max = 0;
      std::fill_n(s.o, q.head_dim, 0.0f);
      std::fill_n(s.a, q.head_dim, 0.0f);
    }
  }

  // Rows of 16 originals.
  cpu::Ahead rows(const uint16_t* p, int tokens) const {
    return {reinterpret_cast<const std::byte*>(p),
            p == nullptr ? 0 : size_t(std::min(tokens, kTile)) * size_t(f.head_dim) * 2};
  }
  cpu::Ahead keys_of(const BlockRef& b) const {
    return b.k != nullptr ? rows(b.k, b.tokens) : cpu::Ahead{b.page, f.value_base};
  }
  cpu::Ahead values_of(const BlockRef& b) const {
    return b.v != nullptr ? rows(b.v, b.tokens)
                          : cpu::Ahead{b.page + f.value_base, f.page_bytes - f.value_base};
  }

  // Scores of one run, and the Delta that goes with the data they were computed from.
  void score(size_t r, cpu::Ahead ahead, SplitWork* w) const {
    const Run& run = w->run[r];
    const std::span<const BlockRef> b = members(run);
    if (b[0].page != nullptr && pq.page != b[0].page)
      k.prepare_page(f, heads, q.scaled.data(), q.norm, b[0].page, &pq);
    score_run(context, q, b, pq, ahead, w->scores + run.column, kSplitTokens);
    if (certificate) charge(run, *w);
  }

  void charge(const Run& run, const SplitWork& w) const {
    const std::span<const BlockRef> b = members(run);
    cpu::Charge charged;
    charge_run(context, q, b, pq, &charged);
    const bool codes = b[0].k == nullptr;
    const auto used = uint8_t((codes ? 0 : kUsedKey) | (b[0].v != nullptr ? kUsedValue : 0));
    for (int h = 0; h < heads; ++h) {
      const size_t i = state.at(h, run.first), n = b.size();
      fill(state.delta.data() + i, n, charged.delta[h]);
      fill(state.c.data() + i, n, charged.c[h]);
      fill(state.keep.data() + i, n, charged.keep[h]);
      fill(state.score_bound.data() + i, n, charged.bound[h]);
      for (size_t j = 0; j < n; ++j) state.used[i + j] = used;
      if (codes) {
        SplitSums& s = sums(w)[h];
        s.c_tokens += charged.c[h] * float(run.tokens);
        s.score_max = max_nan(s.score_max, charged.bound[h]);
      }
    }
    for (size_t i = run.first; i < run.last; ++i) {
      const BlockRef& block = blocks[i];
      state.nu[i] = state.vbar[i] = block.nu;
      state.eta[i] = 0;
      if (block.page == nullptr) continue;
      const BlockAnnotations& note = page_annotations(f, block.page, block.index);
      state.eta[i] = note.eta;
      state.vbar[i] = note.vbar;
    }
  }

  // The reference of the split's weights, once all its scores are there.
  void settle(SplitWork* w) const {
    k.largest(w->scores, kSplitTokens, w->tokens, heads, w->ref);
    for (int h = 0; h < heads; ++h) {
      sums(*w)[h].ref = w->ref[h];
      // A NaN skips nothing; infinity skips what is below everything that counts.
      if (state.skips) w->skip_below[h] = float(std::exp(state.skip[h] - double(w->ref[h])));
      if (certificate)
        std::fill_n(state.block_ref.data() + state.at(h, w->first), w->last - w->first, w->ref[h]);
    }
  }

  // Whether the values of a run of codes need not be read.
  bool skip(const Run& run, const SplitWork& w, const float* l) const {
    float nu = 0;
    for (const BlockRef& b : members(run)) nu = max_nan(nu, accepted(b.nu));
    bool all = true;
    for (int h = 0; h < heads; ++h) all = all && l[h] * nu <= w.skip_below[h];
    return all;
  }

  // Weights and values of one run.
  void weigh(size_t r, const cpu::Ahead ahead[2], SplitWork* w) const {
    const Run& run = w->run[r];
    const std::span<const BlockRef> b = members(run);
    float* p = w->scores + run.column;
    SplitSums* s = sums(*w);
    float tile_sums[kMaxGroupHeads * kRunTiles], c[kMaxGroupHeads], mass[kMaxGroupHeads];
    k.weigh(p, kSplitTokens, run.tokens, heads, w->ref, tile_sums);
    for (int h = 0; h < heads; ++h) {
      const float* tile = tile_sums + h * kRunTiles;
      float l = 0;
      for (size_t i = run.first; i < run.last; ++i) {
        float sum = 0;
        for (int t = 0; t < blocks[i].tokens; t += kTile) sum += *tile++;
        if (certificate) state.block_sum[state.at(h, i)] = sum;
        l += sum;
      }
      s[h].l += l;
      mass[h] = l;
      c[h] = certificate ? state.c[state.at(h, run.first)] : 0;
    }
    if (state.skips && b[0].v == nullptr && skip(run, *w, mass)) {
      for (int h = 0; h < heads; ++h)
        for (size_t i = run.first; i < run.last; ++i) state.used[state.at(h, i)] |= kSkippedValue;
      return;
    }
    constexpr size_t kStride = sizeof(SplitSums) / sizeof(float);
    const bool quantised_keys = b[0].k == nullptr;
    const cpu::ValueSums to{s[0].o, certificate && quantised_keys ? s[0].a : nullptr, c, kStride};
    for_value_runs(context, b, run.tokens, state.unit, [&](const cpu::ValueRun& v, int offset) {
      k.values(v, heads, p + offset, kSplitTokens, ahead, to);
      if (!certificate) return;
      float s1[kMaxGroupHeads], m2[kMaxGroupHeads];
      k.norms(v, heads, p + offset, kSplitTokens, s1, m2);
      for (int h = 0; h < heads; ++h) {
        s[h].s1 += s1[h];
        if (quantised_keys) s[h].m2 += c[h] * m2[h];
      }
    });
  }
};

}  // namespace

void attend_some(const AttendContext& context, const QueryGroup& q,
                 std::span<const BlockRef> blocks, size_t first, size_t last, PassState* state) {
  Scratch& mine = scratch();
  const Worker worker{context, q, blocks, *state, mine.pq};
  SplitWork *now = &mine.work[0], *next = &mine.work[1];
  const size_t per_split = size_t(kSplitTokens / context.format->block_tokens);
  for (size_t split = first; split <= last;
       ++split) {  // scores of `split`, values of the one before
    const size_t weighed = split > first ? now->runs : 0;
    size_t scored = 0;
    if (split < last) {
      worker.begin(split, next);
      scored = next->runs;
    }
    // What comes after run r, wherever it lies. Weighing takes the longest: memory is fetched
    // there.
    const auto keys_after = [&](size_t r) {
      if (r + 1 < scored) return worker.keys_of(blocks[next->run[r + 1].first]);
      const size_t block = (split + 1) * per_split;
      return split + 1 < last ? worker.keys_of(blocks[block]) : cpu::Ahead{};
    };
    const auto values_after = [&](size_t r) {
      if (r + 1 < weighed) return worker.values_of(blocks[now->run[r + 1].first]);
      return scored > 0 ? worker.values_of(blocks[next->run[0].first]) : cpu::Ahead{};
    };
    for (size_t r = 0; r < std::max(weighed, scored); ++r) {
      // Codes are weighed for longer than they are scored; with originals it is about the same.
      const bool codes = r < weighed && blocks[now->run[r].first].v == nullptr;
      if (r < scored) worker.score(r, codes ? cpu::Ahead{} : keys_after(r), next);
      const cpu::Ahead ahead[2] = {values_after(r), codes ? keys_after(r) : cpu::Ahead{}};
      if (r < weighed) worker.weigh(r, ahead, now);
    }
    if (split < last) worker.settle(next);
    std::swap(now, next);
  }
}

void attend_merge(PassState* state) {
  // In order, each split rescaled once (J = 1); leave the unit (exact: a power of two).
  const size_t heads = size_t(state->heads), d = size_t(state->head_dim);
  const bool certificate = state->certificate;
  const size_t splits = state->split.size() / heads;
  const double inv = 1.0 / state->unit;
  if (certificate) {
    state->nu_max = largest_annotation(state->nu.data(), state->blocks);
    state->eta_max = largest_annotation(state->eta.data(), state->blocks);
    state->vbar_max = largest_annotation(state->vbar.data(), state->blocks);
  }
  state->notes_sound = state->nu_max >= 0 && state->eta_max >= 0 && state->vbar_max >= 0;
  for (size_t h = 0; h < heads; ++h) {
    HeadSums& out = state->head[h];
    float m = state->split[h].ref;
    for (size_t i = 0; i < splits; ++i) m = max_nan(m, state->split[i * heads + h].ref);
    out.m = m;
    out.l = out.m2 = out.s1 = out.c_tokens = 0;
    out.score_max = 0;
    out.o.assign(d, 0.0);
    out.a.assign(d, 0.0);
    for (size_t i = 0; i < splits; ++i) {
      const SplitSums& s = state->split[i * heads + h];
      const double factor = std::exp(double(s.ref) - out.m), scaled = factor * inv;
      out.l += factor * s.l;
      out.m2 += scaled * inv * s.m2;
      out.s1 += scaled * s.s1;
      out.c_tokens += s.c_tokens;
      out.score_max = max_nan(out.score_max, s.score_max);
      add_scaled(s.o, scaled, d, out.o.data());
      if (certificate) add_scaled(s.a, scaled, d, out.a.data());
    }
  }
}

void attend_pass(const AttendContext& context, const QueryGroup& q,
                 std::span<const BlockRef> blocks, PassState* state, const PassOptions& options) {
  attend_begin(context, q, blocks, options, state);
  attend_some(context, q, blocks, 0, attend_splits(context, blocks.size()), state);
  attend_merge(state);
}

}  // namespace certkv
