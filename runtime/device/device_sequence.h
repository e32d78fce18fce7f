// What the device's cache keeps of a prompt and of its decodes. For runtime/device/device_*.cc
// alone.
#pragma once

#include <limits>
#include <map>
#include <set>
#include <vector>

#include "runtime/audit/capture.h"
#include "runtime/device/device_cache.h"

namespace certkv {

// Whether heads of a policy may come to rung 3 on the device.
inline bool climbs(Policy policy) {
  return policy == Policy::Budget || policy == Policy::Paper;
}

// Pages of a KV head that a scrub looks at once. REQUIRES scrub_steps > 0
uint64_t most_looks(uint64_t pages, int64_t scrub_steps);

// Throws NonFinite, with its tokens, where a page says so.
void expect_finite(SealStatus status, size_t page);

using cuda::DeviceArray;
using cuda::HostArray;

// True where the memory has moved.
template <typename Array>
bool grow_array(Array* array, cuda::Device& device, size_t count, const char* what) {
  if (array->count() >= count) return false;
  *array = {};
  *array = Array(device, count, what);
  return true;
}

// Words of a layer.
inline constexpr size_t kAnyFailing = 0, kDenseCount = 1, kStageFailing = 2, kWords = 4;
// Words of a KV head at a layer that its kernels raise, from 0 at a step's beginning.
inline constexpr size_t kFailing = 0, kAgain = 1, kFlags = 2, kClimbed = 3, kMarks = 4;

// A prefilled prompt, shared by its decodes. A cell is (layer, local KV head).
struct DeviceCache::Prompt {
  OriginalsSpan span;                                 // of the sealed blocks
  size_t pages = 0;                                   // sealed, of every cell
  size_t tokens = 0;                                  // 0 until prefilled
  DeviceArray<std::byte> page;                        // [cells, pages, page_bytes]
  std::vector<float> k_norm;                          // [cells, pages * 4]
  std::vector<float> nu;                              // [cells, pages * 4]
  std::vector<std::vector<uint16_t>> open_k, open_v;  // [cells] of [open tokens, head_dim]
  // [cells, pages] as sealed. Kept by the host alone: what damages a page in the device's memory
  // does not reach what tells of it, and the comparison is not the device's either.
  std::vector<uint64_t> digests;
  bool verified = false;                   // by the scrub, before its first step
  std::vector<std::vector<float>> last_q;  // [layers] of [queries, heads, head_dim]; of classes
  // Pages that cannot be quantised, as originals: keys, then values, [64, head_dim] each.
  struct Kept {
    size_t cell, page;
    DeviceArray<std::byte> rows;
  };
  std::vector<Kept> kept;
  // Of the layer being sealed; gone after the last one.
  DeviceArray<uint8_t> status;           // [kv_heads, pages]
  DeviceArray<float> notes[2];           // [kv_heads, pages * 4] k_norm, nu
  DeviceArray<uint64_t> sealed_digests;  // [kv_heads, pages]
};

// A decode of a prompt; or, with decoding == false, the prompt itself.
struct DeviceCache::Sequence {
  int64_t handle = 0, id = 0;
  uint32_t audit = 0;  // its stream in the audit
  bool decoding = false;
  StepRules rules;
  std::shared_ptr<Prompt> prompt;
  OriginalsSpan own;             // blocks after the prompt's
  size_t tokens = 0, pages = 0;  // so far; sealed pages of every cell
  SequenceReport report;
  bool failed() const { return report.error.has_value(); }
  std::set<std::pair<size_t, size_t>> own_kept;  // (cell, page): of its own pages without codes
  uint64_t damaged_pages = 0;                    // it held, found since its last report
  std::vector<uint64_t> own_digests;             // [cells, own_capacity], as Prompt::digests
  // Kinds of the cells' pages. The prompt's, of a cell whose kind is another than the prompt's own,
  // are the sequence's: encoded anew at its fork.
  std::vector<cuda::PageKind> kinds;  // [cells]
  std::vector<cuda::PageKind> kinds_present;
  struct Recoded {
    DeviceArray<std::byte> page;  // [pages of the prompt, bytes of the kind]
    std::vector<uint64_t> digests;
  };
  std::vector<Recoded> recoded;            // [cells], empty where it is none
  size_t own_page_bytes = 0;               // from one page of own_page to the next
  DeviceArray<cuda::PageKind> seal_kinds;  // [cells]; of classes alone
  DeviceArray<uint32_t> seal_bytes;        // [cells]

