// The certified KV cache of one rank: tier 1 of the local KV heads, their scratch, their originals
// in the node store, and the decode step with its verdicts.
//
// THREADS: calls come from one thread; the work inside is spread over the rank's pool, one task per
// (sequence, KV head), each on state of its own.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kvstore/client.h"
#include "parallel/shard.h"
#include "runtime/certify/class_change.h"
#include "runtime/certify/head_step.h"
#include "runtime/certify/scrub.h"
#include "runtime/certify/split_list.h"
#include "runtime/kv_attention.h"
#include "runtime/model_config.h"
#include "runtime/sequence_cache.h"

namespace certkv {

class AuditLog;
class Communicator;

struct CertifiedCacheOptions {
  CacheOptions cache;
  ScratchOptions scratch;
  DType dtype = DType::BF16;  // of the originals
  std::chrono::milliseconds read_deadline{5000};
};

// Room that a request takes on a rank that holds `kv_heads` of the model's KV heads, at its
// largest: its prompt, and `forks` decodes of it. UNITS: bytes
struct CacheNeed {
  uint64_t tier1 = 0, scratch = 0, arena = 0;
};
CacheNeed cache_need(const ModelConfig& config, int64_t kv_heads,
                     const CertifiedCacheOptions& options, int64_t prompt_tokens,
                     int64_t max_tokens, int forks);

// Space in the arena for blocks [first_block, first_block + blocks) of these KV heads in all
// layers; empty where none are wanted or there is no store. Throws OutOfMemory, StoreLost.
OriginalsSpan reserve_originals(StoreClient* store, const BlockShape& shape, int64_t layers,
                                ShardRange heads, uint32_t first_block, uint32_t blocks);

class CertifiedCache : public KvAttention, public SequenceCache {
 public:
  // heads: the KV heads of this rank, global indices. `store` may be null only where no sequence
  // ever holds a sealed block (tests). All references must outlive the cache.
  CertifiedCache(const ModelConfig& config, ShardRange heads, CertifiedCacheOptions options,
                 ThreadPool& pool, std::shared_ptr<StoreClient> store, Communicator& group);
  ~CertifiedCache() override;
  // From here on: what the log chooses is audited. It must outlive the cache.
  void watch(AuditLog* audit) { audit_ = audit; }

  // A sequence that will be prefilled with `prompt_tokens`: reserves its originals. max_tokens:
  // that a decode of it will have at most. Throws OutOfMemory where the arena has no room.
  int64_t create(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens) override;
  size_t find_shared(std::span<const OwnerId> segments) override;
  int64_t create_shared(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens,
                        std::span<const OwnerId> segments, size_t shared) override;
  // A decode of a prefilled sequence: shares what is sealed, reserves for max_tokens more. With a
  // scrub, the prompt's pages are verified at its first fork. Under policy budget and layout
  // `classes` every KV head is re-encoded into the class that its last queries ask for.
  int64_t fork(int64_t sequence, int64_t max_tokens, const StepRules& rules) override;
  int64_t fork_named(int64_t sequence, int64_t max_tokens, const StepRules& rules,
                     const OwnerId& name, std::span<const AnswerSpan> sealed,
                     uint64_t held) override;
  std::vector<AnswerSpan> sealed_answer(int64_t sequence) const override;
  // After a sequence's last step: verifies all of its pages. Returns how many damaged ones it held
  // that no step has reported; they are repaired for the sequences that share them.
  uint64_t close(int64_t sequence) override;
  void drop(int64_t sequence, bool failed = false) override;  // failed: of a decode, for its audit

  // Starts a step: clears the reports of the sequences named, and verifies the share of their pages
  // that is due (cache.scrub_steps). A damaged page is rebuilt, for all sequences that share it,
  // before any pass reads it; where that cannot be, they fail by name.
  void begin_step(uint64_t step, std::span<const int64_t> sequences) override;
  // After the last layer of a step.
  void end_step() override;
  const SequenceReport& report(int64_t sequence) const override;
  // This rank's vote on the step, counted over local query heads.
  VerdictRecord verdict(int64_t sequence) const override;

