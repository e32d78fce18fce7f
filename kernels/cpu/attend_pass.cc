#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/attend.h"
#include "kernels/base/error.h"
#include "kernels/cpu/attend_tiles.h"
#include "kernels/quantize.h"

namespace certkv {

namespace cpu {

const TileKernels& tile_kernels() {
  static const TileKernels& chosen = [&]() -> const TileKernels& {
#if defined(CERTKV_BUILD_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return *tile_kernels_avx2();
#endif
    return tile_kernels_baseline();
  }();
  return chosen;
}

}  // namespace cpu

namespace {

// What the queries become for the blocks of one page: computed once per page.
struct PageQuery {
  const std::byte* page = nullptr;
  std::vector<float> scaled_step;              // [heads, head_dim] q step / sqrt(d)
  float base[kMaxGroupHeads];                  // sum q base / sqrt(d)
  double sum_step[kMaxGroupHeads];             // sum |q| step / sqrt(d)
  double sum_bound[kMaxGroupHeads];            // sum |q| (|base| + max_code step) / sqrt(d)
};

void prepare_page(const PageFormat& format, const QueryGroup& q, const std::byte* page,
                  PageQuery* out) {
  if (out->page == page) return;
  const int d = format.head_dim;
  out->scaled_step.resize(size_t(q.heads) * size_t(d));
  float step[kMaxHeadDim], base[kMaxHeadDim];
  float max_code = 0;
  for (int c = 0; c < d; ++c) {
    const ServedAffine a = served_key_affine(format, page, c);
    step[c] = a.step;
    base[c] = a.base;
    max_code = float(a.max_code);
  }
  for (int h = 0; h < q.heads; ++h) {
    const float* s = q.scaled.data() + h * d;
    float* row = out->scaled_step.data() + h * d;
    double sum_base = 0, sum_step = 0, sum_abs_base = 0;
    for (int c = 0; c < d; ++c) {
      row[c] = s[c] * step[c];
      sum_base += double(s[c]) * base[c];
      sum_step += std::abs(double(s[c])) * step[c];
      sum_abs_base += std::abs(double(s[c]) * base[c]);
    }
    out->base[h] = float(sum_base);
    // 4u: the rounding of q / sqrt(d) into FP32 and of these sums.
    out->sum_step[h] = sum_step * (1 + 4 * kUnit);
    out->sum_bound[h] = (sum_abs_base + max_code * sum_step) * (1 + 4 * kUnit);
  }
  out->page = page;
}

// D_b of the codes. SOURCE: method D1.
double score_error(const PageQuery& pq, const QueryGroup& q, const BlockAnnotations& note, int h) {
  const double by_channel = double(note.kappa) * pq.sum_step[h];
  const double by_norm = double(q.norm[size_t(h)]) * note.e;
  return by_channel <= by_norm ? by_channel : by_norm;  // a NaN in either ends as NaN or the other
}

// g_b of the codes and of originals. SOURCE: method section 3.
double code_rounding(const PageQuery& pq, int head_dim, int h) {
  return gamma_n(chain_codes(head_dim)) * pq.sum_bound[h] * (1 + 4 * kUnit);
}
double original_rounding(const QueryGroup& q, int head_dim, float k_norm, int h) {
  return gamma_n(chain_originals(head_dim)) * double(q.norm[size_t(h)]) * k_norm * (1 + 4 * kUnit);
}

// Scores of one block, and the Delta_b that goes with the data they were computed from.
// scores: [heads, stride], block_tokens written.
void score_block(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 PageQuery* pq, float* scores, int stride, float* delta, float* score_bound) {
  const PageFormat& f = *context.format;
  const cpu::TileKernels& k = cpu::tile_kernels();
  if (block.page != nullptr) prepare_page(f, q, block.page, pq);
  for (int first = 0; first < block.tokens; first += kTile) {
    if (block.k != nullptr)
      k.score_originals(context.dtype, f.head_dim, block.k + first * f.head_dim,
                        std::min(kTile, block.tokens - first), q.heads, q.scaled.data(),
                        scores + first, stride);
    else
      k.score_codes(f, block.page, (block.index * f.block_tokens + first) / kTile, q.heads,
                    pq->scaled_step.data(), pq->base, scores + first, stride);
  }
  for (int h = 0; h < q.heads; ++h) {
    double codes = 0;
    if (block.page != nullptr) {
      const BlockAnnotations& note = page_annotations(f, block.page, block.index);
      codes = score_error(*pq, q, note, h) + code_rounding(*pq, f.head_dim, h);
    }
    score_bound[h] = float_up(codes);
    const double bound =
        block.k != nullptr ? original_rounding(q, f.head_dim, block.k_norm, h) : codes;
    delta[h] = float_up(bound + kEpsW);
  }
}

// Weighs one block's values about r (times unit). Sums are added to.
void weigh_block(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 const float* scores, int stride, const float* ref, const float* r, float unit,
                 float* sum, float* o, float* m2, float* big_a, float* s1) {
  const PageFormat& f = *context.format;
  const cpu::TileKernels& k = cpu::tile_kernels();
  float p[kMaxGroupHeads * kTile];
  for (int first = 0; first < block.tokens; first += kTile) {
    const int tokens = std::min(kTile, block.tokens - first);
    for (int h = 0; h < q.heads; ++h)
      sum[h] += k.weigh(scores + h * stride + first, tokens, ref[h], p + h * kTile);
    k.weigh_values(f, context.dtype, block.page,
                   (block.index * f.block_tokens + first) / kTile,
                   block.v != nullptr ? block.v + first * f.head_dim : nullptr, unit, tokens, q.heads,
                   p, r, o, kMaxHeadDim, m2, big_a, s1);
  }
}

void clear_terms(int heads, int head_dim, BlockTerms* t) {
  for (int h = 0; h < heads; ++h) {
    t->sum[h] = t->m2[h] = t->big_a[h] = t->s1[h] = 0;
    std::fill_n(t->o[h], head_dim, 0.0f);
  }
}

void scale_centre(const float* r, int head_dim, float unit, float* out) {
  for (int c = 0; c < head_dim; ++c) out[c] = r[c] * unit;
}

// 2^-e with 2^e just above the largest norm in play, within the range of FP32.
float value_unit(std::span<const BlockRef> blocks, const float* r, int head_dim) {
  float largest = 0;
  for (const BlockRef& b : blocks) largest = std::max(largest, b.nu);
  for (int c = 0; c < head_dim; ++c) largest = std::max(largest, std::abs(r[c]));
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0f, std::clamp(-(std::ilogb(largest) + 1), -120, 120));
}

// NaN-propagating maximum.
float max_nan(float a, float b) { return a > b ? a : (a <= b ? b : a + b); }

PageQuery& page_query_scratch() {
  thread_local PageQuery scratch;
  scratch.page = nullptr;  // pages of another sequence may have come to lie at the same address
  return scratch;
}

struct SplitSums {
  float ref[kMaxGroupHeads], l[kMaxGroupHeads], m2[kMaxGroupHeads], big_a[kMaxGroupHeads],
      s1[kMaxGroupHeads];
  float o[kMaxGroupHeads][kMaxHeadDim], a[kMaxGroupHeads][kMaxHeadDim];
};

}  // namespace