  // On the device. capacity: entries of a cell; a cell has slots_each slots.
  size_t capacity = 0, own_capacity = 0, slots_each = 0;
  size_t dense_blocks = 0;    // policy dense: blocks that a cell has room for
  size_t kept = 0;            // pages without codes: 8 slots each, behind all cells' own
  int32_t open_slot[2] = {};  // first slot of the open rows, by part; see lay_out()
  int32_t quota[2] = {};
  std::vector<float> sealed_nu;  // [cells]
  DeviceArray<std::byte> own_page, slots;
  DeviceArray<cuda::PageEntry> entries;             // [cells, capacity]
  DeviceArray<int32_t> slot_of[2];                  // [cells, capacity, 4]
  DeviceArray<float> k_norm, open_nu;               // [cells, capacity, 4]
  DeviceArray<int32_t> block_of[2], free_slots[2];  // [cells, quota]
  DeviceArray<float> score[2];
  DeviceArray<int32_t> free_count;             // [cells, 2]
  DeviceArray<uint32_t> marks;                 // [cells, kMarks]
  DeviceArray<cuda::LadderCounts> counts;      // [cells]
  DeviceArray<Certificate> judged, candidate;  // [cells, heads]
  // The page that a step fills, on its way.
  DeviceArray<std::byte> filled_rows;  // [cells] of 64 keys, then 64 values
  DeviceArray<uint8_t> filled_status;  // [cells]
  DeviceArray<float> filled_nu;        // [cells]
  HostArray<std::byte> filled_rows_host;
  HostArray<uint8_t> filled_status_host;
  HostArray<float> filled_nu_host;
  DeviceArray<uint64_t> filled_digests;  // [cells]; without a scrub none, as what follows
  HostArray<uint64_t> filled_digests_host;
  // Pages whose digests are taken at once: of the scrub.
  HostArray<const std::byte*> look_at_host;
  DeviceArray<const std::byte*> look_at;
  HostArray<uint32_t> look_bytes_host;
  DeviceArray<uint32_t> look_bytes;
  DeviceArray<uint64_t> seen;
  HostArray<uint64_t> seen_host;
  HostArray<cuda::TableLook> tables_host;
  DeviceArray<cuda::TableLook> tables;
  DeviceArray<uint32_t> found;
  HostArray<uint32_t> found_host;
  // Read back at the end of a step.
  HostArray<uint32_t> marks_host;
  HostArray<cuda::LadderCounts> counts_host;
  HostArray<Certificate> judged_host, candidate_host;

  bool dense() const { return rules.policy == Policy::Dense; }
};

// Pages whose digests are taken at a step's end, and those whose tables are looked at.
struct DeviceCache::Due {
  std::vector<Look> digests, tables;
};

// Of the rows under way, for all layers or, where a layer leaves nothing behind, for one at a time.
struct DeviceCache::StepBuffers {
  size_t rows = 0, pages = 0, splits = 0;          // capacities; splits of a KV head
  std::vector<std::vector<cuda::PageKind>> kinds;  // [layers] of this step's pages, each once
  size_t layer = 0;                                // under way
  int most_splits[2] = {1, 1};  // of this step's rows, in a first and a repeated pass
  // What a step's enqueued work holds on to beside what it reads from the device's memory.
  struct Shape {
    size_t rows = 0;
    int splits[2] = {}, policy = 0;
    int64_t rounds = 0;
    double shares[3] = {};
    int staged_splits = 0;
    std::vector<double> paper;  // options of policy paper; ranking, exploration
    uint64_t grown = 0;         // buffers that have moved
    std::vector<std::vector<cuda::PageKind>> kinds;
    std::vector<int64_t> by_library;  // sequences whose keys and values a library reads
    friend bool operator==(const Shape&, const Shape&) = default;
  };
  // What shape() says of a step: the same where the shape has been before, also when others came
  // between, unless buffers have moved since, or too many others came.
  uint64_t name_of(const Shape& shape);
  static constexpr size_t kNamed = 64;
  std::map<uint64_t, Shape> named;
  uint64_t names = 0;  // given so far
  uint64_t grown = 0;
  HostArray<cuda::PassItem> pass_host;
  HostArray<cuda::AppendItem> append_host;
  HostArray<cuda::LadderItem> ladder_host;
  DeviceArray<cuda::PassItem> pass;  // [layers, rows, kv_heads]
  DeviceArray<cuda::AppendItem> append;
  DeviceArray<cuda::LadderItem> ladder;
  DeviceArray<float> scaled, norm, records, split_sums;
  DeviceArray<double> merged, scored;
  DeviceArray<uint8_t> used;
  DeviceArray<cuda::PageInRequest> list;
  DeviceArray<uint32_t> undecided;
  DeviceArray<cuda::PageInRequest> prefetch_list;
  DeviceArray<uint32_t> prefetch_listed;
  DeviceArray<uint32_t> listed, words;  // words: any failing, count of dense items, and two
  DeviceArray<int32_t> dense;
  // Rung 3's staging area, for one KV head: tables of as many entries, and originals of as many
  // pages, which are all of them where the device has room.
  size_t staged_entries = 0, staged_pages = 0;
  int staged_splits = 0;  // of this step's rows, at a time
  DeviceArray<std::byte> stage;
  DeviceArray<cuda::PageEntry> stage_entries;
  DeviceArray<int32_t> stage_slot[2];
  DeviceArray<float> stage_k_norm, stage_nu, stage_out;
  DeviceArray<Certificate> stage_judged;
  DeviceArray<cuda::PassItem> stage_pass;
  // What an audit has read back of a row at a layer.
  struct Audited {
    size_t row = 0, tokens = 0;
    int layer = 0;
    std::vector<float> q, out;           // [heads, head_dim]
    std::vector<uint16_t> k, v;          // [kv_heads, head_dim] of the new token
    std::vector<AuditCapture> captures;  // [kv_heads]
  };
  std::vector<Audited> audited;
  // Policy dense by a library.
  HostArray<int32_t> lengths_host;  // [rows]
  DeviceArray<int32_t> lengths;
  DeviceArray<float> largest;        // [layers, rows, kv_heads, 2]
  DeviceArray<uint16_t> q16, out16;  // [rows, heads, head_dim]
  std::vector<int64_t> filling;      // sequences whose page the step fills
  std::map<int64_t, Due> due;        // pages of sequences, at the step's end
  // Rows of a prompt's layer on their way to the arena: while blocks are written there from one
  // area, the next ones come to the other.
  struct Taken {
    HostArray<std::byte> area[2];  // [2 parts, kv_heads, blocks]
    int filling = 0;
    int64_t sequence = 0;
    int layer = -1;
    size_t until = 0;   // blocks of the layer that have been fetched, or are
    size_t blocks = 0;  // of these, the last ones, which are not being written yet
  } taken;
};

}  // namespace certkv
