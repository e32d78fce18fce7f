// What drawing tokens on a device is told, and what it keeps between its stages. Plain data: nvcc
// and C++ see the same. Every pointer is memory of the device.
#pragma once

#include "kernels/arith/sampling.h"
#include "kernels/cuda/model_args.h"

namespace certkv::cuda {

inline constexpr size_t kSamplePart = 4096;   // tokens that one block looks at
inline constexpr size_t kSampleParts = 1024;  // of a row, at most
inline constexpr int kSampleBins = 2048;
inline constexpr int kSampleStages = 5;  // that fill bins; two more add the parts up, and draw

// Tokens by some bits of their logits' order, which is the upper half of argmax_word.
struct SampleBins {
  uint64_t mass[kSampleBins];
  uint32_t count[kSampleBins];
};

// Where the last token that is kept has been narrowed down to.
struct SampleCut {
  uint64_t above;   // mass of what lies above, all of it kept
  uint64_t want;    // what is to be reached from there on: mass, or tokens
  uint32_t prefix;  // the known leading bits of its order; all 32 in the end
  uint32_t by_mass;
};

// The last kept token's logit, by its order: all above it are kept and, of its equals, the first by
// their ids.
struct SampleKept {
  uint32_t order;
  uint64_t equals, equal_weight, mass;
};

struct SamplePartSum {
  uint64_t mass;  // of tokens above SampleKept::order
  uint64_t ties;  // tokens of that very order
};

// Of one row.
struct SampleScratch {
  SampleBins bins[kSampleStages];  // zero before the first stage
  SampleCut cuts[kSampleStages];
  SampleKept kept;
  SamplePartSum parts[kSampleParts];
};

// tokens[r]: what sample_token() draws from row r, -1 where nothing is to be drawn: at temperature
// 0, or where the row's largest logit is not finite. A row lies in pieces, one after another by
// their tokens' ids: piece p has ids begins[p] to begins[p + 1], at x + (p * rows + r) * stride.
struct SampleRows {
  const float* x = nullptr;           // [pieces, rows, stride]
  size_t stride = 0;                  // floats; at least the widest piece
  const uint32_t* begins = nullptr;   // [pieces + 1], the first 0, the last n
  const uint64_t* best = nullptr;     // [pieces, rows]: argmax_word within the piece
  const SampleDraw* draws = nullptr;  // [rows]
  SampleScratch* scratch = nullptr;   // [rows], which need not be zero
  int32_t* tokens = nullptr;          // [rows]
  size_t pieces = 1, rows = 0, n = 0;

  CERTKV_HD size_t parts_of_piece() const { return (stride + kSamplePart - 1) / kSamplePart; }
  CERTKV_HD size_t parts() const { return pieces * parts_of_piece(); }
};

}  // namespace certkv::cuda
