// The certified pass: attention of one KV head's query heads over quantised and original blocks,
// with everything its error bound needs accumulated in the same pass.
//
// SOURCE: method sections 3, 4, 4b and 5.1. What the CPU backend does beyond the text is proved in
// kernels/METHOD.md, section 12:
//  - The sequence is cut into splits of kSplitTokens. Within one, all scores come first, then the
//    weights about the split's own maximum: no token meets a rescale inside a split, and one
//    (J = 1) when splits are merged. Splits are merged in double precision, in order.
//  - A run is a stretch of one page whose blocks are served from the same sources; it has one
//    Delta, the largest of its blocks', whose scales are the same.
//  - Values are summed as codes: sum p step code + sum p base. What rounding can cost is bounded by
//    vbar_b, the norm of |base| + code step, not by ||v^||.
//  - The sums a and m2 of method E2 run over quantised keys alone; original keys, whose Delta is
//    rounding, enter the key term by their masses.
//  - Inside a pass values are multiplied by a power of two that brings the largest norm near 1, so
//    that squares neither overflow (BF16 reaches 3e38) nor vanish; sums leave the pass unscaled.
//  - Delta_b uses the worst case of eps_w (m - min s >= 104), known before the pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/arith/chains.h"
#include "kernels/layout.h"

namespace certkv {

// Where one block's keys and values come from in a pass. A snapshot: valid while the pass runs.
struct BlockRef {
  const std::byte* page = nullptr;  // sealed page holding the block; nullptr: originals only
  int16_t index = 0;                // of the block within its page
  int16_t tokens = 0;               // valid rows; fewer than block_tokens only in the open block
  const uint16_t* k = nullptr;      // originals used for scoring [tokens, head_dim]; nullptr: codes
  const uint16_t* v = nullptr;      // originals used for weighing; nullptr: codes
  float nu = 0, k_norm = 0;         // annotations that hold for originals
};

// Query heads that share a KV head, prepared once per step and layer. Scores, Delta_b and all log
// masses that come of it are natural logarithms.
struct QueryGroup {
  int heads = 0, head_dim = 0;
  std::vector<float> scaled;        // [heads, head_dim] q / sqrt(d)
  float norm[kMaxGroupHeads] = {};  // ||q|| / sqrt(d), rounded up; 0 beyond the heads
};
// q: [heads, head_dim]. Reuses `group`'s memory. Throws InvalidArgument for more than
// kMaxGroupHeads heads, or none.
void make_query_group(int heads, int head_dim, const float* q, QueryGroup* group);
QueryGroup make_query_group(int heads, int head_dim, const float* q);

// Sums of one head about a reference maximum m.
struct HeadSums {
  double m = 0;           // reference of the weights: w = exp(s - m)
  double l = 0;           // sum w
  std::vector<double> o;  // [head_dim] sum w v^
  std::vector<double> a;  // [head_dim] sum over T of c_b w v^
  double m2 = 0;          // sum over T of c_b w ||v^||^2, from norms rounded up
  double s1 = 0;          // sum w ||v^||, from norms rounded down (S of method E5, before division)
  double c_tokens = 0;    // sum over T of c_b, over tokens
  float score_max = 0;    // largest D_b + g_b over T; telemetry
};

// Sums of one split of one head about its own maximum, in the pass's unit.
struct alignas(64) SplitSums {
  float o[kMaxHeadDim], a[kMaxHeadDim];
  float ref, l, m2, s1, c_tokens, score_max;
};

// Result of a pass for one KV head. Arrays of cells are [heads, blocks].
struct PassState {
  int heads = 0, head_dim = 0;
  size_t blocks = 0, tokens = 0;
  bool certificate = true;       // false: only o and l are meaningful
  float unit = 1;                // power of two the values were multiplied by inside the pass
  std::vector<HeadSums> head;    // [heads]
  std::vector<float> block_sum;  // sum of exp(s - block_ref) over the block
  std::vector<float> block_ref;  // reference the block's weights were computed with
  std::vector<float> delta;      // Delta_b charged, for the data really used (NaN-propagating)
  std::vector<float> c;          // expm1(delta), rounded up
  std::vector<float> keep;       // exp(-delta), rounded down
  std::vector<float>
      score_bound;            // D_b + g_b of the codes, also where originals were used; 0: no page
  std::vector<uint8_t> used;  // what this head's state was accumulated from: kUsedKey | kUsedValue
  std::vector<float> nu, eta,
      vbar;  // [blocks] annotations; eta and vbar of the codes, 0 and nu without
  bool skips = false;
  double skip[kMaxGroupHeads] = {};
  float nu_max = 0, eta_max = 0, vbar_max = 0;  // over all blocks
  bool notes_sound = true;                      // every annotation is a number >= 0
  std::vector<SplitSums> split;                 // [splits, heads]
  size_t at(int h, size_t b) const { return size_t(h) * blocks + b; }
};
inline constexpr uint8_t kUsedKey = 1, kUsedValue = 2;  // originals were used
inline constexpr uint8_t kSkippedValue = 4;  // values were not read: they counted as 0, eta_b as nu_b

// Instruction set of the pass's inner loops: the machine's best, or what CERTKV_ISA asks for (to
// compare and to test them). Throws InvalidArgument where that is unknown or not of this machine,
// as the first pass would.
const char* attend_isa();

struct AttendContext {
  const PageFormat* format = nullptr;
  DType dtype = DType::BF16;  // of the originals
};

struct PassOptions {
  bool certificate = true;  // false: attention alone, for measuring what the certificate costs
  // Certified skipping of values: a run of value codes is left out where for every head
  // sum exp(s) nu over it is at most exp(skip[h]). nullptr: none. A guess: what was skipped is charged
  // as it is. SOURCE: method E6. Needs the certificate.
  const double* skip = nullptr;  // [heads], copied
};

// The pass in three parts, so that splits can be spread over threads: the result does not depend on
// who runs which. No part allocates once the state has held a sequence of that length.
// REQUIRES blocks.size() >= 1, every block with tokens >= 1 (block_tokens except in the last), and
// originals where page is null; the same blocks in every call.
void attend_begin(const AttendContext& context, const QueryGroup& q,
                  std::span<const BlockRef> blocks, const PassOptions& options, PassState* state);
size_t attend_splits(const AttendContext& context, size_t blocks);
// Splits [first, last): the values of one are weighed while the scores of the next are computed, so
// that memory is read evenly. THREADS: different splits may run at the same time.
void attend_some(const AttendContext& context, const QueryGroup& q,
                 std::span<const BlockRef> blocks, size_t first, size_t last, PassState* state);
void attend_merge(PassState* state);
// All of it, on the calling thread.
void attend_pass(const AttendContext& context, const QueryGroup& q,
                 std::span<const BlockRef> blocks, PassState* state,
                 const PassOptions& options = {});

// One block's contribution to every head of the group: what the pass adds, and, called again with
// the same reference, sources and unit, the same weights bit for bit, which a correction subtracts.
// Sums of values are in units: o and s1 times unit, m2 times unit^2.
struct BlockTerms {
  float ref[kMaxGroupHeads];  // in: reference wished; out: reference used
  float sum[kMaxGroupHeads];  // sum p, p = exp(s - ref)
  float m2[kMaxGroupHeads];   // sum p ||v^||^2, without the factor c_b
  float s1[kMaxGroupHeads];
  float delta[kMaxGroupHeads];        // Delta_b of the sources used, of this block alone
  float score_bound[kMaxGroupHeads];  // D_b + g_b of the codes; 0 without a page
  float score[kMaxGroupHeads][32];       // q.k / sqrt(d) of each token
  float o[kMaxGroupHeads][kMaxHeadDim];  // sum p v^
};
// raise_ref: where a score exceeds the wished reference, that score becomes the reference.
// SOURCE: method sections 5.3 and 7.
void block_terms(const AttendContext& context, const QueryGroup& q, const BlockRef& block,
                 float unit, bool raise_ref, BlockTerms* out);

}  // namespace certkv
