#include "runtime/certified_cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <mutex>
#include <utility>

#include "kernels/arith/rounding.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kvstore/content_owner.h"
#include "parallel/communicator.h"
#include "runtime/audit/log.h"
#include "runtime/cache_sequence.h"

namespace certkv {

// One (row, KV head) of the step under way.
struct CertifiedCache::Task {
  HeadStep step;
  std::optional<Originals> originals;
  bool runs = false;  // false: its sequence has failed
};

CertifiedCache::CertifiedCache(const ModelConfig& config, ShardRange heads,
                               CertifiedCacheOptions options, ThreadPool& pool,
                               std::shared_ptr<StoreClient> store, Communicator& group)
    : config_(config),
      heads_(heads),
      options_(std::move(options)),
      pool_(pool),
      store_(std::move(store)),
      group_(group),
      has_classes_(options_.cache.layout == kClassesLayout),
      classes_(make_class_formats(int(config.head_dim), options_.cache.block_tokens)),
      format_(has_classes_ ? classes_[0]
                           : std::make_shared<const PageFormat>(
                                 largest_page_format(options_.cache, int(config.head_dim)))),
      account_(std::make_shared<TierAccount>()),
      schedule_(uint64_t(options_.cache.scrub_steps)) {
  CERTKV_EXPECT(config.heads_per_group() <= kMaxGroupHeads, InvalidArgument,
                "{} query heads share a KV head: at most {} are supported",
                config.heads_per_group(), kMaxGroupHeads);
  if (store_ != nullptr) reader_ = store_->reader();
}

CertifiedCache::~CertifiedCache() = default;

CacheNeed cache_need(const ModelConfig& config, int64_t kv_heads,
                     const CertifiedCacheOptions& options, int64_t prompt, int64_t max_tokens,
                     int forks) {
  const PageFormat format = largest_page_format(options.cache, int(config.head_dim));
  const uint64_t heads = uint64_t(config.layers) * uint64_t(kv_heads), n = uint64_t(forks);
  const uint64_t group = uint64_t(format.group_tokens), d = uint64_t(format.head_dim);
  const auto pages = [&](int64_t tokens) { return (uint64_t(tokens) + group - 1) / group; };
  const uint64_t open = 4 * group * d;
  const uint64_t quota = uint64_t(options.scratch.key_blocks / config.kv_heads) +
                         uint64_t(options.scratch.value_blocks / config.kv_heads);
  const uint64_t block = uint64_t(format.block_tokens) * d * 2;
  const uint64_t blocks = uint64_t(format.blocks());
  const BlockShape shape{options.dtype, uint16_t(format.block_tokens), uint16_t(format.head_dim)};
  // A fork seals at most the groups that its own tokens complete.
  CacheNeed need;
  need.tier1 = heads * (pages(prompt) * format.page_bytes + open +
                        n * (pages(max_tokens) * format.page_bytes + open));
  // Any head may come to have the dearest class: its own pages for the prompt too, and for a while
  // those of the class before it.
  if (options.cache.layout == kClassesLayout) {
    const PageFormat before = make_page_format(layout_by_name(class_layouts()[kExactClass - 2]),
                                               int(config.head_dim), options.cache.block_tokens);
    need.tier1 +=
        n * heads *
        (pages(prompt) * format.page_bytes + pages(prompt + max_tokens) * before.page_bytes);
  }
  const uint64_t all_blocks = pages(prompt + max_tokens) * blocks;
  need.scratch = n * heads * std::min(quota, 2 * all_blocks) * block;
  need.arena = heads * shape.slot_bytes() * blocks * (pages(prompt) + n * (pages(max_tokens) + 1));
  // Every reservation may be rounded up run by run: a prompt's segments, its rest, each answer.
  const uint64_t spans = uint64_t(prompt) / kSegmentTokens + 1 + n;
  need.arena += heads * spans * kArenaGranule;
  return need;
}

CertifiedCache::Sequence& CertifiedCache::at(int64_t sequence) const {
  const auto it = sequences_.find(sequence);
  CERTKV_EXPECT(it != sequences_.end(), InvalidArgument, "no sequence {} in the cache", sequence);
  return *it->second;
}

OriginalsSpan reserve_originals(StoreClient* store, const BlockShape& shape, int64_t layers,
                                ShardRange heads, uint32_t first_block, uint32_t blocks) {
  if (blocks == 0 || store == nullptr) return {};
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = shape;
  r.layers = uint32_t(layers);
  r.first_kv_head = uint32_t(heads.begin);
  r.kv_heads = uint32_t(heads.count());
  r.first_block = first_block;
  r.blocks = blocks;
  return store->reserve(r);
}

OriginalsSpan CertifiedCache::reserve(uint32_t first_block, uint32_t blocks) {
  return reserve_originals(
      store_.get(), {options_.dtype, uint16_t(format_->block_tokens), uint16_t(format_->head_dim)},
      config_.layers, heads_, first_block, blocks);
}

int64_t CertifiedCache::create(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens) {
  auto s = make_sequence(prompt_tokens, sequence_id);
  s->spans.add(reserve(0, s->prefix_blocks));
  return keep_sequence(std::move(s), prompt_tokens, max_tokens);
}

std::unique_ptr<CertifiedCache::Sequence> CertifiedCache::make_sequence(int64_t prompt_tokens,
                                                                        int64_t sequence_id) {
  CERTKV_FAILPOINT(cache_create);
  auto s = std::make_unique<Sequence>();
  const int64_t groups = prompt_tokens / format_->group_tokens;  // only whole groups are sealed
  s->id = sequence_id;
  s->prefix_blocks = uint32_t(groups * format_->blocks());
  const size_t key_quota = size_t(options_.scratch.key_blocks / config_.kv_heads);
  const size_t value_quota = size_t(options_.scratch.value_blocks / config_.kv_heads);
  for (int64_t i = 0; i < config_.layers * heads_.count(); ++i) {
    s->heads.emplace_back(DeviceTier(format_, options_.dtype, account_), key_quota, value_quota);
    if (has_classes_) s->heads.back().precision.formats = &classes_;
  }
  return s;
}

int64_t CertifiedCache::keep_sequence(std::unique_ptr<Sequence> s, int64_t prompt_tokens,
                                      int64_t max_tokens) {
  const int64_t handle = s->handle = next_++;
  if (audit_ != nullptr) s->audit = audit_->open_prompt(s->id, prompt_tokens, max_tokens);
  sequences_[handle] = std::move(s);
  return handle;
}

int64_t CertifiedCache::fork(int64_t sequence, int64_t max_tokens, const StepRules& rules) {
  Sequence& from = at(sequence);
  auto s = fork_prompt(from, rules);
  s->spans.add(reserve(s->prefix_blocks, answer_blocks(from, max_tokens)));
  return keep_fork(std::move(s), from, max_tokens);
}

std::unique_ptr<CertifiedCache::Sequence> CertifiedCache::fork_prompt(Sequence& from,
                                                                      const StepRules& rules) {
  CERTKV_FAILPOINT(cache_fork);
  if (!from.prompt_verified) {
    scrub({&from.handle, 1}, Extent::All);
    from.prompt_verified = true;
  }
  auto s = std::make_unique<Sequence>();
  s->id = from.id;
  s->rules = rules;
  from.spans.keep();  // the prompt is complete: others may share it, now and later
  s->spans = from.spans;
  s->prefix_blocks = from.prefix_blocks;
  s->segments = from.segments;
  s->report.error = from.report.error;
  s->report.error_text = from.report.error_text;
  s->has_failed = from.failed();
  s->damaged_pages = from.damaged_pages;
  s->prompt_verified = true;
  s->heads.reserve(from.heads.size());
  for (const HeadState& h : from.heads) s->heads.push_back(h.fork());
  return s;
}

// Of the groups that the answer's tokens complete.
uint32_t CertifiedCache::answer_blocks(const Sequence& from, int64_t max_tokens) const {
  const int64_t open =
      int64_t(from.heads[0].tier.tokens()) - int64_t(from.prefix_blocks) * format_->block_tokens;
  return uint32_t((open + max_tokens) / format_->group_tokens * format_->blocks());
}

int64_t CertifiedCache::keep_fork(std::unique_ptr<Sequence> s, const Sequence& from,
                                  int64_t max_tokens) {
  if (audit_ != nullptr)
    s->audit = audit_->open_sequence(from.audit, int64_t(from.heads[0].tier.tokens()), max_tokens,
                                     s->rules);
  if (has_classes_ && s->rules.policy == Policy::Budget && !s->failed())
    choose_classes(from.last_q, s.get());
  const int64_t handle = s->handle = next_++;
  sequences_[handle] = std::move(s);
  return handle;
}

void CertifiedCache::drop(int64_t sequence, bool failed) {
  if (audit_ != nullptr) {
    const Sequence& s = at(sequence);
    audit_->close(s.audit, s.heads[0].tier.tokens(), failed || s.failed());
  }
  sequences_.erase(sequence);
}

SealSink CertifiedCache::sink(Sequence& s, int layer, int head) {
  return [this, &s, layer, head](uint32_t first, int blocks, const uint16_t* k, const uint16_t* v) {
    const size_t rows = size_t(format_->block_tokens) * size_t(format_->head_dim);
    for (int b = 0; b < blocks; ++b) {
      const uint32_t block = first + uint32_t(b);
      const uint32_t kv_head = uint32_t(heads_.begin + head);
      OriginalsSpan* span = s.spans.find(uint32_t(layer), kv_head, block);
      CERTKV_EXPECT(span != nullptr, InvalidArgument,
                    "no space was reserved for block {} of layer {} KV head {}", block, layer,
                    kv_head);
      if (span->adopted()) continue;  // these very originals are there, sealed
      span->seal_block(uint32_t(layer), kv_head, block, k + size_t(b) * rows, v + size_t(b) * rows);
    }
    group_.alive();
    if (store_ != nullptr) store_->stamp_progress();
  };
}

void CertifiedCache::fail(Sequence& s, ErrorKind kind, const std::string& text) const {
  std::lock_guard lock(s.error_mutex);
  if (s.report.error) return;
  s.report.error = kind;
  s.report.error_text = text;
  s.has_failed = true;
}

void CertifiedCache::store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                                   const uint16_t* v, std::span<const float> last_q) {
  Sequence& s = at(sequence);
  const size_t d = size_t(format_->head_dim), heads = size_t(heads_.count());
  if (has_classes_) {
    s.last_q.resize(size_t(config_.layers));
    s.last_q[size_t(layer)].assign(last_q.begin(), last_q.end());
  }
  pool_.parallel_for(heads, [&](size_t h) {
    DeviceTier& tier = s.heads[size_t(layer) * heads + h].tier;
    const size_t held = tier.tokens();  // pages shared with another sequence
    const size_t from = (h * tokens + held) * d;
    tier.append(k + from, v + from, tokens - held, sink(s, layer, int(h)));
  });
  if (audit_ == nullptr) return;
  for (size_t h = 0; h < heads; ++h) {
    audit_->rows(s.audit, layer, int(h), tokens, k + h * tokens * d, v + h * tokens * d);
    group_.alive();
  }
}