QueryGroup make_query_group(int heads, int head_dim, const float* q) {
  CERTKV_EXPECT(heads >= 1 && heads <= kMaxGroupHeads, InvalidArgument,
                "{} query heads share a KV head: 1 to {} are supported", heads, kMaxGroupHeads);
  QueryGroup g;
  g.heads = heads;
  g.head_dim = head_dim;
  g.scaled.resize(size_t(heads) * size_t(head_dim));
  g.norm.resize(size_t(heads));
  const double inv = 1.0 / std::sqrt(double(head_dim));
  for (int h = 0; h < heads; ++h) {
    double norm2 = 0;
    for (int c = 0; c < head_dim; ++c) {
      const size_t i = size_t(h) * size_t(head_dim) + size_t(c);
      g.scaled[i] = float(double(q[i]) * inv);
      norm2 += double(q[i]) * q[i];
    }
    g.norm[size_t(h)] = float_up(std::sqrt(norm2) * inv * (1 + 4 * kUnit));
  }
  return g;
}

void block_terms(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 const float* r, float unit, bool raise_ref, BlockTerms* out) {
  float centre[kMaxHeadDim];
  scale_centre(r, q.head_dim, unit, centre);
  std::memset(out->score, 0, sizeof out->score);
  score_block(context, q, block, &page_query_scratch(), out->score[0], 32, out->delta,
              out->score_bound);
  if (raise_ref)
    for (int h = 0; h < q.heads; ++h)
      for (int t = 0; t < block.tokens; ++t) out->ref[h] = max_nan(out->ref[h], out->score[h][t]);
  clear_terms(q.heads, q.head_dim, out);
  weigh_block(context, q, block, out->score[0], 32, out->ref, centre, unit, out->sum, out->o[0],
              out->m2, out->big_a, out->s1);
}

