// The device's cache, seventh part: precision classes of its KV heads. SOURCE: method section 5b.
//
// A class is chosen at a decode's fork, by the CPU's own code on the prompt's originals; the
// prompt's pages are then sealed again as what it asks for. `exact` is not served: such a head has
// the dearest codes, and its ladder. Classes are not revised.
#include <algorithm>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "runtime/certify/class_change.h"
#include "runtime/certify/page_originals.h"
#include "runtime/device/device_sequence.h"
#include "runtime/span_originals.h"

namespace certkv {

using cuda::kPageTiles;
using cuda::kPageTokens;

namespace {

constexpr auto kDeviceDeadline = std::chrono::seconds(60);
constexpr const char* kRecodedMemory =
    "tier 1: a prompt's pages in other classes (lower run.max_batch, or choose layout compact)";

}  // namespace

// A cell's sealed originals, and what is made of them.
struct DeviceCache::CellRows {
  std::vector<uint16_t> k, v;  // [pages of the prompt, 64, head_dim]
  int chosen = 0;              // class
  std::string error;           // not empty: the class stays as it is
};

bool DeviceCache::read_rows(const Sequence& s, size_t cell, CellRows* rows) const {
  const size_t heads = size_t(heads_.count()), each = kPageTokens * size_t(config_.head_dim);
  const auto reader = store_ == nullptr ? nullptr : store_->reader();
  SpanList spans;
  spans.add(s.prompt->span);
  spans.add(s.own);
  SpanOriginals originals(reader.get(), options_.read_deadline, spans, uint32_t(cell / heads),
                          uint32_t(heads_.begin) + uint32_t(cell % heads));
  PageOriginals from;
  rows->k.resize(s.prompt->pages * each);
  rows->v.resize(s.prompt->pages * each);
  for (size_t page = 0; page < s.prompt->pages; ++page) {
    if (!from.read(format_, page, originals)) {
      rows->error = from.error;
      return false;
    }
    std::copy(from.k.begin(), from.k.end(), rows->k.begin() + ptrdiff_t(page * each));
    std::copy(from.v.begin(), from.v.end(), rows->v.begin() + ptrdiff_t(page * each));
  }
  return true;
}

namespace {

// Originals that have been read and verified already.
class RowsInMemory : public HeadOriginals {
 public:
  RowsInMemory(std::span<const uint16_t> k, std::span<const uint16_t> v, size_t block)
      : k_(k), v_(v), block_(block) {}
  void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
            std::vector<BlockResult>* results) override {
    results->assign(blocks.size(), {});
    for (size_t i = 0; i < blocks.size(); ++i) {
      const auto from = ptrdiff_t(blocks[i] * block_);
      (*results)[i].status = BlockStatus::Ok;
      std::copy_n(k_.begin() + from, block_, static_cast<uint16_t*>(destinations[i].k));
      std::copy_n(v_.begin() + from, block_, static_cast<uint16_t*>(destinations[i].v));
    }
  }

 private:
  std::span<const uint16_t> k_, v_;
  size_t block_;
};

}  // namespace

// As the CPU's cache, from a tier as the CPU's cache would have it.
void DeviceCache::choose_class_of(const Sequence& s, size_t cell, CellRows* rows) const {
  const size_t heads = size_t(heads_.count()), d = size_t(config_.head_dim);
  const size_t width = size_t(config_.heads_per_group()) * d, head = cell % heads;
  const Prompt& p = *s.prompt;
  const std::vector<float>& all = p.last_q[cell / heads];
  std::vector<float> q;  // [queries, heads of the group, head_dim] of this KV head
  for (size_t row = 0; row * heads * width < all.size(); ++row) {
    const auto first = all.begin() + ptrdiff_t((row * heads + head) * width);
    q.insert(q.end(), first, first + ptrdiff_t(width));
  }
  HeadState state(DeviceTier(classes_[0], options_.dtype, std::make_shared<TierAccount>()),
                  size_t(options_.scratch.key_blocks / config_.kv_heads),
                  size_t(options_.scratch.value_blocks / config_.kv_heads));
  state.precision.formats = &classes_;
  state.tier.append(rows->k.data(), rows->v.data(), p.pages * kPageTokens, {});
  state.tier.append(p.open_k[cell].data(), p.open_v[cell].data(), p.open_k[cell].size() / d, {});
  RowsInMemory originals(rows->k, rows->v, 16 * d);
  const ClassChoice choice =
      choose_class(s.rules, int(config_.heads_per_group()), q, &state, originals);
  if (!choice.measured) rows->error = choice.error;
  rows->chosen = std::min(choice.number, kExactClass - 1);
}

