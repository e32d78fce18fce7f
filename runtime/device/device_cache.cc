#include "runtime/device/device_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <mutex>
#include <utility>

#include "kernels/base/log.h"
#include "kernels/quantize.h"
#include "parallel/communicator.h"
#include "runtime/audit/log.h"
#include "runtime/certify/page_originals.h"
#include "runtime/device/device_sequence.h"
#include "runtime/span_originals.h"

namespace certkv {

using cuda::kPageTiles;
using cuda::kPageTokens;

namespace {

// Names of memory, with what makes it smaller.
constexpr const char* kPromptMemory =
    "tier 1: a prompt's pages (lower run.max_batch, or raise parallel.tensor)";
constexpr const char* kAnswerMemory =
    "tier 1: an answer's pages (lower sampling.max_tokens or run.max_batch)";
constexpr const char* kScratchMemory = "scratch (lower scratch.key_blocks, scratch.value_blocks)";
constexpr const char* kDenseMemory =
    "originals of policy dense (lower run.max_batch, or choose policy budget)";
constexpr auto kDeviceDeadline = std::chrono::seconds(60);

void require(bool holds, const char* what) {
  CERTKV_EXPECT(holds, InvalidArgument,
                "the device backend does not support {} yet: change it, or use run.backend cpu",
                what);
}

// A group's 64 rows of one cell as blocks of the arena.
constexpr uint32_t kBlocksPerPage = kPageTiles;

// Pages of policy dense, in steps of a sixteenth: a library's plan is made for a capacity, which
// takes it long, so sequences of about the same length share one.
size_t dense_capacity(size_t pages) {
  const size_t step = std::bit_ceil(pages) / 16;
  return step < 2 ? pages : (pages + step - 1) / step * step;
}

}  // namespace

// Those that are due, and the newest one.
uint64_t most_looks(uint64_t pages, int64_t scrub_steps) {
  return std::min(pages, pages / uint64_t(scrub_steps) + 2);
}

DeviceCache::DeviceCache(const ModelConfig& config, ShardRange heads, CertifiedCacheOptions options,
                         cuda::Device& device, cuda::CacheOps& ops, ThreadPool& pool,
                         std::shared_ptr<StoreClient> store, Communicator& group)
    : config_(config),
      heads_(heads),
      options_(std::move(options)),
      device_(device),
      ops_(ops),
      pool_(pool),
      store_(std::move(store)),
      group_(group),
      has_classes_(options_.cache.layout == kClassesLayout),
      schedule_(uint64_t(options_.cache.scrub_steps)),
      step_(std::make_unique<StepBuffers>()),
      background_(pool.threads()) {
  const std::string_view served[] = {"compact", "balanced", "classes", "k8v4", "k8v8", "k12v8"};
  require(std::ranges::count(served, std::string_view(options_.cache.layout)) == 1,
          "cache.layout other than compact, balanced, classes, k8v4, k8v8 and k12v8");
  require(options_.cache.block_tokens == 16, "cache.block_tokens other than 16");
  require(config.head_dim == 64 || config.head_dim == 128, "a head_dim other than 64 and 128");
  require(config.heads_per_group() <= cuda::kMaxHeads, "more than 8 query heads a KV head");
  const int64_t most = cuda::kMostSlots * config.kv_heads;
  require(options_.scratch.key_blocks <= most && options_.scratch.value_blocks <= most,
          "more than 8192 scratch blocks a KV head");
  if (has_classes_) classes_ = make_class_formats(int(config.head_dim), 16);
  format_ = has_classes_
                ? *classes_[0]
                : make_page_format(layout_by_name(options_.cache.layout), int(config.head_dim), 16);
  kind_ = cuda::page_kind_of(format_);
  block_ = {options_.dtype, 16, uint16_t(config.head_dim)};
  page_bytes_ = cuda::page_layout(int(config.head_dim), kind_).page_bytes();
  block_bytes_ = block_.payload_bytes();
  if (store_ != nullptr) {
    arena_host_ = store_->arena();
    arena_ = device_.map_host(arena_host_.data(), arena_host_.size());
  }
}

DeviceCache::~DeviceCache() {
  background_.wait();
  forget_taken();
  sequences_.clear();
  if (arena_ != nullptr) device_.unmap_host(arena_host_.data());
}

DeviceCache::Sequence& DeviceCache::at(int64_t sequence) const {
  const auto it = sequences_.find(sequence);
  CERTKV_EXPECT(it != sequences_.end(), InvalidArgument, "no sequence {} in the cache", sequence);
  return *it->second;
}

OriginalsSpan DeviceCache::reserve(uint32_t first_block, uint32_t blocks) {
  return reserve_originals(store_.get(), block_, config_.layers, heads_, first_block, blocks);
}

const std::byte* DeviceCache::on_device(const std::byte* in_arena) const {
  return arena_ + (in_arena - arena_host_.data());
}

// As lay_out() and reserve_staging() allocate it.
DeviceCache::Need DeviceCache::need(const ModelConfig& config, int64_t kv_heads,
                                    const CertifiedCacheOptions& options,
                                    const cuda::DeviceShape& device, int64_t prompt_tokens,
                                    int64_t max_tokens, std::span<const Policy> policies) {
  const uint64_t d = uint64_t(config.head_dim), block = 16 * d * 2;
  const uint64_t cells = uint64_t(config.layers) * uint64_t(kv_heads);
  const uint64_t heads = uint64_t(config.heads_per_group());
  const uint64_t prompt = uint64_t(prompt_tokens) / kPageTokens;
  const uint64_t own = uint64_t(prompt_tokens % kPageTokens + max_tokens) / kPageTokens;
  const bool classes = options.cache.layout == kClassesLayout;
  const std::string_view layout =
      classes ? class_layouts()[0] : std::string_view(options.cache.layout);
  const cuda::PageKind kind =
      cuda::page_kind_of(make_page_format(layout_by_name(layout), int(d), 16));
  const uint64_t page = cuda::page_layout(int(d), kind).page_bytes();
  // Any KV head may come to have the dearest class: its own pages for the prompt too.
  const cuda::PageKind dearest = classes ? cuda::PageKind::K12V8 : kind;
  const uint64_t largest = cuda::page_layout(int(d), dearest).page_bytes();
  const uint64_t entries = prompt + own + kPageTiles, blocks = entries * kPageTiles;
  const uint64_t tables = entries * sizeof(cuda::PageEntry) + blocks * (2 * 4 + 2 * 4);
  const uint64_t marks = 2 * 4 + kMarks * 4 + sizeof(cuda::LadderCounts);
  Need n;
  n.prompt = cells * prompt * page;
  bool staged = false;
  for (const Policy policy : policies) {
    n.answers += cells * (tables + marks + heads * 2 * sizeof(Certificate));
    n.answers += cells * (2 * kPageTiles * block + 1 + 4);  // reserve_filled()
    staged |= climbs(policy);
    if (policy == Policy::Dense) {
      n.answers += cells * 2 * dense_capacity(entries) * kPageTiles * block;
      continue;
    }
    n.answers += cells * (own * largest + 2 * kPageTiles * block);
    if (classes && policy == Policy::Budget)  // and the originals of one head, to encode
      n.answers += cells * prompt * largest + prompt * 2 * kPageTiles * block;
    if (options.cache.scrub_steps > 0)  // reserve_looks()
      n.answers += cells * 8 + cells * most_looks(prompt + own, options.cache.scrub_steps) *
                                   (2 * 8 + 4 + sizeof(cuda::TableLook) + 4);
    for (const int64_t of_layer : {options.scratch.key_blocks, options.scratch.value_blocks}) {
      const uint64_t quota =
          std::min(uint64_t(of_layer / config.kv_heads), (prompt + own) * kPageTiles);
      n.scratch += cells * quota * (block + 3 * 4);
    }
  }
  if (!staged) return n;
  const auto staging = [&](uint64_t pages) {
    return pages * 2 * kPageTiles * block + tables + heads * (d * 4 + sizeof(Certificate)) +
           sizeof(cuda::PassItem);
  };
  n.staging = staging(entries);
  uint64_t least = 0;
  for (const cuda::PageKind any : cuda::kPageKinds)
    if (classes || any == kind)
      least = std::max(least, uint64_t(cuda::most_pages_per_split(
                                  device, int(d), int((heads + 3) / 4), any, int(entries), 1)));
  n.least_staging = staging(least);
  return n;
}

int64_t DeviceCache::create(int64_t prompt_tokens, int64_t sequence_id, int64_t max_tokens) {
  auto s = std::make_unique<Sequence>();
  s->handle = next_++;
  s->id = sequence_id;
  s->prompt = std::make_shared<Prompt>();
  Prompt& p = *s->prompt;
  p.pages = size_t(prompt_tokens) / kPageTokens;
  p.span = reserve(0, uint32_t(p.pages) * kBlocksPerPage);
  p.page = {device_, cells() * p.pages * page_bytes_, kPromptMemory};
  p.k_norm.assign(cells() * p.pages * kPageTiles, 0);
  p.nu = p.k_norm;
  p.open_k.resize(cells());
  p.open_v.resize(cells());
  if (audit_ != nullptr) s->audit = audit_->open_prompt(sequence_id, prompt_tokens, max_tokens);
  s->kinds.assign(cells(), kind_);
  s->recoded.resize(cells());
  const int64_t handle = s->handle;
  sequences_[handle] = std::move(s);
  return handle;
}

int64_t DeviceCache::fork(int64_t sequence, int64_t max_tokens, const StepRules& rules) {
  background_.finish();  // the prompt's originals are in the arena
  Sequence& from = at(sequence);
  require(!(rules.skip.share > 0), "skip.share");
  auto s = std::make_unique<Sequence>();
  s->handle = next_++;
  s->id = from.id;
  s->decoding = true;
  s->rules = rules;
  s->prompt = from.prompt;
  s->tokens = from.prompt->tokens;
  s->pages = from.prompt->pages;
  const size_t open = s->tokens - s->pages * kPageTokens;
  s->own_capacity = (open + size_t(max_tokens)) / kPageTokens;
  s->own = reserve(uint32_t(s->pages) * kBlocksPerPage, uint32_t(s->own_capacity) * kBlocksPerPage);
  s->kinds.assign(cells(), kind_);
  s->recoded.resize(cells());
  if (has_classes_ && rules.policy == Policy::Budget && !from.failed()) choose_classes(s.get());
  lay_out(s.get());
  reserve_looks(s.get());
  if (climbs(rules.policy)) reserve_staging(s->capacity);
  if (!from.prompt->verified && s->look_at.count() > 0) {
    scrub_all(from, *s);
    from.prompt->verified = true;
  }
  if (from.failed()) {
    s->report.error = from.report.error;
    s->report.error_text = from.report.error_text;
  }
  s->damaged_pages = s->dense() ? 0 : from.damaged_pages;
  if (audit_ != nullptr)
    s->audit = audit_->open_sequence(from.audit, int64_t(s->tokens), max_tokens, rules);
  const int64_t handle = s->handle;
  sequences_[handle] = std::move(s);
  return handle;
}

// A cell's slots: under policy dense all keys, then all values, block by block; else the open rows
// of keys and of values, 4 slots each, then the scratch of keys and of values.
void DeviceCache::lay_out(Sequence* s) {
  const Prompt& p = *s->prompt;
  const size_t n = cells(), per_group = size_t(config_.heads_per_group());
  s->capacity = p.pages + s->own_capacity + kPageTiles;
  const size_t blocks = s->capacity * kPageTiles;
  s->dense_blocks = dense_capacity(s->capacity) * kPageTiles;
  const auto quota = [&](int64_t blocks_of_layer) {
    const size_t most = (p.pages + s->own_capacity) * kPageTiles;
    return int32_t(std::min(size_t(blocks_of_layer / config_.kv_heads), most));
  };
  if (s->dense()) {
    s->slots_each = 2 * s->dense_blocks;
    s->open_slot[0] = int32_t(p.pages * kPageTiles);
    s->open_slot[1] = int32_t(s->dense_blocks + p.pages * kPageTiles);
  } else {
    s->quota[0] = quota(options_.scratch.key_blocks);
    s->quota[1] = quota(options_.scratch.value_blocks);
    s->slots_each = size_t(2 * kPageTiles + s->quota[0] + s->quota[1]);
    s->open_slot[0] = 0;
    s->open_slot[1] = kPageTiles;
    for (const cuda::PageKind kind : cuda::kPageKinds) {
      if (std::ranges::count(s->kinds, kind) == 0) continue;
      s->kinds_present.push_back(kind);
      s->own_page_bytes = cuda::page_layout(int(config_.head_dim), kind).page_bytes();
    }
    s->own_page = {device_, n * s->own_capacity * s->own_page_bytes, kAnswerMemory};
  }
  s->slots = {device_, (n * s->slots_each + kept_slots(*s)) * block_bytes_,
              s->dense() ? kDenseMemory : kScratchMemory};
  std::vector<cuda::PageEntry> entries(n * s->capacity);
  std::vector<int32_t> slot_of[2];
  slot_of[0].assign(n * blocks, -1);
  slot_of[1] = slot_of[0];
  std::vector<float> k_norm(n * blocks, 0), open_nu(n * blocks, 0);
  s->sealed_nu.assign(n, 0);
  const size_t d = size_t(config_.head_dim);
  for (size_t cell = 0; cell < n; ++cell) {
    for (size_t page = 0; page < p.pages; ++page) {
      cuda::PageEntry& e = entries[cell * s->capacity + page];
      e.page = s->dense() ? nullptr : page_at(*s, cell, page);
      e.wants = s->dense() ? 0xffu : 0;
      e.tokens = kPageTokens;
      for (size_t t = 0; t < kPageTiles; ++t) {
        const size_t note = (cell * p.pages + page) * kPageTiles + t;
        const size_t to = (cell * s->capacity + page) * kPageTiles + t;
        k_norm[to] = p.k_norm[note];
        open_nu[to] = p.nu[note];
        s->sealed_nu[cell] = std::max(s->sealed_nu[cell], p.nu[note]);
        for (size_t part = 0; part < 2 && s->dense(); ++part)
          slot_of[part][to] = int32_t(part * s->dense_blocks + page * kPageTiles + t);
      }
    }
    // The open entries: a block each.
    const size_t open_rows = p.open_k[cell].size() / d;
    for (size_t o = 0; o < kPageTiles; ++o) {
      const size_t entry = cell * s->capacity + p.pages + o;
      for (size_t part = 0; part < 2; ++part)
        slot_of[part][entry * kPageTiles] = s->open_slot[part] + int32_t(o);
      const size_t first = o * 16;
      if (first >= open_rows) continue;
      const int rows = int(std::min<size_t>(16, open_rows - first));
      entries[entry] = {nullptr, 0xffu, rows};
      BlockAnnotations notes;
      (void)annotate_originals(format_, options_.dtype, p.open_k[cell].data() + first * d,
                               p.open_v[cell].data() + first * d, rows, &notes);
      k_norm[entry * kPageTiles] = notes.k_norm;
      open_nu[entry * kPageTiles] = notes.nu;
    }
    for (size_t part = 0; part < 2 && open_rows > 0; ++part)
      device_.copy(
          s->slots.data() + (cell * s->slots_each + size_t(s->open_slot[part])) * block_bytes_,
          (part == 0 ? p.open_k : p.open_v)[cell].data(), open_rows * d * 2);
  }
  reserve_filled(s);
  if (s->kinds_present.size() > 1) {
    s->seal_kinds = {device_, n, "kinds of pages"};
    s->seal_bytes = {device_, n, "kinds of pages"};
    std::vector<uint32_t> bytes;
    for (const cuda::PageKind kind : s->kinds)
      bytes.push_back(cuda::page_layout(int(config_.head_dim), kind).page_bytes());
    device_.copy(s->seal_kinds.data(), s->kinds.data(), s->seal_kinds.bytes());
    device_.copy(s->seal_bytes.data(), bytes.data(), s->seal_bytes.bytes());
    device_.synchronize(Deadline::after(kDeviceDeadline));
  }
  if (!s->dense()) lay_out_kept(s, entries, slot_of);
  const auto put = [&](auto* array, const auto& values, const char* what) {
    *array = {device_, values.size(), what};
    device_.copy(array->data(), values.data(), array->bytes());
  };
  put(&s->entries, entries, "page table");
  for (size_t part = 0; part < 2; ++part) {
    put(&s->slot_of[part], slot_of[part], "slot table");
    if (s->dense()) continue;
    const size_t q = size_t(s->quota[part]);
    const std::vector<int32_t> none(n * q, -1);
    std::vector<int32_t> all_free(n * q);
    for (size_t i = 0; i < all_free.size(); ++i) all_free[i] = int32_t(i % q);
    put(&s->block_of[part], none, "scratch table");
    put(&s->free_slots[part], all_free, "scratch table");
    put(&s->score[part], std::vector<float>(n * q, 0), "scratch table");
  }
  std::vector<int32_t> free_count(n * 2);
  for (size_t i = 0; i < free_count.size(); ++i) free_count[i] = s->quota[i % 2];
  put(&s->free_count, free_count, "scratch table");
  put(&s->k_norm, k_norm, "notes of originals");
  put(&s->open_nu, open_nu, "notes of originals");
  put(&s->marks, std::vector<uint32_t>(n * kMarks, 0), "marks of a step");
  put(&s->counts, std::vector<cuda::LadderCounts>(n), "counts of a step");
  put(&s->judged, std::vector<Certificate>(n * per_group), "certificates");
  put(&s->candidate, std::vector<Certificate>(n * per_group), "certificates");
  s->marks_host = {device_, s->marks.count(), "marks of a step"};
  s->counts_host = {device_, s->counts.count(), "counts of a step"};
  s->judged_host = {device_, s->judged.count(), "certificates"};
  s->candidate_host = {device_, s->candidate.count(), "certificates"};
  if (s->dense()) fill_dense(s);
  device_.synchronize(Deadline::after(kDeviceDeadline));
}

// Policy dense: the prompt's originals, from the arena, verified as rung 3 verifies them. A block
// that is not to be had fails the sequence, whose rows are then zero.
void DeviceCache::fill_dense(Sequence* s) {
  const Prompt& p = *s->prompt;
  const size_t heads = size_t(heads_.count()), blocks = s->dense_blocks;
  const size_t sealed = p.pages * kPageTiles;
  if (sealed == 0) return;
  const auto reader = store_ == nullptr ? nullptr : store_->reader();
  SpanList spans;
  spans.add(p.span);
  std::vector<std::byte> rows(2 * sealed * block_bytes_);
  for (size_t cell = 0; cell < cells() && !s->failed(); ++cell) {
    const size_t layer = cell / heads, kv_head = size_t(heads_.begin) + cell % heads;
    std::vector<std::string> errors(p.pages);
    pool_.parallel_for(p.pages, [&](size_t page) {
      SpanOriginals originals(reader.get(), options_.read_deadline, spans, uint32_t(layer),
                              uint32_t(kv_head));
      PageOriginals from;
      std::byte* to = rows.data() + page * kPageTiles * block_bytes_;
      if (!from.read(format_, page, originals)) {
        errors[page] = from.error;
        return;
      }
      std::memcpy(to, from.k.data(), kPageTiles * block_bytes_);
      std::memcpy(to + sealed * block_bytes_, from.v.data(), kPageTiles * block_bytes_);
    });
    const auto lost = std::ranges::find_if(errors, [](const auto& e) { return !e.empty(); });
    if (lost != errors.end()) {
      s->report.error = ErrorKind::OriginalsLost;
      s->report.error_text = fmt::format("layer {} KV head {}: {}", layer, kv_head, *lost);
      log_error("sequence {} {}", s->id, s->report.error_text);
      device_.fill(s->slots.data(), 0, s->slots.bytes());
      break;
    }
    std::byte* to = s->slots.data() + cell * s->slots_each * block_bytes_;
    device_.copy(to, rows.data(), sealed * block_bytes_);
    device_.copy(to + blocks * block_bytes_, rows.data() + sealed * block_bytes_,
                 sealed * block_bytes_);
    device_.synchronize(Deadline::after(kDeviceDeadline));
    group_.alive();
  }
}

void DeviceCache::drop(int64_t sequence, bool failed) {
  background_.wait();  // it holds on to the sequence's space in the arena
  if (step_->taken.sequence == sequence) forget_taken();
  if (audit_ != nullptr) {
    const Sequence& s = at(sequence);
    audit_->close(s.audit, s.tokens, failed || s.failed());
  }
  sequences_.erase(sequence);
}

void DeviceCache::begin_step(uint64_t step, std::span<const int64_t> sequences) {
  step_number_ = step;
  const size_t figures = cells() * size_t(config_.heads_per_group());
  for (int64_t handle : sequences) {
    Sequence& s = at(handle);
    const auto error = s.report.error;  // a failed sequence stays failed
    const std::string text = s.report.error_text;
    s.report = {};
    s.report.error = error;
    s.report.error_text = text;
    s.report.damaged_pages = std::exchange(s.damaged_pages, 0);
    s.report.figures.assign(figures, HeadFigures{});
    s.report.layers.resize(cells());
  }
}

const SequenceReport& DeviceCache::report(int64_t sequence) const {
  return at(sequence).report;
}

VerdictRecord DeviceCache::verdict(int64_t sequence) const {
  const Sequence& s = at(sequence);
  return verdict_of(s.report, s.failed(), step_number_, int(config_.head_dim));
}

uint64_t DeviceCache::tier1_bytes() const {
  uint64_t sum = 0;
  std::vector<const Prompt*> seen;
  for (const auto& [handle, s] : sequences_) {
    if (s->decoding)
      sum += s->dense() ? s->slots.bytes()
                        : s->own_page.bytes() + s->kept * 2 * kPageTiles * block_bytes_;
    for (const Sequence::Recoded& cell : s->recoded) sum += cell.page.bytes();
    if (std::find(seen.begin(), seen.end(), s->prompt.get()) != seen.end()) continue;
    seen.push_back(s->prompt.get());
    sum += s->prompt->page.bytes();
    for (const Prompt::Kept& kept : s->prompt->kept) sum += kept.rows.bytes();
  }
  return sum;
}

uint64_t DeviceCache::tier1_bytes(int64_t sequence) const {
  const Sequence& s = at(sequence);
  const uint64_t open = (s.tokens - s.pages * kPageTokens) * 4 * uint64_t(config_.head_dim);
  uint64_t sum = cells() * open + kept_bytes(s);
  for (size_t cell = 0; cell < cells(); ++cell) sum += s.pages * bytes_at(s, cell, s.pages);
  return sum;
}

uint64_t DeviceCache::dense_bytes(int64_t sequence) const {
  return cells() * at(sequence).tokens * 4 * uint64_t(config_.head_dim);
}

}  // namespace certkv