  uint64_t tier1_bytes() const override;  // all sequences, shared pages once
  uint64_t tier1_bytes(int64_t sequence) const override;
  uint64_t dense_bytes(int64_t sequence) const override;
  // Of the first class, where heads have classes: their formats differ in bytes, not in tokens.
  const PageFormat& format() const { return *format_; }
  // [layers, local_kv_heads], for audits and tests.
  std::span<const HeadState> heads(int64_t sequence) const;
  // Identity of the originals of a sealed block; head: of this rank.
  BlockId originals_id(int64_t sequence, int layer, int head, uint32_t block) const;

  size_t shared_tokens(int64_t sequence) const override;
  bool load_shared(int64_t sequence, int layer, size_t tokens, uint16_t* k, uint16_t* v) override;
  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, std::span<const float> last_q) override;
  void decode(int layer, std::span<const DecodeRow> rows, float* flags) override;
  void decode_dense(int layer, std::span<const DecodeRow> rows) override;

 private:
  struct Sequence;
  class Originals;
  struct Task;
  Sequence& at(int64_t sequence) const;
  void account(int layer, Sequence& s, size_t head, const GroupReport& g);
  void start_audit(int layer, std::span<const DecodeRow> rows);
  void keep_audit(std::span<const DecodeRow> rows);
  StepWhere where(const Sequence& s, int layer, int head, const HeadState& state) const;
  void fail(Sequence& s, ErrorKind kind, const std::string& text) const;
  OriginalsSpan reserve(uint32_t first_block, uint32_t blocks);
  ReserveRequest blocks_of(const OwnerId& owner, uint32_t first_block, uint32_t blocks) const;
  std::vector<OriginalsSpan> adopt(const ReserveRequest& request) const;
  std::unique_ptr<Sequence> make_sequence(int64_t prompt_tokens, int64_t sequence_id);
  int64_t keep_sequence(std::unique_ptr<Sequence> s, int64_t prompt_tokens, int64_t max_tokens);
  void share_pages(Sequence* s);
  std::unique_ptr<Sequence> fork_prompt(Sequence& from, const StepRules& rules);
  int64_t keep_fork(std::unique_ptr<Sequence> s, const Sequence& from, int64_t max_tokens);
  uint32_t answer_blocks(const Sequence& from, int64_t max_tokens) const;
  bool restore(Sequence* s, std::span<const AnswerSpan> sealed, uint64_t held);
  bool restore_head(Sequence* s, size_t cell, uint64_t held);
  SealSink sink(Sequence& s, int layer, int head);
  enum class Extent { Due, All };
  void scrub(std::span<const int64_t> sequences, Extent extent);
  void repair(Sequence& s, size_t cell, const PageFinding& finding);
  void choose_classes(std::span<const std::vector<float>> last_q, Sequence* s);
  void revise_classes(std::span<const int64_t> sequences);
  void count_reencoding(Sequence& s, size_t cell, ReencodeResult result, int before,
                        const std::string& error);
  std::string steps_in_doubt(const Sequence& s, const StepWhere& now, size_t page) const;

  const ModelConfig& config_;
  ShardRange heads_;
  CertifiedCacheOptions options_;
  ThreadPool& pool_;
  std::shared_ptr<StoreClient> store_;
  std::shared_ptr<BlockReader> reader_;
  Communicator& group_;
  bool has_classes_;
  ClassFormats classes_;
  std::shared_ptr<const PageFormat> format_;
  std::shared_ptr<TierAccount> account_;
  ScrubSchedule schedule_;
  std::map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<std::vector<OriginalsSpan>> found_;  // by segment, of find_shared()
  std::vector<std::unique_ptr<Task>> tasks_;       // of the step under way, [rows, local_kv_heads]
  SplitList splits_;
  int64_t next_ = 1;
  uint64_t step_ = 0;
  AuditLog* audit_ = nullptr;
};

}  // namespace certkv
