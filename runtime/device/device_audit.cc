// The device's cache, fourth part: what an audit reads back. A debugging aid: every layer is waited
// for, and no step is captured.
#include "parallel/communicator.h"
#include "runtime/audit/log.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kPageTiles;

namespace {

constexpr auto kDeviceDeadline = std::chrono::seconds(60);

}  // namespace

void DeviceCache::watch(AuditLog* audit) {
  audit_ = audit;
}

template <typename T>
std::vector<T> DeviceCache::read_back(const T* from, size_t count) const {
  std::vector<T> out(count);
  device_.copy(out.data(), from, count * sizeof(T));
  device_.synchronize(Deadline::after(kDeviceDeadline));
  return out;
}

// The new token's originals and the queries of a layer, behind its append.
void DeviceCache::begin_audit(int layer, const float* qkv) {
  StepBuffers& b = *step_;
  if (layer == 0) b.audited.clear();
  // Behind a halt nothing counts; the layer comes again.
  if (agreement_.halted != nullptr) {
    const uint32_t at = read_back(agreement_.halted, 1)[0];
    if (at != 0 && at <= uint32_t(layer)) return;
  }
  const size_t heads = size_t(heads_.count()), d = size_t(config_.head_dim);
  const size_t width = (size_t(config_.heads_per_group()) + 2) * heads * d;
  for (size_t row = 0; row < rows_.size(); ++row) {
    const Sequence& s = at(rows_[row]);
    if (s.failed()) continue;
    StepBuffers::Audited a;
    a.row = row;
    a.layer = layer;
    a.tokens = s.tokens + 1;
    a.q = read_back(qkv + row * width, width - 2 * heads * d);
    const size_t open = s.tokens - s.pages * size_t(cuda::kPageTokens);
    for (size_t h = 0; h < heads; ++h)
      for (size_t part = 0; part < 2; ++part) {
        const size_t cell = size_t(layer) * heads + h;
        const std::byte* rows =
            s.slots.data() + (cell * s.slots_each + size_t(s.open_slot[part])) * block_bytes_;
        const auto one = read_back(reinterpret_cast<const uint16_t*>(rows) + open * d, d);
        std::vector<uint16_t>& to = part == 0 ? a.k : a.v;
        to.insert(to.end(), one.begin(), one.end());
      }
    a.captures.resize(heads);
    b.audited.push_back(std::move(a));
  }
}

// What the layer's last pass of each audited head has left. Before rung 3, whose pass takes the
// place of the others; and at the layer's end.
void DeviceCache::read_audit(bool at_end) {
  StepBuffers& b = *step_;
  const size_t heads = size_t(heads_.count()), d = size_t(config_.head_dim);
  const size_t n = size_t(config_.heads_per_group()), items = rows_.size() * heads;
  for (StepBuffers::Audited& a : b.audited) {
    const Sequence& s = at(rows_[a.row]);
    if (!a.out.empty()) continue;  // of a layer before
    for (size_t h = 0; h < heads; ++h) {
      if (!audit_->chosen(s.id, a.layer, heads_.begin + int64_t(h), a.tokens)) continue;
      const size_t cell = size_t(a.layer) * heads + h;
      AuditCapture& capture = a.captures[h];
      uint32_t which = (1u << n) - 1;
      bool staged = false;
      if (at_end && !capture.heads.empty()) {
        staged = read_back(s.counts.data() + cell, 1)[0].dense > 0;
        if (!staged) continue;
        which = read_back(s.marks.data() + cell * kMarks + kFailing, 1)[0];
      }
      const cuda::PassItem pass =
          read_back(b.pass.data() + size_t(a.layer) * items + a.row * heads + h, 1)[0];
      const PassState state = read_pass(pass, staged);
      for (size_t i = 0; i < n; ++i)
        if ((which >> i & 1) != 0) capture_head(state, int(i), {}, int(i), &capture);
    }
    if (at_end) {
      const cuda::PassItem& first = b.pass_host[size_t(a.layer) * items + a.row * heads];
      a.out = read_back(first.out, heads * n * d);
    }
  }
  group_.alive();
}

