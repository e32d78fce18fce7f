// The device's cache, sixth part: the rolling scrub of tier 1. Digests are taken where the pages
// are and compared on the host; what is damaged is sealed again from its originals.
//
// A step's looks stand behind its pass, in the stream, with what the host waits for anyway: those
// that are due before the next step. So a page that was damaged before a step's end is in doubt for
// that step too, and is counted in its verdict. A look covers what the sequence's tables say of the
// page and its originals in the scratch, too. Not looked at are pages kept as originals and open
// rows; and under policy dense nothing, for codes are not read there. SOURCE: method section 7,
// "Tier-1 digest".
#include <algorithm>
#include <set>
#include <tuple>

#include "kernels/base/log.h"
#include "kernels/digest.h"
#include "parallel/communicator.h"
#include "runtime/certify/page_originals.h"
#include "runtime/certify/scrub.h"
#include "runtime/device/device_sequence.h"
#include "runtime/span_originals.h"

namespace certkv {

using cuda::kPageTiles;
using cuda::kPageTokens;

namespace {

constexpr auto kDeviceDeadline = std::chrono::seconds(60);

}  // namespace

// ---- looking ------------------------------------------------------------------------------------

std::byte* DeviceCache::page_at(const Sequence& s, size_t cell, size_t page) const {
  const size_t of_prompt = s.prompt->pages;
  if (is_recoded(s, cell, page))
    return s.recoded[cell].page.data() + page * bytes_at(s, cell, page);
  if (page < of_prompt) return s.prompt->page.data() + (cell * of_prompt + page) * page_bytes_;
  return s.own_page.data() + (cell * s.own_capacity + page - of_prompt) * s.own_page_bytes;
}

bool DeviceCache::is_recoded(const Sequence& s, size_t cell, size_t page) const {
  return page < s.prompt->pages && !s.recoded.empty() && s.recoded[cell].page.count() > 0;
}

cuda::PageKind DeviceCache::kind_at(const Sequence& s, size_t cell, size_t page) const {
  return page < s.prompt->pages && !is_recoded(s, cell, page) ? kind_ : s.kinds[cell];
}

size_t DeviceCache::bytes_at(const Sequence& s, size_t cell, size_t page) const {
  return cuda::page_layout(int(config_.head_dim), kind_at(s, cell, page)).page_bytes();
}

cuda::PageKind DeviceCache::kind(int64_t sequence, int layer, int head) const {
  return at(sequence).kinds[size_t(layer) * size_t(heads_.count()) + size_t(head)];
}

uint64_t& DeviceCache::digest_of(Sequence& s, size_t cell, size_t page) const {
  const size_t of_prompt = s.prompt->pages;
  if (is_recoded(s, cell, page)) return s.recoded[cell].digests[page];
  if (page < of_prompt) return s.prompt->digests[cell * of_prompt + page];
  return s.own_digests[cell * s.own_capacity + page - of_prompt];
}

bool DeviceCache::is_kept(const Sequence& s, size_t cell, size_t page) const {
  if (page >= s.prompt->pages) return s.own_kept.contains({cell, page});
  return std::any_of(s.prompt->kept.begin(), s.prompt->kept.end(),
                     [&](const Prompt::Kept& k) { return k.cell == cell && k.page == page; });
}

BlockId DeviceCache::originals_id(int64_t sequence, int layer, int head, uint32_t block) const {
  const Sequence& s = at(sequence);
  const OriginalsSpan& span = block < s.prompt->pages * kPageTiles ? s.prompt->span : s.own;
  return span.id(uint32_t(layer), uint32_t(heads_.begin + head), block);
}

std::byte* DeviceCache::page(int64_t sequence, int layer, int head, size_t page) const {
  return page_at(at(sequence), size_t(layer) * size_t(heads_.count()) + size_t(head), page);
}

// With the sequence, so that no step finds it missing.
void DeviceCache::reserve_looks(Sequence* s) {
  const size_t n = cells(), pages = s->prompt->pages + s->own_capacity;
  if (schedule_.period() == 0 || s->dense() || pages == 0) return;
  const char* what = "digests of pages (set cache.scrub_steps higher)";
  s->own_digests.assign(n * s->own_capacity, 0);
  s->filled_digests = {device_, n, what};
  s->filled_digests_host = {device_, n, what};
  const size_t looks = n * size_t(most_looks(pages, options_.cache.scrub_steps));
  s->look_at_host = {device_, looks, what};
  s->look_at = {device_, looks, what};
  s->look_bytes_host = {device_, looks, what};
  s->look_bytes = {device_, looks, what};
  s->seen = {device_, looks, what};
  s->seen_host = {device_, looks, what};
  s->tables_host = {device_, looks, what};
  s->tables = {device_, looks, what};
  s->found = {device_, looks, what};
  s->found_host = {device_, looks, what};
}

// Enqueues taking the digests of pages of s, into the buffers of a sequence of the same prompt.
void DeviceCache::look(Sequence& s, Sequence& by, std::span<const Look> looks) {
  if (looks.empty()) return;
  for (size_t i = 0; i < looks.size(); ++i) {
    by.look_at_host[i] = page_at(s, looks[i].cell, looks[i].page);
    by.look_bytes_host[i] = uint32_t(bytes_at(s, looks[i].cell, looks[i].page));
  }
  device_.copy(by.look_bytes.data(), by.look_bytes_host.data(), looks.size() * sizeof(uint32_t));
  device_.copy(by.look_at.data(), by.look_at_host.data(), looks.size() * sizeof(std::byte*));
  ops_.digest_pages({.list = by.look_at.data(),
                     .lengths = by.look_bytes.data(),
                     .count = int32_t(looks.size()),
                     .digests = by.seen.data()});
  device_.copy(by.seen_host.data(), by.seen.data(), looks.size() * sizeof(uint64_t));
}

// Enqueues a look at what the tables say of pages. The items of cell (layer, head) are those of
// step_->ladder from layer * items + first on.
void DeviceCache::look_at_tables(Sequence& s, std::span<const Look> looks, size_t items,
                                 size_t first) {
  if (looks.empty()) return;
  const size_t heads = size_t(heads_.count());
  for (size_t i = 0; i < looks.size(); ++i) {
    const auto [cell, page] = looks[i];
    s.tables_host[i] = {page_at(s, cell, page),
                        int32_t(cell / heads * items + first + cell % heads), int32_t(page)};
  }
  device_.copy(s.tables.data(), s.tables_host.data(), looks.size() * sizeof(cuda::TableLook));
  ops_.check_tables({.items = step_->ladder.data(),
                     .head_dim = int32_t(config_.head_dim),
                     .shape = slot_shape(),
                     .list = s.tables.data(),
                     .count = int32_t(looks.size()),
                     .found = s.found.data(),
                     .halted = agreement_.halted});
  device_.copy(s.found_host.data(), s.found.data(), looks.size() * sizeof(uint32_t));
}

// What is due before the steps that follow: as ScrubSchedule and scrub_due() say. A prompt's page
// is looked at once for all rows that share it: of two lengths the same pages are due where they
// are equal modulo the period, and none in common elsewhere.
void DeviceCache::enqueue_due() {
  StepBuffers& b = *step_;
  b.due.clear();
  const uint64_t period = schedule_.period();
  std::set<std::tuple<const Prompt*, uint64_t, size_t>> shared;  // with the cell
  for (size_t row = 0; row < rows_.size(); ++row) {
    Sequence& s = at(rows_[row]);
    if (s.failed() || s.look_at.count() == 0) continue;
    const uint64_t now = s.tokens + 1;
    // Sealed behind the step before, and not looked at since.
    const bool just_sealed =
        s.pages > s.prompt->pages && now == s.pages * uint64_t(kPageTokens) + 1;
    Due& due = b.due[rows_[row]];
    const auto take = [&](size_t cell, size_t page, size_t lowest) {
      if (is_kept(s, cell, page)) return;
      if (page >= lowest) due.digests.push_back({cell, page});
      due.tables.push_back({cell, page});  // every row has its own
    };
    const size_t heads = size_t(heads_.count());
    for (size_t cell = 0; cell < cells(); ++cell) {
      const StepWhere where{s.id, int(cell / heads), int(heads_.begin) + int(cell % heads), now};
      bool newest_seen = false;
      const bool own = is_recoded(s, cell, 0);
      const size_t lowest =
          own || shared.emplace(s.prompt.get(), now % period, cell).second ? 0 : s.prompt->pages;
      for (size_t page = schedule_.first_due(where); page < s.pages; page += size_t(period)) {
        newest_seen = page + 1 == s.pages;
        take(cell, page, lowest);
      }
      if (just_sealed && !newest_seen) take(cell, s.pages - 1, lowest);
    }
    look(s, s, due.digests);
    look_at_tables(s, due.tables, rows_.size() * heads, row * heads);
  }
}

// After the wait; the rows hold the step's token by now.
void DeviceCache::judge_due() {
  for (const auto& [handle, due] : step_->due) {
    Sequence& s = at(handle);
    judge_looks(s, s, due.digests, true);
    judge_tables(s, due.tables, true);
  }
  for (int64_t handle : rows_) {
    Sequence& s = at(handle);
    s.report.damaged_pages += std::exchange(s.damaged_pages, 0);
  }
}

void DeviceCache::judge_looks(Sequence& s, const Sequence& by, std::span<const Look> looks,
                              bool in_step) {
  for (size_t i = 0; i < looks.size(); ++i)
    if (by.seen_host[i] != digest_of(s, looks[i].cell, looks[i].page)) repair(s, looks[i], in_step);
}

void DeviceCache::judge_tables(Sequence& s, std::span<const Look> looks, bool in_step) {
  for (size_t i = 0; i < looks.size() && !s.failed(); ++i) {
    const uint32_t found = s.found_host[i];
    if (found == 0) continue;
    ++s.damaged_pages;
    std::string what;
    if ((found & cuda::kTableDamaged) != 0)
      what = "the block table did not match it; restored from the page";
    if ((found & cuda::kOriginalsDamaged) != 0)
      what += fmt::format(
          "{}originals near the compute were damaged, or pointers to them; "
          "dropped",
          what.empty() ? "" : "; ");
    log_error("{}: {}; {}", name_of(s, looks[i]), what, steps_in_doubt(s, looks[i], in_step));
  }
}

std::string DeviceCache::name_of(const Sequence& s, const Look& look) const {
  const size_t heads = size_t(heads_.count());
  return fmt::format("tier 1: sequence {} layer {} KV head {} page {} (blocks {} to {})", s.id,
                     look.cell / heads, size_t(heads_.begin) + look.cell % heads, look.page,
                     look.page * kPageTiles, (look.page + 1) * kPageTiles - 1);
}

// All pages of s, through the buffers of a sequence that shares them, or of its own.
void DeviceCache::scrub_all(Sequence& s, Sequence& by) {
  const size_t pages = s.decoding ? s.pages : s.prompt->pages, most = size_t(by.look_at.count());
  std::vector<Look> looks;
  // Its tables too, where steps have read them: the buffers are then large enough.
  StepBuffers& b = *step_;
  const bool tables = s.decoding && s.tokens > s.prompt->tokens;
  for (size_t cell = 0; cell < cells() && tables; ++cell)
    b.ladder_host[cell] = ladder_item(s, cell);
  if (tables)
    device_.copy(b.ladder.data(), b.ladder_host.data(), cells() * sizeof(cuda::LadderItem));
  const auto flush = [&] {
    look(s, by, looks);
    if (tables) look_at_tables(s, looks, size_t(heads_.count()), 0);
    device_.synchronize(Deadline::after(kDeviceDeadline));
    judge_looks(s, by, looks, false);
    if (tables) judge_tables(s, looks, false);
    looks.clear();
    group_.alive();
  };
  for (size_t cell = 0; cell < cells(); ++cell)
    for (size_t page = 0; page < pages; ++page) {
      if (is_kept(s, cell, page)) continue;
      looks.push_back({cell, page});
      if (looks.size() == most) flush();
    }
  if (!looks.empty()) flush();
}

uint64_t DeviceCache::close(int64_t sequence) {
  Sequence& s = at(sequence);
  if (s.look_at.count() > 0 && !s.failed()) {
    background_.finish();  // the arena has all sealed blocks
    scrub_all(s, s);
  }
  return std::exchange(s.damaged_pages, 0);
}

// ---- repairing ----------------------------------------------------------------------------------

// Steps of a sequence that may have read a damaged page: those since it was last looked at, or
// since it was sealed. in_step: at the end of a step of this sequence, which looked too.
std::string DeviceCache::steps_in_doubt(const Sequence& s, const Look& look, bool in_step) const {
  const std::string none = "no step has read it since it was sound";
  if (!s.decoding) return none;
  const size_t heads = size_t(heads_.count());
  const uint64_t sealed = (look.page + 1) * uint64_t(kPageTokens);
  const StepWhere before{s.id, int(look.cell / heads), int(heads_.begin) + int(look.cell % heads),
                         uint64_t(s.tokens) + (in_step ? 0 : 1)};
  // The step after the one that sealed it looks at it, whatever is due.
  const uint64_t sound =
      std::max({schedule_.last_due(before, look.page), uint64_t(s.prompt->tokens),
                before.step > sealed + 1 ? sealed + 1 : sealed});
  if (sound >= s.tokens) return none;
  return fmt::format("the steps at {} to {} tokens are in doubt", sound + 1, s.tokens);
}

// Seals a page from its originals again, in place. Rare, so its memory is allocated here.
PageRebuild DeviceCache::rebuild(Sequence& s, const Look& look, const uint16_t* k,
                                 const uint16_t* v) {
  const char* what = "a damaged page's originals";
  const size_t part_bytes = kPageTiles * block_bytes_;
  const size_t bytes = bytes_at(s, look.cell, look.page);
  const DeviceArray<std::byte> rows(device_, 2 * part_bytes, what), fresh(device_, bytes, what);
  const DeviceArray<uint8_t> status(device_, 1, what);
  const DeviceArray<float> notes(device_, 2 * kPageTiles, what);
  device_.copy(rows.data(), k, part_bytes);
  device_.copy(rows.data() + part_bytes, v, part_bytes);
  cuda::SealArgs a;
  a.heads = a.pages = 1;
  a.head_dim = int32_t(config_.head_dim);
  a.kind = kind_at(s, look.cell, look.page);
  a.dtype = options_.dtype;
  a.k = rows.data();
  a.v = rows.data() + part_bytes;
  a.page = fresh.data();
  a.status = status.data();
  a.k_norm = notes.data();
  a.nu = notes.data() + kPageTiles;
  ops_.seal(a);
  std::byte* place = page_at(s, look.cell, look.page);
  std::vector<std::byte> was(bytes), is(bytes);
  uint8_t sealed = 0;
  device_.copy(&sealed, status.data(), sizeof sealed);
  device_.copy(was.data(), place, bytes);
  device_.copy(is.data(), fresh.data(), bytes);
  device_.synchronize(Deadline::after(kDeviceDeadline));
  if (SealStatus(sealed) != SealStatus::Sealed) return PageRebuild::OtherDigest;
  const uint64_t digest = payload_digest(is.data(), bytes);
  const bool same_bytes = was == is;
  uint64_t& as_sealed = digest_of(s, look.cell, look.page);
  if (digest != as_sealed && !same_bytes) return PageRebuild::OtherDigest;
  // As the next look will see it: the memory itself may be at fault.
  const DeviceArray<uint64_t> seen(device_, 1, what);
  uint64_t now = 0;
  device_.copy(place, fresh.data(), bytes);
  ops_.digest_pages({.first = place, .bytes = uint32_t(bytes), .count = 1, .digests = seen.data()});
  device_.copy(&now, seen.data(), sizeof now);
  device_.synchronize(Deadline::after(kDeviceDeadline));
  CERTKV_EXPECT(now == digest, DeviceError,
                "the device's memory does not hold what is written to it: a page of layer {}",
                look.cell / size_t(heads_.count()));
  const bool digest_was_right = digest == as_sealed;
  as_sealed = digest;
  return digest_was_right ? PageRebuild::Done : PageRebuild::DigestWasDamaged;
}

// As CertifiedCache::repair(): counted for all that share the page, logged once, and rebuilt for
// all, or they fail.
void DeviceCache::repair(Sequence& s, const Look& look, bool in_step) {
  using Result = PageRepair::Result;
  std::vector<Sequence*> sharers;
  for (const auto& [handle, other] : sequences_)
    if (other.get() != &s && other->prompt == s.prompt && look.page < s.prompt->pages &&
        !other->dense() && !is_recoded(s, look.cell, look.page) &&
        !is_recoded(*other, look.cell, look.page))
      sharers.push_back(other.get());
  // It may have looked for others too, and failed in the same step.
  const auto has_failed = [](const Sequence* one) { return one->failed(); };
  if (s.failed() && std::all_of(sharers.begin(), sharers.end(), has_failed)) return;
  const size_t heads = size_t(heads_.count()), layer = look.cell / heads;
  const size_t kv_head = size_t(heads_.begin) + look.cell % heads;
  const auto reader = store_ == nullptr ? nullptr : store_->reader();
  SpanList spans;
  spans.add(s.prompt->span);
  spans.add(s.own);
  SpanOriginals originals(reader.get(), options_.read_deadline, spans, uint32_t(layer),
                          uint32_t(kv_head));
  PageOriginals from;
  PageRepair r{Result::Lost, {}};
  if (from.read(format_, look.page, originals))
    r = repair_of(rebuild(s, look, from.k.data(), from.v.data()));
  else
    r.what = from.error;

  const std::string what = fmt::format("{}: {}", name_of(s, look), r.what);
  std::string doubt = steps_in_doubt(s, look, in_step);
  ++s.damaged_pages;
  for (Sequence* other : sharers) {
    ++other->damaged_pages;
    const bool looked =
        in_step && std::find(rows_.begin(), rows_.end(), other->handle) != rows_.end();
    doubt +=
        fmt::format("; sequence {} shares it: {}", other->id, steps_in_doubt(*other, look, looked));
  }
  log_error("{}; {}", what, doubt);
  if (r.result == Result::Repaired) return;
  const ErrorKind kind = r.result == Result::Lost ? ErrorKind::OriginalsLost : ErrorKind::Corrupt;
  sharers.push_back(&s);
  for (Sequence* one : sharers) {
    if (one->failed()) continue;
    one->report.error = kind;
    one->report.error_text = what;
  }
}

}  // namespace certkv