void CertifiedCache::begin_step(uint64_t step, std::span<const int64_t> sequences) {
  step_ = step;
  const size_t cells = size_t(config_.layers) * size_t(heads_.count() * config_.heads_per_group());
  for (int64_t handle : sequences) {
    Sequence& s = at(handle);
    const auto error = s.report.error;  // a failed sequence stays failed
    const std::string text = s.report.error_text;
    s.report = {};
    s.report.error = error;
    s.report.error_text = text;
    s.report.figures.assign(cells, HeadFigures{});
    s.groups.resize(size_t(heads_.count()));
    if (!s.first_step) s.first_step = s.heads[0].tier.tokens();
  }
#if CERTKV_FAILPOINTS
  if (failpoint::is_set(failpoint::Point::tier_rot) ||
      failpoint::is_set(failpoint::Point::scratch_rot)) [[unlikely]]
    for (int64_t handle : sequences)
      for (const HeadState& h : at(handle).heads) {
        h.tier.rot();
        h.keys.rot();
        h.values.rot();
      }
#endif
  scrub(sequences, Extent::Due);
  if (has_classes_) revise_classes(sequences);
  for (int64_t handle : sequences) {
    Sequence& s = at(handle);
    s.report.damaged_pages = std::exchange(s.damaged_pages, 0);
    s.report.lost_reads = s.lost_reads.exchange(0);
  }
}

