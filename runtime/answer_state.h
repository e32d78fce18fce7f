// Where an answer stands while it is generated: what the job's folder keeps of it, so that a job
// that was killed goes on with it and draws no token twice.
//
// The draws need no state of their own: each depends on seed, request and position alone.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/arith/verdict.h"
#include "kvstore/block.h"
#include "runtime/certify/class_table.h"
#include "runtime/options.h"

namespace certkv {

struct Completion;

// Blocks of an answer's originals, of all layers and KV heads, under a name that can be asked for.
struct AnswerSpan {
  OwnerId owner;
  uint32_t first_block = 0, blocks = 0;
  friend bool operator==(const AnswerSpan&, const AnswerSpan&) = default;
};

// The answer at a moment when all of the tokens that the cache held were sealed: the first `tokens`
// of it were drawn, all but the newest were held.
struct SealedAnswer {
  uint64_t tokens = 0;
  uint64_t scope = 0;  // of scope_word(): what the originals were made with
  std::vector<AnswerSpan> spans;
  std::string figures;  // encode_completion() of its head-steps so far, without text and tokens
  double bound_sum = 0, relative_sum = 0;
  uint64_t steps = 0;
};

struct AnswerState {
  Policy policy = Policy::Budget;
  std::vector<int32_t> tokens;  // drawn so far, one that ended it included
  std::optional<SealedAnswer> sealed;
};

// News of one answer, from the engine to the job's folder.
struct AnswerProgress {
  uint64_t id = 0;  // of the request
  Policy policy = Policy::Budget;
  uint64_t first = 0;           // tokens drawn before these
  std::vector<int32_t> tokens;  // drawn by the step, if any
  std::optional<SealedAnswer> sealed;
};

// JSON on one line, without tabs. Decoding throws BadFile.
std::string encode_progress(const AnswerProgress& progress);
AnswerProgress decode_progress(std::string_view text);

// Applies news; false, and nothing is changed, where they do not follow what is known.
bool follow(AnswerState* state, const AnswerProgress& progress);

}  // namespace certkv
