// The device's cache, fifth part: sealing. A kernel makes pages where the rows are; the rows
// themselves go to the node's arena, beside whatever the device does next.
#include <algorithm>
#include <cstring>

#include "parallel/communicator.h"
#include "runtime/audit/log.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kKeys;
using cuda::kPageTiles;
using cuda::kPageTokens;
using cuda::kValues;

namespace {

constexpr auto kDeviceDeadline = std::chrono::seconds(60);
constexpr size_t kKeptSlots = 2 * kPageTiles;  // of a page without codes

void expect_finite(SealStatus status, size_t page) {
  CERTKV_EXPECT(status != SealStatus::NonFinite, NonFinite,
                "a key or value of tokens {} to {} is NaN or infinite", page * kPageTokens,
                (page + 1) * kPageTokens - 1);
}

template <typename Array>
void grow(Array* array, cuda::Device& device, size_t count, const char* what) {
  if (array->count() >= count) return;
  *array = {};
  *array = Array(device, count, what);
}

}  // namespace

// Hands pages' originals to the arena, in the background: rows of a cell's pages lie one after the
// other, cell i's from i of_cell bytes on. The memory must stay until then.
void DeviceCache::write_originals(OriginalsSpan span, size_t first_cell, size_t cells,
                                  uint32_t first_page, size_t pages, const std::byte* k,
                                  const std::byte* v, uint64_t of_cell) {
  if (span.empty()) return;
  const auto seal = [this, span = std::move(span), first_cell, first_page, pages, k, v,
                     of_cell](size_t task) {
    OriginalsSpan shared = span;
    const size_t heads = size_t(heads_.count()), cell = first_cell + task / pages;
    const uint32_t layer = uint32_t(cell / heads);
    const uint32_t kv_head = uint32_t(heads_.begin) + uint32_t(cell % heads);
    const size_t page = task % pages, each = kPageTiles * block_bytes_;
    const uint64_t at = (task / pages) * of_cell + page * each;
    for (size_t b = 0; b < kPageTiles; ++b)
      shared.seal_block(layer, kv_head, uint32_t((first_page + page) * kPageTiles + b),
                        reinterpret_cast<const uint16_t*>(k + at + b * block_bytes_),
                        reinterpret_cast<const uint16_t*>(v + at + b * block_bytes_));
    group_.alive();
    store_->stamp_progress();
  };
  background_.start(cells * pages, seal);
}

// ---- a prompt -----------------------------------------------------------------------------------

void DeviceCache::store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                                const uint16_t* v, size_t head_stride, std::span<const float>) {
  Prompt& p = *at(sequence).prompt;
  StepBuffers& b = *step_;
  const size_t d = size_t(config_.head_dim), heads = size_t(heads_.count());
  const size_t first_cell = size_t(layer) * heads, notes = p.pages * kPageTiles;
  const size_t part_bytes = kPageTiles * block_bytes_;
  background_.finish();  // the layer before: its rows give way to these
  grow(&b.prompt_k, device_, heads * tokens * d, "a prompt's keys");
  grow(&b.prompt_v, device_, heads * tokens * d, "a prompt's values");
  grow(&p.status, device_, heads * p.pages, "notes of a prompt");
  for (auto& array : p.notes) grow(&array, device_, heads * notes, "notes of a prompt");
  const bool scrubbed = schedule_.period() > 0 && p.pages > 0;
  if (scrubbed) grow(&p.sealed_digests, device_, heads * p.pages, "digests of a prompt");
  if (scrubbed) p.digests.resize(cells() * p.pages);

  cuda::SealArgs a;
  a.heads = int32_t(heads);
  a.pages = int32_t(p.pages);
  a.head_dim = int32_t(d);
  a.dtype = options_.dtype;
  a.k = reinterpret_cast<const std::byte*>(k);
  a.v = reinterpret_cast<const std::byte*>(v);
  a.rows_of_head = head_stride * sizeof(uint16_t);
  a.rows_of_page = part_bytes;
  a.page = p.page.data() + first_cell * p.pages * page_bytes_;
  a.page_of_head = p.pages * page_bytes_;
  a.page_of_page = page_bytes_;
  a.status = p.status.data();
  a.k_norm = p.notes[0].data();
  a.nu = p.notes[1].data();
  a.notes_of_head = notes * sizeof(float);
  a.notes_of_page = kPageTiles * sizeof(float);
  if (p.pages > 0) ops_.seal(a);
  if (scrubbed) {
    ops_.digest_pages({.first = a.page,
                       .row_stride = a.page_of_head,
                       .per_row = a.pages,
                       .bytes = uint32_t(page_bytes_),
                       .count = int32_t(heads * p.pages),
                       .digests = p.sealed_digests.data()});
    device_.copy(p.digests.data() + first_cell * p.pages, p.sealed_digests.data(),
                 heads * p.pages * sizeof(uint64_t));
  }
  std::vector<uint8_t> status(heads * p.pages);
  device_.copy(status.data(), p.status.data(), status.size());
  device_.copy(p.k_norm.data() + first_cell * notes, p.notes[0].data(), heads * notes * 4);
  device_.copy(p.nu.data() + first_cell * notes, p.notes[1].data(), heads * notes * 4);
  for (size_t h = 0; h < heads; ++h) {
    device_.copy(b.prompt_k.data() + h * tokens * d, k + h * head_stride, tokens * d * 2);
    device_.copy(b.prompt_v.data() + h * tokens * d, v + h * head_stride, tokens * d * 2);
  }
  device_.synchronize(Deadline::after(kDeviceDeadline));

  for (size_t i = 0; i < status.size(); ++i) {
    const SealStatus of_page = SealStatus(status[i]);
    const size_t h = i / p.pages, page = i % p.pages;
    expect_finite(of_page, page);
    if (of_page == SealStatus::Sealed) continue;
    p.kept.push_back({first_cell + h,
                      page,
                      {device_, 2 * part_bytes,
                       "tier 1: pages kept as "
                       "originals"}});
    std::byte* to = p.kept.back().rows.data();
    const size_t from = h * head_stride + page * kPageTokens * d;
    device_.copy(to, k + from, part_bytes);
    device_.copy(to + part_bytes, v + from, part_bytes);
  }
  const uint16_t *k_host = b.prompt_k.data(), *v_host = b.prompt_v.data();
  for (size_t h = 0; h < heads; ++h) {
    const size_t from = (h * tokens + p.pages * kPageTokens) * d, end = (h + 1) * tokens * d;
    p.open_k[first_cell + h].assign(k_host + from, k_host + end);
    p.open_v[first_cell + h].assign(v_host + from, v_host + end);
  }
  p.tokens = tokens;
  for (size_t h = 0; h < heads && audit_ != nullptr; ++h) {
    audit_->rows(at(sequence).audit, layer, int(h), tokens, k_host + h * tokens * d,
                 v_host + h * tokens * d);
    group_.alive();
  }
  write_originals(p.span, first_cell, heads, 0, p.pages, reinterpret_cast<const std::byte*>(k_host),
                  reinterpret_cast<const std::byte*>(v_host), tokens * d * 2);
  if (layer + 1 < int(config_.layers)) return;
  p.status.reset();
  for (auto& array : p.notes) array.reset();
  p.sealed_digests.reset();
}

