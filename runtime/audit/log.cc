#include "runtime/audit/log.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kernels/cuda/chains.h"
#include "runtime/certify/learn.h"
#include "runtime/output_file.h"
#include "runtime/record_json.h"

namespace certkv {

using audit::LinkKind;
using nlohmann::json;

// ---- the chain ----------------------------------------------------------------------------------

namespace {

std::string fresh(const std::string& path) {
  std::error_code error;
  CERTKV_EXPECT(!std::filesystem::exists(path, error), InvalidArgument,
                "{}: the audit file exists already; choose another folder with --audit.folder",
                path);
  return path;
}

}  // namespace

AuditFile::AuditFile(const std::string& path)
    : file_(std::make_unique<AppendFile>(fresh(path), 0)) {
  file_->append(audit::kMagic);
}

AuditFile::~AuditFile() = default;

void AuditFile::add(LinkKind kind, std::string_view payload) {
  const audit::LinkHead head{uint32_t(kind), 0, payload.size()};
  buffer_.clear();
  audit::put(buffer_, head);
  buffer_.append(payload);
  const std::string_view link = buffer_;
  const audit::Digest digest =
      chain_.add(link.substr(0, audit::kHeadBytes), link.substr(audit::kHeadBytes));
  audit::put(buffer_, digest);
  file_->append(buffer_);
  ++links_;
}

void AuditFile::add(LinkKind kind, const json& payload) {
  add(kind, std::string_view(json_line(payload)));
}

void AuditFile::sync() {
  file_->sync();
}
uint64_t AuditFile::bytes() const {
  return file_->bytes();
}
const std::string& AuditFile::path() const {
  return file_->path();
}

// ---- the log ------------------------------------------------------------------------------------

struct AuditLog::Stream {
  struct Rows {  // of one layer and KV head, not yet written
    bool wanted = false;
    uint64_t written = 0;  // index of the next row
    std::vector<uint16_t> k, v;
  };
  int64_t request = 0;
  bool is_prompt = false;
  std::vector<Rows> heads;  // [layers, local KV heads]
  uint64_t records = 0, head_steps = 0;
  std::array<uint64_t, 4> outcomes{};
  std::array<uint64_t, kRungs> rungs{};
};

struct AuditLog::Pending {
  uint32_t stream = 0;
  int head = 0;
  uint64_t tokens = 0;
  bool kept = false, discarded = false;
  AuditCapture capture;
  std::vector<float> q, out;
  std::vector<HeadReport> heads;
};

namespace {

json planes_json(const TensorPlanes& p) {
  return {{"code_bits", p.code_bits},
          {"residual_bits", p.residual_bits},
          {"read_residual", p.read_residual},
          {"metadata", dtype_name(p.metadata)}};
}

json header_json(const AuditSetup& s, const AuditShape& shape) {
  const PageFormat& f = *shape.format;
  return {{"format", audit::kFormat},
          {"session", s.session},
          {"rank", s.rank},
          {"world", s.world},
          {"replica", s.replica},
          {"tensor_rank", s.tensor_rank},
          {"tensor", s.tensor},
          {"sample", s.sample},
          {"seed", s.seed},
          {"model",
           {{"files", s.model_files},
            {"layers", shape.layers},
            {"query_heads", shape.query_heads},
            {"kv_heads", shape.kv_heads},
            {"head_dim", f.head_dim}}},
          {"kv_heads", {{"first", shape.heads.begin}, {"count", shape.heads.count()}}},
          {"originals", dtype_name(shape.dtype)},
          {"block_tokens", f.block_tokens},
          {"group_tokens", f.group_tokens},
          {"value_group", f.value_group},
          {"layout",
           {{"name", std::string(f.layout.name)},
            {"key", planes_json(f.layout.key)},
            {"value", planes_json(f.layout.value)}}},
          // What the backend states about its own rounding (method 3 and 4b).
          {"backend", shape.device ? "device" : "cpu"},
          {"rounding",
           {{"eps_w", shape.device ? cuda::kEpsWDevice : kEpsW},
            {"chain_codes", chain_codes(f.head_dim)},
            {"chain_originals",
             shape.device ? cuda::chain_originals_device(f.head_dim) : chain_originals(f.head_dim)},
            {"chain_output", kChainOutput},
            {"query_levels", double(kQueryLevels)},
            {"exp_absolute", double(kExpAbsolute)}}}};
}

}  // namespace

AuditLog::AuditLog(AuditSetup setup, const AuditShape& shape)
    : setup_(std::move(setup)),
      shape_(shape),
      file_(setup_.folder + "/" + audit::file_name(setup_.session, setup_.rank)) {
  file_.add(LinkKind::Header, header_json(setup_, shape_));
}

AuditLog::~AuditLog() = default;

bool AuditLog::chosen(int64_t request, int layer, int64_t kv_head, uint64_t tokens) const {
  const uint64_t seed = setup_.seed + uint64_t(request) * 0x9e3779b97f4a7c15u;
  const StepWhere where{.layer = layer, .kv_head = int(kv_head), .step = tokens};
  return counter_uniform(seed, where, 0x61756474u) < setup_.sample;
}

bool AuditLog::any_chosen(int64_t request, int layer, int64_t kv_head, uint64_t first,
                          uint64_t last) const {
  for (uint64_t t = first; t <= last; ++t)
    if (chosen(request, layer, kv_head, t)) return true;
  return false;
}

uint32_t AuditLog::open_prompt(int64_t request, int64_t prompt_tokens, int64_t max_tokens) {
  const uint32_t id = next_++;
  auto s = std::make_unique<Stream>();
  s->request = request;
  s->is_prompt = true;
  for (int64_t layer = 0; layer < shape_.layers; ++layer)
    for (int64_t h = shape_.heads.begin; h < shape_.heads.end; ++h)
      s->heads.push_back({.wanted = any_chosen(request, int(layer), h, uint64_t(prompt_tokens) + 1,
                                               uint64_t(prompt_tokens + max_tokens)),
                          .k = {},
                          .v = {}});
  streams_[id] = std::move(s);
  file_.add(LinkKind::Prompt, json{{"stream", id},
                                   {"request", request},
                                   {"prompt_tokens", prompt_tokens},
                                   {"max_tokens", max_tokens}});
  return id;
}

uint32_t AuditLog::open_sequence(uint32_t prompt, int64_t prompt_tokens, int64_t max_tokens,
                                 const StepRules& rules) {
  const Stream& from = *streams_.at(prompt);
  const uint32_t id = next_++;
  auto s = std::make_unique<Stream>();
  s->request = from.request;
  for (const Stream::Rows& r : from.heads)
    s->heads.push_back({.wanted = r.wanted, .written = uint64_t(prompt_tokens), .k = {}, .v = {}});
  const int64_t request = s->request;
  streams_[id] = std::move(s);
  file_.add(LinkKind::Sequence, json{{"stream", id},
                                     {"prompt", prompt},
                                     {"request", request},
                                     {"policy", policy_name(rules.policy)},
                                     {"tolerance", tolerance_json(rules.tolerance)},
                                     {"prompt_tokens", prompt_tokens},
                                     {"max_tokens", max_tokens}});
  return id;
}

void AuditLog::close(uint32_t stream, uint64_t tokens, bool failed) {
  const auto at = streams_.find(stream);
  if (at == streams_.end()) return;
  const Stream& s = *at->second;
  if (!s.is_prompt) {
    write_pending();
    json outcomes = json::object(), rungs = json::object();
    for (size_t i = 0; i < s.outcomes.size(); ++i)
      outcomes[outcome_name(Outcome(i))] = s.outcomes[i];
    for (size_t i = 0; i < s.rungs.size(); ++i) rungs[std::to_string(i)] = s.rungs[i];
    file_.add(LinkKind::Close, json{{"stream", stream},
                                    {"tokens", tokens},
                                    {"failed", failed},
                                    {"records", s.records},
                                    {"head_steps", s.head_steps},
                                    {"outcomes", outcomes},
                                    {"rungs", rungs}});
    file_.sync();
  }
  streams_.erase(at);
}

void AuditLog::rows(uint32_t stream, int layer, int head, size_t rows, const uint16_t* k,
                    const uint16_t* v) {
  Stream& s = *streams_.at(stream);
  Stream::Rows& r = s.heads[size_t(layer) * size_t(shape_.heads.count()) + size_t(head)];
  if (!r.wanted) return;
  const size_t d = size_t(shape_.format->head_dim);
  r.k.insert(r.k.end(), k, k + rows * d);
  r.v.insert(r.v.end(), v, v + rows * d);
  if (s.is_prompt) write_rows(stream, s, layer, head);
}

// In chunks, so that whoever reads them needs little memory.
void AuditLog::write_rows(uint32_t stream, Stream& s, int layer, int head) {
  Stream::Rows& r = s.heads[size_t(layer) * size_t(shape_.heads.count()) + size_t(head)];
  const size_t d = size_t(shape_.format->head_dim), n = r.k.size() / d;
  std::string payload;
  for (size_t first = 0; first < n; first += audit::kMaxChunkRows) {
    const size_t count = std::min(audit::kMaxChunkRows, n - first);
    payload.clear();
    audit::put(payload,
               audit::RowsHead{stream, uint32_t(layer), uint32_t(shape_.heads.begin + head),
                               uint32_t(count), r.written + first});
    audit::put_all<uint16_t>(payload, {r.k.data() + first * d, count * d});
    audit::put_all<uint16_t>(payload, {r.v.data() + first * d, count * d});
    file_.add(LinkKind::Rows, std::string_view(payload));
  }
  r.written += n;
  r.k.clear();
  r.v.clear();
}

// ---- steps --------------------------------------------------------------------------------------

void AuditLog::start_layer(uint64_t step, int layer, std::span<const Row> rows) {
  write_pending();
  step_ = step;
  layer_ = layer;
  const size_t d = size_t(shape_.format->head_dim);
  for (const Row& row : rows) {
    const int64_t request = streams_.at(row.stream)->request;
    for (int h = 0; h < int(shape_.heads.count()); ++h) {
      this->rows(row.stream, layer, h, 1, row.k + size_t(h) * d, row.v + size_t(h) * d);
      if (!chosen(request, layer, shape_.heads.begin + h, row.tokens)) continue;
      Pending p;
      p.stream = row.stream;
      p.head = h;
      p.tokens = row.tokens;
      pending_.push_back(std::move(p));
    }
  }
}

AuditLog::Pending* AuditLog::find(uint32_t stream, int head) {
  for (Pending& p : pending_)
    if (p.stream == stream && p.head == head) return &p;
  return nullptr;
}

AuditCapture* AuditLog::capture(uint32_t stream, int head) {
  Pending* p = find(stream, head);
  return p == nullptr ? nullptr : &p->capture;
}

void AuditLog::keep(uint32_t stream, int head, const float* q, const float* out,
                    const GroupReport& report) {
  Pending* p = find(stream, head);
  if (p == nullptr) return;
  const size_t n = report.heads.size() * size_t(shape_.format->head_dim);
  p->q.assign(q, q + n);
  p->out.assign(out, out + n);
  p->heads = report.heads;
  p->kept = true;
}

void AuditLog::discard(uint32_t stream) {
  for (Pending& p : pending_)
    if (p.stream == stream) p.discarded = true;
}

void AuditLog::write_pending() {
  for (const Pending& p : pending_)
    if (p.kept && !p.discarded) write_record(p);
  pending_.clear();
}

void AuditLog::end_step() {
  write_pending();
}

void AuditLog::write_record(const Pending& p) {
  Stream& s = *streams_.at(p.stream);
  write_rows(p.stream, s, layer_, p.head);
  const size_t d = size_t(shape_.format->head_dim), heads = p.heads.size();
  const size_t block = size_t(shape_.format->block_tokens), blocks = (p.tokens + block - 1) / block;
  audit::Record r;
  const auto kv_head = uint32_t(shape_.heads.begin + p.head);
  r.head = {p.stream,        uint32_t(layer_), kv_head,  uint32_t(kv_head * heads),
            uint32_t(heads), uint32_t(blocks), p.tokens, step_};
  r.nu = p.capture.nu;
  r.nu.resize(blocks, 0.0f);
  for (size_t h = 0; h < heads; ++h) {
    const HeadReport& report = p.heads[h];
    audit::HeadRecord& out = r.heads.emplace_back();
    out.head.outcome = uint8_t(report.outcome);
    out.head.rung = uint8_t(report.rung);
    out.head.promoted_keys = uint64_t(report.promoted_keys);
    out.head.promoted_values = uint64_t(report.promoted_values);
    const Certificate& c = report.returned;
    out.figures = {c.bound,
                   c.e_key,
                   c.e_val,
                   c.e_fp,
                   c.e_key_paper,
                   c.s,
                   c.s_lo,
                   c.relative,
                   c.den,
                   c.e_acc,
                   c.key_sqrt,
                   c.key_sum,
                   c.r_term,
                   c.h_term,
                   c.s_term,
                   c.out_norm,
                   report.candidate.bound,
                   report.candidate.relative};
    out.q.assign(p.q.begin() + long(h * d), p.q.begin() + long((h + 1) * d));
    out.out.assign(p.out.begin() + long(h * d), p.out.begin() + long((h + 1) * d));
    if (report.outcome != Outcome::Failed && h < p.capture.heads.size()) {
      const AuditCapture::Head& from = p.capture.heads[h];
      out.head.corrections = from.corrections;
      out.mass = from.mass;
      out.delta = from.delta;
      out.eta = from.eta;
      out.used = from.used;
    }
    out.mass.resize(blocks, 0.0);
    out.delta.resize(blocks, 0.0f);
    out.eta.resize(blocks, 0.0f);
    out.used.resize(blocks, 0);
    ++s.head_steps;
    ++s.outcomes[size_t(report.outcome)];
    ++s.rungs[size_t(report.rung)];
  }
  file_.add(LinkKind::Record, std::string_view(audit::encode(r)));
  ++s.records;
  ++records_;
}

void AuditLog::end() {
  write_pending();
  json open = json::array();
  for (const auto& [id, s] : streams_)
    if (!s->is_prompt) open.push_back(id);
  file_.add(LinkKind::End, json{{"links", file_.links()}, {"records", records_}, {"open", open}});
  file_.sync();
  log_info("audit: {} records, {} bytes, digest {}: {}", records_, file_.bytes(),
           audit::hex(file_.digest()), file_.path());
}

}  // namespace certkv
