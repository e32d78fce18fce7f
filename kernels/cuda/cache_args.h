// What the kernels around the pass read and write: a new token's keys and values, the ladder, and
// what stays near the compute. Pointers are the device's. Plain data, the same for both compilers.
//
// An *item* is one KV head of one sequence at one layer of a step; arrays of items of one layer go
// together: PassItem (pass_args.h), AppendItem, LadderItem, index by index.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/pass_args.h"

namespace certkv::cuda {

inline constexpr uint32_t kFlagNonFinite = 2;  // a query, key or value is no finite number
inline constexpr uint32_t kFlagDigest = 4;     // originals did not match what was asked for
inline constexpr int kMaxHeads = 8;            // query heads of a KV head
inline constexpr float kJustPrefetched = -1;   // score of a slot until learn() has seen it
inline constexpr int kMostSlots = 8192;        // of a KV head's scratch, keys and values each

// Where a step over several ranks has halted: at a layer that they will repeat (rung 4). What is
// enqueued behind it still runs, of no account, and must leave the sequences as they are.
struct Halt {
  const uint32_t* at = nullptr;  // the layer + 1, or 0; nullptr: one rank, whose steps never halt
  uint32_t layer = 0;            // of the work at hand
  CERTKV_HD bool passed() const {
    const uint32_t halted = at != nullptr ? *at : 0;
    return halted != 0 && halted <= layer;
  }
};

// Where a new token goes, and what a pass needs of its query.
struct AppendItem {
  std::byte* keys = nullptr;  // rows of the open blocks, [64, head_dim] of 16 bits
  std::byte* values = nullptr;
  PageEntry* entries = nullptr;  // [4] of the open blocks
  float* k_norm = nullptr;       // [4, 4] of the entries
  float* open_nu = nullptr;      // [4, 4]
  float sealed_nu = 0;           // largest norm of a sealed value
  int32_t open = 0;              // open tokens before this one, 0 to 63
  float* scaled = nullptr;       // out, what PassItem reads: [heads, head_dim]
  float* norm = nullptr;         // out [heads]
};

struct AppendArgs {
  const AppendItem* items = nullptr;  // [rows * kv_heads], row-major
  PassItem* passes = nullptr;         // unit is written, flags are raised
  // [rows, (heads + 2) * kv_heads * head_dim]: queries, keys, values, after RoPE, not yet rounded.
  const float* qkv = nullptr;
  int32_t rows = 0, kv_heads = 0, heads = 0;  // heads: of a KV head
  int32_t head_dim = 0;
  DType dtype = DType::BF16;
  uint32_t* any_failing = nullptr;  // out: 0, before the layer's pass
  uint32_t* redone = nullptr;       // the same; or nullptr
  Halt halt = {};
};

// A stretch of blocks in the arena, as the device reads it. SOURCE: kvstore/FORMAT.md.
struct OriginalsRun {
  const std::byte* slots = nullptr;
  int32_t blocks = 0;
  uint32_t id[10] = {};  // BlockId of its blocks, with 0 for the block
};
// What a slot of the arena must say of its block, and where its parts lie.
struct SlotShape {
  uint32_t slot_bytes = 0, k_offset = 0, v_offset = 0;
  uint32_t header[2] = {};  // words 14 and 15: dtype and tokens, block_tokens and head_dim
};

// How many of what a step did for an item.
struct LadderCounts {
  uint32_t rounds = 0;                              // of promotions
  uint32_t dense = 0;                               // 1: went to rung 3
  uint32_t promoted_keys = 0, promoted_values = 0;  // blocks
  uint32_t paged = 0;                               // blocks of one tensor read from the arena
  uint32_t digest = 0;                              // of them, not what was asked for
  uint32_t canary = 0;                              // of them, codes farther off than promised
  uint32_t canary_last = 0;   // the last such block: 4 block + what was broken
  uint32_t canary_ahead = 0;  // as canary, of blocks read for the next step: they are not used
  uint32_t rung4 = 0;         // 1: all heads, with the row's other KV heads
  uint32_t hits = 0;          // policy paper: blocks that the scratch held already
  uint32_t ranked = 0;        // policy budget: bit h: head h's ranking was unresolved
  uint32_t explored = 0;      // blocks, promoted at random: neither promoted_keys nor _values
  uint32_t resident_keys = 0, resident_values = 0;  // blocks, when the step's last pass began
  uint32_t prefetched = 0;                          // blocks of one tensor read for the next step
  uint32_t prefetched_used = 0;  // of those of the step before, which learn() kept
};

inline constexpr int kKeys = 0, kValues = 1;  // parts
// What a canary may find broken: |s - s^| <= D_b + g_b, ||v^ - v|| <= eta_b, ||v|| <= nu_b.
inline constexpr uint32_t kCanaryScore = 1, kCanaryError = 2, kCanaryNorm = 3;

struct LadderItem {
  // Scratch of the KV head, by part: slots are numbers within PassItem::slots.
  int32_t* block_of[2] = {};    // [quota] block a slot holds, -1: none
  float* score[2] = {};         // [quota]
  int32_t* free_slots[2] = {};  // [quota], the first free_count[part] of them
  // [2]; under policy paper: the slot from which on slots are reused, the oldest one.
  int32_t* free_count = nullptr;
  int32_t first_slot[2] = {};
  int32_t quota[2] = {};
  std::byte* slots = nullptr;  // as PassItem::slots, to write
  PageEntry* pages = nullptr;  // as PassItem::pages, to write
  int32_t* slot_of[2] = {};    // as PassItem::key_slot, value_slot
  int32_t coded_pages = 0;     // entries with codes; the open ones follow
  OriginalsRun run[2];         // blocks from 0 on, and those that follow
  uint32_t* again = nullptr;   // as PassItem::again
  // Out [heads]: as judged before the ladder; of an item on rung 4 that no head of its own brought
  // there, what rung 4 has returned, for learn() may be reading `judged`; else untouched.
  Certificate* candidate = nullptr;
  LadderCounts* counts = nullptr;
  uint64_t exploration_seed = 0;  // of this step and KV head: counter_seed()
};

struct PageInRequest {
  int32_t resident = 0;  // 1: the slot held it before this step
  int32_t block = 0, part = 0, slot = 0;
};

struct LadderArgs {
  PassItem* passes = nullptr;
  const LadderItem* items = nullptr;
  int32_t count = 0;     // items
  int32_t kv_heads = 0;  // items of a row: they enter rung 4 together
  int32_t head_dim = 0, groups = 1;
  DType dtype = DType::BF16;  // of originals
  SlotShape shape;
  double value_share = 0.5, max_share = 0.25;  // as LadderOptions
  bool climbed = false;         // learn(): of the items that climbed in this step, or of the others
  uint64_t explored_below = 0;  // explore(): the share of blocks, in 2^-53
  // Policy budget, where ranking is asked for: [count, undecided_of_item] of a page, bit 8 t + h:
  // its block t leaves head h's ranking unresolved. nullptr: it is not.
  uint32_t* undecided = nullptr;
  uint64_t undecided_of_item = 0;
  PageInRequest* list = nullptr;  // [sum of the items' quotas]
  uint32_t* listed = nullptr;
  int32_t* dense = nullptr;  // [count] items that go to rung 3
  uint32_t* dense_count = nullptr;
  uint32_t* dense_listed = nullptr;  // [count] 1: the list has an n-th item
  Halt halt = {};
  // Of several ranks [rows]: raised where a canary has broken a row, whose heads list_dense() then
  // leaves alone: all ranks repeat the layer. nullptr: one rank, where rung 4 follows at once.
  float* fallback = nullptr;
  // [rows] list_dense() lists all items of the rows that are not 0 here, and no other.
  const uint32_t* repeat = nullptr;
};

// Policy `paper`, and ranking. SOURCE: method section 5, "Policies", and section 6.
struct PaperArgs {
  double tau_cov = 0.995, expand_tail = 0.02, v_tol = 0.05;  // as PaperOptions
  int32_t k_min = 2, k_max = 128;
  bool greedy_values = false;
  int32_t ranking = 1;
  bool all_items = false;  // rank(): of those that a repeated pass has left alone, too
  // [count, scored_of_item]: log-masses of codes, which an item has as its records: of four heads
  // of a page [tile 4][head 4].
  double* scored = nullptr;
  uint64_t scored_of_item = 0;
};

// Rung 3 for one item: its originals, verified, into a staging area: those of some splits, of its
// repeated plan, at a time.
struct DenseArgs {
  int32_t first_split = 0, splits = 0;
  PassItem* pass = nullptr;  // out: the item to attend to
  // [2 * blocks of the splits][16, head_dim]: of their block b keys 2 b, values 2 b + 1
  std::byte* slots = nullptr;
  PageEntry* entries = nullptr;                 // [entries]
  int32_t* slot_of[2] = {};                     // [entries, 4]
  float *k_norm = nullptr, *open_nu = nullptr;  // [entries, 4]
  float* out = nullptr;                         // [heads, head_dim]
  Certificate* judged = nullptr;                // [heads]
  uint32_t* failing = nullptr;                  // [2]: of the heads, any
};

// A look at what the tables say of a sealed page with codes, and at its blocks' originals in the
// scratch.
inline constexpr uint32_t kTableDamaged = 1, kOriginalsDamaged = 2;
struct TableLook {
  const std::byte* codes = nullptr;  // what the page's entry must name
  int32_t item = 0, page = 0;
};
struct TableArgs {
  const LadderItem* items = nullptr;
  int32_t head_dim = 0;
  SlotShape shape;
  const TableLook* list = nullptr;  // [count]
  int32_t count = 0;
  uint32_t* found = nullptr;  // out [count]: 0, or what was damaged, and is sound again or dropped
  const uint32_t* halted = nullptr;  // where not 0 nothing is done; or nullptr
};

// Digests (kernels/digest.h) of stretches of the device's memory, all of one length or each of its
// own.
struct DigestArgs {
  // [count] where each begins; or nullptr: n-th at first + n / per_row * row_stride + n % per_row *
  // bytes. All 16-byte aligned.
  const std::byte* const* list = nullptr;
  const std::byte* first = nullptr;
  uint64_t row_stride = 0;
  int32_t per_row = 1;
  uint32_t bytes = 0;  // a multiple of 16
  // [count] in place of `bytes`, each a multiple of 16. REQUIRES a list, or per_row 1.
  const uint32_t* lengths = nullptr;
  int32_t count = 0;
  uint64_t* digests = nullptr;  // out [count]
};

}  // namespace certkv::cuda
