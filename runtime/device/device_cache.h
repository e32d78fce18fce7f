// The certified KV cache of one rank with tier 1 on a device (method section 5): sealed pages and
// scratch in the device's memory, originals in the node's arena, which the device reads itself.
//
// A step of a layer is one stretch of work on the device: append, the certified pass, judging; and
// where a head does not fit its tolerance, the ladder: rungs 1 and 2 by passes repeated over what
// was promoted, rung 3 over originals alone. The host learns at the end of the step what became of
// every head.
//
// What it does not do yet is refused by the constructor or by fork(), by name: layout
// `paper`, blocks but of 16 tokens, skipping. Under layout `classes` a head's class is chosen when
// its decode is forked, as on the CPU, and not revised; what would be served as `exact` has class
// `k12v8`. THREADS: calls come from one thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "kernels/base/thread_pool.h"
#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/dense_ops.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/model_ops.h"
#include "runtime/certified_cache.h"
#include "runtime/device/background_work.h"
#include "runtime/device/device_attention.h"

namespace certkv {

class AuditLog;

class DeviceCache : public SequenceCache, public DeviceAttention {
 public:
  // heads: the KV heads of this rank, global indices. All references must outlive the cache.
  // Throws InvalidArgument for what is not supported.
  DeviceCache(const ModelConfig& config, ShardRange heads, CertifiedCacheOptions options,
              cuda::Device& device, cuda::CacheOps& ops, ThreadPool& pool,
              std::shared_ptr<StoreClient> store, Communicator& group);
  ~DeviceCache() override;
  // From here on policy `dense` attends by this library; without one, by our own pass over
  // originals, which is slower and knows its rounding better. Both must outlive the cache.
  void use_library(cuda::DenseOps& dense, cuda::ModelOps& model);
  // From here on: what the log chooses is audited, and policy `dense` stays with our own pass, for
  // a library does not say what each block weighs. The log must outlive the cache.
  void watch(AuditLog* audit);
  // Of the first class, where heads have classes.
  const PageFormat& format() const { return format_; }
  // Of the pages of a KV head; head: of this rank.
  cuda::PageKind kind(int64_t sequence, int layer, int head) const;

  int64_t create(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens) override;
  int64_t fork(int64_t sequence, int64_t max_tokens, const StepRules& rules) override;
  uint64_t close(int64_t sequence) override;
  void drop(int64_t sequence, bool failed = false) override;

  void begin_step(uint64_t step, std::span<const int64_t> sequences) override;
  void end_step() override;
  const SequenceReport& report(int64_t sequence) const override;
  VerdictRecord verdict(int64_t sequence) const override;

  uint64_t tier1_bytes() const override;
  uint64_t tier1_bytes(int64_t sequence) const override;
  uint64_t dense_bytes(int64_t sequence) const override;

  void take_rows(int64_t sequence, int layer, size_t rows, const uint16_t* k, const uint16_t* v,
                 size_t head_stride) override;
  void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                     const uint16_t* v, size_t head_stride, std::span<const float> last_q) override;
  void begin_rows(std::span<const int64_t> sequences, float* out) override;
  void agree_through(const Agreement& agreement) override { agreement_ = agreement; }
  void decode(int layer, const float* qkv, const Following& following) override;
  void decode_dense(int layer, const uint32_t* rows) override;
  void end_rows() override;
  uint64_t shape() const override { return shape_; }

  // For tests: where the device holds a sealed page (page.h), and the identity of a sealed block's
  // originals. head: of this rank.
  std::byte* page(int64_t sequence, int layer, int head, size_t page) const;
  BlockId originals_id(int64_t sequence, int layer, int head, uint32_t block) const;

  // What the decodes of a prompt, one for each policy, take on the device; beside it, and shared
  // by all sequences, a step's records and sums. UNITS: bytes
  struct Need {
    uint64_t prompt = 0;   // tier 1 of the prompt, from create() on
    uint64_t answers = 0;  // the rest of tier 1, tables, and originals under policy dense
    uint64_t scratch = 0;
    uint64_t staging = 0, least_staging = 0;  // of rung 3: all at once, piece by piece
  };
  static Need need(const ModelConfig& config, int64_t kv_heads,
                   const CertifiedCacheOptions& options, const cuda::DeviceShape& device,
                   int64_t prompt_tokens, int64_t max_tokens, std::span<const Policy> policies);
  // Pinned host memory that prompts' rows go through, taken so many at a time, at most; for as long
  // as no longer prompt comes. UNITS: bytes
  static uint64_t prefill_host_bytes(const ModelConfig& config, int64_t kv_heads,
                                     int64_t prompt_tokens, int64_t chunk_rows);

