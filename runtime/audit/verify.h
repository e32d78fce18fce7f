// Checks a whole audit folder: digest chains, completeness, and every record against the originals.
//
// Memory: per thread the originals of one KV head at one layer of one sequence and one record; and
// a list of where records lie.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "runtime/audit/format.h"

namespace certkv::audit {

struct VerifyOptions {
  std::string folder;
  int threads = 1;
  bool allow_truncated = false;  // a file that ends early is reported, and not counted as violation
  size_t max_listed = 100;       // violations that are kept for printing
  // what: "chain" (bytes) or "records"; from any thread, one call at a time.
  std::function<void(const char* what, uint64_t done, uint64_t total)> progress;
};

struct Violation {
  std::string where, rule, text;
};

// How far bounds are above true errors; of head-steps with a finite bound.
struct Tightness {
  uint64_t head_steps = 0;
  double worst = 0, sum = 0;  // of true error / bound (0/0 is 0)
  double worst_error = 0;     // of true error / S
  // Of recomputed / recorded bound: how closely bounds are checked.
  double least_due = 1, due_sum = 0;
};

struct FileSummary {
  std::string path;
  Digest digest{};  // the last link's: note it elsewhere, and no later change goes unseen
  uint64_t bytes = 0, links = 0, records = 0;
  std::string broken;  // not empty: what is wrong
  bool truncated = false;
};

struct VerifyResult {
  std::vector<FileSummary> files;
  uint64_t records = 0, head_steps = 0, sequences = 0;
  std::map<std::pair<std::string, std::string>, Tightness> tightness;  // by policy and outcome
  uint64_t violations = 0;
  std::vector<Violation> listed;
};

// ERRORS: InvalidArgument where the folder does not exist or holds no audit file, BadFile where a
// file cannot be read at all.
VerifyResult verify_folder(const VerifyOptions& options);

}  // namespace certkv::audit
