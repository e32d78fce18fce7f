// A generated attention problem run with its audit: one KV head, one layer, one token a step.
#pragma once

#include <string>
#include <vector>

#include "runtime/audit/format.h"
#include "tests/support/attention_cases.h"

namespace certkv {

struct AuditedRun {
  oracle::Originals originals;
  std::vector<GroupReport> steps;
  std::vector<std::vector<float>> q;  // [steps][heads, head_dim]
  std::vector<uint64_t> tokens;       // [steps] of the context
};

// Writes folder/audit-000-rank-0000.audit with everything recorded, as policy case.rules says.
// broken_step: of this step the layer goes dense (rung 4); -1: of none. failed_step: its originals
// cannot be had.
AuditedRun run_audited(const AttentionCase& c, const std::string& folder, int broken_step = -1,
                       int failed_step = -1);

// A link of an audit file, as its bytes.
struct AuditLink {
  audit::LinkKind kind;
  std::string payload;
};
std::vector<AuditLink> read_links(const std::string& path);
// With a chain that is whole again.
void write_links(const std::string& path, const std::vector<AuditLink>& links);

}  // namespace certkv