uint64_t CertifiedCache::close(int64_t sequence) {
  scrub({&sequence, 1}, Extent::All);
  return std::exchange(at(sequence).damaged_pages, 0);
}

// ---- scrub of tier 1 (method section 7) ---------------------------------------------------------

// Between passes: the pool only reads while it looks, and what is damaged is repaired here alone.
void CertifiedCache::scrub(std::span<const int64_t> sequences, Extent extent) {
  if (schedule_.period() == 0) return;
  struct Found {
    size_t task;
    PageFinding finding;
  };
  const size_t heads = size_t(heads_.count()), cells = size_t(config_.layers) * heads;
  std::mutex mutex;
  std::vector<Found> found;
  const auto look = [&](size_t task) {
    const Sequence& s = at(sequences[task / cells]);
    const size_t cell = task % cells;
    if (s.failed()) return;
    const HeadState& state = s.heads[cell];
    std::vector<PageFinding> here;
    if (extent == Extent::All)
      scrub_all(state, &here);
    else
      scrub_due(schedule_, where(s, int(cell / heads), int(cell % heads), state), state, &here);
    group_.alive();
    if (here.empty()) return;
    const std::lock_guard lock(mutex);
    for (const PageFinding& f : here) found.push_back({task, f});
  };
  pool_.parallel_for(sequences.size() * cells, std::cref(look));  // a reference: no allocation
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return a.task != b.task ? a.task < b.task : a.finding.page < b.finding.page;
  });
  for (const Found& f : found) repair(at(sequences[f.task / cells]), f.task % cells, f.finding);
}

