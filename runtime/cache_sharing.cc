// Originals of a prompt's segments that the store already has: finding, holding and reading them.
#include <algorithm>

#include "parallel/communicator.h"
#include "runtime/cache_sequence.h"
#include "runtime/certified_cache.h"

namespace certkv {
namespace {

// Reservations of one owner that are tried, newest first: one may have been left unfinished by a
// job that was killed.
constexpr int kVersionsTried = 4;

OriginalsSpan adopt_sealed(StoreClient& store, const ReserveRequest& request) {
  uint32_t older_than = 0;
  for (int i = 0; i < kVersionsTried; ++i) {
    OriginalsSpan span = store.adopt(request, older_than);
    if (span.empty() || span.sealed_throughout()) return span;
    older_than = span.version();
  }
  return {};
}

}  // namespace

ReserveRequest CertifiedCache::blocks_of(const OwnerId& owner, uint32_t first_block,
                                         uint32_t blocks) const {
  ReserveRequest r;
  r.owner = owner;
  r.shape = {options_.dtype, uint16_t(format_->block_tokens), uint16_t(format_->head_dim)};
  r.layers = uint32_t(config_.layers);
  r.first_kv_head = uint32_t(heads_.begin);
  r.kv_heads = uint32_t(heads_.count());
  r.first_block = first_block;
  r.blocks = blocks;
  return r;
}

// All of the request, or nothing. Another number of ranks has reserved other sets of heads.
std::vector<OriginalsSpan> CertifiedCache::adopt(const ReserveRequest& request) const {
  std::vector<OriginalsSpan> spans;
  if (OriginalsSpan whole = adopt_sealed(*store_, request); !whole.empty()) {
    spans.push_back(std::move(whole));
    return spans;
  }
  for (uint32_t h = 0; h < request.kv_heads && request.kv_heads > 1; ++h) {
    ReserveRequest one = request;
    one.first_kv_head += h;
    one.kv_heads = 1;
    OriginalsSpan span = adopt_sealed(*store_, one);
    if (span.empty()) return {};
    spans.push_back(std::move(span));
  }
  return spans;
}

size_t CertifiedCache::find_shared(std::span<const OwnerId> segments) {
  found_.clear();
  if (store_ == nullptr) return 0;
  const uint32_t each = kSegmentTokens / uint32_t(format_->block_tokens);
  for (const OwnerId& owner : segments) {
    std::vector<OriginalsSpan> spans =
        adopt(blocks_of(owner, uint32_t(found_.size()) * each, each));
    if (spans.empty()) break;
    found_.push_back(std::move(spans));
    group_.alive();
  }
  return found_.size();
}

int64_t CertifiedCache::create_shared(int64_t prompt_tokens, int64_t sequence_id,
                                      int64_t max_tokens, std::span<const OwnerId> segments,
                                      size_t shared) {
  const auto found = std::exchange(found_, {});  // held until the end of this call
  CERTKV_EXPECT(shared <= found.size() && shared <= segments.size() &&
                    (shared == 0 || int64_t(shared * kSegmentTokens) < prompt_tokens),
                InvalidArgument, "{} of {} segments are to be shared, {} were found", shared,
                segments.size(), found.size());
  if (store_ == nullptr) segments = {};
  auto s = make_sequence(prompt_tokens, sequence_id);
  const uint32_t each = kSegmentTokens / uint32_t(format_->block_tokens);
  for (size_t i = 0; i < segments.size(); ++i) {
    if (i < shared)
      for (const OriginalsSpan& span : found[i]) s->spans.add(span);
    else
      s->spans.add(store_->reserve(blocks_of(segments[i], uint32_t(i) * each, each)));
    group_.alive();
  }
  const uint32_t named = uint32_t(segments.size()) * each;
  s->spans.add(reserve(named, s->prefix_blocks - named));
  s->segments.assign(segments.begin(), segments.end());
  s->shared_tokens = shared * kSegmentTokens;
  share_pages(s.get());
  return keep_sequence(std::move(s), prompt_tokens, max_tokens);
}

// Tier 1 of what is shared, from a sequence that is still there; what is left is sealed again from
// the originals, to the same bits.
void CertifiedCache::share_pages(Sequence* s) {
  const size_t segments = s->shared_tokens / kSegmentTokens;
  if (segments == 0) return;
  const size_t pages = s->shared_tokens / size_t(format_->group_tokens);
  for (const auto& [handle, other] : sequences_) {
    // A segment's name stands for all tokens up to its end.
    if (other->failed() || other->segments.size() < segments ||
        other->segments[segments - 1] != s->segments[segments - 1])
      continue;
    bool complete = true;
    for (size_t cell = 0; cell < s->heads.size(); ++cell) {
      DeviceTier& mine = s->heads[cell].tier;
      const DeviceTier& theirs = other->heads[cell].tier;
      if (mine.tokens() == 0 && &theirs.format() == format_.get() && theirs.pages() >= pages)
        mine = theirs.fork_pages(pages);
      complete = complete && mine.tokens() != 0;
    }
    if (complete) return;
  }
}

size_t CertifiedCache::shared_tokens(int64_t sequence) const {
  return at(sequence).shared_tokens;
}

bool CertifiedCache::load_shared(int64_t sequence, int layer, size_t tokens, uint16_t* k,
                                 uint16_t* v) {
  const Sequence& s = at(sequence);
  const size_t rows = size_t(format_->block_tokens) * size_t(format_->head_dim);
  const size_t blocks = s.shared_tokens / size_t(format_->block_tokens);
  std::atomic<bool> sound{true};
  pool_.parallel_for(size_t(heads_.count()), [&](size_t h) {
    Originals originals(*this, s, layer, int(h));
    const size_t start = h * tokens * size_t(format_->head_dim);
    std::vector<uint32_t> list(blocks);
    std::vector<Destination> to(blocks);
    for (size_t b = 0; b < blocks; ++b) {
      list[b] = uint32_t(b);
      to[b] = {BlockPart::Both, false, k + start + b * rows, v + start + b * rows};
    }
    std::vector<BlockResult> results;
    originals.read(list, to, &results);
    const bool whole = std::all_of(results.begin(), results.end(), [&](const BlockResult& r) {
      return r.status == BlockStatus::Ok && r.tokens == format_->block_tokens;
    });
    if (!whole) sound = false;
    group_.alive();
  });
  return sound;
}

}  // namespace certkv
