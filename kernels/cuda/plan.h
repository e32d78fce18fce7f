// How a pass is laid over the device: a pure function of shapes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/chains.h"
#include "kernels/cuda/page.h"

namespace certkv::cuda {

inline constexpr int kKeySlots = 1, kValueSlots = 1;  // of each warp, in shared memory
inline constexpr int kCopyStateBytes = 48;

// Warps of a pass block that kernels are compiled for. More of them have more copies under way;
// fewer fit where a multiprocessor has 100 KB of shared memory (sm_86, sm_89, sm_120).
struct WarpCounts {
  int most, fewest;
};
CERTKV_HD constexpr WarpCounts warp_counts(PageKind kind) {
  return kind == PageKind::K12V8 ? WarpCounts{10, 4} : WarpCounts{kMostWarps, 5};
}
inline constexpr int kFewWarps = 5;  // at most, of a block that leaves room for another
// Of fewer warps, so many blocks share a multiprocessor's registers.
inline constexpr int kMostResident = 2;

// Offsets in a block's shared memory. UNITS: bytes.
struct SharedLayout {
  uint32_t warp_bytes = 0;  // of each warp: its slots; then its terms of the queries, then its sums
  uint32_t values = 0;      // of the value slots within a warp's part
  uint32_t states = 0, entries = 0, tiles = 0, query = 0, norm = 0, bytes = 0;
};
CERTKV_HD constexpr SharedLayout shared_layout(int head_dim, int groups, int warps, PageKind kind) {
  const PageLayoutDevice page = page_layout(head_dim, kind);
  SharedLayout s;
  s.values = kKeySlots * page.key_bytes;
  s.warp_bytes = s.values + kValueSlots * page.value_bytes;
  s.states = uint32_t(warps) * s.warp_bytes;
  s.entries = s.states + uint32_t(warps) * (kKeySlots + kValueSlots) * kCopyStateBytes;
  s.tiles = s.entries + uint32_t(warps) * kMaxPagesPerWarp * 16;
  s.query = s.tiles + uint32_t(warps) * kMaxTilesPerWarp * 4;
  s.norm = s.query + uint32_t(4 * groups * head_dim) * 4;
  s.bytes = s.norm + uint32_t(4 * groups) * 4;
  return s;
}

struct DeviceShape {
  int multiprocessors = 0;
  size_t shared_per_block = 0, shared_per_multiprocessor = 0;  // bytes, opted in
};

// The most warps of a pass block that the device has shared memory for. It depends on the kind of
// device and the shape of a KV head alone, so it is one number for all passes of a model. Throws
// InvalidArgument where not even the fewest fit.
int pass_warps(const DeviceShape& device, int head_dim, int groups, PageKind kind);

// A head's sums are cut into splits; a split is one block's work.
struct SplitPlan {
  int pages_per_split = 1;
  int splits = 1;
  int warps = kMostWarps;  // of a block: pass_warps()
};
// max_pages: of the longest sequence; items: KV heads of all sequences. The same arguments give the
// same plan: who needs a head's bits not to depend on its neighbours or on the number of ranks
// names the same `items` everywhere. A split has at most warps * kMaxPagesPerWarp pages, what the
// rounding analysis allows. Throws InvalidArgument where a block's shared memory does not suffice.
SplitPlan plan_splits(const DeviceShape& device, int head_dim, int groups, PageKind kind,
                      int max_pages, int items);

// The most that plan_splits() gives a split of any sequence of up to `max_pages`.
int most_pages_per_split(const DeviceShape& device, int head_dim, int groups, PageKind kind,
                         int max_pages, int items);

// Bytes that a pass reads of one page, codes and notes; what benches divide by time.
inline double bytes_per_token(int head_dim, PageKind kind) {
  return double(page_layout(head_dim, kind).page_bytes()) / kPageTokens;
}

}  // namespace certkv::cuda