// Steps of a sequence that may have read a damaged page: those since it was last looked at, or
// since it was sealed, for the next step looks at what was sealed.
std::string CertifiedCache::steps_in_doubt(const Sequence& s, const StepWhere& now,
                                           size_t page) const {
  const uint64_t sealed = (page + 1) * uint64_t(format_->group_tokens);
  const uint64_t sound = std::max({schedule_.last_due(now, page), s.first_step.value_or(now.step),
                                   now.step > sealed ? sealed : sealed - 1});
  if (sound >= now.step) return "no step has read it since it was sound";
  return fmt::format("the steps at {} to {} tokens are in doubt", sound + 1, now.step);
}

void CertifiedCache::repair(Sequence& s, size_t cell, const PageFinding& finding) {
  using Result = PageRepair::Result;
  if (s.failed()) return;  // with a sequence that shares the page
  const size_t page = finding.page;
  const int layer = int(cell / size_t(heads_.count())), head = int(cell % size_t(heads_.count()));
  HeadState& state = s.heads[cell];
  std::vector<Sequence*> sharers;
  if (finding.state == PageState::Bytes)
    for (const auto& [handle, other] : sequences_)
      if (other.get() != &s && other->heads[cell].tier.shares_page(page, state.tier))
        sharers.push_back(other.get());
  Originals originals(*this, s, layer, head);
  const PageRepair r = repair_page(finding, &state, originals);
  if (r.result == Result::NotNeeded) return;  // repaired, counted and logged through a sharer

  const StepWhere now = where(s, layer, head, state);
  const size_t blocks = size_t(format_->blocks());
  const std::string what =
      fmt::format("tier 1: sequence {} layer {} KV head {} page {} (blocks {} to {}): {}", s.id,
                  layer, now.kv_head, page, page * blocks, (page + 1) * blocks - 1, r.what);
  std::string doubt = steps_in_doubt(s, now, page);
  ++s.damaged_pages;
  for (Sequence* other : sharers) {
    ++other->damaged_pages;
    doubt +=
        fmt::format("; sequence {} shares it: {}", other->id,
                    steps_in_doubt(*other, where(*other, layer, head, other->heads[cell]), page));
  }
  log_error("{}; {}", what, doubt);
  if (r.result == Result::Repaired) {
    for (Sequence* other : sharers) other->heads[cell].tier.adopt_page(page, state.tier);
    return;
  }
  const ErrorKind kind = r.result == Result::Lost ? ErrorKind::OriginalsLost : ErrorKind::Corrupt;
  fail(s, kind, what);
  for (Sequence* other : sharers) fail(*other, kind, what);
}

const SequenceReport& CertifiedCache::report(int64_t sequence) const {
  return at(sequence).report;
}

void CertifiedCache::end_step() {
  if (audit_ != nullptr) audit_->end_step();
}

void CertifiedCache::start_audit(int layer, std::span<const DecodeRow> rows) {
  std::vector<AuditLog::Row> audited;
  for (const DecodeRow& row : rows) {
    const Sequence& s = at(row.sequence);
    if (s.failed()) continue;
    const HeadState& state = s.heads[size_t(layer) * size_t(heads_.count())];
    audited.push_back({s.audit, state.tier.tokens() + 1, row.k, row.v});
  }
  audit_->start_layer(step_, layer, audited);
}

