#include "runtime/certify/scrub.h"

#include <fmt/core.h>

#include "runtime/certify/page_originals.h"

namespace certkv {
namespace {

// Block b's originals near the compute and the table's pointer to them.
bool resident_is_sound(const ScratchCache& cache, uint32_t block, const uint16_t* used) {
  if (cache.resident() == 0) return used == nullptr;
  const uint16_t* held = cache.find(block);
  return (used == nullptr || used == held) && (held == nullptr || cache.sound(block));
}

bool residents_are_sound(const HeadState& state, size_t page) {
  const uint32_t n = uint32_t(state.tier.format().blocks());
  for (uint32_t b = uint32_t(page) * n; b < (uint32_t(page) + 1) * n; ++b) {
    const BlockRef& ref = state.tier.blocks()[b];
    if (ref.page == nullptr) continue;  // served from the page's own originals
    if (!resident_is_sound(state.keys, b, ref.k) || !resident_is_sound(state.values, b, ref.v))
      return false;
  }
  return true;
}

PageFinding look(const HeadState& state, size_t page) {
  const PageState seen = state.tier.check_page(page);
  return {page, seen, !residents_are_sound(state, page)};
}

bool damaged(const PageFinding& f) {
  return f.state != PageState::Sound || f.resident;
}

// Drops what is damaged and lets the pass use what is not.
void restore_residents(HeadState* state, size_t page) {
  const uint32_t n = uint32_t(state->tier.format().blocks());
  for (uint32_t b = uint32_t(page) * n; b < (uint32_t(page) + 1) * n; ++b) {
    const BlockRef ref = state->tier.blocks()[b];
    if (ref.page == nullptr) continue;
    if (!resident_is_sound(state->keys, b, ref.k)) {
      if (state->keys.find(b) != nullptr && !state->keys.sound(b)) state->keys.erase(b);
      state->tier.use_key(b, state->keys.find(b));
    }
    if (!resident_is_sound(state->values, b, ref.v)) {
      if (state->values.find(b) != nullptr && !state->values.sound(b)) state->values.erase(b);
      state->tier.use_value(b, state->values.find(b));
    }
  }
}

PageRepair rebuild(size_t page, HeadState* state, HeadOriginals& originals) {
  PageOriginals from;
  if (!from.read(state->tier.format(), page, originals))
    return {PageRepair::Result::Lost, from.error};
  return repair_of(state->tier.rebuild_page(page, from.k.data(), from.v.data()));
}

}  // namespace

// Irrational steps along layers and heads (the plane's low-discrepancy sequence R2, in units of
// 2^-64) fill the circle of phases evenly for any numbers of layers, heads and pages.
uint64_t ScrubSchedule::phase(const StepWhere& where) const {
  const uint64_t turn =
      uint64_t(where.layer) * 0xc13fa9a902a6328f + uint64_t(where.kv_head) * 0x91e10da5c79e7b1d;
  return uint64_t((static_cast<unsigned __int128>(turn) * period_) >> 64);
}

size_t ScrubSchedule::first_due(const StepWhere& where) const {
  const uint64_t at = where.step % period_, shift = phase(where);
  return size_t(at >= shift ? at - shift : at + period_ - shift);
}

uint64_t ScrubSchedule::last_due(const StepWhere& where, size_t page) const {
  const uint64_t now = where.step % period_, due = (page % period_ + phase(where)) % period_;
  const uint64_t ago = now > due ? now - due : now + period_ - due;  // 1 .. period
  return where.step >= ago ? where.step - ago : 0;
}

void scrub_due(const ScrubSchedule& schedule, const StepWhere& where, const HeadState& state,
               std::vector<PageFinding>* found) {
  if (schedule.period() == 0) return;
  const size_t pages = state.tier.pages();
  const auto check = [&](size_t page) {
    const PageFinding f = look(state, page);
    if (damaged(f)) found->push_back(f);
  };
  size_t page = schedule.first_due(where);
  bool newest_seen = false;
  for (; page < pages; page += size_t(schedule.period())) {
    check(page);
    newest_seen = page + 1 == pages;
  }
  // Sealed by the step before, and not looked at since.
  const bool just_sealed =
      pages > 0 && where.step == pages * uint64_t(state.tier.format().group_tokens);
  if (just_sealed && !newest_seen) check(pages - 1);
}

void scrub_all(const HeadState& state, std::vector<PageFinding>* found) {
  for (size_t page = 0; page < state.tier.pages(); ++page) {
    const PageFinding f = look(state, page);
    if (damaged(f)) found->push_back(f);
  }
}

PageRepair repair_of(PageRebuild rebuilt) {
  using Result = PageRepair::Result;
  switch (rebuilt) {
    case PageRebuild::Done:
      return {Result::Repaired, "its bytes did not match their digest; rebuilt from originals"};
    case PageRebuild::DigestWasDamaged:
      return {Result::Repaired,
              "its digest was damaged, not its bytes; both are as sealed from originals again"};
    case PageRebuild::OtherDigest:
      break;
  }
  return {Result::OtherDigest,
          "its bytes do not match their digest, and neither does what verified originals give"};
}

PageRepair repair_page(const PageFinding& finding, HeadState* state, HeadOriginals& originals) {
  using Result = PageRepair::Result;
  const PageFinding now = look(*state, finding.page);
  PageRepair repair;
  switch (now.state) {
    case PageState::Sound:
      break;
    case PageState::Bytes:
      repair = rebuild(finding.page, state, originals);
      if (repair.result != Result::Repaired) return repair;
      break;
    case PageState::Table:
      state->tier.restore_table(finding.page);
      repair = {Result::Repaired, "the block table did not match it; restored from the page"};
      break;
  }
  if (!residents_are_sound(*state, finding.page)) {
    restore_residents(state, finding.page);
    repair.result = Result::Repaired;
    repair.what += fmt::format(
        "{}originals near the compute were damaged, or pointers to them; "
        "dropped",
        repair.what.empty() ? "" : "; ");
  }
  return repair;
}

}  // namespace certkv
