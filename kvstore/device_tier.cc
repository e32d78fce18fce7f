#include "kvstore/device_tier.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/digest.h"
#include "kernels/quantize.h"

namespace certkv {

// A sealed scale group; or the originals of one that cannot be quantised, K before V, and then the
// annotations of its blocks.
struct DeviceTier::Page {
  Page(std::shared_ptr<TierAccount> a, size_t n) : account(std::move(a)), bytes(n) {
    data = static_cast<std::byte*>(std::aligned_alloc(64, (n + 63) / 64 * 64));
    if (data == nullptr) throw std::bad_alloc();
    account->bytes += bytes;
  }
  ~Page() {
    std::free(data);
    account->bytes -= bytes;
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;

  std::shared_ptr<TierAccount> account;
  size_t bytes;
  std::byte* data;
  bool quantised = true;
  uint64_t digest = 0;  // over codes, metadata and annotations, written at sealing
};

DeviceTier::DeviceTier(std::shared_ptr<const PageFormat> format, DType dtype,
                       std::shared_ptr<TierAccount> account)
    : format_(std::move(format)), dtype_(dtype), account_(std::move(account)) {
  CERTKV_EXPECT(dtype == DType::F16 || dtype == DType::BF16, InvalidArgument,
                "originals are {}: F16 or BF16 is needed", dtype_name(dtype));
  const size_t n = size_t(format_->group_tokens) * size_t(format_->head_dim);
  open_k_ = std::make_unique<uint16_t[]>(n);
  open_v_ = std::make_unique<uint16_t[]>(n);
}

DeviceTier DeviceTier::fork() const {
  DeviceTier copy(format_, dtype_, account_);
  copy.pages_ = pages_;
  copy.open_tokens_ = open_tokens_;
  copy.tokens_ = tokens_;
  copy.sealed_blocks_ = sealed_blocks_;
  copy.quantised_blocks_ = quantised_blocks_;
  const size_t n = open_tokens_ * size_t(format_->head_dim);
  std::copy_n(open_k_.get(), n, copy.open_k_.get());
  std::copy_n(open_v_.get(), n, copy.open_v_.get());
  copy.open_sealed_ = open_sealed_;
  copy.refs_ = refs_;
  for (size_t b = 0; b < sealed_blocks_; ++b)
    if (copy.refs_[b].page != nullptr) copy.refs_[b].k = copy.refs_[b].v = nullptr;
  copy.list_open_blocks(0);
  return copy;
}

DeviceTier DeviceTier::fork_pages(size_t pages) const {
  DeviceTier copy(format_, dtype_, account_);
  const size_t blocks = size_t(format_->blocks());
  copy.pages_.assign(pages_.begin(), pages_.begin() + ptrdiff_t(pages));
  copy.tokens_ = pages * size_t(format_->group_tokens);
  copy.sealed_blocks_ = pages * blocks;
  for (size_t p = 0; p < pages; ++p)
    for (size_t b = 0; b < blocks; ++b) {
      copy.refs_.push_back(sealed_ref(*pages_[p], int(b)));
      if (pages_[p]->quantised) ++copy.quantised_blocks_;
    }
  return copy;
}

void DeviceTier::append(const uint16_t* k, const uint16_t* v, size_t tokens, const SealSink& sink) {
  const size_t d = size_t(format_->head_dim), group = size_t(format_->group_tokens);
  CERTKV_EXPECT(open_tokens_ == 0 || open_digest() == open_sealed_, OriginalsLost,
                "the keys or values of tokens {} to {} have changed in memory, and no copy of them "
                "was sealed yet",
                tokens_ - open_tokens_, tokens_ - 1);
  while (tokens > 0 || open_tokens_ == group) {
    if (open_tokens_ == group) {  // full; also where an earlier sealing failed
      seal(open_k_.get(), open_v_.get(), sink);
      continue;
    }
    if (open_tokens_ == 0 && tokens >= group) {  // a whole group: no detour through the open block
      seal(k, v, sink);
      k += group * d;
      v += group * d;
      tokens -= group;
      continue;
    }
    const size_t n = std::min(tokens, group - open_tokens_), before = open_tokens_;
    std::copy_n(k, n * d, open_k_.get() + before * d);
    std::copy_n(v, n * d, open_v_.get() + before * d);
    BlockAnnotations unused;
    CERTKV_EXPECT(annotate_originals(*format_, dtype_, k, v, int(n), &unused) == SealStatus::Sealed,
                  NonFinite, "a key or value of tokens {} to {} is NaN or infinite", tokens_,
                  tokens_ + n - 1);
    open_tokens_ += n;
    tokens_ += n;
    k += n * d;
    v += n * d;
    tokens -= n;
    list_open_blocks(before);
    open_sealed_ = open_digest();
    CERTKV_FAILPOINT_BYTES(tier_open, open_k_.get(), 2 * open_tokens_ * d);
  }
}

std::array<uint64_t, 2> DeviceTier::open_digest() const {
  const size_t bytes = 2 * open_tokens_ * size_t(format_->head_dim);
  return {payload_digest(open_k_.get(), bytes), payload_digest(open_v_.get(), bytes)};
}

// The page of one group; nullptr where an original is not finite.
std::shared_ptr<DeviceTier::Page> DeviceTier::make_page(const PageFormat& f, const uint16_t* k,
                                                        const uint16_t* v) const {
  const size_t rows = size_t(f.group_tokens) * size_t(f.head_dim);
  const size_t block = size_t(f.block_tokens) * size_t(f.head_dim);
  auto page = std::make_shared<Page>(account_, f.page_bytes);
  CERTKV_FAILPOINT(tier_allocate);
  const SealStatus status = seal_page(f, dtype_, k, v, page->data);
  if (status == SealStatus::NonFinite) return nullptr;
  if (status != SealStatus::Sealed) {  // served from originals for ever: keep them beside the pages
    const size_t notes = 4 * rows;
    page = std::make_shared<Page>(account_, notes + size_t(f.blocks()) * sizeof(BlockAnnotations));
    page->quantised = false;
    std::memcpy(page->data, k, 2 * rows);
    std::memcpy(page->data + 2 * rows, v, 2 * rows);
    for (size_t b = 0; b < size_t(f.blocks()); ++b) {
      BlockAnnotations note{};
      annotate_originals(f, dtype_, k + b * block, v + b * block, f.block_tokens, &note);
      std::memcpy(page->data + notes + b * sizeof note, &note, sizeof note);
    }
  }
  page->digest = payload_digest(page->data, page->bytes);
  CERTKV_FAILPOINT_BYTES(tier_page, page->data, page->bytes);
  return page;
}

// What the block table says of a block, from what the page says.
BlockRef DeviceTier::sealed_ref(const Page& page, int index) const {
  const PageFormat& f = *format_;
  const size_t rows = size_t(f.group_tokens) * size_t(f.head_dim);
  const size_t first = size_t(index) * size_t(f.block_tokens) * size_t(f.head_dim);
  const size_t notes = page.quantised ? f.annotations : 4 * rows;
  BlockAnnotations note;
  std::memcpy(&note, page.data + notes + size_t(index) * sizeof note, sizeof note);
  const uint16_t* kept = reinterpret_cast<const uint16_t*>(page.data) + first;
  return {.page = page.quantised ? page.data : nullptr,
          .index = int16_t(index),
          .tokens = int16_t(f.block_tokens),
          .k = page.quantised ? nullptr : kept,
          .v = page.quantised ? nullptr : kept + rows,
          .nu = note.nu,
          .k_norm = note.k_norm};
}

void DeviceTier::seal(const uint16_t* k, const uint16_t* v, const SealSink& sink) {
  const PageFormat& f = *format_;
  const size_t group = size_t(f.group_tokens);
  const bool was_open = k == open_k_.get();
  const size_t first_token = was_open ? tokens_ - group : tokens_;
  const std::shared_ptr<Page> page = make_page(f, k, v);
  CERTKV_EXPECT(page != nullptr, NonFinite, "a key or value of tokens {} to {} is NaN or infinite",
                first_token, first_token + group - 1);
  const size_t refs = sealed_blocks_ + size_t(f.blocks());
  if (refs_.capacity() < refs) refs_.reserve(2 * refs);
  if (pages_.capacity() == pages_.size()) pages_.reserve(2 * pages_.size() + 1);
  if (sink) sink(uint32_t(sealed_blocks_), f.blocks(), k, v);
  // Nothing below throws: a group is sealed as a whole or not at all.
  refs_.resize(sealed_blocks_);  // the open blocks that become sealed ones
  for (int b = 0; b < f.blocks(); ++b) refs_.push_back(sealed_ref(*page, b));
  CERTKV_FAILPOINT_BYTES(tier_table, &refs_.back().nu, sizeof refs_.back().nu);
  pages_.push_back(page);
  sealed_blocks_ += size_t(f.blocks());
  if (page->quantised) quantised_blocks_ += size_t(f.blocks());
  if (was_open)
    open_tokens_ = 0;
  else
    tokens_ += group;
}

void DeviceTier::list_open_blocks(size_t changed_from) {
  const PageFormat& f = *format_;
  const size_t block = size_t(f.block_tokens), d = size_t(f.head_dim);
  const size_t first_block = changed_from / block;
  refs_.resize(sealed_blocks_ + (open_tokens_ + block - 1) / block);
  for (size_t b = first_block; b * block < open_tokens_; ++b) {
    const size_t first = b * block, n = std::min(block, open_tokens_ - first);
    const uint16_t *k = open_k_.get() + first * d, *v = open_v_.get() + first * d;
    BlockAnnotations note{};
    annotate_originals(f, dtype_, k, v, int(n), &note);
    refs_[sealed_blocks_ + b] = {.page = nullptr,
                                 .index = 0,
                                 .tokens = int16_t(n),
                                 .k = k,
                                 .v = v,
                                 .nu = note.nu,
                                 .k_norm = note.k_norm};
  }
}

// ---- integrity ----------------------------------------------------------------------------------

PageState DeviceTier::check_page(size_t page) const {
  const Page& p = *pages_[page];
  if (payload_digest(p.data, p.bytes) != p.digest && !CERTKV_FAILPOINT_FORCED(tier_unchecked))
    return PageState::Bytes;
  const auto same = [](float a, float b) {  // bit for bit: NaN too
    return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
  };
  const size_t n = size_t(format_->blocks());
  for (size_t b = 0; b < n; ++b) {
    const BlockRef says = sealed_ref(p, int(b)), &ref = refs_[page * n + b];
    const bool pointers = p.quantised || (ref.k == says.k && ref.v == says.v);
    if (ref.page != says.page || ref.index != says.index || ref.tokens != says.tokens ||
        !same(ref.nu, says.nu) || !same(ref.k_norm, says.k_norm) || !pointers)
      return PageState::Table;
  }
  return PageState::Sound;
}

#if CERTKV_FAILPOINTS
void DeviceTier::rot() const {
  for (const auto& page : pages_)
    failpoint::change(failpoint::Point::tier_rot, page->data, page->bytes);
}
#endif

void DeviceTier::restore_table(size_t page) {
  const Page& p = *pages_[page];
  const size_t n = size_t(format_->blocks());
  for (size_t b = 0; b < n; ++b) {
    BlockRef& ref = refs_[page * n + b];
    const BlockRef was = ref;
    ref = sealed_ref(p, int(b));
    if (!p.quantised) continue;
    ref.k = was.k;
    ref.v = was.v;
  }
}

PageRebuild DeviceTier::rebuild_page(size_t page, const uint16_t* k, const uint16_t* v) {
  const Page& old = *pages_[page];
  std::shared_ptr<Page> fresh = make_page(*format_, k, v);
  if (fresh == nullptr) return PageRebuild::OtherDigest;
  const bool same_bytes =
      fresh->bytes == old.bytes && std::memcmp(fresh->data, old.data, old.bytes) == 0;
  if (fresh->digest != old.digest && !same_bytes) return PageRebuild::OtherDigest;
  pages_[page] = std::move(fresh);
  restore_table(page);
  return same_bytes ? PageRebuild::DigestWasDamaged : PageRebuild::Done;
}

bool DeviceTier::shares_page(size_t page, const DeviceTier& other) const {
  return page < pages_.size() && page < other.pages_.size() && pages_[page] == other.pages_[page];
}

void DeviceTier::adopt_page(size_t page, const DeviceTier& from) {
  pages_[page] = from.pages_[page];
  restore_table(page);
}

// ---- re-encoding --------------------------------------------------------------------------------

void DeviceTier::begin_reseal(std::shared_ptr<const PageFormat> format) {
  CERTKV_EXPECT(format->head_dim == format_->head_dim &&
                    format->block_tokens == format_->block_tokens &&
                    format->group_tokens == format_->group_tokens,
                InvalidArgument,
                "layout {} groups {} tokens and {} of a block, {} groups {} and {}: pages of one "
                "cannot take the place of the other's",
                format->layout.name, format->group_tokens, format->block_tokens,
                format_->layout.name, format_->group_tokens, format_->block_tokens);
  next_format_ = std::move(format);
  next_pages_.clear();
}

bool DeviceTier::reseal_next(const uint16_t* k, const uint16_t* v) {
  std::shared_ptr<Page> page = make_page(*next_format_, k, v);
  if (page == nullptr) return false;
  next_pages_.push_back(std::move(page));
  return true;
}

void DeviceTier::cancel_reseal() {
  next_format_.reset();
  next_pages_.clear();
}

void DeviceTier::adopt_reseal() {
  CERTKV_EXPECT(resealing() && next_pages_.size() == pages_.size(), InvalidArgument,
                "{} of {} pages are re-encoded: all of them are needed", next_pages_.size(),
                pages_.size());
  const size_t n = size_t(next_format_->blocks());
  format_ = std::move(next_format_);
  pages_.swap(next_pages_);
  quantised_blocks_ = 0;
  for (size_t page = 0; page < pages_.size(); ++page) {
    const bool was_quantised = next_pages_[page]->quantised;
    if (pages_[page]->quantised) quantised_blocks_ += n;
    for (size_t b = 0; b < n; ++b) {
      BlockRef& ref = refs_[page * n + b];
      const BlockRef was = ref;
      ref = sealed_ref(*pages_[page], int(b));
      if (!pages_[page]->quantised || !was_quantised) continue;
      ref.k = was.k;
      ref.v = was.v;
    }
  }
  cancel_reseal();
}

uint64_t DeviceTier::bytes() const {
  uint64_t sum = 4 * open_tokens_ * size_t(format_->head_dim);
  for (const auto& p : pages_) sum += p->bytes;
  for (const auto& p : next_pages_) sum += p->bytes;
  return sum;
}

uint64_t DeviceTier::dense_bytes() const {
  return 4 * tokens_ * uint64_t(format_->head_dim);
}

}  // namespace certkv