void CertifiedCache::keep_audit(std::span<const DecodeRow> rows) {
  const size_t width = size_t(config_.heads_per_group()) * size_t(format_->head_dim);
  for (const DecodeRow& row : rows) {
    const Sequence& s = at(row.sequence);
    if (s.failed()) audit_->discard(s.audit);
    for (size_t h = 0; h < size_t(heads_.count()); ++h)
      audit_->keep(s.audit, int(h), row.q + h * width, row.out + h * width, s.groups[h]);
  }
}

// The step is counted by the sequence's own tokens, so that what depends on it (exploration) does
// not depend on neighbours in the batch.
StepWhere CertifiedCache::where(const Sequence& s, int layer, int head,
                                const HeadState& state) const {
  return {s.id, layer, int(heads_.begin) + head, uint64_t(state.tier.tokens()),
          audit_ != nullptr ? audit_->capture(s.audit, head) : nullptr};
}

void CertifiedCache::decode(int layer, std::span<const DecodeRow> rows, float* flags) {
  const size_t heads = size_t(heads_.count()), d = size_t(format_->head_dim);
  const size_t per_group = size_t(config_.heads_per_group());
  if (audit_ != nullptr) start_audit(layer, rows);
  const size_t tasks = rows.size() * heads;
  while (tasks_.size() < tasks) tasks_.push_back(std::make_unique<Task>());

  // A step's error ends its request; losing the store ends the job.
  const auto guarded = [&](size_t task, auto body) {
    Sequence& s = at(rows[task / heads].sequence);
    if (s.failed()) return;
    try {
      body(s);
    } catch (const Error& e) {
      if (e.kind() == ErrorKind::StoreLost) throw;
      fail(s, e.kind(), e.what());
    }
  };
  pool_.parallel_for(tasks, [&](size_t task) {
    const size_t row = task / heads, h = task % heads;
    Task& t = *tasks_[task];
    t.runs = false;
    at(rows[row].sequence).groups[h].clear(per_group);
    guarded(task, [&](Sequence& s) {
      HeadState& state = s.heads[size_t(layer) * heads + h];
      const auto start = std::chrono::steady_clock::now();
      CERTKV_FAILPOINT_BYTES(cache_key, const_cast<uint16_t*>(rows[row].k + h * d), 2 * d);
      CERTKV_FAILPOINT_BYTES(cache_value, const_cast<uint16_t*>(rows[row].v + h * d), 2 * d);
      CERTKV_FAILPOINT_BYTES(cache_query, const_cast<float*>(rows[row].q + h * per_group * d),
                             4 * per_group * d);
      state.tier.append(rows[row].k + h * d, rows[row].v + h * d, 1, sink(s, layer, int(h)));
      const std::chrono::duration<double> appended = std::chrono::steady_clock::now() - start;
      t.originals.emplace(*this, s, layer, int(h));
      t.step.begin(s.rules, where(s, layer, int(h), state), int(per_group),
                   rows[row].q + h * per_group * d, &state, *t.originals,
                   rows[row].out + h * per_group * d, nullptr, &s.groups[h]);
      s.groups[h].append_seconds = appended.count();
      t.runs = true;
    });
    group_.alive();
  });
  // The pass, and once more for heads that the ladder sends to rung 3.
  for (bool more = true; more;) {
    splits_.clear();
    for (size_t i = 0; i < tasks; ++i) splits_.add(tasks_[i]->runs ? tasks_[i]->step.splits() : 0);
    splits_.run(pool_, [&](size_t task, size_t first, size_t last) {
      guarded(task, [&](Sequence&) { tasks_[task]->step.attend(first, last); });
      group_.alive();
    });
    std::atomic<bool> unfinished = false;
    pool_.parallel_for(tasks, [&](size_t task) {
      if (tasks_[task]->runs) {
        tasks_[task]->runs = false;
        guarded(task, [&](Sequence&) { tasks_[task]->runs = tasks_[task]->step.finish(); });
        CERTKV_FAILPOINT_BYTES(cache_output, rows[task / heads].out + task % heads * per_group * d,
                               4 * per_group * d);
        if (tasks_[task]->runs) unfinished = true;
      }
      group_.alive();
    });
    more = unfinished;
  }
  for (size_t task = 0; task < tasks; ++task) {
    const size_t row = task / heads, h = task % heads;
    Sequence& s = at(rows[row].sequence);
    if (!s.failed()) continue;
    std::fill_n(rows[row].out + h * per_group * d, per_group * d, 0.0f);
    s.groups[h].broken = false;
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    Sequence& s = at(rows[row].sequence);
    bool broken = false;
    for (size_t h = 0; h < heads; ++h) broken = broken || s.groups[h].broken;
    flags[row] = broken && !s.failed() ? 1.0f : 0.0f;
    // Other ranks may still ask for rung 4: then decode_dense counts these heads anew.
    for (size_t h = 0; h < heads; ++h) {
      HeadClass& precision = s.heads[size_t(layer) * heads + h].precision;
      if (has_classes_ && precision.next == precision.now && s.groups[h].attended_tokens > 0)
        precision.count(double(s.groups[h].read_bytes) / double(s.groups[h].attended_tokens));
      account(layer, s, h, s.groups[h]);
    }
  }
  if (audit_ != nullptr) keep_audit(rows);
}

