#include "tests/support/device_pass.h"

#include <algorithm>
#include <cmath>
#include <string_view>

namespace certkv {
namespace {

using cuda::kPageTiles;

float unit_for(std::span<const BlockRef> blocks) {
  float largest = 0;
  for (const BlockRef& b : blocks) largest = std::max(largest, b.nu);
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0f, std::clamp(-(std::ilogb(largest) + 1), -120, 120));
}

template <typename T>
T* put(PassBackend& backend, const std::vector<T>& v) {
  return reinterpret_cast<T*>(backend.put(v.data(), v.size() * sizeof(T)));
}
template <typename T>
void get(PassBackend& backend, const T* at, std::vector<T>* v) {
  backend.get(reinterpret_cast<const std::byte*>(at), v->data(), v->size() * sizeof(T));
}

}  // namespace

DevicePass::DevicePass(const AttendContext& context, const QueryGroup& q,
                       std::span<const BlockRef> blocks, const DevicePassOptions& options) {
  const PageFormat& f = *context.format;
  const cuda::PageKind kind = cuda::page_kind_of(f);
  const auto backend = make_pass_backend();
  const int d = f.head_dim;
  const size_t n = blocks.size();
  const size_t page_bytes = cuda::page_layout(d, kind).page_bytes(), row_bytes = size_t(d) * 2;
  // Pages as they are, and what has no codes in entries of 1, 4, 1, 4, ... blocks.
  std::vector<cuda::PageEntry> entries;
  std::vector<uint32_t> place;
  for (size_t b = 0; b < n;) {
    const bool coded = blocks[b].page != nullptr;
    const size_t wanted = coded || entries.size() % 2 == 1 ? kPageTiles : 1;
    size_t t = 0;
    for (; t < wanted && b < n && (blocks[b].page != nullptr) == coded; ++t, ++b)
      place.push_back(uint32_t(entries.size() * kPageTiles + t));
    entries.emplace_back();
  }
  const size_t pages = entries.size();
  std::vector<int32_t> key_slot(pages * kPageTiles, -1), value_slot(key_slot);
  std::vector<float> k_norm(pages * kPageTiles, 0.0f), nu, eta, vbar;
  std::vector<std::byte> slots, page(page_bytes);
  size_t tokens = 0;
  int32_t slot_count = 0;
  const auto slot = [&](const uint16_t* rows, int valid) {
    const size_t at = slots.size();
    slots.resize(at + 16 * row_bytes, std::byte(0xff));  // NaN beyond the last token
    std::memcpy(slots.data() + at, rows, size_t(valid) * row_bytes);
    return slot_count++;
  };
  const cuda::PageNotesDevice* notes = nullptr;
  for (size_t b = 0; b < n; ++b) {
    const BlockRef& block = blocks[b];
    const size_t at = place[b], t = at % kPageTiles;
    cuda::PageEntry& entry = entries[at / kPageTiles];
    if (t == 0) {
      notes = nullptr;
      if (block.page != nullptr) {
        cuda::convert_page(f, block.page, page.data());
        if (options.damage) options.damage(page.data());
        entry.page = backend->put(page.data(), page_bytes);
        notes = &cuda::device_notes(d, page.data());
      }
    }
    entry.tokens += block.tokens;
    tokens += size_t(block.tokens);
    k_norm[at] = block.k_norm;
    if (block.k != nullptr) entry.wants |= 1u << t;
    if (block.v != nullptr) entry.wants |= 16u << t;
    if (options.missing_slot != int(b)) {
      if (block.k != nullptr) key_slot[at] = slot(block.k, block.tokens);
      if (block.v != nullptr) value_slot[at] = slot(block.v, block.tokens);
    }
    nu.push_back(notes != nullptr ? notes->block[t].nu : block.nu);
    eta.push_back(notes != nullptr ? notes->block[t].eta : 0);
    vbar.push_back(notes != nullptr ? notes->block[t].vbar : block.nu);
  }

  const cuda::PassShape shape{
      .head_dim = d,
      .heads = q.heads,
      .items = 1,
      .splits =
          int((pages + size_t(options.pages_per_split) - 1) / size_t(options.pages_per_split)),
      .warps = options.warps > 0 ? options.warps : cuda::warp_counts(kind).most,
      .kind = kind,
      .certificate = options.certificate};
  const size_t sums = size_t(cuda::sums_floats(d)), heads = size_t(q.heads);
  // Poison where the pass must write.
  std::vector<float> records(pages * size_t(shape.groups()) * cuda::kRecordFloats, NAN);
  std::vector<float> splits(size_t(shape.splits) * heads * sums, NAN);
  std::vector<double> merged(heads * sums, NAN);
  std::vector<uint8_t> used(pages * kPageTiles, 0xff);
  std::vector<uint32_t> flag(1, 0);
  out.assign(heads * size_t(d), NAN);
  const std::vector<float> norm(q.norm, q.norm + heads);

  cuda::PassItem item;
  item.pages = put(*backend, entries);
  item.page_count = int32_t(pages);
  item.heads = q.heads;
  item.scaled = put(*backend, q.scaled);
  item.norm = put(*backend, norm);
  item.key_slot = put(*backend, key_slot);
  item.value_slot = put(*backend, value_slot);
  item.k_norm = put(*backend, k_norm);
  item.unit = unit_for(blocks);
  item.records = put(*backend, records);
  item.used = put(*backend, used);
  item.splits = put(*backend, splits);
  item.merged = put(*backend, merged);
  item.out = put(*backend, out);
  item.flags = put(*backend, flag);
  std::vector<float> open_nu(pages * kPageTiles, NAN);
  for (size_t b = 0; b < n; ++b)
    if (blocks[b].page == nullptr) open_nu[place[b]] = blocks[b].nu;
  item.open_nu = put(*backend, open_nu);
  std::vector<uint32_t> marks(3, 0);
  if (options.certificate) {
    judged.assign(heads, {});
    item.relative = 1;
    item.tolerance = kTolerance;
    item.tokens = int64_t(tokens);
    item.judged = put(*backend, judged);
    item.failing = put(*backend, marks);
    item.any_failing = item.failing + 1;
    item.climbed = item.failing + 2;
  }
  item.slots = slots.empty() ? nullptr : put(*backend, slots);
  item.slot_count = slot_count;
  const std::vector<cuda::PassItem> items{item};
  cuda::PassArgs args;
  args.items = put(*backend, items);
  args.pages_per_split = options.pages_per_split;
  args.dtype = context.dtype;
  backend->run(args, shape);

  get(*backend, item.records, &records);
  get(*backend, item.used, &used);
  get(*backend, item.merged, &merged);
  get(*backend, item.out, &out);
  get(*backend, item.flags, &flag);
  flags = flag[0];
  if (options.certificate) {
    get(*backend, item.judged, &judged);
    get(*backend, item.failing, &marks);
    failing = marks[0];
    any_failing = marks[1];
  }
  cuda::read_state({.heads = q.heads,
                    .head_dim = d,
                    .groups = shape.groups(),
                    .blocks = n,
                    .tokens = tokens,
                    .certificate = options.certificate,
                    .unit = item.unit,
                    .place = place,
                    .records = records,
                    .used = used,
                    .merged = merged,
                    .nu = nu,
                    .eta = eta,
                    .vbar = vbar},
                   &state);
}

