// Tier 1 of one KV head of one sequence at one layer: sealed pages and the open block.
//
// OWNERSHIP: pages are immutable once sealed and shared between forks of a sequence; the open block
// is each fork's own. A page found damaged is replaced, never written to. THREADS: one at a time;
// const functions may run beside each other.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels/base/failpoint.h"
#include "kernels/attend.h"

namespace certkv {

// Bytes in use, counted over all heads that share it. Shared pages count once.
struct TierAccount {
  std::atomic<uint64_t> bytes{0};
};

// Called with each group at its sealing, before it can be read: blocks [first, first + blocks) and
// their originals, [blocks * block_tokens, head_dim].
using SealSink =
    std::function<void(uint32_t first_block, int blocks, const uint16_t* k, const uint16_t* v)>;

// What a look at one sealed page found.
enum class PageState : uint8_t {
  Sound,
  Bytes,  // codes, metadata or annotations do not match the digest written at sealing
  Table,  // the page is sound, but the block table says other things of its blocks
};

enum class PageRebuild : uint8_t {
  Done,
  DigestWasDamaged,  // done; the old page's bytes were right all the time
  OtherDigest,       // sealing anew gave another page than the first time: nothing was changed
};

class DeviceTier {
 public:
  DeviceTier(std::shared_ptr<const PageFormat> format, DType dtype,
             std::shared_ptr<TierAccount> account);
  // A fork shares the sealed pages and copies the open block; no scratch pointer comes along.
  DeviceTier fork() const;

  // The first pages alone, shared, nothing open. REQUIRES pages <= pages() and no re-encoding.
  DeviceTier fork_pages(size_t pages) const;

  // Appends rows [tokens, head_dim]; every scale group that becomes full is sealed at once, from
  // its own tokens, and never rewritten. Throws NonFinite (naming the token) before anything of the
  // offending group is served, and OriginalsLost where open tokens are no longer those that came:
  // of them there is no other copy.
  void append(const uint16_t* k, const uint16_t* v, size_t tokens, const SealSink& sink);

  size_t tokens() const { return tokens_; }
  size_t sealed_blocks() const { return sealed_blocks_; }
  // All blocks in order, open ones last. Pointers k and v of sealed blocks are what use() set.
  std::span<const BlockRef> blocks() const { return refs_; }
  bool is_sealed(size_t block) const { return block < sealed_blocks_; }
  bool is_quantised(size_t block) const { return refs_[block].page != nullptr; }
  size_t quantised_blocks() const { return quantised_blocks_; }

  // Which originals the next pass uses for a sealed, quantised block; nullptr: its codes.
  void use_key(size_t block, const uint16_t* k) { refs_[block].k = k; }
  void use_value(size_t block, const uint16_t* v) { refs_[block].v = v; }

  // Integrity of the sealed pages. SOURCE: method section 7, "Tier-1 digest". Page p holds blocks
  // [p * format().blocks(), (p + 1) * format().blocks()).
  size_t pages() const { return pages_.size(); }
  // Reads the whole page and the table's entries of its blocks, the pointers set by use_key() and
  // use_value() excepted: whoever set them knows what they must be.
  PageState check_page(size_t page) const;
#if CERTKV_FAILPOINTS
  void rot() const;  // meets tier.rot once for each page
#endif
  // Takes nu, k_norm and the rest of the table from the page again. REQUIRES the page's bytes
  // sound.
  void restore_table(size_t page);
  // Seals a damaged page anew, from its originals [group_tokens, head_dim]. Sealing is
  // deterministic, so the digest must come out as it was; if not, the damaged page stays.
  PageRebuild rebuild_page(size_t page, const uint16_t* k, const uint16_t* v);
  // Whether this very page is also `other`'s; and, after that, taking over what `from` replaced it
  // by.
  bool shares_page(size_t page, const DeviceTier& other) const;
  void adopt_page(size_t page, const DeviceTier& from);

  // Re-encoding into another format (method section 5b). Its pages are made one by one beside those
  // in use, always from originals, and take their place all at once; groups sealed meanwhile are
  // re-encoded like the others. Forks keep what they have. REQUIRES the same head_dim, block_tokens
  // and group_tokens as format().
  void begin_reseal(std::shared_ptr<const PageFormat> format);
  bool resealing() const { return next_format_ != nullptr; }
  size_t resealed() const { return next_pages_.size(); }
  // Seals page resealed() from its originals [group_tokens, head_dim]. False: one of them is not
  // finite, and nothing has changed. REQUIRES resealing() and resealed() < pages().
  bool reseal_next(const uint16_t* k, const uint16_t* v);
  void cancel_reseal();
  // Blocks that the new format quantises keep the originals that use_key() and use_value() set, the
  // others have only the page's own. REQUIRES resealed() == pages().
  void adopt_reseal();

  const PageFormat& format() const { return *format_; }
  DType dtype() const { return dtype_; }
  uint64_t bytes() const;        // of this head, shared pages included
  uint64_t dense_bytes() const;  // what FP16/BF16 would take

 private:
  struct Page;
  struct Deleter {
    void operator()(std::byte* p) const;
  };
  std::shared_ptr<Page> make_page(const PageFormat& f, const uint16_t* k, const uint16_t* v) const;
  BlockRef sealed_ref(const Page& page, int index) const;
  void seal(const uint16_t* k, const uint16_t* v, const SealSink& sink);
  void list_open_blocks(size_t changed_from);
  std::array<uint64_t, 2> open_digest() const;  // of the open rows of K and V, as they are now

  std::shared_ptr<const PageFormat> format_;
  DType dtype_;
  std::shared_ptr<TierAccount> account_;
  std::vector<std::shared_ptr<const Page>> pages_;
  std::shared_ptr<const PageFormat> next_format_;  // of the re-encoding under way, or nullptr
  std::vector<std::shared_ptr<const Page>> next_pages_;
  std::unique_ptr<uint16_t[]> open_k_, open_v_;  // [group_tokens, head_dim]
  size_t open_tokens_ = 0, tokens_ = 0, sealed_blocks_ = 0, quantised_blocks_ = 0;
  std::array<uint64_t, 2> open_sealed_{};  // open_digest() after the last append
  std::vector<BlockRef> refs_;
};

}  // namespace certkv
