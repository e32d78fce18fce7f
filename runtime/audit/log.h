// Writes the audit of one rank: the originals of what is audited, and a record of every chosen
// head-step, as links of one digest chain in one file. runtime/AUDIT.md is the format.
//
// What is chosen depends on the request, layer, KV head and step alone, never on the number of
// ranks or on neighbours in the batch. Rows of heads of which no step can be chosen are not
// written.
//
// ERRORS: IoError where the file cannot be written: the job ends by name, since an audit was asked
// for. THREADS: one, but for capture(), which tasks may call for different heads at a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "kernels/layout.h"
#include "parallel/shard.h"
#include "runtime/audit/capture.h"
#include "runtime/audit/format.h"
#include "runtime/certify/head_step.h"
#include "runtime/kv_attention.h"

namespace certkv {

class AppendFile;

// Which audit this rank writes.
struct AuditSetup {
  std::string folder;  // exists
  double sample = 0;   // share of head-steps, above 0
  uint64_t seed = 0;
  int session = 0;          // the same on all ranks
  int rank = 0, world = 1;  // of the job
  int replica = 0, tensor_rank = 0, tensor = 1;
  std::string model_files;  // digest of the model folder (runtime/manifest.h)
};

struct AuditShape {
  int64_t layers = 0, query_heads = 0, kv_heads = 0;  // of the model
  ShardRange heads{};                                 // KV heads of this rank
  DType dtype = DType::BF16;                          // of the originals
  const PageFormat* format = nullptr;
  bool device = false;  // what a device backend serves and states (kernels/METHOD.md, 12b)
};

// The digest chain of one file.
class AuditFile {
 public:
  explicit AuditFile(const std::string& path);  // throws InvalidArgument where the file exists
  ~AuditFile();
  void add(audit::LinkKind kind, std::string_view payload);
  void add(audit::LinkKind kind, const nlohmann::json& payload);
  void sync();
  uint64_t links() const { return links_; }
  uint64_t bytes() const;
  const std::string& path() const;
  const audit::Digest& digest() const { return chain_.last(); }

 private:
  std::unique_ptr<AppendFile> file_;
  audit::DigestChain chain_;
  std::string buffer_;
  uint64_t links_ = 0;
};

class AuditLog {
 public:
  AuditLog(AuditSetup setup, const AuditShape& shape);
  ~AuditLog();

  bool chosen(int64_t request, int layer, int64_t kv_head, uint64_t tokens) const;

  // Streams of rows: of a prompt, and of a sequence decoded from it. Their ids are this file's own.
  uint32_t open_prompt(int64_t request, int64_t prompt_tokens, int64_t max_tokens);
  uint32_t open_sequence(uint32_t prompt, int64_t prompt_tokens, int64_t max_tokens,
                         const StepRules& rules);
  // tokens: of the context at its end. A closed sequence is on the disk.
  void close(uint32_t stream, uint64_t tokens, bool failed);

  // Rows of a prompt, of one KV head (counted on this rank): [rows, head_dim] each.
  void rows(uint32_t stream, int layer, int head, size_t rows, const uint16_t* k,
            const uint16_t* v);

  // One layer of a decode step, rows already appended to tier 1: `streams` with their requests and
  // context lengths. What the layer before left is written first.
  struct Row {
    uint32_t stream = 0;
    uint64_t tokens = 0;
    const uint16_t *k = nullptr, *v = nullptr;  // [local KV heads, head_dim] of the newest token
  };
  void start_layer(uint64_t step, int layer, std::span<const Row> rows);
  // Where the head's step leaves its record; nullptr where it was not chosen.
  AuditCapture* capture(uint32_t stream, int head);
  // The outcome, again after a rung 4. q, out: [heads, head_dim]
  void keep(uint32_t stream, int head, const float* q, const float* out, const GroupReport& report);
  // The sequence has failed within the step: nothing of it leaves the system.
  void discard(uint32_t stream);
  void end_step();

  // The file is complete as it stands. More may follow.
  void end();

 private:
  struct Stream;
  struct Pending;
  Pending* find(uint32_t stream, int head);
  void write_pending();
  void write_rows(uint32_t stream, Stream& s, int layer, int head);
  void write_record(const Pending& p);
  bool any_chosen(int64_t request, int layer, int64_t kv_head, uint64_t first, uint64_t last) const;

  AuditSetup setup_;
  AuditShape shape_;
  AuditFile file_;
  std::map<uint32_t, std::unique_ptr<Stream>> streams_;
  std::vector<Pending> pending_;
  uint32_t next_ = 1;
  uint64_t step_ = 0, records_ = 0;
  int layer_ = 0;
};

}  // namespace certkv
