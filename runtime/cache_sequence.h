// What the certified cache keeps of a sequence. For runtime/certified_cache.cc and
// runtime/cache_classes.cc alone.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/certified_cache.h"
#include "runtime/span_originals.h"

namespace certkv {

struct CertifiedCache::Sequence {
  int64_t handle = 0;
  int64_t id = 0;  // of the request: for log lines and exploration
  StepRules rules;
  SpanList spans;                   // of the prompt (shared by forks), then of the answer
  uint32_t prefix_blocks = 0;       // of the prompt's sealed groups
  std::vector<OwnerId> segments;    // names of the prompt's whole segments, where it may share them
  size_t shared_tokens = 0;         // of the prompt, whose originals the store had
  uint32_t audit = 0;               // its stream in the audit
  std::vector<HeadState> heads;     // [layers, local_kv_heads]
  std::vector<GroupReport> groups;  // [local_kv_heads], of the layer under way
  SequenceReport report;
  std::mutex error_mutex;
  std::atomic<bool> has_failed{false};  // report.error is set; read by the pool's threads
  bool prompt_verified = false;         // by the scrub, once prefill has filled the pages
  uint64_t damaged_pages = 0;           // it held, found since its last report
  std::optional<uint64_t> first_step;   // tokens held before the first step
  // The prompt's last queries, [layers] of [queries, local_query_heads, head_dim].
  std::vector<std::vector<float>> last_q;
  std::atomic<uint64_t> lost_reads{0};  // re-encodings given up since its last report

  bool failed() const { return has_failed; }
};

class CertifiedCache::Originals : public SpanOriginals {
 public:
  Originals(const CertifiedCache& cache, const Sequence& s, int layer, int head)
      : SpanOriginals(cache.reader_.get(), cache.options_.read_deadline, s.spans, uint32_t(layer),
                      uint32_t(cache.heads_.begin + head)) {}
};

}  // namespace certkv