void CertifiedCache::decode_dense(int layer, std::span<const DecodeRow> rows) {
  const size_t heads = size_t(heads_.count()), d = size_t(format_->head_dim);
  const size_t per_group = size_t(config_.heads_per_group());
  pool_.parallel_for(rows.size() * heads, [&](size_t task) {
    const size_t row = task / heads, h = task % heads;
    Sequence& s = at(rows[row].sequence);
    if (s.failed()) {
      std::fill_n(rows[row].out + h * per_group * d, per_group * d, 0.0f);
      return;
    }
    Originals originals(*this, s, layer, int(h));
    HeadState& state = s.heads[size_t(layer) * heads + h];
    GroupReport& g = s.groups[h];
    const auto start = std::chrono::steady_clock::now();
    dense_step(where(s, layer, int(h), state), int(per_group), (1u << per_group) - 1, 4,
               rows[row].q + h * per_group * d, &state, originals,
               rows[row].out + h * per_group * d, nullptr, &g);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    g.ladder_seconds += seconds.count();
    group_.alive();
  });
  for (const DecodeRow& row : rows) {
    Sequence& s = at(row.sequence);
    for (size_t h = 0; h < heads; ++h) account(layer, s, h, s.groups[h]);
  }
  if (audit_ != nullptr) keep_audit(rows);
}

// Writes the heads' figures; the verdict is counted from the figures of all layers at the end, so a
// layer that is repeated on rung 4 replaces what its first attempt said.
void CertifiedCache::account(int layer, Sequence& s, size_t head, const GroupReport& g) {
  const size_t per_group = size_t(config_.heads_per_group());
  const size_t local_heads = size_t(heads_.count()) * per_group;
  s.report.layers.resize(size_t(config_.layers) * size_t(heads_.count()));
  s.report.layers[size_t(layer) * size_t(heads_.count()) + head] = g;
  for (size_t i = 0; i < per_group; ++i) {
    const HeadReport& r = g.heads[i];
    s.report.figures[size_t(layer) * local_heads + head * per_group + i] = figures_of(r);
    if (r.outcome == Outcome::Failed && !g.broken && !s.failed())
      fail(s, g.digest > 0 ? ErrorKind::OriginalsLost : ErrorKind::Uncertifiable,
           fmt::format("layer {} KV head {}: {}", layer, heads_.begin + int64_t(head),
                       g.digest > 0 ? "originals are corrupt or lost, and no copy is left"
                                    : "no finite output with a finite bound exists"));
  }
}

VerdictRecord CertifiedCache::verdict(int64_t sequence) const {
  CERTKV_FAILPOINT(cache_verdict);
  const Sequence& s = at(sequence);
  return verdict_of(s.report, s.failed(), step_, format_->head_dim);
}

std::span<const HeadState> CertifiedCache::heads(int64_t sequence) const {
  return at(sequence).heads;
}
BlockId CertifiedCache::originals_id(int64_t sequence, int layer, int head, uint32_t block) const {
  return Originals(*this, at(sequence), layer, head).id(block);
}

uint64_t CertifiedCache::tier1_bytes() const {
  return account_->bytes;
}
uint64_t CertifiedCache::tier1_bytes(int64_t sequence) const {
  uint64_t sum = 0;
  for (const HeadState& h : at(sequence).heads) sum += h.tier.bytes();
  return sum;
}
uint64_t CertifiedCache::dense_bytes(int64_t sequence) const {
  uint64_t sum = 0;
  for (const HeadState& h : at(sequence).heads) sum += h.tier.dense_bytes();
  return sum;
}

}  // namespace certkv