void attend_pass(const AttendContext& context, const QueryGroup& q, std::span<const BlockRef> blocks,
                 const float* r, PassState* state) {
  const PageFormat& f = *context.format;
  const int heads = q.heads, d = q.head_dim;
  const size_t n = blocks.size(), cells = size_t(heads) * n;
  state->heads = heads;
  state->head_dim = d;
  state->blocks = n;
  state->r.assign(r, r + d);
  const float unit = value_unit(blocks, r, d);
  state->unit = unit;
  float centre[kMaxHeadDim];
  scale_centre(r, d, unit, centre);
  state->block_sum.resize(cells);
  state->block_ref.resize(cells);
  state->delta.resize(cells);
  state->score_bound.resize(cells);
  state->used.resize(cells);
  const size_t per_split = size_t(kSplitTokens / f.block_tokens);
  const size_t splits = (n + per_split - 1) / per_split;

  thread_local std::vector<SplitSums> split_sums;
  thread_local std::vector<float> scores;
  split_sums.resize(splits);
  scores.assign(size_t(kMaxGroupHeads) * kSplitTokens, 0.0f);
  PageQuery& pq = page_query_scratch();
  thread_local BlockTerms terms;
  size_t tokens = 0;

  for (size_t split = 0; split < splits; ++split) {
    SplitSums& sums = split_sums[split];
    const size_t first = split * per_split, last = std::min(n, first + per_split);
    for (int h = 0; h < heads; ++h) {
      sums.ref[h] = -std::numeric_limits<float>::infinity();
      sums.l[h] = sums.m2[h] = sums.big_a[h] = sums.s1[h] = 0;
      std::fill_n(sums.o[h], d, 0.0f);
      std::fill_n(sums.a[h], d, 0.0f);
    }
    for (size_t b = first; b < last; ++b) {
      const int column = int(b - first) * f.block_tokens;
      score_block(context, q, blocks[b], &pq, scores.data() + column, kSplitTokens, terms.delta,
                  terms.score_bound);
      tokens += size_t(blocks[b].tokens);
      for (int h = 0; h < heads; ++h) {
        const float* s = scores.data() + size_t(h) * kSplitTokens + column;
        for (int t = 0; t < blocks[b].tokens; ++t) sums.ref[h] = max_nan(sums.ref[h], s[t]);
        const size_t i = state->at(h, b);
        state->delta[i] = terms.delta[h];
        state->score_bound[i] = terms.score_bound[h];
        state->used[i] = uint8_t((blocks[b].k != nullptr ? kUsedKey : 0) |
                                 (blocks[b].v != nullptr ? kUsedValue : 0));
      }
    }
    for (size_t b = first; b < last; ++b) {
      const int column = int(b - first) * f.block_tokens;
      clear_terms(heads, d, &terms);
      weigh_block(context, q, blocks[b], scores.data() + column, kSplitTokens, sums.ref, centre,
                  unit, terms.sum, terms.o[0], terms.m2, terms.big_a, terms.s1);
      for (int h = 0; h < heads; ++h) {
        const size_t i = state->at(h, b);
        const float c_b = c_of_delta(state->delta[i]);
        state->block_sum[i] = terms.sum[h];
        state->block_ref[i] = sums.ref[h];
        sums.l[h] += terms.sum[h];
        sums.m2[h] += c_b * terms.m2[h];
        sums.big_a[h] += terms.big_a[h];
        sums.s1[h] += terms.s1[h];
        float* o = sums.o[h];
        float* a = sums.a[h];
        const float* add = terms.o[h];
        for (int c = 0; c < d; ++c) {
          o[c] += add[c];
          a[c] += c_b * add[c];
        }
      }
    }
  }
  state->tokens = tokens;

  // Merge in order, each split rescaled once (J = 1); leave the unit (exact: a power of two).
  const double inv = 1.0 / unit;
  state->head.resize(size_t(heads));
  for (int h = 0; h < heads; ++h) {
    HeadSums& out = state->head[size_t(h)];
    float m = split_sums[0].ref[h];
    for (const SplitSums& s : split_sums) m = max_nan(m, s.ref[h]);
    out.m = m;
    out.l = out.m2 = out.big_a = out.s1 = 0;
    out.o.assign(size_t(d), 0.0);
    out.a.assign(size_t(d), 0.0);
    for (const SplitSums& s : split_sums) {
      const double factor = std::exp(double(s.ref[h]) - out.m);
      out.l += factor * s.l[h];
      out.m2 += factor * inv * inv * s.m2[h];
      out.big_a += factor * inv * s.big_a[h];
      out.s1 += factor * inv * s.s1[h];
      for (int c = 0; c < d; ++c) {
        out.o[size_t(c)] += factor * inv * s.o[h][c];
        out.a[size_t(c)] += factor * inv * s.a[h][c];
      }
    }
  }
}

}  // namespace certkv