// Before the step goes on from a layer that is repeated for some rows: nothing of later layers
// counts, nor of these rows at this layer.
void DeviceCache::repeat_audit(int layer, const uint32_t* rows) {
  const std::vector<uint32_t> repeated = read_back(rows, rows_.size());
  std::vector<StepBuffers::Audited>& audited = step_->audited;
  std::erase_if(audited, [&](const auto& a) { return a.layer > layer; });
  for (StepBuffers::Audited& a : audited) {
    if (a.layer != layer || repeated[a.row] == 0) continue;
    a.captures.assign(size_t(heads_.count()), {});
    a.out.clear();
  }
}

PassState DeviceCache::read_pass(const cuda::PassItem& pass, bool staged) const {
  const size_t pages = size_t(pass.page_count), d = size_t(config_.head_dim);
  const std::vector<cuda::PageEntry> entries = read_back(pass.pages, pages);
  const std::vector<float> open_nu = read_back(pass.open_nu, pages * kPageTiles);
  std::vector<uint32_t> place;
  std::vector<float> nu, eta, vbar;
  for (size_t page = 0; page < pages; ++page) {
    const cuda::PageEntry& entry = entries[page];
    cuda::PageNotesDevice notes;
    if (entry.page != nullptr) {
      const std::byte* at = entry.page + cuda::notes_offset(int(d));
      notes = read_back(reinterpret_cast<const cuda::PageNotesDevice*>(at), 1)[0];
    }
    for (size_t t = 0; t < size_t(entry.tokens + 15) / 16; ++t) {
      const bool coded = entry.page != nullptr;
      place.push_back(uint32_t(page * kPageTiles + t));
      nu.push_back(coded && !staged ? notes.block[t].nu : open_nu[page * kPageTiles + t]);
      eta.push_back(coded && !staged ? notes.block[t].eta : 0);
      vbar.push_back(coded && !staged ? notes.block[t].vbar : nu.back());
    }
  }
  cuda::PassOutput output;
  output.heads = pass.heads;
  output.head_dim = int(d);
  output.groups = (pass.heads + 3) / 4;
  output.blocks = place.size();
  output.tokens = size_t(pass.tokens);
  output.unit = pass.unit;
  const auto records = read_back(pass.records, pages * size_t(output.groups) * cuda::kRecordFloats);
  const auto used = read_back(pass.used, pages * kPageTiles);
  const auto merged =
      read_back(pass.merged, size_t(pass.heads) * size_t(cuda::sums_floats(int(d))));
  output.place = place;
  output.records = records;
  output.used = used;
  output.merged = merged;
  output.nu = nu;
  output.eta = eta;
  output.vbar = vbar;
  PassState state;
  cuda::read_state(output, &state);
  return state;
}

// Behind the step's reports: its records, layer by layer.
void DeviceCache::write_audit() {
  StepBuffers& b = *step_;
  const size_t heads = size_t(heads_.count()), d = size_t(config_.head_dim);
  const size_t width = size_t(config_.heads_per_group()) * d;
  for (int layer = 0; layer < int(config_.layers); ++layer) {
    std::vector<AuditLog::Row> rows;
    for (const StepBuffers::Audited& a : b.audited)
      if (a.layer == layer && !at(rows_[a.row]).failed())
        rows.push_back({at(rows_[a.row]).audit, a.tokens, a.k.data(), a.v.data()});
    audit_->start_layer(step_number_, layer, rows);
    for (const StepBuffers::Audited& a : b.audited) {
      const Sequence& s = at(rows_[a.row]);
      if (a.layer != layer || s.failed()) continue;
      for (size_t h = 0; h < heads; ++h) {
        AuditCapture* capture = audit_->capture(s.audit, int(h));
        if (capture == nullptr) continue;
        *capture = a.captures[h];
        audit_->keep(s.audit, int(h), a.q.data() + h * width, a.out.data() + h * width,
                     s.report.layers[size_t(layer) * heads + h]);
      }
    }
  }
  audit_->end_step();
  b.audited.clear();
}

}  // namespace certkv
