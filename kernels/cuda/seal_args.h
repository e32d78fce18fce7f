// What sealing on the device reads and writes. Pointers are the device's. Plain data, the same for
// both compilers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/pass_args.h"
#include "kernels/quantize.h"

namespace certkv::cuda {

// Seals `pages` pages of each of `heads` KV heads: head h, page p is number h pages + p. Strides of
// a head and of a page are in bytes, but where entries are counted.
struct SealArgs {
  int32_t heads = 0, pages = 0, head_dim = 0;
  PageKind kind = PageKind::K8V4;
  const PageKind* kinds = nullptr;  // [heads] in place of `kind`
  DType dtype = DType::BF16;
  // [64, head_dim] rows of 16 bits, 16-byte aligned.
  const std::byte *k = nullptr, *v = nullptr;
  uint64_t rows_of_head = 0, rows_of_page = 0;
  // out: page_bytes() of the kind each, 16-byte aligned; meaningless where the status is
  // not Sealed. nullptr: nothing is quantised, only the norms are taken.
  std::byte* page = nullptr;
  uint64_t page_of_head = 0, page_of_page = 0;
  uint8_t* status = nullptr;  // out [heads * pages] SealStatus
  // out [4] of a page, of its blocks' originals: the notes that serve where there are no codes.
  // Also where it cannot be quantised.
  float *k_norm = nullptr, *nu = nullptr;
  uint64_t notes_of_head = 0, notes_of_page = 0;
  float* largest_nu = nullptr;     // out, or nullptr: [heads * pages] of a page's blocks
  std::byte* originals = nullptr;  // out, or nullptr: [heads * pages] of all keys, then all values

  // Of a decode, where pages is 1: the page's entry and those of the open blocks behind it (5 of a
  // head) begin anew. nullptr: not.
  PageEntry* entries = nullptr;
  int32_t* slot_of[2] = {};          // [5, 4] of a head
  uint64_t entries_of_head = 0;      // entries from one head's to the next one's
  int32_t open_slot[2] = {};         // of the open rows from now on
  int32_t kept_slot[2] = {};         // of the page's own rows, where nothing is quantised
  const uint32_t* halted = nullptr;  // where not 0 nothing is done; or nullptr
};

inline constexpr int kSealThreads = 128;  // for a page

}  // namespace certkv::cuda