 private:
  struct Prompt;
  struct Sequence;
  struct StepBuffers;
  struct Look {  // at a sealed page
    size_t cell, page;
  };
  struct Due;
  Sequence& at(int64_t sequence) const;
  size_t cells() const { return size_t(config_.layers) * size_t(heads_.count()); }
  OriginalsSpan reserve(uint32_t first_block, uint32_t blocks);
  const std::byte* on_device(const std::byte* in_arena) const;
  void lay_out(Sequence* s);
  void fill_dense(Sequence* s);
  struct CellRows;
  void choose_classes(Sequence* s);
  bool read_rows(const Sequence& s, size_t cell, CellRows* rows) const;
  void choose_class_of(const Sequence& s, size_t cell, CellRows* rows) const;
  bool recode(Sequence* s, size_t cell, const CellRows& rows);
  void attend(cuda::PassArgs pass, cuda::PassShape shape);
  bool is_recoded(const Sequence& s, size_t cell, size_t page) const;
  cuda::PageKind kind_at(const Sequence& s, size_t cell, size_t page) const;
  size_t bytes_at(const Sequence& s, size_t cell, size_t page) const;
  void reserve_filled(Sequence* s);
  void enqueue_sealing();
  void seal_open(Sequence* s);
  size_t kept_slots(const Sequence& s) const;
  uint64_t kept_bytes(const Sequence& s) const;
  void lay_out_kept(Sequence* s, std::vector<cuda::PageEntry>& entries,
                    std::vector<int32_t> (&slot_of)[2]);
  void keep_open(Sequence* s, const std::vector<size_t>& cells);
  void write_originals(OriginalsSpan span, size_t first_cell, size_t cells, size_t first_block,
                       size_t blocks, const std::byte* k, const std::byte* v, uint64_t of_cell);
  void write_taken();
  void forget_taken();
  std::byte* page_at(const Sequence& s, size_t cell, size_t page) const;
  uint64_t& digest_of(Sequence& s, size_t cell, size_t page) const;
  bool is_kept(const Sequence& s, size_t cell, size_t page) const;
  void reserve_looks(Sequence* s);
  void enqueue_due();
  void look(Sequence& s, Sequence& by, std::span<const Look> looks);
  void judge_looks(Sequence& s, const Sequence& by, std::span<const Look> looks, bool in_step);
  void judge_due();
  void look_at_tables(Sequence& s, std::span<const Look> looks, size_t items, size_t first);
  void judge_tables(Sequence& s, std::span<const Look> looks, bool in_step);
  cuda::LadderItem ladder_item(const Sequence& s, size_t cell) const;
  cuda::SlotShape slot_shape() const;
  std::string name_of(const Sequence& s, const Look& look) const;
  void scrub_all(Sequence& s, Sequence& by);
  void repair(Sequence& s, const Look& look, bool in_step);
  PageRebuild rebuild(Sequence& s, const Look& look, const uint16_t* k, const uint16_t* v);
  std::string steps_in_doubt(const Sequence& s, const Look& look, bool in_step) const;
  void reserve_staging(size_t entries);
  cuda::PassArgs pass_args(int layer) const;
  cuda::PassShape pass_shape(int splits) const;
  cuda::LadderArgs ladder_args(int layer, const cuda::PassShape& shape) const;
  void climb(const cuda::PassArgs& pass, const cuda::PassShape& shape,
             const cuda::LadderArgs& ladder);
  // Of the rows under way, under policy budget; else 0.
  int ranking() const;
  double exploration() const;
  cuda::PaperArgs paper_args(const cuda::LadderArgs& ladder) const;
  void paper(const cuda::PassArgs& pass, const cuda::PassShape& shape,
             const cuda::LadderArgs& ladder);
  void explore(const cuda::PassArgs& pass, const cuda::PassShape& shape, cuda::LadderArgs* ladder);
  void rung3(const cuda::PassArgs& pass, const cuda::PassShape& shape,
             const cuda::LadderArgs& ladder);
  void read_reports(Sequence* s);
  bool by_library() const;  // the rows under way
  void begin_library();
  void decode_by_library(int layer, const float* qkv);
  template <typename T>
  std::vector<T> read_back(const T* from, size_t count) const;
  void begin_audit(int layer, const float* qkv);
  void read_audit(bool at_end);
  void repeat_audit(int layer, const uint32_t* rows);
  PassState read_pass(const cuda::PassItem& pass, bool staged) const;
  void write_audit();

  const ModelConfig& config_;
  ShardRange heads_;
  CertifiedCacheOptions options_;
  cuda::Device& device_;
  cuda::CacheOps& ops_;
  ThreadPool& pool_;
  std::shared_ptr<StoreClient> store_;
  Communicator& group_;
  cuda::DenseOps* library_ = nullptr;
  cuda::ModelOps* conversions_ = nullptr;
  AuditLog* audit_ = nullptr;
  bool has_classes_;
  ClassFormats classes_;  // where heads have them
  PageFormat format_;
  cuda::PageKind kind_;  // of a prompt's pages
  BlockShape block_;
  size_t page_bytes_, block_bytes_;   // of a prompt's pages
  const std::byte* arena_ = nullptr;  // where the device finds the arena
  std::span<const std::byte> arena_host_;
  ScrubSchedule schedule_;
  std::map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::unique_ptr<StepBuffers> step_;
  BackgroundWork background_;  // writes originals to the arena, from step_'s memory
  std::vector<int64_t> rows_;  // of the step under way
  uint64_t step_number_ = 0;
  uint64_t shape_ = 0;
  Agreement agreement_;
  bool reports_enqueued_ = false;  // of the step under way
  int64_t next_ = 1;
};

}  // namespace certkv
