// What the device's pass reads and writes. Pointers are the device's (in emulation: the host's).
// Plain data, the same for both compilers. See DESIGN.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arith/certificate.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/page.h"

namespace certkv::cuda {

// What a warp takes at a time: a page, or up to four blocks that have no codes. Those of the open
// end are best given one by one, so that several warps share them.
struct PageEntry {
  const std::byte* page = nullptr;  // see page.h; nullptr: originals only
  uint32_t wants = 0;  // bit t: original keys of tile t, bit 4 + t: values, where they are resident
  int32_t tokens = 0;  // 64 of a page; without codes 1 to 64, whole blocks but for the last one
};
static_assert(sizeof(PageEntry) == 16);

// What a block was really served from; the same bits as kUsedKey and kUsedValue.
inline constexpr uint8_t kUsedOriginalKey = 1, kUsedOriginalValue = 2;

inline constexpr uint32_t kFlagMissing = 1;  // originals were wanted that no slot holds

// What a pass writes for a page and four heads: [56] floats, head = index % 4.
//   0 sum of exp(s - reference) [tile 4][head 4]     16 reference [tile 4][head 4]
//   32 Delta_b charged [tile 4][head 4]   48 D_b + g_b of the codes [4]   52 c_b of the codes [4]
inline constexpr int kRecordFloats = 56;
inline constexpr int kRecordRef = 16, kRecordDelta = 32, kRecordBound = 48, kRecordC = 52;

// Sums of a split about its own reference: a header, then o and a, [head_dim] each. In the merged
// state the same in double. Values are multiplied by the item's unit in splits alone.
inline constexpr int kSumsHeader = 24;
enum SumsHeader {
  kSumRef,
  kSumL,
  kSumM2,  // with the unit twice, as kSumH2
  kSumS1,
  // What the closing arithmetic asks for of the blocks (BlockSums).
  kSumS,
  kSumH2,
  kSumABar,
  kSumTNu,
  kSumFSum,
  kSumFNu,
  kSumDen,
  kSumValue,
  kSumGO,
  kSumTail,
  kSumFlushed,  // from here on whatever the reference
  kSumCTokens,
  kSumScoreMax,  // from here on largest, not sums
  kSumNuMax,     // notes without the unit; one that is not >= 0 counts as NaN
  kSumEtaMax,
  kSumVbarMax,
  kSumCount
};
inline constexpr int kFirstOfBlocks = kSumS, kFirstPlain = kSumFlushed, kFirstMax = kSumScoreMax;
static_assert(kSumCount <= kSumsHeader);
// How often a header's sum has the unit as a factor.
CERTKV_HD constexpr int units_in(int entry) {
  if (entry == kSumM2 || entry == kSumH2) return 2;
  return entry == kSumS1 || entry == kSumABar || entry == kSumTNu || entry == kSumFNu ||
                 entry == kSumValue || entry == kSumGO
             ? 1
             : 0;
}
CERTKV_HD constexpr int sums_floats(int head_dim) {
  return kSumsHeader + 2 * head_dim;
}

// One KV head of one sequence.
struct PassItem {
  const PageEntry* pages = nullptr;
  int32_t page_count = 0;
  int32_t heads = 0;                    // query heads of the KV head
  int32_t pages_per_split = 0;          // of a first pass
  int32_t repeated_per_split = 0;       // of a repeated one
  const float* scaled = nullptr;        // [heads, head_dim] q / sqrt(d)
  const float* norm = nullptr;          // [heads] its norm, rounded up
  const int32_t* key_slot = nullptr;    // [page_count, 4] slot of a block's keys; -1: not resident
  const int32_t* value_slot = nullptr;  // the same of its values
  const float* k_norm = nullptr;        // [page_count, 4] of original keys, as annotated
  const float* open_nu = nullptr;       // [page_count, 4] largest norm of a value, without codes
  float unit = 1;                       // power of two that brings the largest norm near 1
  PageKind kind = PageKind::K8V4;       // of its pages; see PassArgs::of_kind
  float* records = nullptr;             // out [page_count, groups, kRecordFloats]
  uint8_t* used = nullptr;              // out [page_count, 4] kUsedOriginalKey, kUsedOriginalValue
  float* splits = nullptr;              // out [splits, heads, sums_floats(head_dim)]
  double* merged = nullptr;             // out [heads, sums_floats(head_dim)]
  float* out = nullptr;                 // out [heads, head_dim] o / l
  uint32_t* flags = nullptr;            // out: or-ed into
  const std::byte* slots = nullptr;     // [slot_count][16, head_dim] rows of one block's tensor
  int32_t slot_count = 0;

  // Judging. judged == nullptr: the pass alone.
  int32_t relative = 0;             // whether the tolerance is relative to S
  double tolerance = 0;             // method E5; infinite and absolute: every number fits
  int64_t tokens = 0;               // of the sequence
  Certificate* judged = nullptr;    // out [heads]
  uint32_t* failing = nullptr;      // out: bit h or-ed in where head h is not within the tolerance
  uint32_t* any_failing = nullptr;  // out: 1 or-ed in if any is
  const uint32_t* again = nullptr;  // 0: a repeated pass leaves the item alone
  uint32_t* climbed = nullptr;      // out: 1 or-ed in if any head has failed in this step
};

struct PassArgs {
  const PassItem* items = nullptr;  // [grid.y]
  int32_t pages_per_split = 0;      // of every item; 0: as each says
  int32_t first_split = 0;          // of those that this launch takes
  DType dtype = DType::BF16;        // of originals
  bool repeated = false;            // only items whose `again` is not 0
  bool of_kind = false;             // only items of the launch's kind; the merge takes all items
  bool after_append = false;        // a kernel of append() was enqueued right before
  bool sets_condition = false;      // Device::Setter, of any_failing
  uint64_t condition = 0;
};
CERTKV_INLINE int pages_per_split(const PassArgs& args, const PassItem& item) {
  if (args.pages_per_split > 0) return args.pages_per_split;
  return args.repeated ? item.repeated_per_split : item.pages_per_split;
}

}  // namespace certkv::cuda