std::vector<Certificate> DevicePass::judge() const {
  std::vector<Certificate> closed;
  for (int h = 0; h < state.heads; ++h)
    closed.push_back(certify(state, h, {}, out.data() + size_t(h) * size_t(state.head_dim)));
  return closed;
}

// Both close the same sums. The device takes the blocks' in FP32 beside its others, which is at
// most kSumUnits roundings (kernels/METHOD.md, 12b) and 2^-21 for exp(-Delta) off what the host
// adds up in double from the records, and moves them by 2^-17 to the safe side; a bound has two of
// them as factors, and c of original keys is within 2^-19. Where the sum under E2's root cancels,
// the rounding of its term s ||O||^2 counts by itself. The device counts a page whose weights it
// has flushed as nothing, the host as what it weighs: less than kExpAbsolute a token, which E_acc
// charges on both sides.
constexpr double kSumUnits = 111;
constexpr double kApart = 0x1.1p-15;
static_assert(2 * (kSumUnits * 0x1p-24 + 0x1p-17) + 0x1p-19 + 0x1p-20 < kApart);

testing::AssertionResult DevicePass::judged_alike() const {
  const std::vector<Certificate> host = judge();
  for (size_t h = 0; h < host.size(); ++h) {
    const Certificate &a = judged[h], &b = host[h];
    const std::pair<const char*, std::pair<double, double>> pairs[] = {
        {"bound", {a.bound, b.bound}},       {"S", {a.s, b.s}},
        {"S_lo", {a.s_lo, b.s_lo}},          {"den", {a.den, b.den}},
        {"E_key", {a.e_key, b.e_key}},       {"E_val", {a.e_val, b.e_val}},
        {"||O||", {a.out_norm, b.out_norm}}, {"E_acc", {a.e_acc, b.e_acc}}};
    const double of_s = kSumUnits * 0x1p-24 * b.s_term * b.out_norm * b.out_norm;
    const double root = std::sqrt(b.s_term) * (std::sqrt(b.r_term * b.r_term + of_s) - b.r_term);
    double weighed = 0;  // c_b and 1, of all tokens
    for (size_t block = 0; block < state.blocks; ++block)
      weighed += 2 * kMaxBlockTokens * (1 + double(state.c[state.at(int(h), block)]));
    const double most = state.nu_max + state.eta_max + b.out_norm;
    const double flushed = weighed * double(kExpAbsolute) * (1 + most) / state.head[h].l / b.den;
    for (const auto& [name, x] : pairs) {
      if (!std::isfinite(b.bound) && !std::isfinite(a.bound)) continue;
      const bool has_key = std::string_view(name) == "bound" || std::string_view(name) == "E_key";
      const double own = (has_key ? root / b.den : 0) + flushed;
      if (!(std::abs(x.first - x.second) <= kApart * std::abs(x.second) + own))
        return testing::AssertionFailure() << "head " << h << ": " << name << " is " << x.first
                                           << " on the device, " << x.second << " on the host";
    }
    const bool failed = (failing >> h & 1) != 0;
    if (failed == within_tolerance(a, true, kTolerance))
      return testing::AssertionFailure() << "head " << h << ": bound " << a.bound << ", S_lo "
                                         << a.s_lo << ", but failing is " << failing;
  }
  if ((failing != 0) != (any_failing != 0))
    return testing::AssertionFailure() << "failing " << failing << ", any " << any_failing;
  return testing::AssertionSuccess();
}

}  // namespace certkv
