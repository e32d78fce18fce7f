#include "kvstore/device_tier.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels/base/error.h"
#include "kernels/digest.h"
#include "kernels/quantize.h"

namespace certkv {

// A sealed scale group, or the originals of one that cannot be quantised.
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
  const size_t n = open_tokens_ * size_t(format_->head_dim);
  std::copy_n(open_k_.get(), n, copy.open_k_.get());
  std::copy_n(open_v_.get(), n, copy.open_v_.get());
  copy.refs_ = refs_;
  for (size_t b = 0; b < sealed_blocks_; ++b)
    if (copy.refs_[b].page != nullptr) copy.refs_[b].k = copy.refs_[b].v = nullptr;
  copy.list_open_blocks(0);
  return copy;
}

void DeviceTier::append(const uint16_t* k, const uint16_t* v, size_t tokens, const SealSink& sink) {
  const size_t d = size_t(format_->head_dim), group = size_t(format_->group_tokens);
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
  }
}

void DeviceTier::seal(const uint16_t* k, const uint16_t* v, const SealSink& sink) {
  const PageFormat& f = *format_;
  const size_t d = size_t(f.head_dim), group = size_t(f.group_tokens);
  const bool was_open = k == open_k_.get();
  const size_t first_token = was_open ? tokens_ - group : tokens_;
  auto page = std::make_shared<Page>(account_, f.page_bytes);
  const SealStatus status = seal_page(f, dtype_, k, v, page->data);
  CERTKV_EXPECT(status != SealStatus::NonFinite, NonFinite,
                "a key or value of tokens {} to {} is NaN or infinite", first_token,
                first_token + group - 1);
  const bool quantised = status == SealStatus::Sealed;
  const uint16_t *k_kept = nullptr, *v_kept = nullptr;
  if (!quantised) {  // served from originals for ever: keep them beside the pages
    page = std::make_shared<Page>(account_, 4 * group * d);
    uint16_t* kept = reinterpret_cast<uint16_t*>(page->data);
    std::copy_n(k, group * d, kept);
    std::copy_n(v, group * d, kept + group * d);
    k_kept = kept;
    v_kept = kept + group * d;
  }
  page->digest = payload_digest(page->data, page->bytes);
  const size_t refs = sealed_blocks_ + size_t(f.blocks());
  if (refs_.capacity() < refs) refs_.reserve(2 * refs);
  if (pages_.capacity() == pages_.size()) pages_.reserve(2 * pages_.size() + 1);
  if (sink) sink(uint32_t(sealed_blocks_), f.blocks(), k, v);
  // Nothing below throws: a group is sealed as a whole or not at all.
  refs_.resize(sealed_blocks_);  // the open blocks that become sealed ones
  for (int b = 0; b < f.blocks(); ++b) {
    const size_t first = size_t(b) * size_t(f.block_tokens) * d;
    BlockAnnotations note;
    annotate_originals(f, dtype_, k + first, v + first, f.block_tokens, &note);
    refs_.push_back({.page = quantised ? page->data : nullptr,
                     .index = int16_t(b),
                     .tokens = int16_t(f.block_tokens),
                     .k = quantised ? nullptr : k_kept + first,
                     .v = quantised ? nullptr : v_kept + first,
                     .nu = note.nu,
                     .k_norm = note.k_norm});
  }
  pages_.push_back(std::move(page));
  sealed_blocks_ += size_t(f.blocks());
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
    refs_[sealed_blocks_ + b] = {.page = nullptr, .index = 0, .tokens = int16_t(n), .k = k, .v = v,
                                 .nu = note.nu, .k_norm = note.k_norm};
  }
}

size_t DeviceTier::damaged_pages() const {
  size_t damaged = 0;
  for (const auto& p : pages_) damaged += payload_digest(p->data, p->bytes) != p->digest;
  return damaged;
}

uint64_t DeviceTier::bytes() const {
  uint64_t sum = 4 * open_tokens_ * size_t(format_->head_dim);
  for (const auto& p : pages_) sum += p->bytes;
  return sum;
}

uint64_t DeviceTier::dense_bytes() const { return 4 * tokens_ * uint64_t(format_->head_dim); }

}  // namespace certkv
