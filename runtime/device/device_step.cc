// The device's cache, second part: the steps of its sequences.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "runtime/certify/learn.h"
#include "runtime/device/device_sequence.h"

namespace certkv {

using cuda::kKeys;
using cuda::kPageTiles;
using cuda::kPageTokens;
using cuda::kValues;

namespace {

// Learning of two layers may be under way, so there are records of two; the ladder has a branch of
// its own.
constexpr size_t kLearning = 2;
constexpr int kLadderBranch = 2;
static_assert(kLadderBranch < cuda::Device::kBranches);
constexpr auto kDeviceDeadline = std::chrono::seconds(60);

cuda::OriginalsRun run_of(const OriginalsSpan& span, const std::byte* first, uint32_t layer,
                          uint32_t kv_head) {
  cuda::OriginalsRun run;
  if (span.empty()) return run;
  const ReserveRequest& r = span.request();
  run.slots = first;
  run.blocks = int32_t(r.blocks);
  BlockId id = span.id(layer, kv_head, r.first_block);
  id.block = 0;
  static_assert(sizeof id == sizeof run.id);
  std::memcpy(run.id, &id, sizeof id);
  return run;
}

// Of policy paper, what its kernels are given.
std::vector<double> figures_of(const StepRules& rules) {
  const PaperOptions& o = rules.paper;
  return {o.tau_cov,
          o.expand_tail,
          o.v_tol,
          double(o.k_min),
          double(o.k_max),
          o.value_rule == "greedy" ? 1.0 : 0.0,
          double(rules.ranking())};
}

}  // namespace

cuda::SlotShape DeviceCache::slot_shape() const {
  return {uint32_t(block_.slot_bytes()),
          uint32_t(block_.k_offset()),
          uint32_t(block_.v_offset()),
          {uint32_t(block_.dtype) | 16u << 16, 16u | uint32_t(block_.head_dim) << 16}};
}

cuda::LadderItem DeviceCache::ladder_item(const Sequence& s, size_t cell) const {
  const size_t heads = size_t(heads_.count()), entry = cell * s.capacity;
  const uint32_t layer = uint32_t(cell / heads);
  const uint32_t kv_head = uint32_t(heads_.begin) + uint32_t(cell % heads);
  uint32_t* marks = s.marks.data() + cell * kMarks;
  cuda::LadderItem l;
  int32_t first_slot = 2 * kPageTiles;
  for (int part = 0; part < 2 && !s.dense(); ++part) {
    const size_t q = size_t(s.quota[part]);
    l.block_of[part] = s.block_of[part].data() + cell * q;
    l.score[part] = s.score[part].data() + cell * q;
    l.free_slots[part] = s.free_slots[part].data() + cell * q;
    l.first_slot[part] = first_slot;
    l.quota[part] = s.quota[part];
    first_slot += s.quota[part];
  }
  l.free_count = s.free_count.data() + cell * 2;
  l.slots = s.slots.data() + cell * s.slots_each * block_bytes_;
  l.pages = s.entries.data() + entry;
  l.slot_of[kKeys] = s.slot_of[kKeys].data() + entry * kPageTiles;
  l.slot_of[kValues] = s.slot_of[kValues].data() + entry * kPageTiles;
  l.coded_pages = s.dense() ? 0 : int32_t(s.pages);
  const OriginalsSpan* spans[2] = {&s.prompt->span, &s.own};
  for (size_t i = 0; i < 2; ++i)
    if (!spans[i]->empty())
      l.run[i] = run_of(*spans[i], on_device(spans[i]->run(layer, kv_head)), layer, kv_head);
  l.again = marks + kAgain;
  l.candidate = s.candidate.data() + cell * size_t(config_.heads_per_group());
  l.counts = s.counts.data() + cell;
  l.exploration_seed = counter_seed(s.rules.exploration_seed,
                                    {s.id, int(layer), int(kv_head), uint64_t(s.tokens) + 1});
  return l;
}

void DeviceCache::begin_rows(std::span<const int64_t> sequences, float* out) {
  background_.finish();  // the arena has all sealed blocks: the step may read them
  rows_.assign(sequences.begin(), sequences.end());
  reports_enqueued_ = false;
  StepBuffers& b = *step_;
  const size_t layers = size_t(config_.layers), heads = size_t(heads_.count());
  const size_t d = size_t(config_.head_dim), n = size_t(config_.heads_per_group());
  const size_t groups = (n + 3) / 4, sums = size_t(cuda::sums_floats(int(d)));
  const size_t items = rows_.size() * heads, all = layers * items;
  size_t pages = 1, quotas = 1, staged = 0;
  b.most_splits[0] = b.most_splits[1] = 1;
  std::vector<std::array<cuda::SplitPlan, 2>> plans;  // [rows, layers, kinds]
  constexpr size_t kKinds = std::size(cuda::kPageKinds);
  b.kinds.assign(layers, {});
  int largest = 1;
  for (int64_t handle : rows_) {
    const Sequence& s = at(handle);
    CERTKV_EXPECT(s.decoding && s.rules.policy == at(rows_[0]).rules.policy, InvalidArgument,
                  "a step decodes sequences of one policy");
    const size_t open = s.tokens - s.pages * kPageTokens;
    const int entries = int(s.pages + (open + 16) / 16);
    pages = std::max(pages, s.capacity);
    quotas += heads * size_t(s.quota[0] + s.quota[1]);
    if (climbs(s.rules.policy)) staged = std::max(staged, s.capacity);
    // By the sequence's own length alone, so that its bits do not depend on its neighbours; a pass
    // that is repeated for a few KV heads spreads each over the whole device.
    // Each kind has a launch of its own, which the layer's KV heads of that kind share.
    for (size_t layer = 0; layer < layers; ++layer)
      for (const cuda::PageKind kind : cuda::kPageKinds) {
        const auto first = s.kinds.begin() + ptrdiff_t(layer * heads);
        const auto of = std::count(first, first + ptrdiff_t(heads), kind);
        plans.emplace_back();
        if (of == 0) continue;
        if (std::ranges::count(b.kinds[layer], kind) == 0) b.kinds[layer].push_back(kind);
        const auto plan = [&](int sharing) {
          return cuda::plan_splits(device_.shape(), int(d), int(groups), kind, entries, sharing);
        };
        plans.back() = {plan(int(of)), plan(1)};
        for (size_t i = 0; i < 2; ++i)
          b.most_splits[i] = std::max(b.most_splits[i], plans.back()[i].splits);
        largest = std::max(largest, plans.back()[1].pages_per_split);
      }
  }
  for (auto& of_layer : b.kinds) std::ranges::sort(of_layer);
  const auto grow = [&](auto* array, cuda::Device& device, size_t count, const char* what) {
    b.grown += grow_array(array, device, count, what);
  };
  const size_t splits = size_t(std::max(b.most_splits[0], b.most_splits[1]));
  grow(&b.pass_host, device_, all, "items of a step");
  grow(&b.append_host, device_, all, "items of a step");
  grow(&b.ladder_host, device_, all, "items of a step");
  grow(&b.pass, device_, all, "items of a step");
  grow(&b.append, device_, all, "items of a step");
  grow(&b.ladder, device_, all, "items of a step");
  grow(&b.scaled, device_, items * n * d, "queries");
  grow(&b.norm, device_, items * n, "queries");
  const size_t records = items * pages * groups * cuda::kRecordFloats, merged = items * n * sums;
  grow(&b.records, device_, kLearning * records, "records of a pass");
  const size_t used = items * pages * kPageTiles;
  grow(&b.used, device_, kLearning * used, "records of a pass");
  grow(&b.split_sums, device_, items * splits * n * sums, "sums of a pass");
  grow(&b.merged, device_, kLearning * merged, "sums of a pass");
  const bool paper = at(rows_[0]).rules.policy == Policy::Paper;
  if (paper) grow(&b.scored, device_, items * pages * groups * 16, "masses of a first pass");
  if (ranking() > 0) grow(&b.undecided, device_, items * pages, "blocks that ranking waits for");
  grow(&b.list, device_, quotas, "list of blocks to page in");
  grow(&b.listed, device_, items, "list of blocks to page in");
  if (at(rows_[0]).rules.prefetches()) {
    grow(&b.prefetch_list, device_, quotas, "list of blocks to page in");
    grow(&b.prefetch_listed, device_, items, "list of blocks to page in");
  }
  grow(&b.words, device_, kWords + items, "marks of a step");
  grow(&b.dense, device_, items, "list of heads for rung 3");
  if (by_library()) {
    grow(&b.lengths_host, device_, rows_.size(), "lengths");
    grow(&b.lengths, device_, rows_.size(), "lengths");
    grow(&b.largest, device_, all * 2, "notes of originals");
    grow(&b.q16, device_, items * n * d, "queries");
    grow(&b.out16, device_, items * n * d, "outputs of dense attention");
  }
  reserve_staging(staged);
  b.staged_splits = std::min(int(b.staged_pages) / largest, b.most_splits[1]);

  const StepRules& rules = at(rows_[0]).rules;
  const StepBuffers::Shape shape{
      rows_.size(),
      {b.most_splits[0], b.most_splits[1]},
      int(rules.policy),
      rules.ladder.max_rounds,
      {rules.ladder.value_share, rules.ladder.max_share, rules.ladder.prefetch},
      b.staged_splits,
      paper ? figures_of(rules) : std::vector<double>{double(ranking()), exploration()},
      b.grown,
      b.kinds,
      by_library() ? rows_ : std::vector<int64_t>{}};
  // An audit waits within the step: none is like another.
  shape_ = audit_ == nullptr ? b.name_of(shape) : ++b.names;

  for (size_t row = 0; row < rows_.size(); ++row) {
    Sequence& s = at(rows_[row]);
    const size_t open = s.tokens - s.pages * kPageTokens;
    // Policies that hold no head to its tolerance while the step is under way: every number fits.
    const bool any_fits = s.dense() || paper;
    device_.fill(s.marks.data(), 0, s.marks.bytes());
    device_.fill(s.counts.data(), 0, s.counts.bytes());
    for (size_t layer = 0; layer < layers; ++layer)
      for (size_t h = 0; h < heads; ++h) {
        const size_t cell = layer * heads + h, item = row * heads + h, at = layer * items + item;
        const size_t entry = cell * s.capacity;
        std::byte* slots = s.slots.data() + cell * s.slots_each * block_bytes_;
        uint32_t* marks = s.marks.data() + cell * kMarks;
        cuda::PassItem p;
        p.pages = s.entries.data() + entry;
        p.page_count = int32_t(s.pages + (open + 16) / 16);
        p.heads = int32_t(n);
        p.kind = s.kinds[cell];
        const auto& plan = plans[(row * layers + layer) * kKinds + size_t(p.kind)];
        p.pages_per_split = plan[0].pages_per_split;
        p.repeated_per_split = plan[1].pages_per_split;
        p.scaled = b.scaled.data() + item * n * d;
        p.norm = b.norm.data() + item * n;
        p.key_slot = s.slot_of[kKeys].data() + entry * kPageTiles;
        p.value_slot = s.slot_of[kValues].data() + entry * kPageTiles;
        p.k_norm = s.k_norm.data() + entry * kPageTiles;
        p.open_nu = s.open_nu.data() + entry * kPageTiles;
        // Of two layers, one beside the other: what the first one's learning and prefetch read.
        const size_t branch = layer % kLearning;
        p.records =
            b.records.data() + branch * records + item * pages * groups * cuda::kRecordFloats;
        p.used = b.used.data() + branch * used + item * pages * kPageTiles;
        p.splits = b.split_sums.data() + item * splits * n * sums;
        p.merged = b.merged.data() + branch * merged + item * n * sums;
        p.out = out + item * n * d;
        p.flags = marks + kFlags;
        p.slots = slots;
        p.slot_count = int32_t(s.slots.bytes() / block_bytes_ - cell * s.slots_each);
        p.relative = s.rules.tolerance.is_relative && !any_fits;
        p.tolerance = any_fits ? std::numeric_limits<double>::infinity() : s.rules.tolerance.value;
        p.tokens = int64_t(s.tokens) + 1;
        p.judged = s.judged.data() + cell * n;
        p.failing = marks + kFailing;
        p.any_failing = b.words.data() + kAnyFailing;
        p.again = marks + kAgain;
        p.climbed = marks + kClimbed;
        b.pass_host[at] = p;

        cuda::AppendItem a;
        a.keys = slots + size_t(s.open_slot[kKeys]) * block_bytes_;
        a.values = slots + size_t(s.open_slot[kValues]) * block_bytes_;
        a.entries = s.entries.data() + entry + s.pages;
        a.k_norm = s.k_norm.data() + (entry + s.pages) * kPageTiles;
        a.open_nu = s.open_nu.data() + (entry + s.pages) * kPageTiles;
        a.sealed_nu = s.sealed_nu[cell];
        a.open = int32_t(open);
        a.scaled = b.scaled.data() + item * n * d;
        a.norm = b.norm.data() + item * n;
        b.append_host[at] = a;

        b.ladder_host[at] = ladder_item(s, cell);
      }
  }
  device_.copy(b.pass.data(), b.pass_host.data(), all * sizeof(cuda::PassItem));
  device_.copy(b.append.data(), b.append_host.data(), all * sizeof(cuda::AppendItem));
  device_.copy(b.ladder.data(), b.ladder_host.data(), all * sizeof(cuda::LadderItem));
  if (by_library()) begin_library();
}

void DeviceCache::decode(int layer, const float* qkv, const Following& following) {
  StepBuffers& b = *step_;
  const size_t heads = size_t(heads_.count()), items = rows_.size() * heads;
  const size_t d = size_t(config_.head_dim), n = size_t(config_.heads_per_group());
  const size_t first = size_t(layer) * items;
  b.layer = size_t(layer);
  const Policy policy = at(rows_[0]).rules.policy;
  const int branch = layer % int(kLearning);
  device_.join(branch);  // what this layer overwrites is learned from there
  ops_.append({.items = b.append.data() + first,
               .passes = b.pass.data() + first,
               .qkv = qkv,
               .rows = int32_t(rows_.size()),
               .kv_heads = int32_t(heads),
               .heads = int32_t(n),
               .head_dim = int32_t(d),
               .dtype = options_.dtype,
               .any_failing = b.words.data() + kAnyFailing,
               .redone = following.redone,
               .halt = {agreement_.halted, uint32_t(layer)}});
  const auto follow = [&](bool again) {
    if (following.enqueue) following.enqueue(again);
  };
  if (by_library()) {
    decode_by_library(layer, qkv);
    return follow(false);
  }
  if (audit_ != nullptr) begin_audit(layer, qkv);
  cuda::PassArgs pass = pass_args(layer);
  const cuda::PassShape shape = pass_shape(b.most_splits[0]);
  // Of a policy that climbs: what is made must be used.
  cuda::Device::Condition failing;
  const bool ranks = ranking() > 0, explores = exploration() > 0;
  const bool later = ranks || explores;  // heads fail behind the pass, too
  if (policy == Policy::Budget && !later) failing = device_.condition(b.words.data() + kAnyFailing);
  pass.after_append = audit_ == nullptr;  // an audit copies in between
  pass.sets_condition = failing.setter.armed;
  pass.condition = failing.setter.handle;
  attend(pass, shape);
  pass.after_append = pass.sets_condition = false;
  if (climbs(policy)) {
    cuda::LadderArgs ladder = ladder_args(layer, shape);
    ladder.undecided = ranks ? b.undecided.data() : nullptr;
    ladder.undecided_of_item = b.undecided.count() / items;
    // Where the device decides, what follows need not wait until it has.
    const bool ahead = failing.setter.armed && following.enqueue && following.redone != nullptr;
    const auto learn = [&] { device_.beside(branch, [this, ladder] { ops_.learn(ladder); }); };
    if (ahead) {
      device_.beside(kLadderBranch, [&] {
        device_.when_met(failing, [&] {
          climb(pass, shape, ladder);
          follow(true);
          device_.fill(following.redone, 1, sizeof *following.redone);
        });
      });
      learn();
      follow(false);
      device_.join(kLadderBranch);
    } else if (policy == Policy::Paper) {
      paper(pass, shape, ladder);
      follow(false);
    } else {
      if (explores) explore(pass, shape, &ladder);
      cuda::PaperArgs all = paper_args(ladder);
      all.all_items = true;
      if (ranks) ops_.rank(ladder, all);
      // An audit reads the tables that learning changes.
      if (audit_ == nullptr) learn();
      const auto climbing = [&] { climb(pass, shape, ladder); };
      if (later)
        device_.when(b.words.data() + kAnyFailing, climbing);
      else
        device_.when_met(failing, climbing);
      if (audit_ != nullptr) ops_.learn(ladder);
      follow(false);
    }
    if (at(rows_[0]).rules.prefetches()) {
      ladder.list = b.prefetch_list.data();
      ladder.listed = b.prefetch_listed.data();
      const auto prefetch = [this, ladder, share = at(rows_[0]).rules.ladder.prefetch] {
        ops_.prefetch(ladder, share);
      };
      if (audit_ == nullptr)
        device_.beside(branch, prefetch);
      else
        prefetch();
    }
  } else {
    follow(false);
  }
  if (layer + 1 == int(config_.layers))
    for (int other = 0; other < int(kLearning); ++other) device_.join(other);
  if (audit_ != nullptr) read_audit(true);
  group_.alive();
}

cuda::PassArgs DeviceCache::pass_args(int layer) const {
  cuda::PassArgs pass;
  pass.items = step_->pass.data() + size_t(layer) * rows_.size() * size_t(heads_.count());
  pass.dtype = options_.dtype;
  return pass;
}

cuda::PassShape DeviceCache::pass_shape(int splits) const {
  return {.head_dim = int(config_.head_dim),
          .heads = int(config_.heads_per_group()),
          .items = int(rows_.size()) * int(heads_.count()),
          .splits = splits,
          .certificate = true};
}

cuda::LadderArgs DeviceCache::ladder_args(int layer, const cuda::PassShape& shape) const {
  StepBuffers& b = *step_;
  const LadderOptions& rules = at(rows_[0]).rules.ladder;
  const size_t first = size_t(layer) * size_t(shape.items);
  cuda::LadderArgs ladder;
  ladder.passes = b.pass.data() + first;
  ladder.items = b.ladder.data() + first;
  ladder.count = int32_t(shape.items);
  ladder.kv_heads = int32_t(heads_.count());
  ladder.head_dim = int32_t(config_.head_dim);
  ladder.groups = shape.groups();
  ladder.dtype = options_.dtype;
  ladder.shape = slot_shape();
  ladder.value_share = rules.value_share;
  ladder.max_share = rules.max_share;
  ladder.list = b.list.data();
  ladder.listed = b.listed.data();
  ladder.dense = b.dense.data();
  ladder.dense_count = b.words.data() + kDenseCount;
  ladder.dense_listed = b.words.data() + kWords;
  ladder.halt = {agreement_.halted, uint32_t(layer)};
  ladder.fallback = agreement_.fallback;
  return ladder;
}

// A launch for each kind of page that the layer's items have; the last one's merge takes all.
void DeviceCache::attend(cuda::PassArgs pass, cuda::PassShape shape) {
  const std::vector<cuda::PageKind>& kinds = step_->kinds[step_->layer];
  const bool merge = shape.merge;
  pass.of_kind = kinds.size() > 1;
  for (const cuda::PageKind kind : kinds) {
    shape.kind = kind;
    shape.warps = cuda::pass_warps(device_.shape(), shape.head_dim, shape.groups(), kind);
    shape.merge = merge && kind == kinds.back();
    ops_.attend(pass, shape);
    pass.after_append = false;
  }
}

void DeviceCache::climb(const cuda::PassArgs& first_pass, const cuda::PassShape& first_shape,
                        const cuda::LadderArgs& ladder) {
  StepBuffers& b = *step_;
  cuda::PassArgs pass = first_pass;
  cuda::PassShape shape = first_shape;
  pass.repeated = true;
  shape.splits = b.most_splits[1];
  const int rounds = int(at(rows_[0]).rules.ladder.max_rounds);
  for (int round = 0; round < rounds; ++round)
    device_.when(b.words.data() + kAnyFailing, [&] {
      ops_.climb(ladder);
      ops_.page_in(ladder);
      device_.fill(b.words.data() + kAnyFailing, 0, sizeof(uint32_t));
      attend(pass, shape);
      if (ranking() > 0) ops_.rank(ladder, paper_args(ladder));
    });
  rung3(first_pass, shape, ladder);
  cuda::LadderArgs of_climbed = ladder;
  of_climbed.climbed = true;
  ops_.learn(of_climbed);
}

uint64_t DeviceCache::StepBuffers::name_of(const Shape& shape) {
  std::erase_if(named, [&](const auto& s) { return s.second.grown != shape.grown; });
  const auto known =
      std::find_if(named.begin(), named.end(), [&](const auto& s) { return s.second == shape; });
  if (known != named.end()) return known->first;
  if (named.size() == kNamed) named.erase(named.begin());
  named[++names] = shape;
  return names;
}

void DeviceCache::end_rows() {
  reports_enqueued_ = true;
  for (int64_t handle : rows_) {
    Sequence& s = at(handle);
    device_.copy(s.marks_host.data(), s.marks.data(), s.marks.bytes());
    device_.copy(s.counts_host.data(), s.counts.data(), s.counts.bytes());
    device_.copy(s.judged_host.data(), s.judged.data(), s.judged.bytes());
    device_.copy(s.candidate_host.data(), s.candidate.data(), s.candidate.bytes());
  }
  enqueue_due();
  enqueue_sealing();
}

void DeviceCache::end_step() {
  if (!reports_enqueued_) end_rows();
  device_.synchronize(Deadline::after(kDeviceDeadline));
  for (int64_t handle : rows_) {
    Sequence& s = at(handle);
    ++s.tokens;
    read_reports(&s);
  }
  judge_due();
  if (audit_ != nullptr) write_audit();
  for (int64_t handle : step_->filling) {
    Sequence& s = at(handle);
    if (s.failed()) continue;
    try {
      seal_open(&s);
    } catch (const Error& e) {  // ends its request; losing the store or the device ends the job
      if (e.kind() == ErrorKind::StoreLost || e.kind() == ErrorKind::DeviceError) throw;
      s.report.error = e.kind();
      s.report.error_text = e.what();
    }
  }
}

}  // namespace certkv
