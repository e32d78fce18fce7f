#include "runtime/certify/class_change.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/quantize.h"
#include "runtime/certify/page_originals.h"

namespace certkv {
namespace {

constexpr size_t kSamplePages = 8;  // spread evenly over the prompt
// F is learned with memory: it comes to hold about as many times what a few queries ask for.
constexpr double kMemory = 2;

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};
using PageBytes = std::unique_ptr<std::byte, Free>;

PageBytes page_bytes(const PageFormat& f) {
  PageBytes p(static_cast<std::byte*>(std::aligned_alloc(64, (f.page_bytes + 63) / 64 * 64)));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// Originals near the compute of blocks that have no codes any more are the page's own.
void drop_unquantised(HeadState* state) {
  for (ScratchCache* cache : {&state->keys, &state->values})
    for (const uint32_t b : cache->blocks())
      if (!state->tier.is_quantised(b)) cache->erase(b);
}

}  // namespace

bool measure_classes(std::span<const QueryGroup> queries, HeadState* state,
                     HeadOriginals& originals, std::string* error) {
  const ClassFormats& formats = *state->precision.formats;
  // Without queries: one that asks of all channels alike.
  const std::vector<float> flat(size_t(state->tier.format().head_dim), 1.0f);
  const QueryGroup even = make_query_group(1, state->tier.format().head_dim, flat.data());
  if (queries.empty()) queries = {&even, 1};
  const DeviceTier& tier = state->tier;
  std::array<double, kExactClass> key{}, value{};
  std::array<PageBytes, kExactClass> pages;
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = page_bytes(*formats[i]);
  PageOriginals from;
  const size_t samples = std::min(kSamplePages, tier.pages());
  thread_local BlockTerms terms;
  for (size_t sample = 0; sample < samples; ++sample) {
    const size_t page = sample * tier.pages() / samples;
    if (!tier.is_quantised(page * size_t(tier.format().blocks()))) continue;
    if (!from.read(tier.format(), page, originals)) {
      *error = from.error;
      return false;
    }
    bool sealed = true;
    for (size_t i = 0; i < pages.size(); ++i)
      sealed = sealed && seal_page(*formats[i], tier.dtype(), from.k.data(), from.v.data(),
                                   pages[i].get()) == SealStatus::Sealed;
    if (!sealed) continue;
    for (size_t i = 0; i < pages.size(); ++i) {
      const PageFormat& f = *formats[i];
      for (int b = 0; b < f.blocks(); ++b) {
        const BlockAnnotations& note = page_annotations(f, pages[i].get(), b);
        value[i] += double(note.eta);
        const BlockRef ref{.page = pages[i].get(),
                           .index = int16_t(b),
                           .tokens = int16_t(f.block_tokens),
                           .nu = note.nu,
                           .k_norm = note.k_norm};
        for (const QueryGroup& q : queries) {
          std::fill_n(terms.ref, q.heads, 0.0f);
          block_terms({&f, tier.dtype()}, q, ref, 1, true, &terms);
          for (int h = 0; h < q.heads; ++h) key[i] += double(terms.score_bound[h]);
        }
      }
    }
  }
  ClassRatios& ratios = state->precision.ratios;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (key[0] > 0) ratios.key[i] = key[i] / key[0];
    if (value[0] > 0) ratios.value[i] = value[i] / value[0];
  }
  state->precision.measured = true;
  return true;
}

ClassChoice choose_class(const StepRules& rules, int heads, std::span<const float> q,
                         HeadState* state, HeadOriginals& originals) {
  ClassChoice choice;
  const DeviceTier& tier = state->tier;
  const int d = tier.format().head_dim;
  const size_t width = size_t(heads) * size_t(d), rows = q.size() / width;
  std::vector<QueryGroup> queries;
  for (size_t i = 0; i < rows; ++i)
    queries.push_back(make_query_group(heads, d, q.data() + i * width));
  choice.measured = measure_classes(queries, state, originals, &choice.error);
  if (!choice.measured || rows == 0) return choice;

  const AttendContext context{&tier.format(), tier.dtype()};
  ClassForecast forecast(*state);
  PassState pass;
  std::vector<float> out(static_cast<size_t>(d));
  std::vector<Certificate> certificates(static_cast<size_t>(heads));
  for (const QueryGroup& query : queries) {
    attend_pass(context, query, tier.blocks(), &pass);
    for (int h = 0; h < heads; ++h) {
      finish_output(pass, h, out.data());
      certificates[size_t(h)] = certify(pass, h, {}, out.data());
    }
    forecast.add(rules, state->precision.ratios, 0, tier.blocks(), pass, certificates);
  }
  std::array<double, kClasses> bytes = forecast.bytes();
  for (int i = 0; i < kClasses; ++i)
    bytes[size_t(i)] = forecast.base(i) + kMemory * (bytes[size_t(i)] - forecast.base(i));
  choice.number = cheapest_class(bytes);
  return choice;
}

ReencodeResult reencode(size_t pages, HeadState* state, HeadOriginals& originals,
                        std::string* error) {
  HeadClass& precision = state->precision;
  DeviceTier& tier = state->tier;
  if (precision.next == kExactClass) {  // served from the store: the pages stay as they are
    precision.now = kExactClass;
    for (ScratchCache* cache : {&state->keys, &state->values})
      for (const uint32_t b : cache->blocks()) cache->erase(b);
    for (size_t b = 0; b < tier.sealed_blocks(); ++b) {
      if (!tier.is_quantised(b)) continue;
      tier.use_key(b, nullptr);
      tier.use_value(b, nullptr);
    }
    return ReencodeResult::Adopted;
  }
  const auto& format = (*precision.formats)[size_t(precision.next)];
  if (format->layout.name == tier.format().layout.name) {  // back from `exact`
    precision.now = precision.next;
    return ReencodeResult::Adopted;
  }
  if (!tier.resealing()) tier.begin_reseal(format);
  PageOriginals from;
  for (; pages > 0 && tier.resealed() < tier.pages(); --pages) {
    const size_t page = tier.resealed();
    const bool have = from.read(tier.format(), page, originals);
    if (!have || !tier.reseal_next(from.k.data(), from.v.data())) {
      *error = have ? "verified originals are not finite" : from.error;
      tier.cancel_reseal();
      precision.next = precision.now;
      return ReencodeResult::Lost;
    }
  }
  if (tier.resealed() < tier.pages()) return ReencodeResult::Going;
  tier.adopt_reseal();
  drop_unquantised(state);
  precision.now = precision.next;
  return ReencodeResult::Adopted;
}

}  // namespace certkv