// ---- pages that cannot be quantised -------------------------------------------------------------

size_t DeviceCache::kept_slots(const Sequence& s) const {
  return s.dense() ? 0 : kKeptSlots * s.prompt->kept.size();
}

// Beyond what their codes would take.
uint64_t DeviceCache::kept_bytes(const Sequence& s) const {
  const size_t count = s.decoding ? s.kept : s.prompt->kept.size();
  return count * (kKeptSlots * block_bytes_ - page_bytes_);
}

// The prompt's, in slots behind those of all cells.
void DeviceCache::lay_out_kept(Sequence* s, std::vector<cuda::PageEntry>& entries,
                               std::vector<int32_t> (&slot_of)[2]) {
  for (const Prompt::Kept& kept : s->prompt->kept) {
    const size_t slot = cells() * s->slots_each + kKeptSlots * s->kept++;
    device_.copy(s->slots.data() + slot * block_bytes_, kept.rows.data(), kept.rows.bytes());
    const size_t entry = kept.cell * s->capacity + kept.page;
    entries[entry] = {nullptr, 0xffu, kPageTokens};
    for (size_t part = 0; part < 2; ++part)
      for (size_t t = 0; t < kPageTiles; ++t)
        slot_of[part][entry * kPageTiles + t] =
            int32_t(slot + part * kPageTiles + t - kept.cell * s->slots_each);
  }
}

// A decode's own, of these cells: the open rows move to slots of their own. The cells' tables say
// so already, but for the slots.
void DeviceCache::keep_open(Sequence* s, const std::vector<size_t>& cells_kept) {
  const size_t before = s->slots.bytes(), part_bytes = kPageTiles * block_bytes_;
  DeviceArray<std::byte> grown(device_, before + cells_kept.size() * kKeptSlots * block_bytes_,
                               "tier 1: pages kept as originals");
  device_.copy(grown.data(), s->slots.data(), before);
  for (size_t i = 0; i < cells_kept.size(); ++i) {
    s->own_kept.insert({cells_kept[i], s->pages});
    const size_t cell = cells_kept[i], slot = before / block_bytes_ + i * kKeptSlots;
    int32_t slots[2][kPageTiles];
    for (size_t part = 0; part < 2; ++part) {
      const size_t open = cell * s->slots_each + size_t(s->open_slot[part]);
      device_.copy(grown.data() + (slot + part * kPageTiles) * block_bytes_,
                   s->slots.data() + open * block_bytes_, part_bytes);
      for (size_t t = 0; t < kPageTiles; ++t)
        slots[part][t] = int32_t(slot + part * kPageTiles + t - cell * s->slots_each);
      device_.copy(s->slot_of[part].data() + (cell * s->capacity + s->pages) * kPageTiles,
                   slots[part], sizeof slots[part]);
    }
  }
  device_.synchronize(Deadline::after(kDeviceDeadline));
  s->slots = std::move(grown);
  s->kept += cells_kept.size();
}

