// The device's cache, fifth part: sealing. A kernel makes pages where the rows are; the rows
// themselves go to the node's arena, beside whatever the device does next.
#include <algorithm>
#include <cstring>

#include "parallel/communicator.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kKeys;
using cuda::kPageTiles;
using cuda::kPageTokens;
using cuda::kValues;

namespace {

constexpr auto kDeviceDeadline = std::chrono::seconds(60);
constexpr size_t kKeptSlots = 2 * kPageTiles;  // of a page without codes

}  // namespace

void expect_finite(SealStatus status, size_t page) {
  CERTKV_EXPECT(status != SealStatus::NonFinite, NonFinite,
                "a key or value of tokens {} to {} is NaN or infinite", page * kPageTokens,
                (page + 1) * kPageTokens - 1);
}

// Hands blocks' originals to the arena, in the background: rows of a cell's blocks lie one after
// the other, cell i's from i of_cell bytes on. The memory must stay until then.
void DeviceCache::write_originals(OriginalsSpan span, size_t first_cell, size_t cells,
                                  size_t first_block, size_t blocks, const std::byte* k,
                                  const std::byte* v, uint64_t of_cell) {
  if (span.empty()) return;
  const size_t tasks_each = (blocks + kPageTiles - 1) / kPageTiles;
  const auto seal = [this, span = std::move(span), first_cell, first_block, blocks, k, v, of_cell,
                     tasks_each](size_t task) {
    OriginalsSpan shared = span;
    const size_t heads = size_t(heads_.count()), cell = first_cell + task / tasks_each;
    const uint32_t layer = uint32_t(cell / heads);
    const uint32_t kv_head = uint32_t(heads_.begin) + uint32_t(cell % heads);
    const size_t first = task % tasks_each * kPageTiles;
    for (size_t b = first; b < std::min(first + kPageTiles, blocks); ++b) {
      const uint64_t at = (task / tasks_each) * of_cell + b * block_bytes_;
      shared.seal_block(layer, kv_head, uint32_t(first_block + b),
                        reinterpret_cast<const uint16_t*>(k + at),
                        reinterpret_cast<const uint16_t*>(v + at));
    }
    group_.alive();
    store_->stamp_progress();
  };
  background_.start(cells * tasks_each, seal);
}

// ---- pages that cannot be quantised -------------------------------------------------------------

size_t DeviceCache::kept_slots(const Sequence& s) const {
  return s.dense() ? 0 : kKeptSlots * s.prompt->kept.size();
}

// Beyond what their codes would take.
uint64_t DeviceCache::kept_bytes(const Sequence& s) const {
  uint64_t sum = 0;
  for (const Prompt::Kept& kept : s.prompt->kept)
    if (!s.dense()) sum += kKeptSlots * block_bytes_ - bytes_at(s, kept.cell, kept.page);
  for (const auto& [cell, page] : s.own_kept)
    sum += kKeptSlots * block_bytes_ - bytes_at(s, cell, page);
  return sum;
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
      a.page = s.own_page.data() + (s.pages - s.prompt->pages) * s.own_page_bytes;
      a.page_of_head = s.own_capacity * s.own_page_bytes;
      a.kind = s.kinds_present.front();
      if (s.seal_kinds.count() > 0) a.kinds = s.seal_kinds.data();
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
    a.halted = agreement_.halted;
    ops_.seal(a);
    if (s.filled_digests.count() > 0) {
      ops_.digest_pages({.first = a.page,
                         .row_stride = a.page_of_head,
                         .bytes = uint32_t(s.own_page_bytes),
                         .lengths = s.seal_bytes.count() > 0 ? s.seal_bytes.data() : nullptr,
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
    write_originals(s->own, 0, n, s->pages * kPageTiles, kPageTiles, rows, rows + part_bytes,
                    2 * part_bytes);
  }
  ++s->pages;
}

}  // namespace certkv
