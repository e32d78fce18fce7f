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

int64_t CertifiedCache::fork_named(int64_t sequence, int64_t max_tokens, const StepRules& rules,
                                   const OwnerId& name, std::span<const AnswerSpan> sealed,
                                   uint64_t held) {
  Sequence& from = at(sequence);
  if (store_ == nullptr) return sealed.empty() ? fork(sequence, max_tokens, rules) : int64_t(0);
  auto s = fork_prompt(from, rules);
  const uint32_t end = s->prefix_blocks + answer_blocks(from, max_tokens);
  uint32_t first = s->prefix_blocks;
  if (!sealed.empty()) {
    if (s->failed() || !restore(s.get(), sealed, held)) return 0;
    first = uint32_t(held / uint64_t(format_->block_tokens));
  }
  if (first < end) s->spans.add(store_->reserve(blocks_of(name, first, end - first)));
  return keep_fork(std::move(s), from, max_tokens);
}

std::vector<AnswerSpan> CertifiedCache::sealed_answer(int64_t sequence) const {
  const Sequence& s = at(sequence);
  const DeviceTier& tier = s.heads[0].tier;
  std::vector<AnswerSpan> list;
  // The audit has to see every row come in.
  if (s.failed() || audit_ != nullptr ||
      tier.sealed_blocks() * size_t(format_->block_tokens) != tier.tokens())
    return list;
  for (const OriginalsSpan& span : s.spans.spans()) {
    const ReserveRequest& r = span.request();
    if (r.first_block < s.prefix_blocks || r.first_block >= tier.sealed_blocks()) continue;
    if (!r.owner.is_content()) return {};
    const AnswerSpan a{r.owner, r.first_block, r.blocks};
    if (list.empty() || !(list.back() == a)) list.push_back(a);  // one for each KV head, after
  }                                                              // another number of ranks
  return list;
}

// Fills tier 1 behind the prompt from an answer's sealed originals. False where they are not all
// there, sound, and behind this very prompt.
bool CertifiedCache::restore(Sequence* s, std::span<const AnswerSpan> sealed, uint64_t held) {
  const uint64_t block = uint64_t(format_->block_tokens);
  if (audit_ != nullptr || held % uint64_t(format_->group_tokens) != 0 ||
      held <= s->heads[0].tier.tokens())
    return false;
  const uint64_t end = held / block;
  uint64_t next = s->prefix_blocks;
  for (const AnswerSpan& a : sealed) {
    const uint64_t last = std::min(end, uint64_t(a.first_block) + a.blocks);
    if (a.first_block != next || last <= next || !a.owner.is_content()) return false;
    const auto spans = adopt(blocks_of(a.owner, a.first_block, uint32_t(last - a.first_block)));
    if (spans.empty()) return false;
    for (const OriginalsSpan& span : spans) s->spans.add(span);
    next = last;
  }
  if (next != end) return false;
  std::atomic<bool> sound{true};
  pool_.parallel_for(s->heads.size(), [&](size_t cell) {
    if (!restore_head(s, cell, held)) sound = false;
    group_.alive();
  });
  return sound;
}

bool CertifiedCache::restore_head(Sequence* s, size_t cell, uint64_t held) {
  const size_t heads = size_t(heads_.count()), d = size_t(format_->head_dim);
  const int layer = int(cell / heads), head = int(cell % heads);
  const size_t bt = size_t(format_->block_tokens), rows = bt * d;
  DeviceTier& tier = s->heads[cell].tier;
  const size_t first = tier.sealed_blocks(), blocks = size_t(held) / bt - first;
  std::vector<uint16_t> k(blocks * rows), v(blocks * rows);
  std::vector<uint32_t> list(blocks);
  std::vector<Destination> to(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    list[b] = uint32_t(first + b);
    to[b] = {BlockPart::Both, false, &k[b * rows], &v[b * rows]};
  }
  Originals originals(*this, *s, layer, head);
  std::vector<BlockResult> results;
  originals.read(list, to, &results);
  for (const BlockResult& r : results)
    if (r.status != BlockStatus::Ok || r.tokens != bt) return false;
  // The first of them begin with the prompt's last tokens, which this job has made itself.
  const size_t open = tier.tokens() - first * bt;
  for (size_t t = 0; t < open; ++t) {
    const BlockRef& ref = tier.blocks()[first + t / bt];
    if (!std::equal(&k[t * d], &k[t * d] + d, ref.k + t % bt * d) ||
        !std::equal(&v[t * d], &v[t * d] + d, ref.v + t % bt * d))
      return false;
  }
  try {
    tier.append(&k[open * d], &v[open * d], size_t(held) - tier.tokens(), sink(*s, layer, head));
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::NonFinite) throw;
    return false;
  }
  return true;
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