// ---- a decode -----------------------------------------------------------------------------------

// With the sequence, so that no step finds it missing.
void DeviceCache::reserve_filled(Sequence* s) {
  const char* what = "pages on their way to the arena (lower run.max_batch)";
  const size_t n = cells(), rows = n * kKeptSlots * block_bytes_;
  s->filled_rows = {device_, rows, what};
  s->filled_rows_host = {device_, rows, what};
  s->filled_status = {device_, n, what};
  s->filled_status_host = {device_, n, what};
  s->filled_nu = {device_, n, what};
  s->filled_nu_host = {device_, n, what};
}

// Rows that fill their page with the step under way: it is sealed, and the open end begins anew
// behind it.
void DeviceCache::enqueue_sealing() {
  StepBuffers& b = *step_;
  const size_t n = cells();
  b.filling.clear();
  for (int64_t handle : rows_) {
    const Sequence& s = at(handle);
    if (!s.failed() && s.tokens + 1 - s.pages * kPageTokens == kPageTokens)
      b.filling.push_back(handle);
  }
  for (int64_t handle : b.filling) {
    const Sequence& s = at(handle);
    cuda::SealArgs a;
    a.heads = int32_t(n);
    a.pages = 1;
    a.head_dim = int32_t(config_.head_dim);
    a.dtype = options_.dtype;
    a.k = s.slots.data() + size_t(s.open_slot[kKeys]) * block_bytes_;
    a.v = s.slots.data() + size_t(s.open_slot[kValues]) * block_bytes_;
    a.rows_of_head = s.slots_each * block_bytes_;
    if (!s.dense()) {
      a.page = s.own_page.data() + (s.pages - s.prompt->pages) * page_bytes_;
      a.page_of_head = s.own_capacity * page_bytes_;
    }
    a.status = s.filled_status.data();
    a.largest_nu = s.filled_nu.data();
    a.k_norm = s.k_norm.data() + s.pages * kPageTiles;
    a.nu = s.open_nu.data() + s.pages * kPageTiles;
    a.notes_of_head = s.capacity * kPageTiles * sizeof(float);
    a.originals = s.filled_rows.data();
    a.entries = s.entries.data() + s.pages;
    a.entries_of_head = s.capacity;
    for (size_t part = 0; part < 2; ++part) {
      a.slot_of[part] = s.slot_of[part].data() + s.pages * kPageTiles;
      a.kept_slot[part] = s.open_slot[part];
      a.open_slot[part] = s.open_slot[part] + (s.dense() ? kPageTiles : 0);
    }
    ops_.seal(a);
    if (s.filled_digests.count() > 0) {
      ops_.digest_pages({.first = a.page,
                         .row_stride = a.page_of_head,
                         .bytes = uint32_t(page_bytes_),
                         .count = int32_t(n),
                         .digests = s.filled_digests.data()});
      device_.copy(s.filled_digests_host.data(), s.filled_digests.data(), s.filled_digests.bytes());
    }
    device_.copy(s.filled_status_host.data(), s.filled_status.data(), s.filled_status.bytes());
    device_.copy(s.filled_nu_host.data(), s.filled_nu.data(), s.filled_nu.bytes());
    device_.copy(s.filled_rows_host.data(), s.filled_rows.data(), s.filled_rows.bytes());
  }
}

// What the host has to know and do of a sealed page, after the wait.
void DeviceCache::seal_open(Sequence* s) {
  const size_t n = cells(), part_bytes = kPageTiles * block_bytes_;
  std::vector<size_t> kept;
  for (size_t cell = 0; cell < n; ++cell) {
    const SealStatus status = SealStatus(s->filled_status_host[cell]);
    expect_finite(status, s->pages);
    if (status != SealStatus::Sealed) kept.push_back(cell);
    if (s->filled_digests_host.count() > 0)
      digest_of(*s, cell, s->pages) = s->filled_digests_host[cell];
    s->sealed_nu[cell] = std::max(s->sealed_nu[cell], s->filled_nu_host[cell]);
  }
  if (!kept.empty()) keep_open(s, kept);
  for (int32_t& slot : s->open_slot) slot += s->dense() ? kPageTiles : 0;
  if (!s->own.empty()) {
    const std::byte* rows = s->filled_rows_host.data();
    write_originals(s->own, 0, n, uint32_t(s->pages), 1, rows, rows + part_bytes, 2 * part_bytes);
  }
  ++s->pages;
}

}  // namespace certkv
