// `certkv attend`: one certified attention step on the user's own tensors, file to file.
//
// Input (safetensors): q [query_heads, d], k and v [kv_heads, tokens, d], after RoPE, F16, BF16 or
// F32. F32 is rounded to the type of k and v first (`dtype` where those are F32 too), and the rounded
// tensors are the originals.
// Output, [query_heads] unless said otherwise:
//   o                F32 [query_heads, d]
//   bound, e_key, e_val, e_fp, e_key_paper, relative, candidate_bound       F64
//   outcome          U8  0 certified, 1 exact, 2 failed, 3 over
//   rung             U8  highest rung reached, 0 to 4
//   promoted_keys, promoted_values                                          I64, blocks
//   block_log_mass   F32 [query_heads, ceil(tokens / block)] natural logarithm, not normalised, of
//                    the candidate pass; open blocks last
// Tokens beyond the last full key scale group form the open block, which stays unquantised.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>

#include "kernels/arith/verdict.h"
#include "kernels/base/dtype.h"
#include "runtime/options.h"

namespace certkv {

struct AttendFileOptions {
  std::filesystem::path input, output;
  DType dtype = DType::BF16;  // F32 input is rounded to it; of F16 and BF16 input the file's counts
  Policy policy = Policy::Budget;
  Tolerance tolerance;
  CacheOptions cache;
  PaperOptions paper;
  LadderOptions ladder;
  uint64_t seed = 0;          // of exploration
};

struct AttendFileResult {
  std::array<uint64_t, 4> outcomes{};  // query heads, by Outcome
  std::array<uint64_t, kRungs> rungs{};
  double bound_max = 0, relative_max = 0;
  double bytes_per_token = 0;  // of tier 1, per KV head
  int64_t tokens = 0, query_heads = 0, kv_heads = 0, head_dim = 0;
};

// ERRORS: BadFile (missing or misshapen tensors), InvalidArgument, NonFinite (naming the tensor),
// IoError.
AttendFileResult attend_file(const AttendFileOptions& options);

}  // namespace certkv
