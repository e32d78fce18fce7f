// The device's cache, sixth part: a prompt. Its rows leave the device beside what follows them:
// those of a chunk come to the host while the chunk is computed on, and go to the node's arena
// while the next one is.
#include <algorithm>
#include <utility>

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
constexpr size_t kBlockTokens = kPageTokens / kPageTiles;

template <typename Array>
void grow(Array* array, cuda::Device& device, size_t count, const char* what) {
  if (array->count() >= count) return;
  *array = {};
  *array = Array(device, count, what);
}

}  // namespace

// ---- rows on their way to the arena -------------------------------------------------------------

uint64_t DeviceCache::prefill_host_bytes(const ModelConfig& config, int64_t kv_heads,
                                         int64_t prompt_tokens, int64_t chunk_rows) {
  // A chunk that does not end with a block leaves its last rows to the next one.
  const uint64_t of_chunk = (uint64_t(chunk_rows) + kBlockTokens - 1) / kBlockTokens;
  const uint64_t of_prompt = uint64_t(prompt_tokens) / kPageTokens * kPageTiles;
  return 2 * std::min(of_chunk, of_prompt) * uint64_t(kv_heads) * kBlockTokens *
         uint64_t(config.head_dim) * 4;
}

void DeviceCache::take_rows(int64_t sequence, int layer, size_t rows, const uint16_t* k,
                            const uint16_t* v, size_t head_stride) {
  const Prompt& p = *at(sequence).prompt;
  StepBuffers::Taken& t = step_->taken;
  if (t.sequence != sequence || t.layer != layer) {
    forget_taken();
    t.sequence = sequence;
    t.layer = layer;
    t.until = 0;
  }
  const size_t until = std::min(rows / kBlockTokens, p.pages * kPageTiles);
  if (p.span.empty() || until <= t.until) return;
  write_taken();
  const size_t heads = size_t(heads_.count()), blocks = until - t.until;
  const size_t bytes = blocks * block_bytes_,
               from = t.until * kBlockTokens * size_t(block_.head_dim);
  HostArray<std::byte>& area = t.area[t.filling];
  grow(&area, device_, 2 * heads * bytes, "a prompt's rows on their way to the arena");
  std::vector<cuda::Device::Fetch> parts;
  for (size_t h = 0; h < heads; ++h) {
    parts.push_back({area.data() + h * bytes, k + h * head_stride + from, bytes});
    parts.push_back({area.data() + (heads + h) * bytes, v + h * head_stride + from, bytes});
  }
  t.until = until;
  t.blocks = blocks;
  device_.fetch(parts);
}

// Hands what was fetched to the arena, and turns to the other area once that is free.
void DeviceCache::write_taken() {
  StepBuffers::Taken& t = step_->taken;
  if (t.blocks == 0) return;
  device_.await_fetches(Deadline::after(kDeviceDeadline));
  background_.finish();
  const size_t heads = size_t(heads_.count()), blocks = std::exchange(t.blocks, 0);
  const size_t bytes = blocks * block_bytes_;
  const std::byte* k = t.area[t.filling].data();
  write_originals(at(t.sequence).prompt->span, size_t(t.layer) * heads, heads, t.until - blocks,
                  blocks, k, k + heads * bytes, bytes);
  t.filling ^= 1;
}

// What was fetched of a layer that did not come to its end.
void DeviceCache::forget_taken() {
  StepBuffers::Taken& t = step_->taken;
  if (std::exchange(t.blocks, 0) > 0) device_.settle(Deadline::after(kDeviceDeadline));
}

// ---- a layer ------------------------------------------------------------------------------------

void DeviceCache::store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                                const uint16_t* v, size_t head_stride,
                                std::span<const float> last_q) {
  take_rows(sequence, layer, tokens, k, v, head_stride);
  Prompt& p = *at(sequence).prompt;
  const size_t d = size_t(config_.head_dim), heads = size_t(heads_.count());
  const size_t first_cell = size_t(layer) * heads, notes = p.pages * kPageTiles;
  const size_t part_bytes = kPageTiles * block_bytes_;
  grow(&p.status, device_, heads * p.pages, "notes of a prompt");
  for (auto& array : p.notes) grow(&array, device_, heads * notes, "notes of a prompt");
  const bool scrubbed = schedule_.period() > 0 && p.pages > 0;
  if (scrubbed) grow(&p.sealed_digests, device_, heads * p.pages, "digests of a prompt");
  if (scrubbed) p.digests.resize(cells() * p.pages);

  cuda::SealArgs a;
  a.heads = int32_t(heads);
  a.pages = int32_t(p.pages);
  a.head_dim = int32_t(d);
  a.kind = kind_;
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
  const size_t sealed = p.pages * kPageTokens, open = (tokens - sealed) * d;
  for (size_t h = 0; h < heads; ++h) {
    p.open_k[first_cell + h].resize(open);
    p.open_v[first_cell + h].resize(open);
    device_.copy(p.open_k[first_cell + h].data(), k + h * head_stride + sealed * d, open * 2);
    device_.copy(p.open_v[first_cell + h].data(), v + h * head_stride + sealed * d, open * 2);
  }
  device_.synchronize(Deadline::after(kDeviceDeadline));
  if (has_classes_) {
    p.last_q.resize(size_t(config_.layers));
    p.last_q[size_t(layer)].assign(last_q.begin(), last_q.end());
  }
  write_taken();  // from here on nothing reads what the caller holds, whatever is thrown

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
  p.tokens = tokens;
  for (size_t h = 0; h < heads && audit_ != nullptr; ++h) {
    std::vector<uint16_t> keys(tokens * d), values(tokens * d);
    device_.copy(keys.data(), k + h * head_stride, keys.size() * 2);
    device_.copy(values.data(), v + h * head_stride, values.size() * 2);
    device_.synchronize(Deadline::after(kDeviceDeadline));
    audit_->rows(at(sequence).audit, layer, int(h), tokens, keys.data(), values.data());
    group_.alive();
  }
  if (layer + 1 < int(config_.layers)) return;
  p.status.reset();
  for (auto& array : p.notes) array.reset();
  p.sealed_digests.reset();
}

}  // namespace certkv
