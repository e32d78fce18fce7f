// Tier 1 of one KV head of one sequence at one layer: sealed pages and the open block.
//
// OWNERSHIP: pages are immutable once sealed and shared between forks of a sequence; the open block
// is each fork's own. THREADS: one at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/attend.h"

namespace certkv {

// Bytes in use, counted over all heads that share it. Shared pages count once.
struct TierAccount {
  std::atomic<uint64_t> bytes{0};
};

// Called with each group at its sealing, before it can be read: blocks [first, first + blocks) and
// their originals, [blocks * block_tokens, head_dim].
using SealSink = std::function<void(uint32_t first_block, int blocks, const uint16_t* k,
                                    const uint16_t* v)>;

class DeviceTier {
 public:
  DeviceTier(std::shared_ptr<const PageFormat> format, DType dtype,
             std::shared_ptr<TierAccount> account);
  // A fork shares the sealed pages and copies the open block; no scratch pointer comes along.
  DeviceTier fork() const;

  // Appends rows [tokens, head_dim]; every scale group that becomes full is sealed at once, from its
  // own tokens, and never rewritten. Throws NonFinite (naming the token) before anything of the
  // offending group is served.
  void append(const uint16_t* k, const uint16_t* v, size_t tokens, const SealSink& sink);

  size_t tokens() const { return tokens_; }
  size_t sealed_blocks() const { return sealed_blocks_; }
  // All blocks in order, open ones last. Pointers k and v of sealed blocks are what use() set.
  std::span<const BlockRef> blocks() const { return refs_; }
  bool is_sealed(size_t block) const { return block < sealed_blocks_; }
  bool is_quantised(size_t block) const { return refs_[block].page != nullptr; }

  // Which originals the next pass uses for a sealed, quantised block; nullptr: its codes.
  void use_key(size_t block, const uint16_t* k) { refs_[block].k = k; }
  void use_value(size_t block, const uint16_t* v) { refs_[block].v = v; }

  // Pages whose bytes no longer match the digest written when they were sealed (method section 7).
  // Reads every page.
  size_t damaged_pages() const;

  const PageFormat& format() const { return *format_; }
  DType dtype() const { return dtype_; }
  uint64_t bytes() const;        // of this head, shared pages included
  uint64_t dense_bytes() const;  // what FP16/BF16 would take

 private:
  struct Page;
  struct Deleter {
    void operator()(std::byte* p) const;
  };
  void seal(const uint16_t* k, const uint16_t* v, const SealSink& sink);
  void list_open_blocks(size_t changed_from);

  std::shared_ptr<const PageFormat> format_;
  DType dtype_;
  std::shared_ptr<TierAccount> account_;
  std::vector<std::shared_ptr<const Page>> pages_;
  std::unique_ptr<uint16_t[]> open_k_, open_v_;  // [group_tokens, head_dim]
  size_t open_tokens_ = 0, tokens_ = 0, sealed_blocks_ = 0;
  std::vector<BlockRef> refs_;
};

}  // namespace certkv