// A layer at a time: its originals are held meanwhile.
void DeviceCache::choose_classes(Sequence* s) {
  const size_t heads = size_t(heads_.count());
  if (s->prompt->pages == 0 || s->prompt->last_q.empty()) return;
  for (size_t layer = 0; layer < size_t(config_.layers); ++layer) {
    std::vector<CellRows> rows(heads);
    pool_.parallel_for(heads, [&](size_t h) {
      if (read_rows(*s, layer * heads + h, &rows[h]))
        choose_class_of(*s, layer * heads + h, &rows[h]);
      group_.alive();
    });
    for (size_t h = 0; h < heads; ++h) {
      const size_t cell = layer * heads + h;
      if (rows[h].error.empty() && rows[h].chosen > 0 && !recode(s, cell, rows[h]))
        rows[h].error = "a page cannot be quantised as the class asks";
      if (!rows[h].error.empty())
        log_warning("sequence {} layer {} KV head {} stays in class {}: {}", s->id, layer,
                    size_t(heads_.begin) + h, class_label(0), rows[h].error);
    }
  }
}

// The prompt's pages of a cell as those of another class; false, and nothing has changed, where one
// cannot be quantised that was.
bool DeviceCache::recode(Sequence* s, size_t cell, const CellRows& rows) {
  const size_t pages = s->prompt->pages, each = kPageTokens * size_t(config_.head_dim) * 2;
  const auto kind = cuda::PageKind(rows.chosen);
  static_assert(int(cuda::PageKind::K8V4) == 0 && int(cuda::PageKind::K8V8) == 1 &&
                int(cuda::PageKind::K12V8) == 2 && kExactClass == 3);
  const size_t bytes = cuda::page_layout(int(config_.head_dim), kind).page_bytes();
  const DeviceArray<std::byte> k(device_, pages * each, kRecodedMemory),
      v(device_, pages * each, kRecodedMemory);
  Sequence::Recoded made{{device_, pages * bytes, kRecodedMemory}, {}};
  const DeviceArray<uint8_t> status(device_, pages, kRecodedMemory);
  const DeviceArray<float> notes(device_, 2 * pages * kPageTiles, kRecodedMemory);
  device_.copy(k.data(), rows.k.data(), k.bytes());
  device_.copy(v.data(), rows.v.data(), v.bytes());
  cuda::SealArgs a;
  a.heads = 1;
  a.pages = int32_t(pages);
  a.head_dim = int32_t(config_.head_dim);
  a.kind = kind;
  a.dtype = options_.dtype;
  a.k = k.data();
  a.v = v.data();
  a.rows_of_page = each;
  a.page = made.page.data();
  a.page_of_page = bytes;
  a.status = status.data();
  a.k_norm = notes.data();
  a.nu = notes.data() + pages * kPageTiles;
  a.notes_of_page = kPageTiles * sizeof(float);
  ops_.seal(a);
  std::vector<uint8_t> sealed(pages);
  device_.copy(sealed.data(), status.data(), pages);
  if (schedule_.period() > 0) {
    const DeviceArray<uint64_t> digests(device_, pages, kRecodedMemory);
    ops_.digest_pages({.first = made.page.data(),
                       .row_stride = bytes,
                       .bytes = uint32_t(bytes),
                       .count = int32_t(pages),
                       .digests = digests.data()});
    made.digests.resize(pages);
    device_.copy(made.digests.data(), digests.data(), digests.bytes());
    device_.synchronize(Deadline::after(kDeviceDeadline));
  }
  device_.synchronize(Deadline::after(kDeviceDeadline));
  for (size_t page = 0; page < pages; ++page)  // what is kept as originals stays so
    if (SealStatus(sealed[page]) != SealStatus::Sealed && !is_kept(*s, cell, page)) return false;
  s->kinds[cell] = kind;
  s->recoded[cell] = std::move(made);
  log_debug("sequence {} layer {} KV head {}: class {}", s->id, cell / size_t(heads_.count()),
            size_t(heads_.begin) + cell % size_t(heads_.count()), class_label(rows.chosen));
  return true;
}

}  // namespace certkv
