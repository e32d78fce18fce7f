// One audited head-step against the originals, in float64: true error, tolerance, the terms of the
// bound. Written from kernels/METHOD.md; calls nothing of runtime/certify, kernels/arith or the
// kernels themselves.
//
// What the recorded figures may differ by from float64's is derived beside each comparison. Every
// comparison is written so that NaN is a violation.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "runtime/audit/reader.h"
#include "runtime/audit/requantise.h"

namespace certkv::audit {

// What was violated, and the recorded and recomputed figures.
using Report = std::function<void(const std::string& rule, const std::string& text)>;

struct HeadResult {
  std::string outcome;     // certified, exact, over, failed
  bool has_bound = false;  // it returned a finite bound
  double error = 0, bound = 0;
  double due = 0;  // the least bound that E4 allows here, recomputed
  double s = 0;    // S recomputed
};

// Head `head` of the record. REQUIRES record.head.tokens <= x.tokens(), blocks and heads as the
// record's context and model have them.
HeadResult check_head(const FileHeader& file, const StreamInfo& stream, const HeadRows& x,
                      const Record& record, size_t head, const Report& violation);

// Whether the writer must have recorded this step.
bool must_be_recorded(const FileHeader& file, int64_t request, uint32_t layer, uint32_t kv_head,
                      uint64_t tokens);

const char* outcome_text(uint8_t outcome);

}  // namespace certkv::audit
