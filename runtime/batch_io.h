// The lines of a job's input, and the lines of its results.
//
// Input, one JSON object per line, blank lines skipped:
//   OpenAI batch  {"custom_id", "method": "POST", "url", "body"}, url /v1/completions or
//                 /v1/chat/completions
//   plain         {"prompt", "max_tokens", ...}: the body of a completion, with custom_id beside it
// Both take `certkv: {"tolerance": 0.02 | {"relative": x} | {"absolute": x}, "policy": "dense"}`,
// beside custom_id or in the body. A missing custom_id is the line's number.
//
// A field that would change the answer and is not supported fails its line by name, unless it has
// the value that changes nothing ("n": 1). A field that is not known fails its line as well; only
// the few that cannot change an answer (user, metadata, store, service_tier ...) are ignored.
//
// Output: the OpenAI batch schema, see launcher/RESULTS.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/engine.h"
#include "runtime/options.h"

namespace certkv {

struct BatchLimits {
  size_t line_bytes = size_t(16) << 20;  // more: more memory while one line is read
  size_t json_depth = 32;
  size_t json_values = size_t(4) << 20;
  size_t custom_id_bytes = 512;
  size_t stop_strings = 16, stop_bytes = 256;
};

// What a line gets where it does not say.
struct BatchDefaults {
  SamplingOptions sampling;
  Policy policy = Policy::Budget;
  Tolerance tolerance;
  bool compare = false;  // every prompt is decoded under several policies: a line may ask for none
};

struct BatchMessage {
  std::string role, content;
};

enum class BatchKind : uint8_t { Plain, Completion, Chat };

struct BatchLine {
  uint64_t index = 0;   // counts the lines that are not blank, from 0
  uint64_t number = 0;  // in the file, from 1
  std::string custom_id;
  BatchKind kind = BatchKind::Plain;
  std::string model;   // as asked for; not used to choose one
  std::string prompt;  // Plain and Completion, unless given as ids
  std::vector<int32_t> prompt_ids;
  std::vector<BatchMessage> messages;  // Chat
  SamplingOptions sampling;
  Policy policy = Policy::Budget;
  bool policy_asked = false;  // by the line itself
  Tolerance tolerance;

  bool bad = false;  // the line fails alone, for this reason
  ErrorKind error_kind = ErrorKind::InvalidArgument;
  std::string error;
};

// Never throws for what a line says: a bad line comes back with `bad` set. `number` is used in
// messages and as custom_id where there is none.
BatchLine parse_batch_line(std::string_view text, uint64_t number, const BatchDefaults& defaults,
                           const BatchLimits& limits = {});

// What the whole file holds, found by reading it once.
struct BatchSurvey {
  uint64_t lines = 0;  // not blank
  uint64_t bytes = 0;
  std::string digest;  // XXH3, 128 bits in hexadecimal digits
};

class BatchReader {
 public:
  // Throws BadFile where the file is missing or not a regular file.
  BatchReader(const std::string& path, BatchDefaults defaults, BatchLimits limits = {});
  ~BatchReader();

  // Reads the file to its end, without parsing it, and starts over.
  BatchSurvey survey();

  // The next line that is not blank, or nothing at the end. A custom_id used by an earlier line
  // makes the later one bad. Throws BadFile at the end if the file is no longer the surveyed one.
  std::optional<BatchLine> next();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// What is remembered of a line until its answer is written.
struct LineIdentity {
  uint64_t index = 0, number = 0;
  std::string custom_id;
  BatchKind kind = BatchKind::Plain;
  std::string model;
  Tolerance tolerance;
};
LineIdentity identity_of(const BatchLine& line);

// One line of results.jsonl, without its newline. `run_id` goes into the ids, `created` is in
// seconds since 1970. ENSURES valid UTF-8, whatever bytes the text has.
std::string result_line(const LineIdentity& line, const Completion& completion,
                        const std::string& run_id, int64_t created);

// The completion of a line that never reached an engine.
Completion failed_completion(uint64_t index, Policy policy, ErrorKind kind, std::string message);

}  // namespace certkv
